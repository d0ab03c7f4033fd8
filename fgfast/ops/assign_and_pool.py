"""Assignment and pooling together: a group of images is labelled and pooled while it is in the cache."""

import torch
from torch import Tensor

from fgfast.backend import check_triton, preference, resolve
from fgfast.ops.derivatives import needs_definition
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
from fgfast.ops.kmeans.step import assign_tiles
from fgfast.ops.part_pool.part_pool import differentiate_pool, is_pixel_major
from fgfast.ops.part_pool.tiled import pool
from fgfast.ops.registration import operation
from fgfast.reference import assign_and_pool as reference
from fgfast.reference.part_pool import part_pool as define_pool
from fgfast.tensors import accumulation, check_weight, exact, shape_error


@operation("assign_and_pool")
def _assign_and_pool(
    features: Tensor, centroids: Tensor, weight: Tensor | None, metric: str, backend: str = "torch"
) -> tuple[Tensor, Tensor, Tensor]:
    check_finite("centroids", centroids)
    if weight is not None:
        check_weight(weight)
    if backend == "triton" and features.numel():
        from fgfast.kernels import assign_and_pool as kernels

        return kernels.assign_and_pool(features, centroids, weight, metric)
    pooled, area, labels = _outputs(features, centroids)
    starts = groups(len(features), features[:1].numel(), features.device)
    with exact(features.device):
        for b in starts:
            part = slice(b, b + starts.step)
            w = None if weight is None else weight[part]
            flat = None if w is None else w.flatten(1)
            ids = assign_tiles(features[part].flatten(2), centroids[part], flat, metric)[0]
            labels[part] = ids.view(labels[part].shape)
            pooled[part], area[part] = pool(features[part], labels[part], centroids.shape[1], w, True)
    return pooled, area, labels


def _outputs(features: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, n_parts, channels = centroids.shape
    return (
        features.new_empty(batch, n_parts, channels),
        features.new_empty(batch, n_parts, dtype=accumulation(features.dtype)),
        features.new_empty(batch, *features.shape[2:], dtype=torch.int64),
    )


@_assign_and_pool.register_fake
def _(
    features: Tensor, centroids: Tensor, weight: Tensor | None, metric: str, backend: str = "torch"
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(features, centroids)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    features, _, weight, _, ctx.backend = inputs
    ctx.pixel_major = is_pixel_major(features)
    ctx.save_for_backward(weight, *output[1:])


def _backward(ctx, grad: Tensor, grad_area: Tensor, grad_labels: None):  # type: ignore[no-untyped-def]
    weight, area, labels = ctx.saved_tensors
    out = differentiate_pool(grad, labels, weight, area, True, ctx.pixel_major, ctx.backend)
    return out, None, None, None, None


_assign_and_pool.register_autograd(_backward, setup_context=_setup)
_assign_and_pool.loop_in_vmap()


def assign_and_pool(
    features: Tensor | Array,
    centroids: Tensor | Array,
    *,
    metric: str = "euclidean",
    weight: Tensor | Array | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Label each pixel with its nearest centroid and take the mean of each part.

    .. math:: labels_p = \min \arg\min_k |f_p - c_k|^2, \quad pooled_k = \sum_{labels_p = k} w_p f_p / area_k

    Gradients reach the features through the mean; labels, area and centroids get none. Labels as in `kmeans_step`,
    pooling and its derivatives as in `part_pool` (of the features as they are, for "cosine" too).

    Args:
        features: float [B, D, h, w] or [B, N, D], any strides. Arrays and integers are taken here and below as `kmeans`
            takes them.
        centroids: float [B, K, D], or [K, D] for all images; finite.
        metric: "euclidean" or "cosine".
        weight: float, the spatial shape of features, not negative; 0 leaves a pixel out.
        backend: "triton", "torch" or "reference"; strict. None follows `use_backend`.

    Returns:
        (pooled [B, K, D] in the dtype of features, area float32 [B, K], labels int64 in the spatial shape of features).

    Raises:
        ValueError: shapes, devices or names do not fit, or (seen on the CPU) negative weights, non-finite centroids.
        TypeError: something is not a tensor or array of real numbers.

    Example:
        >>> import torch
        >>> from fgfast import assign_and_pool
        >>> x = torch.tensor([[[0.0], [1.0], [9.0]]])
        >>> pooled, area, labels = assign_and_pool(x, torch.tensor([[0.0], [8.0]]))
        >>> pooled.tolist(), area.tolist(), labels.tolist()
        ([[[0.5], [9.0]]], [[2.0, 1.0]], [[0, 0, 1]])

    Source: the assignment of Lloyd 1982, the mask pooling of DetCon (Henaff et al., ICCV 2021).
    """
    choose("metric", metric, METRICS)
    features = as_floats("features", features)
    if features.dim() not in (3, 4):
        raise shape_error("features", "[B, D, h, w] or [B, N, D]", features)
    maps, shape = columns(features)
    maps = maps if maps.dim() == 4 else maps.unsqueeze(3)
    c = match_centroids("centroids", centroids, len(maps), maps.shape[1], features.device)
    w = flat_weight(weight, shape, len(maps), features.device)
    chosen = resolve("assign_and_pool", backend, preference("assign_and_pool", maps))
    if needs_definition("assign_and_pool", backend, maps, c, w):
        spread = None if w is None else w.view(len(maps), *maps.shape[2:])
        labels = _assign_and_pool(maps.detach(), c, spread, metric, "triton" if chosen == "triton" else "torch")[2]
        pixels = maps.flatten(2).transpose(1, 2)
        pooled, area = define_pool(pixels, labels.flatten(1), c.shape[1], w)
    elif chosen == "reference":
        check_finite("centroids", c)
        if w is not None:
            check_weight(w)
        pooled, area, labels = reference.assign_and_pool(maps.flatten(2).transpose(1, 2), c, w, metric)
    else:
        w = None if w is None else w.view(len(maps), *maps.shape[2:])
        if chosen == "triton":
            check_triton("features", maps)
        pooled, area, labels = _assign_and_pool(maps, c, w, metric, chosen)
    return pooled, area.detach().float(), labels.reshape(shape)
