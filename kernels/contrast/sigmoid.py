r"""Triton kernels of the pairwise sigmoid loss, which :mod:`fgfast.ops.sigmoid` calls: device side, host side, cases.

.. math:: \ell_i = \sum_j \log(1 + e^{v_{ij}}), \qquad v_{ij} = \mp (t \langle x_i, y_j \rangle + b)

with the minus sign where i and j are a pair. In ``sigmoid_forward`` a program keeps rows and loops over columns; in
``sigmoid_gradient`` it keeps the vectors that it computes gradients of and recomputes the tiles. If there are few rows,
the columns are divided into splits, one program each, whose results are added in a fixed order; there are no atomics.
Vectors are multiplied in their stored dtype; in backward the derivatives by the logits are rounded to bfloat16 for
bfloat16 and float16 vectors; sums are float32. Tiles are those of the contrast.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fgfast.kernels.common import AotCase, cdiv, interpreted, launch_options, on_device_of
from fgfast.kernels.configs import architectures_for, table
from fgfast.kernels.contrast.problem import (
    SPLIT_BYTES,
    TileShape,
    arithmetic,
    channels_of_tile,
    check_sizes,
    programs_wanted,
    tile,
)
from fgfast.kernels.contrast.tiles import add_product, multiply
from fgfast.kernels.contrast.vectors import INFINITY, LOG2E, indices, load_vectors
from fgfast.kernels.launches import launch


@triton.jit
def _softplus(v):
    """log(1 + e^v); log(1 + e) / e is a polynomial fitted to 4e-8, as log2(1 + e) would round small e away."""
    e = tl.exp2(-tl.abs(v) * LOG2E)
    p = 0.00512610214 * e - 0.0290740647
    p = (p * e + 0.0775160868) * e - 0.136022476
    p = (p * e + 0.190768807) * e - 0.24835399
    p = (p * e + 0.333181217) * e - 0.49999445
    return tl.maximum(v, 0.0) + e * (p * e + 0.999999966)


@triton.jit
def _logit_tile(
    x_tile, x, x_n, x_exists, y_tile, y, y_n, y_exists, scale, bias, D,
    PAIRED: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Inner products, v (-inf in columns that do not exist), and which entries are pairs, [X, Y] each."""
    s = multiply(
        x_tile, x, x_n, x_exists, y_tile, y, y_n, y_exists, D, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION, UPCAST
    )
    v = s * scale + bias
    pair = x_n.to(tl.int32)[:, None] == y_n.to(tl.int32)[None, :]
    if PAIRED:
        v = tl.where(pair, -v, v)
    return s, tl.where(y_exists[None, :], v, -INFINITY), pair


@triton.jit
def sigmoid_forward(
    x, x_stride_n, x_stride_d, y, y_stride_n, y_stride_d, factors, out, X, Y, D,
    PAIRED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Losses of a block of rows x over one split of the columns y, into out [SPLITS, X]; factors: scale and bias."""
    scale, bias = tl.load(factors), tl.load(factors + 1)
    of_x, of_y = (x, x_stride_n, x_stride_d), (y, y_stride_n, y_stride_d)
    split = tl.program_id(1)
    x_n, exists = indices(tl.program_id(0), X, BLOCK_X)
    x_tile = None
    if WHOLE:
        x_tile = load_vectors(of_x, x_n, exists, 0, D, BLOCK_D, UPCAST)
    total = tl.zeros([BLOCK_X], tl.float32)
    per_split = tl.cdiv(tl.cdiv(Y, BLOCK_Y), SPLITS)
    for j in range(split * per_split, tl.minimum((split + 1) * per_split, tl.cdiv(Y, BLOCK_Y))):
        y_n, y_exists = indices(j, Y, BLOCK_Y)
        y_tile = None
        if WHOLE:
            y_tile = load_vectors(of_y, y_n, y_exists, 0, D, BLOCK_D, UPCAST)
        _, v, _ = _logit_tile(
            x_tile, of_x, x_n, exists, y_tile, of_y, y_n, y_exists, scale, bias, D,
            PAIRED, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION, UPCAST,
        )  # fmt: skip
        total += tl.sum(_softplus(v), 1)
    tl.store(out + split.to(tl.int64) * X + x_n, total, mask=exists)


@triton.jit
def sigmoid_gradient(
    x, x_stride_n, x_stride_d, y, y_stride_n, y_stride_d, factors, raw, sums, X, Y, D,
    PAIRED: tl.constexpr, ADD: tl.constexpr, SPLITS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Factor times the sums of w y for a block of x over one split of y, into raw [X, SPLITS, D]; with ADD added to it.

    w is the derivative of the losses by the logit; factors: scale, bias, factor. Into sums [2, SPLITS, X], unless it is
    None, go those of w <x, y> and of w. Without WHOLE sums accumulate in raw, which must be 0 initially.
    """
    scale, bias, factor = tl.load(factors), tl.load(factors + 1), tl.load(factors + 2)
    of_x, of_y = (x, x_stride_n, x_stride_d), (y, y_stride_n, y_stride_d)
    split = tl.program_id(1)
    x_n, exists = indices(tl.program_id(0), X, BLOCK_X)
    x_tile = None
    if WHOLE:
        x_tile = load_vectors(of_x, x_n, exists, 0, D, BLOCK_D, UPCAST)
    at_row = raw + (x_n * SPLITS + split)[:, None] * D
    acc = tl.zeros([BLOCK_X, BLOCK_D if WHOLE else 1], tl.float32)
    if WHOLE and ADD:  # loaded first: after the loop the sum would need the registers of a second tile
        before = tl.arange(0, BLOCK_D)
        acc = tl.load(at_row + before[None, :], mask=exists[:, None] & (before < D)[None, :], other=0.0)
    of_scale = tl.zeros([BLOCK_X], tl.float32)
    of_bias = of_scale
    per_split = tl.cdiv(tl.cdiv(Y, BLOCK_Y), SPLITS)
    for j in range(split * per_split, tl.minimum((split + 1) * per_split, tl.cdiv(Y, BLOCK_Y))):
        y_n, y_exists = indices(j, Y, BLOCK_Y)
        y_tile = None
        if WHOLE:
            y_tile = load_vectors(of_y, y_n, y_exists, 0, D, BLOCK_D, UPCAST)
        s, v, pair = _logit_tile(
            x_tile, of_x, x_n, exists, y_tile, of_y, y_n, y_exists, scale, bias, D,
            PAIRED, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION, UPCAST,
        )  # fmt: skip
        w = 1.0 / (1.0 + tl.exp2(-v * LOG2E))
        if PAIRED:
            w = tl.where(pair, -w, w)
        if sums is not None:
            of_scale += tl.sum(w * s, 1)
            of_bias += tl.sum(w, 1)
        w *= factor
        if WHOLE:
            acc = add_product(acc, w, y_tile, PRECISION)
        else:
            for start in range(0, D, BLOCK_D):
                part = load_vectors(of_y, y_n, y_exists, start, D, BLOCK_D, UPCAST)
                d = start + tl.arange(0, BLOCK_D)
                mask = exists[:, None] & (d < D)[None, :]
                at = at_row + d[None, :]
                tl.store(at, add_product(tl.load(at, mask=mask, other=0.0), w, part, PRECISION), mask=mask)
            tl.debug_barrier()  # the next block reads values written by other threads of this program
    if WHOLE:
        d = tl.arange(0, BLOCK_D)
        tl.store(at_row + d[None, :], acc, mask=exists[:, None] & (d < D)[None, :])
    if sums is not None:
        tl.store(sums + split.to(tl.int64) * X + x_n, of_scale, mask=exists)
        tl.store(sums + (split + SPLITS).to(tl.int64) * X + x_n, of_bias, mask=exists)


def _plan(kernel: str, x: Tensor, y: Tensor, width: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and options of a launch whose splits store ``width`` numbers per row of x."""
    (n, d), kind = x.shape, arithmetic(x.dtype, "ieee")
    shape = tile("sigmoid gradient" if (kernel, kind) == ("gradient", "ieee") else kernel, x.device, kind, d)
    blocks = cdiv(n, shape.x)
    splits = min(programs_wanted(x.device) // blocks, cdiv(len(y), shape.y), SPLIT_BYTES // (4 * n * width))
    splits = max(splits, 1)
    return (blocks, splits), _options(shape, d, splits) | launch_options(shape.warps, shape.stages, shape.registers)


def _options(shape: TileShape, channels: int, splits: int) -> dict[str, Any]:
    block_d = channels_of_tile(channels, shape.d) if shape.whole else shape.d
    return {
        "SPLITS": splits, "BLOCK_X": shape.x, "BLOCK_Y": shape.y, "BLOCK_D": block_d, "WHOLE": shape.whole,
        "PRECISION": "ieee", "UPCAST": interpreted(),
    }  # fmt: skip


def _on_device(factors: list[Tensor], device: torch.device) -> Tensor:
    """0-d tensors as one of float32; those of the CPU are filled in, as copies would not fit into a CUDA graph."""
    moved = (
        torch.full((), float(x), device=device) if x.device.type == "cpu" else x.detach().to(device, torch.float32)
        for x in factors
    )
    return torch.stack([x.to(torch.float32) for x in moved])


def forward(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, paired: bool) -> Tensor:
    """The losses of the images over a block of texts, float32 [N]; text i belongs to image i if ``paired``."""
    check_sizes(image_features=image, text_features=text)
    if not len(image) or not len(text):
        return image.new_zeros(len(image), dtype=torch.float32)
    with on_device_of(image):
        grid, options = _plan("forward", image, text, 1)
        out = image.new_empty(grid[1], len(image), dtype=torch.float32)
        launch(
            sigmoid_forward, grid,
            image, *image.stride(), text, *text.stride(), _on_device([scale, bias], image.device), out, len(image),
            len(text), image.shape[1], PAIRED=paired, **options,
        )  # fmt: skip
        return out.sum(0)


def add_gradients(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, paired: bool, factor: Tensor, d_image: Tensor,
    d_text: Tensor | None,
) -> Tensor:  # fmt: skip
    """Add ``factor`` times the sums of w y to d_image and of w x to d_text, w being the derivative by the logit.

    d_image and d_text are float32 and contiguous; they hold zeros, but for d_image unless ``paired``.

    Returns:
        The sums of w <x, y> and of w over the texts, for every image, float32 [2, N].
    """
    if not len(image) or not len(text):
        return image.new_zeros(2, len(image), dtype=torch.float32)
    with on_device_of(image):
        factors = _on_device([scale, bias, factor], image.device)
        sums = _add_gradient(image, text, factors, paired, d_image, not paired, True)
        if d_text is not None:
            _add_gradient(text, image, factors, paired, d_text, False, False)
    assert sums is not None
    return sums


def _add_gradient(
    x: Tensor, y: Tensor, factors: Tensor, paired: bool, out: Tensor, add: bool, with_sums: bool
) -> Tensor | None:
    (n, d), (grid, options) = x.shape, _plan("gradient", x, y, x.shape[1])
    splits = grid[1]
    raw = out.view(n, 1, d) if splits == 1 else x.new_zeros(n, splits, d, dtype=torch.float32)
    sums = x.new_empty(2, splits, n, dtype=torch.float32) if with_sums else None
    launch(
        sigmoid_gradient, grid,
        x, *x.stride(), y, *y.stride(), factors, raw, sums, n, len(y), d, PAIRED=paired,
        ADD=add and splits == 1, **options,
    )  # fmt: skip
    if splits > 1:
        out += raw.sum(1)
    return None if sums is None else sums.sum(1)


def aot_cases() -> Iterator[AotCase]:
    """Every row that these kernels take: bfloat16 (float16 as rare cases) and float32."""
    launched = (
        (sigmoid_forward, "forward", ("half", "fp16", "ieee")), (sigmoid_gradient, "gradient", ("half", "fp16")),
        (sigmoid_gradient, "sigmoid gradient", ("ieee",)),
    )  # fmt: skip
    for kernel, name, kinds in launched:
        for arch, row_name, row in table(f"contrast {name}"):
            dtypes = {"half": ("bf16",), "fp16": ("fp16",), "ieee": ("fp32",)}[row.kind] if row.kind in kinds else ()
            shape = TileShape.of(row)
            for dtype in dtypes:
                constexprs: dict[str, Any] = _options(shape, row.channels, 1) | {
                    "PAIRED": True, "UPCAST": False, "x_stride_d": 1, "y_stride_d": 1,
                }  # fmt: skip
                if kernel is sigmoid_forward:
                    yield _case(kernel, name, arch, row_name, row, shape, dtype, constexprs)
                    continue
                for add in (False, True) if shape.whole else (False,):  # without WHOLE the flag has no effect
                    of_ranks = constexprs | {"ADD": add, "PAIRED": not add}
                    yield _case(kernel, name, arch, row_name, row, shape, dtype, of_ranks)


def _case(
    kernel: Any, name: str, arch: str, row_name: str, row: Any, shape: TileShape, dtype: str, constexprs: dict[str, Any]
) -> AotCase:  # fmt: skip
    tuned, added = "tuned" in row_name, constexprs.get("ADD", False)
    types = dict.fromkeys(("x", "y"), f"*{dtype}:16") | dict.fromkeys(("factors", "out", "raw", "sums"), "*fp32:16")
    sizes = ("X", "Y", "D", "x_stride_n", "y_stride_n")
    types |= dict.fromkeys(sizes, "i32:16") | dict.fromkeys(constexprs, "constexpr")
    return AotCase(
        f"contrast {kernel.__name__.replace('_', ' ')} {arch} {dtype} D{row.channels}{' added' * added}"
        f"{' tuned' * tuned}", kernel, {n: types[n] for n in kernel.arg_names if n in types}, constexprs, row.warps,
        row.stages, architectures_for(f"contrast {name}", arch, row), dtype == "fp16", tuned, row.registers,
        row.shared,
    )  # fmt: skip
