"""Functions of tiles of logits that ``forward`` and ``gradient`` of the contrastive loss share.

A program keeps a block of X vectors and loops over blocks of Y vectors; s' [X, Y] is a tile of logits in base 2. Beside
its features a kernel reads one number per vector, ``inverse``: 1 / max(norm, eps), or -1 for an absent vector. Features
are multiplied in their stored dtype and the tile is scaled afterwards, which avoids rounding a vector a second time.

Where ``prepare`` made a copy of y, absent vectors are 0 there and all blocks complete: a load of a tile depends on no
other load, and several of them are in flight. Without it loads are masked by presence.

The loop over blocks of Y runs in chunks. In each chunk the blocks whose range of image ids overlaps that of the program
lie between two bounds. The blocks outside come first: no id is read for them, and "same_image" skips them. Then the
blocks inside, where ids are compared for BLOCK_S vectors at a time, because ids take many registers.

Where query is key and logits are bounded, ``forward`` computes one triangle of the symmetric logits: the mask of
counted pairs is symmetric too, and each tile past the diagonal is summed along its rows and along its columns.

Arguments that belong together are tuples: vectors (x, stride_n, stride_d), ids (image, part, view and their strides).
"""

import triton
import triton.language as tl

from fgfast.kernels.common import Constant, upcast
from fgfast.kernels.contrast.vectors import HIGHEST, INFINITY, LOWEST, indices, load_inverse, load_vectors

PIECE = Constant(64)  # channels at a time where the rows stay in registers


@triton.jit
def overlapping_blocks(
    low, high, start, stop, x_low, x_high, scratch, CHUNK: tl.constexpr, STEP: tl.constexpr = 1
):  # fmt: skip
    """Bounds (first, after) of the blocks in start..stop with an image id in x_low..x_high; j is block j * STEP."""
    if scratch is not None:  # kept there, not in registers
        x_low, x_high = tl.load(scratch + 2), tl.load(scratch + 3)
    j = start + tl.arange(0, CHUNK)
    inside = j < stop
    hit = inside & (tl.load(low + j * STEP, mask=inside, other=HIGHEST) <= x_high)
    hit &= tl.load(high + j * STEP, mask=inside, other=LOWEST) >= x_low
    first = tl.min(tl.where(hit, j, stop), 0)
    return first, tl.max(tl.where(hit, j + 1, first), 0)


@triton.jit
def any_present(present, x_low, x_high, scratch):
    """Whether the program has a present vector."""
    if x_low is None:
        return tl.max(present.to(tl.int32), 0) > 0
    else:
        if scratch is not None:
            x_low, x_high = tl.load(scratch + 2), tl.load(scratch + 3)
        return x_low <= x_high


@triton.jit
def keep_range(scratch, x_low, x_high):
    """Write the range of image ids of this program."""
    if scratch is not None:
        tl.debug_barrier()  # all threads have read the range of the rows before
        tl.store(scratch + 2, x_low)
        tl.store(scratch + 3, x_high)
        tl.debug_barrier()


@triton.jit
def uniform_bounds(scratch, a, b):
    """The integers a and b, written to memory and read again; as they are if scratch is None.

    A value of a load from one address is known to be the same in all threads, one of a reduction is not: loops with
    such bounds take their addresses and buffers in registers of every thread, and the gradient spills.
    """
    if scratch is None:
        return a, b
    else:
        tl.debug_barrier()  # all threads have read what was there before
        tl.store(scratch, a.to(tl.int64))
        tl.store(scratch + 1, b.to(tl.int64))
        tl.debug_barrier()
        return tl.load(scratch).to(tl.int32), tl.load(scratch + 1).to(tl.int32)


@triton.jit
def blocks_before(block, split, SPLITS: tl.constexpr):
    """How many blocks of a split, i.e. of blocks split, split + SPLITS, ..., come before ``block``."""
    return tl.cdiv(tl.maximum(block - split, 0), SPLITS)


@triton.jit
def may_overlap(low, high, block, x_low, x_high):
    """Whether the image ids of one block overlap x_low..x_high."""
    return (tl.load(low + block) <= x_high) & (tl.load(high + block) >= x_low)


@triton.jit
def _equal_ids(x, x_stride, x_n, x_present, y, y_stride, y_n, y_present):
    """Whether the ids of vectors x_n and y_n are equal, bool [X, Y]."""
    of_x = tl.load(x + x_n * x_stride, mask=x_present, other=0).to(tl.int64)
    of_y = tl.load(y + y_n * y_stride, mask=y_present, other=0).to(tl.int64)
    return of_x[:, None] == of_y[None, :]


@triton.jit
def counted_pairs(x_ids, x_n, x_present, y_ids, y_n, y_present, NEGATIVES: tl.constexpr):
    """Positive pairs, and pairs in the denominator of the loss (positive or negative), bool [X, Y] each."""
    x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view = x_ids
    y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view = y_ids
    present = x_present[:, None] & y_present[None, :]
    same_image = present & _equal_ids(x_image, x_stride_image, x_n, x_present, y_image, y_stride_image, y_n, y_present)
    same_part = same_image & _equal_ids(x_part, x_stride_part, x_n, x_present, y_part, y_stride_part, y_n, y_present)
    same = same_part & _equal_ids(x_view, x_stride_view, x_n, x_present, y_view, y_stride_view, y_n, y_present)
    positive = same_part ^ same
    if NEGATIVES == "other_images":
        counted = present ^ same_image ^ positive
    elif NEGATIVES == "same_image":
        counted = same_image ^ same
    else:
        counted = present ^ same
    return positive, counted


@triton.jit
def multiply(
    x_tile, x, x_n, x_present, y_tile, y, y_n, y_present, D,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> [X, Y]: one product with WHOLE (all channels in one tile), else summed over blocks of channels."""
    if WHOLE:
        s = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
    else:
        s = tl.zeros([BLOCK_X, BLOCK_Y], tl.float32)
        for start in range(0, D, BLOCK_D):
            of_x = load_vectors(x, x_n, x_present, start, D, BLOCK_D, UPCAST)
            of_y = load_vectors(y, y_n, y_present, start, D, BLOCK_D, UPCAST)
            s = tl.dot(of_x, tl.trans(of_y), s, input_precision=PRECISION)
    return s


@triton.jit
def load_pieces(x, n, wanted, D, CHANNELS: tl.constexpr, HELD: tl.constexpr, UPCAST: tl.constexpr):
    """All channels of vectors n, in pieces [N, PIECE] of which the first HELD channels stay in registers.

    The compiler takes the left factor of a product from registers where it is a product itself: here one with the unit
    matrix, which changes no finite number.
    """
    d = tl.arange(0, PIECE)
    pieces = ()
    for i in tl.static_range((CHANNELS + PIECE - 1) // PIECE):
        piece = load_vectors(x, n, wanted, i * PIECE, D, PIECE, UPCAST)
        if i * PIECE < HELD:
            unit = (d[:, None] == d[None, :]).to(piece.dtype)
            piece = tl.dot(piece, unit, input_precision="ieee").to(piece.dtype)
            if not UPCAST:  # converted here, not where it is used: the float32 numbers would stay alive until then
                piece = tl.inline_asm_elementwise(
                    "mov.b32 $0, $1;", "=r,r", [piece], dtype=piece.dtype, is_pure=False, pack=2
                )
        pieces += (piece,)  # type: ignore[assignment]
        tl.debug_barrier()  # one piece after the other
    return pieces


@triton.jit
def multiply_pieces(
    x_pieces, copy, block, CHANNELS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, UPCAST: tl.constexpr
):
    """<x_i, y_j> [X, Y] of the pieces of x and one block of the copy of y."""
    d = tl.arange(0, PIECE)
    first = copy + tl.full([], BLOCK_Y * CHANNELS, tl.int64) * block
    at = first + tl.arange(0, BLOCK_Y)[:, None] * CHANNELS + d[None, :]
    pieces = ()
    for i in tl.static_range((CHANNELS + PIECE - 1) // PIECE):
        if (i + 1) * PIECE <= CHANNELS:
            piece = tl.load(at + i * PIECE)
        else:
            piece = tl.load(at + i * PIECE, (d + i * PIECE < CHANNELS)[None, :], 0.0)
        pieces += (upcast(piece, UPCAST),)  # type: ignore[assignment]
    s = tl.zeros([BLOCK_X, BLOCK_Y], tl.float32)
    for i in tl.static_range((CHANNELS + PIECE - 1) // PIECE):
        s = tl.dot(x_pieces[i], tl.trans(pieces[i]), s, input_precision="ieee")
    return s


@triton.jit
def scale_tile(s, x_factor, x_bias, copied, y_block, Y, y_inverse, BIASED: tl.constexpr, BLOCK_Y: tl.constexpr):
    """Logits s' of products s, and the factors of the columns; -inf in absent columns if BIASED.

    ``x_bias``: 0 or -inf for each row, or None.
    """
    s *= x_factor[:, None]
    if x_bias is not None:  # a fused multiply-add
        s += x_bias[:, None]
    if copied[0] is not None:
        y_n = y_block * BLOCK_Y + tl.arange(0, BLOCK_Y)  # in 32 bits
        factor = tl.load(copied[1] + y_n)
        bias = tl.load(copied[2] + y_n) if BIASED else factor
    else:
        y_n, y_exists = indices(y_block, Y, BLOCK_Y)
        factor, y_present = load_inverse(y_inverse, y_n, y_exists)
        bias = tl.where(y_present, 0.0, -INFINITY)
        if x_bias is not None:  # a factor of -1 would flip the sign of -inf
            factor = tl.where(y_present, factor, 1.0)
    if BIASED:
        s = s * factor[None, :] + bias[None, :]
    else:
        s *= factor[None, :]
    return s, factor


@triton.jit
def add_product(acc, w, y, PRECISION: tl.constexpr):
    """Acc + w y; for float16 vectors in bfloat16, because w is as small as 1 / (rows x columns)."""
    if y.dtype == tl.float16:
        y = y.to(tl.bfloat16)
    return tl.dot(w.to(y.dtype), y, acc, input_precision=PRECISION)
