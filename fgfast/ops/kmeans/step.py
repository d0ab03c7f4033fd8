"""One step of k-means: labels, and the sums of the new centroids, from one or two reads of the pixels."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fgfast.backend import check_triton, preference, resolve
from fgfast.ops.kmeans.checks import (
    METRICS,
    Array,
    as_floats,
    check_finite,
    choose,
    columns,
    flat_weight,
    groups,
    match_centroids,
)
from fgfast.ops.registration import operation
from fgfast.pixels.source import Dense, middle, tiles, unit
from fgfast.reference import kmeans as reference
from fgfast.tensors import accumulation, check_weight, exact, transformed


class KMeansStep(NamedTuple):
    """What `kmeans_step` returns.

    Labels int64, sums [B, K, D] (of unit vectors for cosine), counts float32 [B, K], inertia float32 [B].
    """

    labels: Tensor
    sums: Tensor
    counts: Tensor
    inertia: Tensor


def assign_tiles(
    x: Tensor, centroids: Tensor, weight: Tensor | None, metric: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step of x [b, D, N], a tile of pixels at a time, relative to the median of a few centroids."""
    wide = accumulation(x.dtype)
    c = centroids.to(wide)
    if metric == "cosine":
        c = unit(c)
    shift = middle(c[:, :: -(-c.shape[1] // 8)])
    labels = torch.empty(len(x), x.shape[2], dtype=torch.int64, device=x.device)
    sums, counts, inertia = torch.zeros_like(c), c.new_zeros(c.shape[:2]), c.new_zeros(len(x))
    for n in tiles(x):
        source = Dense(x[:, :, n].to(wide))
        source.prepare(metric, None if weight is None else weight[:, n], shift)
        labels[:, n], near, more, heavier = source.step(source.relative(c))
        sums += source.sums_as_given(more, heavier)
        counts += heavier
        inertia += torch.where(source.has_nonfinite, torch.nan, source.true_inertia((source.w * near).sum(1)))
    return labels, sums, counts.float(), inertia.float()


@operation("kmeans_step")
def _kmeans_step(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None,
    metric: str,
    precision: str,
    deterministic: bool = True,
    backend: str = "torch",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_finite("centroids", centroids)
    if weight is not None:
        check_weight(weight)
    if backend == "triton" and x.numel():
        from fgfast.kernels.kmeans import step as kernels

        return kernels.kmeans_step(x, centroids, weight, metric, precision, deterministic)
    outs = _step_outputs(x, centroids)
    starts = groups(len(x), x[:1].numel(), x.device)
    with exact(x.device, precision):
        for b in starts:
            part = slice(b, b + starts.step)
            w = None if weight is None else weight[part]
            for out, value in zip(outs, assign_tiles(x[part].flatten(2), centroids[part], w, metric), strict=True):
                out[part] = value
    return outs


def _step_outputs(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, n_clusters, channels = centroids.shape
    return (
        x.new_empty(batch, math.prod(x.shape[2:]), dtype=torch.int64),
        x.new_empty(batch, n_clusters, channels, dtype=accumulation(x.dtype)),
        x.new_empty(batch, n_clusters, dtype=torch.float32),
        x.new_empty(batch, dtype=torch.float32),
    )


@_kmeans_step.register_fake
def _(
    x: Tensor,
    centroids: Tensor,
    weight: Tensor | None,
    metric: str,
    precision: str,
    deterministic: bool = True,
    backend: str = "torch",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _step_outputs(x, centroids)


_kmeans_step.loop_in_vmap()


def kmeans_step(
    x: Tensor | Array,
    centroids: Tensor | Array,
    *,
    weight: Tensor | Array | None = None,
    metric: str = "euclidean",
    precision: str = "ieee",
    deterministic: bool = True,
    backend: str | None = None,
) -> KMeansStep:
    r"""Assign each pixel to its nearest centroid and sum the pixels of each, reading the pixels once or twice.

    .. math:: labels_n = \min \arg\min_k |x_n - c_k|^2, \quad sums_k = \sum_{n: labels_n = k} w_n x_n, \quad
              inertia = \sum_n w_n |x_n - c_{labels_n}|^2

    With metric "cosine" x_n and c_k stand for their unit vectors and the distance is 1 - <x_n, c_k>. Every output is a
    constant: nothing here is differentiable. Products and sums are float32 (float64 for float64): a label may differ
    from the exact one where two distances agree to about 1e-6 |x - m| |c - m|, m the median of a few centroids (in the
    Triton kernel the mean of all). In half precision the Triton kernel rounds c - m to the dtype of x (bfloat16: 2^-9
    of it), assigns to these rounded centroids, and adds an error of 1e-7 |m| |c - m|.

    Args:
        x: float [N, D] (one problem), [B, N, D] or [B, D, H, W], any strides, read without a copy. Arrays and integers
            are taken here and below as `kmeans` takes them.
        centroids: float [B, K, D], or [K, D] for all problems; finite.
        weight: float, the spatial shape of x, not negative; 0 leaves a pixel out.
        metric: "euclidean" or "cosine".
        precision: "ieee" or "tf32": how float32 products are made on a GPU.
        deterministic: False lets the Triton kernel add sums with atomics; all other paths have a fixed order.
        backend: "torch", "triton" or "reference"; strict. None follows `use_backend`.

    Returns:
        KMeansStep: labels int64 in the spatial shape of x (-1 where weight is 0 or the pixel is not finite; ties go to
        the lowest index), sums [B, K, D] float32 (float64 for float64), counts float32 [B, K], inertia float32 [B] (NaN
        where a pixel of positive weight is not finite; such a pixel affects nothing else). One problem [N, D] has no B.

    Raises:
        ValueError: shapes, devices or names do not fit, or (seen on the CPU) negative weights, non-finite centroids.
        TypeError: something is not a tensor or array of real numbers.

    Example:
        >>> import torch
        >>> from fgfast import kmeans_step
        >>> x = torch.tensor([[0.0], [1.0], [9.0]])
        >>> step = kmeans_step(x, torch.tensor([[0.0], [8.0]]))
        >>> step.labels.tolist(), step.sums.tolist(), step.inertia.item()
        ([0, 0, 1], [[1.0], [9.0]], 2.0)

    Source: Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 1982.
    """
    choose("metric", metric, METRICS)
    choose("precision", precision, ("ieee", "tf32"))
    x = as_floats("x", x)
    pixels, shape = columns(x.detach())
    batch = len(pixels)
    c = match_centroids("centroids", centroids, batch, pixels.shape[1], x.device)
    w = flat_weight(weight, shape, batch, x.device)
    chosen = resolve("kmeans_step", backend, preference("kmeans_step", pixels))
    if chosen == "reference" and not transformed(pixels, c, w):
        if w is not None:
            check_weight(w)
        check_finite("centroids", c)
        outs = reference.kmeans_step(pixels.flatten(2).transpose(1, 2), c, w, metric)
    else:
        if chosen == "triton":
            check_triton("x", pixels)
        outs = _kmeans_step(pixels, c, w, metric, precision, deterministic, chosen)
    labels, *rest = outs
    sums, counts, inertia = (r[0] for r in rest) if x.dim() == 2 else rest
    return KMeansStep(labels.reshape(shape), sums, counts, inertia)
