"""Functions of tiles that the kernels of part pooling share."""

import triton
import triton.language as tl


@triton.jit
def pixel_offset(p, WIDTH, stride_y, stride_x, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Offset of pixel p within its image; FLAT: no gaps between rows; WIDE: in int64."""
    if FLAT:
        return (p.to(tl.int64) if WIDE else p) * stride_x
    y, x = p // WIDTH, p % WIDTH
    return (y.to(tl.int64) if WIDE else y) * stride_y + (x.to(tl.int64) if WIDE else x) * stride_x


@triton.jit
def part_ids(labels, offsets, inside, K):
    """Part of each pixel, -1 for none; compared in int64, because narrowing could turn a large id into a part."""
    ids = tl.load(labels + offsets, mask=inside, other=0).to(tl.int64)
    return tl.where(inside & (ids >= 0) & (ids < K), ids, -1).to(tl.int32)


@triton.jit
def _truncate(x):
    """Float32 x truncated to the 8 leading bits of its significand, which a bfloat16 holds."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def one_hot_dot(x, hot, sums, UPCAST: tl.constexpr):
    """Sums + x @ hot. A float32 is the exact sum of three bfloat16, so products on tensor cores are exact too."""
    if x.dtype == tl.float32:
        narrow: tl.constexpr = tl.float32 if UPCAST else tl.bfloat16  # the interpreter has no bfloat16
        hot = hot.to(narrow)
        high = _truncate(x)
        middle = _truncate(x - high)
        sums = tl.dot((x - high - middle).to(narrow), hot, sums)
        sums = tl.dot(middle.to(narrow), hot, sums)
        return tl.dot(high.to(narrow), hot, sums)
    return tl.dot(x, hot.to(x.dtype), sums)
