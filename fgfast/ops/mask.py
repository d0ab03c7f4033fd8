"""``pivotal_mask`` and ``mask_images``: which patches attention ranks highest, and images of only those.

The compiled sampler (csrc/, "native") and the path in PyTorch here give the same bits on every device: the arithmetic
of a score is spelled out as single float32 roundings in a fixed order, log2 included.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgfast.backend import missing, resolve
from fgfast.ops.derivatives import needs_definition
from fgfast.ops.registration import operation
from fgfast.reference import mask as reference
from fgfast.reference.draws import philox
from fgfast.tensors import (
    FLOATS,
    accumulation,
    check_device,
    check_float,
    check_tensor,
    check_whole,
    seed_or_random,
    shape_error,
    transformed,
    values_checked,
)

STRATEGIES = ("topk", "sample", "block", "random")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the compiled sampler, in the order of its numbers
MAX_PATCHES = 8192  # patches that fit the shared memory of a block on a GPU
ATANH = (0.32059890, 0.41219857, 0.57707804, 0.96179670, 2.88539008)  # 2 / (n ln 2), n = 9, 7, 5, 3, 1
ZERO = -1e9  # what a patch without attention adds to the sum of a window


class PivotalMask(NamedTuple):
    """What `pivotal_mask` returns.

    Mask bool [B, P], True = kept; index int64 [B, k], ascending; images [B, C, H, W], masked, or None.
    """

    mask: Tensor
    index: Tensor  # type: ignore[assignment]  # a field hides tuple.index
    images: Tensor | None


def _log2(x: Tensor) -> Tensor:
    """log2 of x >= 0 to within 3 units in the last place, operation for operation as in csrc/pivotal.h."""
    if x.dtype == torch.float64:
        return x.log2()
    small = x < 2.0**-126
    bits = torch.where(small, x * 2.0**24, x).view(torch.int32)
    shifted = bits - 0x3F3504F3
    m = ((shifted & 0x7FFFFF) + 0x3F3504F3).view(torch.float32)
    s = (m - 1) / (m + 1)
    z = s * s
    p = z * ATANH[0]
    for c in ATANH[1:-1]:
        p = (p + c) * z
    p = (p + ATANH[-1]) * s
    result = ((shifted >> 23) - small.int() * 24).float() + p
    return torch.where(x > 0, torch.where(x < torch.inf, result, x), -torch.inf)


def _scores(attention: Tensor) -> Tensor:
    """Sum over layers of log2 of the mean over heads [B, P], one rounding after the other."""
    score = None
    for layer in attention:
        total = layer[:, 0].to(accumulation(layer.dtype))
        for h in range(1, layer.shape[1]):
            total = total + layer[:, h]
        term = _log2(total / layer.shape[1])
        score = term if score is None else score + term
    assert score is not None  # at least one layer: checked
    return score


def _top(rank: Tensor, kept: int) -> Tensor:
    """Mask of the kept largest of each row, ties to the lowest."""
    limit = rank.kthvalue(rank.shape[1] - kept + 1, dim=1, keepdim=True).values
    above, equal = rank > limit, rank == limit
    return above | (equal & (equal.cumsum(1) <= kept - above.sum(1, keepdim=True)))


def _window(score: Tensor, kept: int) -> Tensor:
    """Mask of the best window of each row."""
    side = math.isqrt(score.shape[1])
    rows, columns = reference.window_shape(kept, side)
    terms = torch.where(score > -torch.inf, score.double(), ZERO)
    down, across = side - rows + 1, side - columns + 1
    first = torch.arange(down, device=score.device)[:, None] * side + torch.arange(across, device=score.device)
    total = torch.zeros(len(score), down * across, dtype=torch.float64, device=score.device)
    cells = reference.window_cells(0, 0, kept, side)
    for cell in cells:  # in the order in which the compiled sampler adds
        total += terms[:, first.flatten() + cell]
    best = first.flatten()[total.argmax(1)]
    index = best[:, None] + torch.tensor(cells, device=score.device)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, index, True)


def _mask_torch(attention: Tensor, kept: int, strategy: str, seed: int) -> tuple[Tensor, Tensor]:
    _, batch, _, patches = attention.shape
    if strategy == "random":
        rank = philox(seed, batch, patches, attention.device)
    else:
        rank = _scores(attention).nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if strategy == "sample":
            rank = rank - _log2(-_log2(philox(seed, batch, patches, attention.device)))
    mask = _window(rank, kept) if strategy == "block" else _top(rank, kept)
    # a stable sort of the flags puts the kept ones first, in order, without a sync to learn how many there are
    return mask, mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :kept].contiguous()


def _layout(images: Tensor, out: Tensor, grid: tuple[int, int]) -> tuple[Any, ...]:
    """The image as [B, outer, rows, inner] for the compiled code; channels that lie together join the inner run."""
    _, channels, height, width = images.shape
    joined = all(x.stride(1) == 1 and x.stride(3) == channels for x in (images, out)) and channels > 1
    shape = (1, height, width * channels) if joined else (channels, height, width)
    strides = [
        (x.stride(0), 0, x.stride(2), 1) if joined else (x.stride(0), x.stride(1), x.stride(2), x.stride(3))
        for x in (images, out)
    ]
    return images.data_ptr(), out.data_ptr(), images.element_size(), shape, grid, *strides


def _where(x: Tensor) -> tuple[bool, int, int]:
    """Whether on a GPU, the current stream there, and the threads to take on a CPU."""
    if x.device.type == "cuda":
        return True, torch.cuda.current_stream(x.device).cuda_stream, 1
    return False, 0, torch.get_num_threads()


@operation("pivotal_mask")
def _pivotal_mask(
    attention: Tensor, images: Tensor | None, kept: int, strategy: str, seed: int, rows: int, columns: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend != "native" or attention.device.type != "cpu":  # the compiled loop on the CPU looks while it reads
        _check_values(attention)
    if backend != "native":
        make = reference.pivotal_mask if backend == "reference" else _mask_torch
        mask, index = make(attention, kept, strategy, seed)
        if images is None:
            return attention.new_empty(0), mask, index
        return reference.mask_images(images, mask, (rows, columns)), mask, index
    import fgfast._native as _native

    _, batch, _, patches = attention.shape
    mask = attention.new_empty(batch, patches, dtype=torch.bool)
    index = attention.new_empty(batch, kept, dtype=torch.int64)
    masked = attention.new_empty(0) if images is None else torch.empty_like(images)
    window = (0, 0, 0)
    if strategy == "block":
        side = math.isqrt(patches)
        window = (side, *reference.window_shape(kept, side))
    with torch.cuda.device_of(attention):
        _native.pivotal_mask(
            attention.data_ptr(), DTYPES.index(attention.dtype), tuple(attention.shape), attention.stride(), kept,
            STRATEGIES.index(strategy), window, seed, mask.data_ptr(), index.data_ptr(),
            None if images is None else _layout(images, masked, (rows, columns)), *_where(attention),
        )  # fmt: skip
    return masked, mask, index


@_pivotal_mask.register_fake
def _(
    attention: Tensor, images: Tensor | None, kept: int, strategy: str, seed: int, rows: int, columns: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    shape = attention.shape[1], attention.shape[3]
    mask = attention.new_empty(shape, dtype=torch.bool)
    index = attention.new_empty(shape[0], kept, dtype=torch.int64)
    return attention.new_empty(0) if images is None else torch.empty_like(images), mask, index


@operation("mask_images")
def _mask_images(images: Tensor, mask: Tensor, rows: int, columns: int, backend: str) -> Tensor:
    if backend != "native":
        return reference.mask_images(images, mask, (rows, columns))
    import fgfast._native as _native

    out, dense = torch.empty_like(images), mask.contiguous()  # bound to a name: it must outlive the call
    with torch.cuda.device_of(images):
        _native.mask_images(_layout(images, out, (rows, columns)), dense.data_ptr(), len(images), *_where(images))
    return out


@_mask_images.register_fake
def _(images: Tensor, mask: Tensor, rows: int, columns: int, backend: str) -> Tensor:
    return torch.empty_like(images)


def _mask_gradient(grad: Tensor, mask: Tensor, rows: int, columns: int, backend: str) -> Tensor:
    """The gradient of images, by the definition in a transform."""
    if transformed(grad):
        return reference.mask_images(grad, mask, (rows, columns))
    return _mask_images(grad, mask, rows, columns, backend)


def _setup_pivotal(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[5:]
    ctx.has_images = inputs[1] is not None
    ctx.save_for_backward(output[1])


def _backward_pivotal(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    of_images = _mask_gradient(grad, mask, *ctx.options) if ctx.has_images else None
    return None, of_images, None, None, None, None, None, None


def _setup_images(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.options = inputs[2:]


def _backward_images(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (mask,) = ctx.saved_tensors
    return _mask_gradient(grad, mask, *ctx.options), None, None, None, None


_pivotal_mask.register_autograd(_backward_pivotal, setup_context=_setup_pivotal)
_mask_images.register_autograd(_backward_images, setup_context=_setup_images)
_pivotal_mask.loop_in_vmap()


def _check_values(attention: Tensor) -> None:
    if values_checked(attention) and not bool((attention >= 0).all()):
        raise ValueError("attention holds a negative number or NaN: give probabilities.")


def _square(patches: int, why: str) -> int:
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"There are {patches} patches, which is no square: {why}.")
    return side


def _check_images(images: Tensor, batch: int, patches: int, grid: tuple[int, int] | None, device: torch.device) -> Any:
    """The grid (rows, columns), after all checks."""
    check_float("images", images)
    check_device("images", images, device)
    if images.dim() != 4 or len(images) != batch:
        raise shape_error("images", f"[B, C, H, W] with B = {batch}", images)
    if grid is None:
        side = _square(patches, "give grid=(rows, columns)")
        grid = (side, side)
    for side in grid:
        check_whole("grid", side)
    if len(grid) != 2 or min(grid) < 1 or grid[0] * grid[1] != patches:
        raise ValueError(f"grid is {tuple(grid)} for {patches} patches: give (rows, columns) whose product is that.")
    if images.shape[2] % grid[0] or images.shape[3] % grid[1]:
        raise ValueError(
            f"images of {images.shape[2]} x {images.shape[3]} do not divide into {grid[0]} x {grid[1]} patches: "
            "resize or crop them."
        )
    return grid


def _resolve(op: str, backend: str | None, x: Tensor, dtypes: tuple[torch.dtype, ...], patches: int) -> str:
    """The backend of a call: the compiled one first where it can take x."""
    why = _native_misses(x, dtypes, patches)
    order = ("native", "torch", "reference") if why is None else ("torch", "reference", "native")
    name = resolve(op, backend, order)
    if name == "native" and why is not None:
        raise ValueError(f"{op} cannot run natively because {why}: choose backend 'torch'.")
    return name


def _native_misses(x: Tensor, dtypes: tuple[torch.dtype, ...], patches: int) -> str | None:
    """Why the compiled code cannot take x, or None."""
    reason = missing("native")
    if reason is not None:
        return reason
    import fgfast._native as _native

    if x.dtype not in dtypes:
        return f"it takes no {x.dtype}"
    if x.device.type == "cuda" and not _native.CUDA:
        return "it was built without CUDA"
    if x.device.type == "cuda" and patches > MAX_PATCHES:
        return f"a GPU takes {MAX_PATCHES} patches, not {patches}"
    return None if x.device.type in ("cpu", "cuda") else f"it does not know {x.device}"


def pivotal_mask(
    attention: Tensor,
    *,
    keep: float = 0.3,
    strategy: str = "topk",
    seed: int | None = None,
    images: Tensor | None = None,
    backend: str | None = None,
) -> PivotalMask:
    r"""Choose the patches of each image that attention calls pivotal.

    .. math:: score_{bp} = \sum_l \log_2 \tfrac{1}{H} \sum_h a_{lbhp}, \qquad k = \lfloor keep \cdot P \rfloor

    Exactly k patches are kept, ties to the lowest index. The mask is the same, bit for bit, on every device and by
    the "native" and the "torch" backend.

    Args:
        attention: float32, float16 or bfloat16 (the torch backend: float64 too) [L, B, P] or [L, B, heads, P], not
            negative, any strides: of the CLS token over the P patches, without CLS and registers, in L layers.
        keep: fraction of the patches that is kept, above 0 and at most 1; k = floor(keep x P + 1e-9) must be 1 or more.
        strategy: "topk" takes the largest scores; "sample" draws without replacement in proportion to 2^score (Gumbel
            top-k, noise by Philox 4x32-10 of seed, image and patch); "block" takes the nearly square window of k
            cells with the largest sum of scores, fewest zeros first (P a square); "random" draws uniformly.
        seed: of "sample" and "random", 0 and up; None draws one from torch's generator.
        images: [B, C, H, W] over a square grid of patches: returned with zeros in the patches that are not kept.
        backend: "native", "torch" or "reference"; strict. None follows `use_backend`.

    Returns:
        PivotalMask(mask bool [B, P], True = kept; index int64 [B, k], ascending; images or None). Only images carry a
        gradient.

    Raises:
        ValueError: keep out of range, no patch kept, shapes or devices that do not fit, an unknown strategy, P no
            square where it must be, or (seen on the CPU, or with FGFAST_CHECKS=1) attention negative or NaN.
        TypeError: a dtype that is not supported.

    Example:
        >>> import torch
        >>> from fgfast import pivotal_mask
        >>> attention = torch.tensor([[[0.1, 0.4, 0.3, 0.2]]])
        >>> pivotal_mask(attention, keep=0.5).index.tolist()
        [[1, 2]]

    Source: LoDisc (Shi, Wei, Nie, Huang), the location-wise mask; the strategies but "topk" are controls of ours.
    """
    check_float("attention", attention)
    attention = attention.detach()
    if attention.dim() == 3:
        attention = attention.unsqueeze(2)
    if attention.dim() != 4 or 0 in (attention.shape[0], attention.shape[2], attention.shape[3]):
        raise shape_error("attention", "[L, B, P] or [L, B, heads, P]", attention)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is {strategy!r}: choose one of {', '.join(STRATEGIES)}.")
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}: give a fraction above 0 and at most 1.")
    patches = attention.shape[3]
    kept = math.floor(keep * patches + 1e-9)
    if kept < 1:
        raise ValueError(f"keep is {keep} of {patches} patches, which keeps none: give at least {1 / patches:.4g}.")
    if strategy == "block":
        _square(patches, 'strategy "block" needs a square grid')
    grid = (0, 0)
    if images is not None:
        grid = _check_images(images, attention.shape[1], patches, None, attention.device)
    seed = seed_or_random(seed, strategy in ("sample", "random"))
    name = _resolve("pivotal_mask", backend, attention, DTYPES, patches)
    if needs_definition("pivotal_mask", backend, images):
        _, mask, index = _pivotal_mask(attention, None, kept, strategy, seed, *grid, name)
        return PivotalMask(mask, index, None if images is None else reference.mask_images(images, mask, grid))
    masked, mask, index = _pivotal_mask(attention, images, kept, strategy, seed, *grid, name)
    return PivotalMask(mask, index, None if images is None else masked)


def mask_images(
    images: Tensor, mask: Tensor, grid: tuple[int, int] | None = None, *, backend: str | None = None
) -> Tensor:
    """Zero the patches of images that a mask does not keep, in one pass.

    Args:
        images: [B, C, H, W] float32, float16, bfloat16 or float64, any strides. Gets every derivative.
        mask: bool [B, P], True = kept, patches in row-major order.
        grid: (rows, columns) of patches, P in all, that divide H and W; None takes the square one.
        backend: "native", "torch" or "reference"; strict. None follows `use_backend`.

    Returns:
        The images [B, C, H, W], in the memory format of images; what is dropped is 0, whatever stood there.

    Raises:
        ValueError: shapes, grid or devices that do not fit.
        TypeError: images are no floats, or mask is not bool.

    Example:
        >>> import torch
        >>> from fgfast import mask_images
        >>> mask = torch.tensor([[True, False, False, True]])
        >>> mask_images(torch.ones(1, 1, 2, 2), mask).flatten().tolist()
        [1.0, 0.0, 0.0, 1.0]
    """
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}: give bool, True = kept.")
    if mask.dim() != 2:
        raise shape_error("mask", "[B, P]", mask)
    rows, columns = _check_images(images, len(mask), mask.shape[1], grid, mask.device)
    name = _resolve("mask_images", backend, images, FLOATS, 0)
    if needs_definition("mask_images", backend, images, mask):
        return reference.mask_images(images, mask, (rows, columns))
    return _mask_images(images, mask, rows, columns, name)
