"""The kernel of feature pyramids that moves the centroids; names as in ``pyramid_cells.py``."""

import triton
import triton.language as tl

from fgfast.kernels.kmeans.pyramid_cells import load_resized
from fgfast.kernels.kmeans.tiles import EPS, find_farthest, has_converged, store_centred


@triton.jit
def _repair_empty(
    tile, count, x_ptr, strides, size, mu, weight_ptr, scale_ptr, labels_ptr, distances_ptr, k, d, height, width, K,
    WIDE: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_D, KP] of one level and counts [KP] after the i-th farthest pixel moved to the i-th empty cluster.

    Every program of a problem makes the same choices. Ties go to the lowest pixel: the next one at this distance has a
    higher index.
    """
    pixels = height * width
    far = float("inf")
    taken = pixels
    searching = True
    before = count
    for empty in range(K):
        if (tl.sum(tl.where(k == empty, before, 0.0), 0) == 0) & searching:
            best, pixel = find_farthest(distances_ptr, pixels, far, taken, BLOCK)
            searching = (best >= 0) & ((far < float("inf")) | (best > 0))
            if searching:
                far = best
                taken = pixel
                w = tl.load(weight_ptr + pixel) if WEIGHTED else 1.0
                donor = tl.load(labels_ptr + pixel)
                at = pixel + tl.zeros([1], tl.int32)
                vector = tl.sum(load_resized(x_ptr, strides, size, at, d, height, width, WIDE), 0)
                if SHIFT:
                    vector -= mu
                vector *= tl.load(scale_ptr + pixel)
                is_donor = tl.where(k == donor, 1.0, 0.0)
                tile = tl.where((k == empty)[None, :], vector[:, None], tile - vector[:, None] * is_donor[None, :])
                count = tl.where(k == empty, w, count - w * is_donor)
    return tile, count


@triton.jit
def _move_level(
    x_ptr, strides, size, part_ptr, splits, weight_ptr, scale_ptr, labels_ptr, distances_ptr, counts_ptr, lengths_ptr,
    c_ptr, m_ptr, mu_ptr, first, height, width, strips, blocks, channels, K,
    START: tl.constexpr, LENGTHS: tl.constexpr, COSINE: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr,
    FARTHEST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Move the centroids in BLOCK_D channels of one level; returns the bias (or squares) and shift [KP] of these.

    With SHIFT sums and centroids are relative to mu.
    """
    k = tl.arange(0, KP)
    d = first + tl.arange(0, BLOCK_D)
    mask = (k < K)[None, :] & (d < size[0])[:, None]
    place = k[None, :].to(tl.int64) * channels + d[:, None]
    before = tl.load(c_ptr + place, mask, other=0.0)
    mu = tl.load(mu_ptr + d)
    c = before
    shift = tl.zeros([KP], tl.float32)
    if not START:
        tile = tl.zeros([BLOCK_D, KP], tl.float32)
        for _ in range(splits):
            tile += tl.load(part_ptr + k[None, :] * size[0] + d[:, None], mask, other=0.0)
            part_ptr += K * size[0]
        count = tl.zeros([KP], tl.float32)
        for strip in range(strips):
            count += tl.load(counts_ptr + strip * KP + k)
        if FARTHEST:  # noqa: SIM102  (the one a constant, the other a value)
            if tl.sum(((count == 0) & (k < K)).to(tl.int32), 0) > 0:
                tile, count = _repair_empty(
                    tile, count, x_ptr, strides, size, mu, weight_ptr, scale_ptr, labels_ptr, distances_ptr, k, d,
                    height, width, K, WIDE, SHIFT, WEIGHTED, BLOCK,
                )  # fmt: skip
        if LENGTHS:
            c = tile
        else:
            divisor = tl.where(count > 0, count, 1.0)
            if COSINE:
                square = tl.zeros([KP], tl.float32)
                for block in range(blocks):
                    square += tl.load(lengths_ptr + block * KP + k)
                divisor = tl.maximum(tl.sqrt(square), EPS)
            c = tl.where((count > 0)[None, :], tile / divisor[None, :], before)
            shift = tl.sum((c - before) * (c - before), 0)
            tl.store(c_ptr + place, c, mask)
    if LENGTHS:
        partial = tl.sum(c * c, 0)
    else:
        partial = store_centred(m_ptr, c, mu * 0 if SHIFT else mu, k, d, K, size[0], KP, SHIFT)
    return partial, shift


@triton.jit
def move(
    xs, strides, sizes, parts, splits, weight_ptr, scale_ptr, labels_ptr, distances_ptr, counts_ptr, changed_ptr,
    lengths_ptr, shift_ptr, bias_ptr, c_ptr, m_ptr, mu_ptr, limit_ptr, done_ptr, steps_ptr, arrived_ptr,
    height, width, strips, blocks, DP, channels, K,
    START: tl.constexpr, LENGTHS: tl.constexpr, COSINE: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr,
    FARTHEST: tl.constexpr, WIDE: tl.constexpr, LEVELS: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Centroids c [B, K, D] from the sums, empty clusters repaired; m, and bias in parts [B, blocks, KP].

    The last program of a problem decides whether it has converged. START: only m and bias, of the given c. LENGTHS:
    only the squared lengths of the sums, in parts [B, blocks, KP], which cosine needs before the centroids.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if has_converged(done_ptr, b, True):
        return
    k = tl.arange(0, KP)
    n = b * height * width
    row = b * blocks + block
    c_ptr += b * K * channels
    m_ptr += b * DP * KP
    mu_ptr += b * DP
    rest = block
    for level in tl.static_range(LEVELS):
        count = tl.cdiv(sizes[level][0], PAD) * (PAD // BLOCK_D)
        if (rest >= 0) & (rest < count):
            partial, shift = _move_level(
                xs[level] + b * strides[level][0], strides[level], sizes[level],
                parts[level] + b * splits[level] * K * sizes[level][0], splits[level], weight_ptr + n, scale_ptr + n,
                labels_ptr + n, distances_ptr + n, counts_ptr + b * strips * KP, lengths_ptr + b * blocks * KP,
                c_ptr, m_ptr, mu_ptr, rest * BLOCK_D, height, width, strips, blocks, channels, K,
                START, LENGTHS, COSINE, SHIFT, WEIGHTED, FARTHEST, WIDE, BLOCK, BLOCK_D, KP,
            )  # fmt: skip
            if LENGTHS:
                tl.store(lengths_ptr + row * KP + k, partial)
            else:
                tl.store(bias_ptr + row * KP + k, partial)
            if not (START or LENGTHS):
                tl.store(shift_ptr + row, tl.sum(shift, 0))
        rest -= count
        c_ptr += sizes[level][0]
        m_ptr += count * BLOCK_D * KP
        mu_ptr += count * BLOCK_D
    if not (START or LENGTHS):
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + b, 1, sem="acq_rel") == blocks - 1:
            moved = 0.0
            for i in range(blocks):
                moved += tl.load(shift_ptr + b * blocks + i)
            changed = 0
            for i in range(strips):
                changed += tl.load(changed_ptr + b * strips + i)
            converged = (moved <= tl.load(limit_ptr + b)) | (changed == 0)
            tl.store(done_ptr + b, converged.to(tl.int32))
            tl.store(steps_ptr + b, tl.load(steps_ptr + b) + 1)
            tl.store(arrived_ptr + b, 0)
