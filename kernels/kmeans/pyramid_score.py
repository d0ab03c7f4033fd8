"""The kernel of feature pyramids that scores cells and labels pixels; names as in ``pyramid_cells.py``."""

import triton
import triton.language as tl

from fgfast.kernels.common import upcast
from fgfast.kernels.kmeans.pyramid_cells import aligned_strides, channel_offsets, flat_offsets, pixel_rows, taps
from fgfast.kernels.kmeans.tiles import has_converged, nearest_centroid, pixel_distances, relative


@triton.jit
def _resize_scores(
    ptr, y, x, dy, dx, height, width, k, K, inside, KP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Scores [cells, KP] of one level resized to pixels, [BLOCK_N, BLOCK_K]; a cell of weight 0 is not read."""
    out = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            weight = (dy if i == 1 else 1 - dy) * (dx if j == 1 else 1 - dx)
            mixed = (inside & (weight > 0))[:, None] & (k < K)[None, :]
            at = ((y + i) * width + x + j).to(tl.int64)[:, None] * KP + k[None, :]
            out += tl.load(ptr + at, mixed, other=0.0) * weight[:, None]
    return out


@triton.jit
def _score_tile(
    x_ptr, strides, size, m_ptr, mu_ptr, out_ptr, start,
    FLAT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Scores <f, m_k> of one tile of cells, <f - mu, m_k> with SHIFT."""
    channels, height, width = size
    c = start + tl.arange(0, BLOCK_C)
    k = tl.arange(0, KP)
    d = tl.arange(0, BLOCK_D)
    inside = c < height * width // ALIGN * ALIGN
    cell_offsets = flat_offsets(c, width, strides, FLAT, WIDE)
    dots = tl.zeros([BLOCK_C, KP], tl.float32)
    for first in range(0, channels, BLOCK_D):
        mask = inside[:, None] & (first + d < channels)[None, :]
        offsets = cell_offsets[:, None] + channel_offsets(first + d, strides, WIDE)[None, :]
        x = upcast(tl.load(x_ptr + offsets, mask, other=0.0), UPCAST)
        if SHIFT:
            x = relative(x, mu_ptr + first + d, False)
        m = tl.load(m_ptr + (first + d)[:, None] * KP + k[None, :])
        dots = tl.dot(x, m, dots, input_precision=PRECISION)
    tl.store(out_ptr + c.to(tl.int64)[:, None] * KP + k[None, :], dots, inside[:, None])


@triton.jit
def _label_strip(
    sizes, scores_ptr, bias_ptr, squares_ptr, weight_ptr, labels_ptr, distances_ptr, counts_ptr, inertia_ptr,
    changed_ptr, strip, height, width, rows, blocks, K,
    SAME: tl.constexpr, LEVELS: tl.constexpr, COSINE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """Labels and distances of a strip of rows of pixels; its counts, inertia and number of changed labels.

    SAME: cells of a level are pixels.
    """
    k = tl.arange(0, KP)
    bias = tl.zeros([KP], tl.float32)
    for block in range(blocks):
        bias += tl.load(bias_ptr + block * KP + k)
    counts = tl.zeros([KP], tl.float32)
    inertia = tl.zeros([BLOCK_N], tl.float32)
    changed = tl.zeros([BLOCK_N], tl.int32)
    last = tl.minimum((strip + 1) * rows, height) * width
    for start in range(strip * rows * width, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < last
        dots = tl.zeros([BLOCK_N, KP], tl.float32)
        base = scores_ptr
        for level in tl.static_range(LEVELS):
            h, w = sizes[level][1], sizes[level][2]
            if SAME[level]:
                at = n.to(tl.int64)[:, None] * KP + k[None, :]
                dots += tl.load(base + at, inside[:, None] & (k < K)[None, :], other=0.0)
            else:
                y, dy = taps(n // width, h, height)
                x, dx = taps(n % width, w, width)
                dots += _resize_scores(base, y, x, dy, dx, h, w, k, K, inside, KP, BLOCK_N, KP)
            base += tl.cast(h * w, tl.int64) * KP
        best, index = nearest_centroid(dots, bias, k, K, COSINE)
        weight = tl.where(inside, 1.0, 0.0)
        if WEIGHTED:
            weight = tl.load(weight_ptr + n, inside, other=0.0)
        squares = tl.load(squares_ptr + n, inside, other=0.0)
        distance, counted, _, has_nonfinite = pixel_distances(best, squares, weight, COSINE)
        label = tl.where(counted, index, -1)
        counts += tl.sum(tl.where(label[:, None] == k[None, :], weight[:, None], 0.0), 0)
        inertia += tl.where(has_nonfinite, float("nan"), tl.where(counted, weight * distance, 0.0))
        changed += (inside & (tl.load(labels_ptr + n, inside, other=-1) != label)).to(tl.int32)
        tl.store(distances_ptr + n, tl.where(counted, distance, -1.0), inside)
        tl.store(labels_ptr + n, label.to(labels_ptr.dtype.element_ty), inside)
    tl.store(counts_ptr + strip * KP + k, counts)
    tl.store(inertia_ptr + strip, tl.sum(inertia, 0))
    tl.store(changed_ptr + strip, tl.sum(changed, 0))


@triton.jit
def score(
    xs, strides, sizes, m_ptr, mu_ptr, scores_ptr, bias_ptr, squares_ptr, weight_ptr, done_ptr, needed_ptr, arrived_ptr,
    labels_ptr, distances_ptr, counts_ptr, inertia_ptr, changed_ptr,
    height, width, rows, strips, spans, programs, cells, blocks, DP, K,
    FLATS: tl.constexpr, SAME: tl.constexpr, ALIGNS: tl.constexpr, WIDE: tl.constexpr, LEVELS: tl.constexpr,
    COSINE: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    TILES: tl.constexpr, PAD: tl.constexpr, BLOCK_N: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Scores of spans[l] cells of a level; the last program that a strip of pixels waits for also labels the strip.

    TILES: cells and channels of a tile of each level. Which program labels a strip varies, but not what it computes.
    """
    b = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    if has_converged(done_ptr, b, True):
        return
    scores_ptr += b * cells * KP
    m_ptr += b * DP * KP
    mu_ptr += b * DP
    base = scores_ptr
    first = 0
    last = -1
    for level in tl.static_range(LEVELS):
        h, w = sizes[level][1], sizes[level][2]
        count = tl.cdiv(h * w, spans[level])
        if (program >= 0) & (program < count):
            begin = program * spans[level]
            end = tl.minimum(begin + spans[level], h * w)
            aligned = aligned_strides(strides[level], ALIGNS[level])
            for start in range(begin, end, TILES[level][0]):
                _score_tile(
                    xs[level] + b * aligned[0], aligned, sizes[level], m_ptr, mu_ptr, base, start,
                    FLATS[level], ALIGNS[level], WIDE, SHIFT, PRECISION, UPCAST, TILES[level][0], TILES[level][1], KP,
                )  # fmt: skip
            low, high = pixel_rows(begin // w, (end - 1) // w, h, height)
            first = low // rows
            last = high // rows
        program -= count
        base += tl.cast(h * w, tl.int64) * KP
        m_ptr += tl.cdiv(sizes[level][0], PAD) * PAD * KP
        mu_ptr += tl.cdiv(sizes[level][0], PAD) * PAD
    tl.debug_barrier()  # all threads store their scores before one of them signals it
    arrived_ptr += b * strips
    n = b * height * width
    for strip in range(first, last + 1):
        others = tl.atomic_add(arrived_ptr + strip, 1, sem="acq_rel")
        if others == tl.load(needed_ptr + strip) - 1:
            _label_strip(
                sizes, scores_ptr, bias_ptr + b * blocks * KP, squares_ptr + n, weight_ptr + n, labels_ptr + n,
                distances_ptr + n, counts_ptr + b * strips * KP, inertia_ptr + b * strips, changed_ptr + b * strips,
                strip, height, width, rows, blocks, K, SAME, LEVELS, COSINE, WEIGHTED, BLOCK_N, KP,
            )  # fmt: skip
            tl.store(arrived_ptr + strip, 0)  # for the next step
