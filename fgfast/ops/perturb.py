"""``perturb``: choose the dimensions of features that matter least, and change only those.

The mask is made from float32 values rounded once and from sums of integers, so it is the same bit for bit on every
device and backend, whatever the order of summation.
"""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fgfast.backend import check_triton, preference, resolve
from fgfast.ops.registration import operation
from fgfast.reference import perturb as reference
from fgfast.reference.draws import normal
from fgfast.tensors import accumulation, check_device, check_float, check_tensor, readable, seed_or_random, shape_error

IMPORTANCE = ("absolute", "positive", "given")
COMBINE = ("union", "intersection")
STRATEGIES = ("noise", "swap", "zero")
MAX_CHANNELS = 4096  # that a program of the kernel holds in registers
AT_ONCE = 2**16  # features whose energies a CPU sorts together: 512 KiB, which fits its caches
FRACTION_BITS = 16  # the budget is a whole number of 2^-16


class Perturbed(NamedTuple):
    """What `perturb` returns: features [B, D] in their dtype, mask bool [B, D], True = changed."""

    features: Tensor
    mask: Tensor


def smallest_mask(scores: Tensor, count: int) -> Tensor:
    """Mask bool [B, D] of the ``count`` smallest scores of each vector, ties to the lowest index, NaN last.

    Example:
        >>> smallest_mask(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), 2).tolist()
        [[False, True, False, True]]
    """
    if count == 0 or not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf)
    can_read = readable(scores)
    if can_read:  # NumPy selects and sorts with vector instructions, 10 to 20 times as fast as PyTorch
        limit = torch.from_numpy(np.partition(scores.numpy(), count - 1, axis=1)[:, count - 1 : count])
    else:
        limit = scores.kthvalue(count, dim=1, keepdim=True).values
    at_most = scores <= limit
    if can_read and bool((at_most.sum(1) == count).all()):
        return at_most
    below = scores < limit
    equal = at_most ^ below
    return below | (equal & (equal.cumsum(1) <= count - below.sum(1, keepdim=True)))


def limit_energy(rows: Tensor, mask: Tensor, budget: int) -> Tensor:
    """Shrink the mask until it holds at most budget / 2^16 of the energy of each vector; vectors are float32 [B, D]."""
    top = rows.abs().amax(1, keepdim=True)
    finite = top < torch.inf  # False for NaN
    exponent = (268 - (top.view(torch.int32) >> 23)).clamp(max=254)  # of the power of two that brings top under 2^15
    scale = torch.where(finite, exponent << 23, 0).view(torch.float32)
    cost = (torch.where(finite, rows, 0) * scale).square().long()
    mask = mask & finite
    allowed = cost.sum(1, keepdim=True) * budget >> FRACTION_BITS
    can_read = readable(mask)
    if can_read and not bool(((cost * mask).sum(1, keepdim=True) > allowed).any()):
        return mask
    bits = (rows.shape[1] - 1).bit_length()
    place = torch.arange(rows.shape[1], device=rows.device)
    keys = torch.where(mask, cost, 1 << reference.UNITS) << bits | place  # all distinct, so any sort is stable
    ordered = torch.from_numpy(np.sort(keys.numpy(), axis=1)) if can_read else keys.sort(dim=1).values
    kept = ((ordered >> bits).cumsum(1) <= allowed).sum(1, keepdim=True)
    limit = ordered.gather(1, (kept - 1).clamp_min(0))
    return mask & (keys <= limit) & (kept > 0)


def _perturb_torch(
    features: Tensor,
    gradient: Tensor | None,
    low_variance: Tensor | None,
    std: Tensor | None,
    noise: Tensor | None,
    count: int,
    importance: str,
    combine: str,
    strategy: str,
    strength: float,
    budget: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    wide = features.to(accumulation(features.dtype))
    masks = [] if low_variance is None else [low_variance.expand(features.shape)]
    if gradient is not None:
        weight = gradient.to(wide.dtype)
        scores = weight if importance == "given" else weight * wide
        masks.append(smallest_mask(scores.clamp_min(0) if importance == "positive" else scores.abs(), count))
    mask = masks[0] if len(masks) == 1 else masks[0] | masks[1] if combine == "union" else masks[0] & masks[1]
    if not wide.numel():
        return features.clone(), mask.clone()
    few = AT_ONCE // features.shape[1] + 1 if mask.device.type == "cpu" else len(mask)
    parts = zip(wide.float().split(few), mask.split(few), strict=True)
    mask = torch.cat([limit_energy(rows, chosen, budget) for rows, chosen in parts])
    if strategy == "noise":
        assert std is not None  # checked
        drawn = normal(seed, len(features), features.shape[1], features.device) if noise is None else noise
        most = wide.abs().amax(1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)  # squares may overflow
        norm = (wide / most).norm(dim=1, keepdim=True) * most
        change = norm * std.to(wide.dtype) * drawn.to(wide.dtype)
    else:
        change = (wide.roll(-1, 0) if strategy == "swap" else 0) - wide
    return torch.where(mask, wide + strength * change, wide).to(features.dtype), mask


@operation("perturb")
def _perturb(
    features: Tensor,
    gradient: Tensor | None,
    low_variance: Tensor | None,
    std: Tensor | None,
    noise: Tensor | None,
    count: int,
    importance: str,
    combine: str,
    strategy: str,
    strength: float,
    budget: int,
    seed: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        from fgfast.kernels.perturb import perturb as run
    else:
        run = reference.perturb if backend == "reference" else _perturb_torch
    with torch.autocast(features.device.type, enabled=False):
        out, mask = run(
            features, gradient, low_variance, std, noise, count, importance, combine, strategy, strength, budget, seed
        )
    return out.contiguous(), mask.contiguous()


@_perturb.register_fake
def _(features: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return features.new_empty(features.shape), features.new_empty(features.shape, dtype=torch.bool)


_perturb.loop_in_vmap()


def _check(
    features: Tensor, gradient: Tensor | None, low_variance: Tensor | None, std: Tensor | None, noise: Tensor | None
) -> None:
    """Types, shapes and devices."""
    check_float("features", features)
    if features.dim() != 2 or features.shape[1] < 1:
        raise shape_error("features", "[B, D]", features)
    rows, row = tuple(features.shape), tuple(features.shape[1:])
    for name, x, shape in (
        ("gradient", gradient, rows), ("low_variance", low_variance, row), ("std", std, row), ("noise", noise, rows),
    ):  # fmt: skip
        if x is None:
            continue
        if name == "low_variance":
            check_tensor(name, x)
            if x.dtype != torch.bool:
                raise TypeError(f"low_variance has dtype {x.dtype}: give bool, True = low.")
        else:
            check_float(name, x)
        if tuple(x.shape) != shape:
            raise shape_error(name, str(list(shape)), x)
        check_device(name, x, features.device)


def perturb(
    features: Tensor,
    gradient: Tensor | None = None,
    *,
    low_variance: Tensor | None = None,
    std: Tensor | None = None,
    fraction: float = 0.3,
    importance: str = "absolute",
    combine: str = "union",
    strategy: str = "noise",
    strength: float = 1.0,
    budget: float = 0.5,
    noise: Tensor | None = None,
    seed: int | None = None,
    backend: str | None = None,
    lowest: float | None = None,
) -> Perturbed:
    r"""Change the dimensions of each feature vector that two criteria call unimportant, in one pass over them.

    .. math:: r'_{bd} = r_{bd} + \lambda M_{bd} \Delta_{bd}, \qquad
              \Delta_{bd} = \|r_b\| \sigma_d \epsilon_{bd} \;\text{(noise)}, \quad
              r_{b+1,d} - r_{bd} \;\text{(swap)}, \quad -r_{bd} \;\text{(zero)}

    The mask M joins the dimensions of low variance, the same for all vectors, with the floor(fraction x D) dimensions
    of each vector whose importance :math:`|w_{bd} r_{bd}|` is smallest, ties to the lowest index. Where these hold more
    than the fraction ``budget`` of the vector's energy :math:`\sum_d r_{bd}^2`, those with the most energy are left
    unchanged until the rest do not (the largest energy has 28 to 30 bits). Dimensions outside the mask keep their bits.
    A vector with a value that is not finite in float32 is not changed at all.

    Args:
        features: r, [B, D] float32, float16, bfloat16 or float64, any strides; floats below may be of another dtype.
        gradient: w, float [B, D], such as that of a loss (Grad-CAM); None leaves this criterion out.
        low_variance: bool [D], True where the data vary little; None leaves this criterion out.
        std: float [D], sigma, for vectors scaled to norm 1: needed by "noise".
        fraction: of the dimensions of a vector, how many the gradient's criterion takes, 0 to 1.
        importance: "absolute" is |w r|, "positive" is max(w r, 0), "given" is |w|.
        combine: "union" or "intersection" of two criteria.
        strategy: "noise", "swap" (with the next vector, the last one with the first) or "zero".
        strength: lambda; 0 changes nothing.
        budget: largest fraction of a vector's energy that may change, 0 to 1, rounded down to 2^-16.
        noise: epsilon, float [B, D]; None draws standard normal numbers from ``seed``, row and dimension (Philox
            4x32-10, Box and Muller), the same ones on every device.
        seed: 0 and up; None takes one from torch's generator.
        backend: "triton" (D up to 4,096), "torch" or "reference"; strict. None follows `use_backend`.
        lowest: the former name of ``fraction``, for one version.

    Returns:
        Perturbed(features [B, D] in the dtype of features, mask bool [B, D], True = changed). Masks are equal for all
        backends; changed values agree to a few roundings of float32. No gradient flows: every derivative is 0.

    Raises:
        ValueError: neither criterion, no std for "noise", shapes or devices that do not fit, an option out of range.
        TypeError: a dtype that is not of the kind asked for.

    Example:
        >>> import torch
        >>> from fgfast import perturb
        >>> r, w = torch.tensor([[3.0, 1.0, 1.0, 2.0]]), torch.tensor([[0.1, 1.0, 0.0, 1.0]])
        >>> perturb(r, w, fraction=0.5, strategy="zero").features.tolist()  # 3.0 would be more than half of the energy
        [[3.0, 1.0, 0.0, 2.0]]

    Source: after Wang, Liu, Weston, Tian, Li, "On Learning Discriminative Features from Synthesized Data for
    Self-Supervised Fine-Grained Visual Recognition", ECCV 2024. Their settings and code are not public: fractions,
    energy budget and changes are a re-creation.
    """
    _check(features, gradient, low_variance, std, noise)
    for name, value, known in (
        ("importance", importance, IMPORTANCE), ("combine", combine, COMBINE), ("strategy", strategy, STRATEGIES),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(known)}.")
    if lowest is not None:
        warnings.warn(
            "perturb(lowest=...) will be removed in the next minor version: use fraction.",
            DeprecationWarning,
            stacklevel=2,
        )
        fraction = lowest
    for name, part in (("fraction", fraction), ("budget", budget)):
        if not 0 <= part <= 1:
            raise ValueError(f"{name} is {part}: give a fraction from 0 to 1.")
    if not math.isfinite(strength):
        raise ValueError(f"strength is {strength}: give a finite number.")
    if gradient is None and low_variance is None:
        raise ValueError("Neither gradient nor low_variance is given: no dimension can be chosen.")
    if strategy == "noise" and std is None:
        raise ValueError('std is missing, and strategy is "noise": give the standard deviation of each dimension.')
    seed = seed_or_random(seed, strategy == "noise" and noise is None)
    chosen = resolve("perturb", backend, _order(features))
    if chosen == "triton":
        check_triton("features", features)
        if features.shape[1] > MAX_CHANNELS:
            raise ValueError(
                f"features has {features.shape[1]} channels, over the {MAX_CHANNELS} of a kernel: choose 'torch'."
            )
    given = [None if x is None else x.detach() for x in (features, gradient, low_variance, std, noise)]
    count = math.floor(fraction * features.shape[1] + 1e-9)
    bits = math.floor(budget * (1 << FRACTION_BITS))
    return Perturbed(*_perturb(*given, count, importance, combine, strategy, float(strength), bits, seed, chosen))


def _order(features: Tensor) -> tuple[str, ...]:
    """Backends, the one that "auto" takes first."""
    order = preference("perturb", features)
    return order if features.shape[1] <= MAX_CHANNELS else ("torch", "reference", "triton")
