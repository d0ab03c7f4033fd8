r"""Perturbation of the least important feature dimensions.

One launch: features, gradient and noise [B, D] by strides, low_variance and std [D] -> out and mask [B, D].

.. math:: r'_{bd} = r_{bd} + \lambda M_{bd} \Delta_{bd}

A program loops over rows and keeps each in registers from its only load to its only store; low_variance and std are
loaded once before. The k-th smallest score, and the largest energy at which dimensions may change, are found bit by bit
from the highest bit on, by 31 counts or sums of integers, whose value does not depend on the order. Minimum traffic:
B D elements of each input and of the two outputs; the counts need only registers.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fgfast.kernels.common import AotCase, Constant, on_device_of, output_dtype, power_of_2
from fgfast.kernels.configs import processors
from fgfast.kernels.launches import launch

PROGRAMS = 8  # at most, per multiprocessor
NO_GRADIENT, ABSOLUTE, POSITIVE, GIVEN = (Constant(i) for i in range(4))
NOISE, DRAWN, SWAP, ZERO = (Constant(i) for i in range(4))
KINDS = {"absolute": ABSOLUTE, "positive": POSITIVE, "given": GIVEN}
CHANGES = {"noise": NOISE, "swap": SWAP, "zero": ZERO}


@triton.jit
def _select_smallest(bits, count):
    """Mask of the ``count`` lanes with the smallest ``bits`` (int32, not negative), ties to the first lanes."""
    limit = 0
    for i in range(31):  # the largest limit under which at most ``count`` lanes lie
        higher = limit | (1 << (30 - i))
        limit = tl.where(tl.sum((bits < higher).to(tl.int32), 0) <= count, higher, limit)
    below, equal = bits < limit, (bits == limit).to(tl.int32)
    room = count - tl.sum(below.to(tl.int32), 0)
    return below | ((equal > 0) & (tl.cumsum(equal, 0) <= room))


@triton.jit
def _total_cost(cost, chosen):
    return tl.sum(tl.where(chosen, cost, 0).to(tl.int64), 0)


@triton.jit
def _select_cheapest(cost, chosen, allowed):
    """Mask of the chosen lanes of lowest cost (int32, >= 0) that sum to at most ``allowed``, ties to the first."""
    limit = 0
    for i in range(31):
        higher = limit | (1 << (30 - i))
        limit = tl.where(_total_cost(cost, chosen & (cost < higher)) <= allowed, higher, limit)
    below, equal = chosen & (cost < limit), (chosen & (cost == limit)).to(tl.int32)
    room = (allowed - _total_cost(cost, below)) // limit  # limit is at least 1, as no cost is negative
    return below | ((equal > 0) & (tl.cumsum(equal, 0).to(tl.int64) <= room))


@triton.jit
def _cosine(turn):
    """cos(2 pi turn) for turn in [0, 1), to 2^-23; tl.cos uses a stack, for large angles, which do not occur here."""
    z = (tl.abs(turn - 0.5) - 0.25) * 6.283185307179586  # sin z, |z| <= pi / 2
    q = z * z
    p = -2.5052108e-08 * q + 2.7557319e-06
    p = (p * q - 1.9841270e-04) * q + 8.3333333e-03
    return z + z * q * (p * q - 1.6666667e-01)


@triton.jit
def _normal(seed, row, d):
    """The numbers of fgfast.reference.draws.normal: four words per four neighbours, two numbers per two words."""
    zero = d * 0
    a, b, c, e = tl.philox(seed, d // 4, zero, zero + row.to(tl.int32), zero + (row >> 32).to(tl.int32))
    first = d % 4 < 2
    u = ((tl.where(first, a, c) >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
    v = ((tl.where(first, b, e) >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    turn = tl.where(d % 2 == 0, v, tl.where(v < 0.25, v + 0.75, v - 0.25))  # sine for odd d
    return tl.sqrt(-2.0 * tl.log(u)) * _cosine(turn)


@triton.jit(do_not_specialize=["seed"])
def perturb_kernel(
    features, gradient, low_variance, std, noise, out, mask, B, D, count, budget, strength, seed,
    f_b, f_d, g_b, g_d, n_b, n_d,
    KIND: tl.constexpr, LOW: tl.constexpr, UNION: tl.constexpr, CHANGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows program_id, program_id + num_programs, ... of out and mask; ``budget`` is in units of 2^-16."""
    d = tl.arange(0, BLOCK)
    inside = d < D
    if LOW:
        low = tl.load(low_variance + d, mask=inside, other=0) > 0
    if CHANGE <= DRAWN:  # noise, given or drawn
        sigma = tl.load(std + d, mask=inside, other=0.0).to(tl.float32)
    row = tl.program_id(0).to(tl.int64)
    while row < B:
        r = tl.load(features + row * f_b + d.to(tl.int64) * f_d, mask=inside, other=0.0).to(tl.float32)
        chosen = inside
        if KIND != NO_GRADIENT:
            w = tl.load(gradient + row * g_b + d.to(tl.int64) * g_d, mask=inside, other=0.0).to(tl.float32)
            score = w if KIND == GIVEN else w * r
            score = tl.abs(tl.where(score > 0, score, 0.0) if KIND == POSITIVE else score)
            bits = tl.where(score < float("inf"), score, float("inf")).to(tl.int32, bitcast=True)  # NaN: infinity
            chosen = _select_smallest(tl.where(inside, bits, 0x7FFFFFFF), count)
            if LOW:
                chosen = (chosen | low) if UNION else (chosen & low)
        else:
            chosen = low

        size = tl.abs(r)
        finite = tl.max(tl.where(size < float("inf"), 0, 1), 0) == 0
        exponent = 268 - (tl.max(size, 0).to(tl.int32, bitcast=True) >> 23)
        scale = (tl.minimum(exponent, 254) << 23).to(tl.float32, bitcast=True)  # scales the largest below 2^15
        scaled = tl.where(finite, r * tl.where(finite, scale, 0.0), 0.0)
        cost = (scaled * scaled).to(tl.int32)
        allowed = (tl.sum(cost.to(tl.int64), 0) * budget) >> 16
        chosen = chosen & inside & (cost < tl.where(finite, 0x7FFFFFFF, 0))
        if _total_cost(cost, chosen) > allowed:
            chosen = _select_cheapest(cost, chosen, allowed)

        if CHANGE <= DRAWN:  # noise, given or drawn
            if CHANGE == DRAWN:
                epsilon = _normal(seed, row, d)
            else:
                at = noise + row * n_b + d.to(tl.int64) * n_d
                epsilon = tl.load(at, mask=chosen, other=0.0).to(tl.float32)
            norm = tl.sqrt(tl.sum(scaled * scaled, 0)) / scale  # r * r may overflow
            change = norm * sigma * epsilon
        elif CHANGE == SWAP:
            other = tl.where(row + 1 < B, row + 1, 0)
            at = features + other * f_b + d.to(tl.int64) * f_d
            change = tl.load(at, mask=chosen, other=0.0).to(tl.float32) - r
        else:
            change = -r
        tl.store(out + row * D + d, tl.where(chosen, r + strength * change, r), mask=inside)
        tl.store(mask + row * D + d, chosen.to(tl.uint8), mask=inside)
        row += tl.num_programs(0)


def _launch(channels: int) -> dict[str, int]:
    """Lanes and warps of a program, with at most 8 lanes per thread."""
    block = max(32, power_of_2(channels))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def perturb(
    features: Tensor, gradient: Tensor | None, low_variance: Tensor | None, std: Tensor | None, noise: Tensor | None,
    count: int, importance: str, combine: str, strategy: str, strength: float, budget: int, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Features [B, D] with the chosen dimensions changed, and their mask bool [B, D]; ``budget`` is in 2^-16."""
    batch, channels = features.shape
    out = features.new_empty(features.shape, dtype=output_dtype(features.dtype))
    mask = features.new_empty(features.shape, dtype=torch.uint8)
    if batch:
        change = DRAWN if strategy == "noise" and noise is None else CHANGES[strategy]
        g, n = (features if x is None else x for x in (gradient, noise))
        low = mask if low_variance is None else low_variance.contiguous().view(torch.uint8)
        with on_device_of(features):
            launch(
                perturb_kernel, (min(batch, PROGRAMS * processors(features.device)),),
                features, g, low, features if std is None else std.contiguous(), n, out, mask,
                batch, channels, count, budget, strength, seed, *features.stride(), *g.stride(), *n.stride(),
                KIND=NO_GRADIENT if gradient is None else KINDS[importance], LOW=low_variance is not None,
                UNION=combine == "union", CHANGE=change, **_launch(channels),
            )  # fmt: skip
    return out.to(features.dtype), mask.view(torch.bool)


def aot_cases() -> Iterator[AotCase]:
    """Each change at 2,048 channels with both criteria, and the largest row."""
    pointers = {"low_variance": "*u8:16", "mask": "*u8:16", "std": "*fp32:16", "noise": "*fp32:16"}
    rows = [(2048, "bf16", change) for change in (NOISE, DRAWN, SWAP, ZERO)]
    for channels, kind, change in [*rows, (2048, "fp32", DRAWN), (4096, "bf16", DRAWN), (4096, "fp32", DRAWN)]:
        launch = _launch(channels)
        flags = {"KIND": ABSOLUTE, "LOW": True, "UNION": True, "CHANGE": change, "BLOCK": launch["BLOCK"]}
        constexprs = flags | {"f_d": 1, "g_d": 1, "n_d": 1}
        types = pointers | dict.fromkeys(("features", "gradient", "out"), f"*{kind}:16")
        types |= {"strength": "fp32", "seed": "i64"}
        names = perturb_kernel.arg_names
        signature = {n: "constexpr" if n in constexprs else types.get(n, "i32") for n in names}
        rare = channels == 2048 and change not in (DRAWN, SWAP)
        name = f"perturb {channels} {kind} {('noise', 'drawn', 'swap', 'zero')[change.value]}"
        yield AotCase(name, perturb_kernel, signature, constexprs, launch["num_warps"], 1, rare=rare)
