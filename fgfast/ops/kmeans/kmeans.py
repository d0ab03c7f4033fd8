"""k-means of many small problems at once: pixels of images, or feature pyramids whose hypercolumns are never built.

Lloyd's iteration by scikit-learn's rules. Assignment and the sums of the new centres come from one read of the pixels,
as two products with K rows: scores [K, D] x [D, n] and one-hot sums [K, n] x [n, D], tile by tile. On the CPU problems
run a few at a time: each stays in the cache and stops when it has converged. On a device all run together
and the host looks at nothing. `fgfast.pixels.pyramid` has the derivation for lists of maps.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fgfast.backend import check_triton, missing, preference, resolve
from fgfast.ops.kmeans.checks import (
    BACKENDS,
    METRICS,
    Array,
    as_floats,
    check_counts,
    check_finite,
    check_maps,
    choose,
    columns,
    flat_weight,
    groups,
    match_centroids,
    seed_tensor,
)
from fgfast.ops.kmeans.lloyd import lloyd
from fgfast.ops.registration import operation
from fgfast.pixels.init import start
from fgfast.pixels.native import NativePyramid
from fgfast.pixels.options import KMeansOptions
from fgfast.pixels.pyramid import Pyramid
from fgfast.pixels.result import LloydResult, best_of
from fgfast.pixels.source import Dense, PixelSource, unit
from fgfast.reference import kmeans as reference
from fgfast.tensors import accumulation, check_weight, exact, transformed

MOST_OF_MAPS = 256  # clusters of a list of maps that the Triton kernels take


class KMeansResult(NamedTuple):
    """What `kmeans` returns.

    Centroids [B, K, D], labels int64, counts float32 [B, K], inertia float32 [B], n_iter int32 [B].
    """

    centroids: Tensor
    labels: Tensor
    counts: Tensor
    inertia: Tensor
    n_iter: Tensor


def _solve(source: PixelSource, weight: Tensor | None, seed: Tensor, options: KMeansOptions) -> LloydResult:
    """The best of n_init runs of each problem."""
    n_clusters, first = options.n_clusters, options.first
    source.prepare(options.metric, weight)

    def run(number: int) -> LloydResult:
        if first is None:
            c = start(source, n_clusters, options.init, options.init_samples, seed, number)
        else:
            c = source.relative(first.to(source.dtype))
        if options.metric == "cosine":
            c = unit(c)
        return lloyd(source, c, options.n_iter, options.tol, options.empty)

    best = best_of(options.n_init, run, lambda result: result.inertia)
    inertia = torch.where(source.has_nonfinite, torch.nan, source.true_inertia(best.inertia))
    return best._replace(centroids=source.as_given(best.centroids), inertia=inertia)


def _outputs(
    xs: list[Tensor], n_clusters: int, size: list[int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, batch = xs[0], xs[0].shape[0]
    pixels = math.prod(x.shape[2:]) if size is None else math.prod(size)
    return (
        x.new_empty(batch, n_clusters, sum(m.shape[1] for m in xs), dtype=accumulation(x.dtype)),
        x.new_empty(batch, pixels, dtype=torch.int64),
        x.new_empty(batch, n_clusters, dtype=torch.float32),
        x.new_empty(batch, dtype=torch.float32),
        x.new_empty(batch, dtype=torch.int32),
    )


@operation("kmeans")
def _kmeans(
    xs: list[Tensor],
    n_clusters: int,
    size: list[int] | None,
    n_iter: int,
    init: str,
    first: Tensor | None,
    init_samples: int,
    n_init: int,
    tol: float,
    weight: Tensor | None,
    metric: str,
    empty: str,
    seed: Tensor,
    precision: str,
    deterministic: bool = True,
    backend: str = "torch",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if first is not None:
        check_finite("init", first)
    if weight is not None:
        check_weight(weight)
    options = KMeansOptions(
        n_clusters, n_iter, init, first, init_samples, n_init, tol, metric, empty, precision, deterministic
    )
    if backend == "triton" and xs[0].numel():
        from fgfast.kernels.kmeans import launch as kernels
        from fgfast.kernels.kmeans import pyramid as pyramids

        with exact(xs[0].device, precision):
            if size is not None:
                return pyramids.kmeans(xs, (size[0], size[1]), weight, seed, options)
            return kernels.kmeans(xs[0], weight, seed, options)
    outs = _outputs(xs, n_clusters, size)
    starts = groups(len(xs[0]), sum(m[:1].numel() for m in xs), xs[0].device)
    with exact(xs[0].device, precision):
        for b in starts:
            part = slice(b, b + starts.step)
            maps = [m[part] for m in xs]
            of_maps = NativePyramid if backend == "native" else Pyramid
            source = Dense(maps[0].flatten(2)) if size is None else of_maps(maps, (size[0], size[1]))
            w, c = (None if t is None else t[part] for t in (weight, first))
            result = _solve(source, w, seed, options._replace(first=c))
            for out, value in zip(outs, result, strict=True):
                out[part] = value
    return outs


# fmt: off
@_kmeans.register_fake
def _(  # type: ignore[no-untyped-def]
    xs, n_clusters, size, n_iter, init, first, init_samples, n_init, tol, weight, metric, empty, seed, precision,
    deterministic=True, backend="torch",
):
    return _outputs(xs, n_clusters, size)
# fmt: on


_kmeans.loop_in_vmap()


def kmeans(
    x: Tensor | Array | Sequence[Tensor | Array],
    n_clusters: int,
    *,
    size: int | tuple[int, int] | None = None,
    n_iter: int = 20,
    init: str | Tensor | Array = "k-means++",
    init_samples: int | None = None,
    n_init: int = 1,
    tol: float = 1e-4,
    weight: Tensor | Array | None = None,
    metric: str = "euclidean",
    empty: str = "farthest",
    seed: int | Tensor | None = None,
    precision: str = "ieee",
    deterministic: bool = True,
    backend: str | None = None,
) -> KMeansResult:
    r"""Cluster the pixels of each image on its own, or of a feature pyramid without building its hypercolumns.

    .. math:: \min_{c, labels} \sum_n w_n |x_n - c_{labels_n}|^2

    Lloyd's iteration by scikit-learn's rules: it stops when the labels repeat or when the squared movement of the
    centroids is at most tol x the mean variance of the features (over the pixels that count); an empty cluster takes
    the pixel farthest from its centroid, out of that one's sum; a last assignment makes labels, counts and inertia
    belong to the centroids returned. With metric "cosine" pixels are unit vectors, the distance is 1 - cosine and
    centroids are renormalised. Every problem of a batch draws the same random numbers, so its result does not depend on
    its neighbours. Not differentiable: every output is a constant.

    Products and sums are float32 (float64 for float64) of pixels less a point near them. Whatever offset the pixels
    share, the inertia is exact to 1e-6 x (inertia + sum of weight x squared distance from the mean). It belongs to the
    centroids before they are rounded to float32 for the result, by at most 6e-8 |c|. In half precision the Triton
    kernels round c - m, m the mean of the pixels, to the dtype of x (bfloat16: by 2^-9 of it, float16: 2^-12) and
    assign to these rounded centroids, with an error of 1e-7 |m| |c - m| per squared distance. On the CPU squares may
    exceed the range of float32; on a device a pixel for which they do counts as not finite.

    Args:
        x: float [N, D] (one problem), [B, N, D] or [B, D, H, W], any strides; or a list of maps [B, D_l, h_l, w_l],
            whose pixels are the maps resized to size (bilinear, align_corners=False, no antialias), channels in order.
            x, init and weight may be NumPy arrays (or convert to them, as DataFrames do): x is taken to the CPU, init
            and weight to the device of x, and the result is tensors. Integers and booleans of up to 16 bits become
            float32, wider ones float64 (scikit-learn: all float64).
        n_clusters: K, 1 to the number of pixels.
        size: (H, W) or one number for a square; for a list of maps, and only there.
        n_iter: largest number of iterations, 0 or more.
        init: "k-means++" (greedy, as scikit-learn's), "random" (distinct pixels, in proportion to their weight) or
            centroids [B, K, D] or [K, D].
        init_samples: how many pixels k-means++ chooses from, drawn half evenly and half in proportion to the distance
            from the centre (so that a few far ones are not missed), and weighted for it; None means max(16 K, 1024).
        n_init: runs, the one of least inertia is returned; of no use with a tensor init.
        tol: see above, 0 or more.
        weight: float, the spatial shape of x (size for maps), not negative; 0 leaves a pixel out.
        metric: "euclidean" or "cosine".
        empty: "farthest", or "keep" to leave an empty cluster where it was.
        seed: int from 0 to 2^63 - 1 or 0-d int64 tensor on the device of x; the same seed gives the same result. None
            draws one.
        precision: "ieee" or "tf32": how float32 products are made on a GPU.
        deterministic: False lets the Triton kernel add sums with atomics; everything else has a fixed order anyway.
        backend: "torch", "reference", "triton" (of a list of maps up to 256 clusters) or "native" (compiled, of a list
            of maps on a CPU, not float64); strict. None follows `use_backend`, and takes "native" where it can.

    Returns:
        KMeansResult: centroids [B, K, D] float32 (float64 for float64), labels int64 in the spatial shape of x (-1
        where weight is 0 or the pixel is not finite; ties go to the lowest index), counts float32 [B, K] sums of
        weight, inertia float32 [B] (NaN where a pixel of positive weight is not finite, which affects nothing else),
        n_iter int32 [B]. One problem [N, D] has no B.

    Raises:
        ValueError: shapes, devices, numbers or names do not fit, K > N, or (seen on the CPU) negative weights.
        TypeError: something is not a tensor or array of real numbers, a number not whole or of another type.

    Example:
        >>> import torch
        >>> from fgfast import kmeans
        >>> x = torch.tensor([[0.0], [1.0], [8.0], [9.0]])
        >>> result = kmeans(x, 2, seed=0)
        >>> sorted(result.centroids.flatten().tolist()), result.inertia.item()
        ([0.5, 8.5], 1.0)
        >>> maps = [torch.rand(2, 8, 16, 16), torch.rand(2, 32, 4, 4)]
        >>> kmeans(maps, 5, size=(16, 16)).labels.shape
        torch.Size([2, 16, 16])

    Source: Lloyd 1982; Arthur and Vassilvitskii, "k-means++", SODA 2007; scikit-learn's KMeans; per-image clustering of
    hypercolumns as in PARTICLE (Saha and Maji).
    """
    choose("metric", metric, METRICS)
    choose("empty", empty, ("farthest", "keep"))
    choose("precision", precision, ("ieee", "tf32"))
    if isinstance(x, list | tuple):
        xs, full = check_maps(x, size)
        shape: tuple[int, ...] = (xs[0].shape[0], *full)
        alone = False
    else:
        x = as_floats("x", x)
        if size is not None:
            raise ValueError("size is given but x is one tensor: size belongs to a list of maps.")
        pixel_columns, shape = columns(x.detach())
        xs, full, alone = [pixel_columns], None, x.dim() == 2
    batch, channels, device = xs[0].shape[0], sum(m.shape[1] for m in xs), xs[0].device
    pixels = math.prod(xs[0].shape[2:]) if full is None else math.prod(full)
    check_counts(n_clusters, pixels, n_iter, n_init, init_samples, tol)
    samples = max(16 * n_clusters, 1024) if init_samples is None else init_samples
    first = None
    if isinstance(init, str):
        choose("init", init, ("k-means++", "random"))
    else:
        first = match_centroids("init", init, batch, channels, device)
        if first.shape[1] != n_clusters:
            raise ValueError(f"init holds {first.shape[1]} centroids but n_clusters is {n_clusters}: make them agree.")
        n_init = 1
        seed = 0 if seed is None else seed  # nothing is drawn
    w = flat_weight(weight, shape, batch, device)
    chosen = seed_tensor(seed, device)
    name = init if isinstance(init, str) else "given"
    op, backends = "kmeans", preference("kmeans", xs[0])
    if full is not None and n_clusters > MOST_OF_MAPS:
        op, backends = f"kmeans of a list of maps in {n_clusters} clusters", BACKENDS
    if full is not None and device.type == "cpu" and xs[0].dtype != torch.float64:
        backends = ("native", *backends) if missing("native") is None else (*backends, "native")
    which = resolve(op, backend, backends)
    if which == "reference" and not transformed(*xs, first, w):
        if w is not None:
            check_weight(w)
        if first is not None:
            check_finite("init", first)
        built = xs if full is not None else xs[0].flatten(2).transpose(1, 2)
        begin = name if first is None else first
        outs = reference.kmeans(built, n_clusters, full, n_iter, begin, samples, n_init, tol, w, metric, empty, chosen)
    else:
        if which == "triton":
            check_triton("x", xs[0])
        outs = _kmeans(
            xs, n_clusters, None if full is None else list(full), n_iter, name, first, samples, n_init, float(tol), w,
            metric, empty, chosen, precision, deterministic, which,
        )  # fmt: skip
    if alone:
        centroids, _, counts, inertia, steps = (out[0] for out in outs)
    else:
        centroids, _, counts, inertia, steps = outs
    return KMeansResult(centroids, outs[1].reshape(shape), counts, inertia, steps)
