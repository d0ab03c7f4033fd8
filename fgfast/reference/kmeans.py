"""k-means in plain PyTorch, one problem at a time on the built matrix: every backend is tested against it.

It computes in float64, where neither a common offset of the pixels nor their scale costs digits that float32 shows.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast.reference.draws import spaced_pixels, uniform
from fgfast.tensors import EPS


def hypercolumns(maps: list[Tensor], size: tuple[int, int]) -> Tensor:
    """[B, H W, sum of D_l]: the maps [B, D_l, h, w] resized bilinearly and joined in list order.

    Example:
        >>> hypercolumns([torch.zeros(1, 2, 4, 4), torch.ones(1, 3, 2, 2)], (4, 4)).shape
        torch.Size([1, 16, 5])
    """
    resized = [m if m.shape[2:] == size else F.interpolate(m, size, mode="bilinear", align_corners=False) for m in maps]
    return torch.cat(resized, 1).flatten(2).transpose(1, 2)


def _distances(x: Tensor, centroids: Tensor, metric: str) -> Tensor:
    """[N, K] squared distances, or 1 - cosine of unit vectors x."""
    if metric == "cosine":
        return 1 - x @ F.normalize(centroids, dim=1, eps=EPS).T
    return torch.stack([(x - c).square().sum(1) for c in centroids], 1)


def _prepare_pixels(x: Tensor, weight: Tensor | None, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels [N, D] in float64, non-finite ones zero (unit vectors for cosine), their weights, which are finite."""
    finite = x.isfinite().all(1)
    x = torch.where(finite[:, None], x.double(), 0)
    if metric == "cosine":
        x = F.normalize(x, dim=1, eps=EPS)
    w = torch.ones(len(x), dtype=x.dtype, device=x.device) if weight is None else weight.double()
    return x, torch.where(finite, w, 0), finite | (w <= 0)


def _assign(x: Tensor, w: Tensor, centroids: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Labels [N], -1 for weight 0, and the distance of each pixel from its centroid."""
    nearest, labels = _distances(x, centroids, metric).min(1)
    return torch.where(w > 0, labels, -1), torch.where(w > 0, nearest.clamp_min(0), 0)


def _totals(x: Tensor, w: Tensor, labels: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    hot = (labels[:, None] == torch.arange(n_clusters, device=x.device)) * w[:, None]  # [N, K]
    return hot.T @ x, hot.sum(0)


def kmeans_step(
    x: Tensor, centroids: Tensor, weight: Tensor | None = None, metric: str = "euclidean"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels [B, N], sums [B, K, D], counts [B, K] and inertia [B] of x [B, N, D] at centroids [B, K, D].

    Example:
        >>> kmeans_step(torch.tensor([[[0.0], [1.0], [9.0]]]), torch.tensor([[[0.0], [8.0]]]))[0].tolist()
        [[0, 0, 1]]
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, pixels, _ = x.shape
    labels = torch.empty(batch, pixels, dtype=torch.int64, device=x.device)
    sums = torch.zeros_like(centroids, dtype=wide)
    counts, inertia = sums.new_zeros(sums.shape[:2]), sums.new_zeros(batch)
    for b in range(batch):
        xb, w, finite = _prepare_pixels(x[b], None if weight is None else weight[b], metric)
        labels[b], nearest = _assign(xb, w, centroids[b].double(), metric)
        sums[b], counts[b] = _totals(xb, w, labels[b], centroids.shape[1])
        inertia[b] = (w * nearest).sum() if bool(finite.all()) else math.nan
    return labels, sums, counts.float(), inertia.float()


def random_pixels(w: Tensor, seed: Tensor, stream: int, n: int) -> Tensor:
    """Distinct pixels drawn in proportion to their weight: the n largest log(u) / w (Efraimidis and Spirakis, 2006)."""
    keys = torch.log(uniform(seed, stream, len(w)) + 2**-33) / w.clamp_min(1e-30)
    return torch.where(w > 0, keys, -math.inf).topk(n).indices.sort().values


def sample(x: Tensor, w: Tensor, few: Tensor, seed: Tensor, stream: int, n: int, metric: str) -> tuple[Tensor, Tensor]:
    """Indices and weights of n pixels that stand for all, as `fgfast.pixels.init.sample_pixels` draws them.

    The centre is the median of those of the pixels ``few`` that count.
    """
    centre = torch.where((w[few] > 0)[:, None], x[few], math.nan).nanmedian(0).values.nan_to_num(0.0)
    mass = w * _distances(x, centre[None], metric)[:, 0]
    chance = (w > 0) / (w > 0).sum().clamp_min(1) + mass / mass.sum().clamp_min(1e-300)
    top = (chance / (uniform(seed, stream, len(w)) + 2**-33)).topk(n + 1)
    index = top.indices[:n].sort().values
    stands_for = torch.where(chance[index] > 0, (top.values[n] / chance[index]).clamp_min(1), 0)
    return index, w[index] * stands_for


def _draw(p: Tensor, u: Tensor) -> Tensor:
    """Positions drawn in proportion to p by uniform numbers u."""
    c = p.double().cumsum(0)
    return torch.searchsorted(c, u.to(c.device) * c[-1], right=True).clamp_max(len(p) - 1)


def starts(
    x: Tensor,
    w: Tensor,
    few: Tensor,
    n_clusters: int,
    init: str,
    init_samples: int,
    metric: str,
    seed: Tensor,
    run: int,
) -> Tensor:
    """K rows of x: greedy k-means++ with 2 + floor(log K) trials, as scikit-learn does it, or "random" pixels."""
    if init == "random":
        return x[random_pixels(w, seed, 3 * run + 1, n_clusters)]
    if init_samples < len(x):
        chosen, w = sample(x, w, few, seed, 3 * run + 1, init_samples, metric)
        x = x[chosen]
    trials = 2 + int(math.log(n_clusters))
    u = uniform(seed, 3 * run + 2, n_clusters * trials).view(n_clusters, trials)
    rows = [x[_draw(w, u[0, :1])[0]]]
    closest = _distances(x, rows[0][None], metric)[:, 0].clamp_min(0)
    for k in range(1, n_clusters):
        p = closest * w
        candidates = x[_draw(p if float(p.sum()) > 0 else w, u[k])]  # [trials, D]
        closer = torch.minimum(closest[:, None], _distances(x, candidates, metric).clamp_min(0))
        best = int((closer * w[:, None]).sum(0).argmin())
        rows.append(candidates[best])
        closest = closer[:, best]
    return torch.stack(rows)


def _relocate_empty(
    x: Tensor, w: Tensor, labels: Tensor, nearest: Tensor, sums: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Give each empty cluster the farthest pixel that is left, taken from its donor (scikit-learn's rule)."""
    sums, counts = sums.clone(), counts.clone()
    far = torch.where(w > 0, nearest, -1).topk(len(counts)).indices
    if float(nearest.max()) > 0:
        for pixel, k in zip(far.tolist(), (counts == 0).nonzero()[:, 0].tolist(), strict=False):
            if w[pixel] > 0:
                donor = int(labels[pixel])
                sums[donor] -= w[pixel] * x[pixel]
                counts[donor] -= w[pixel]
                sums[k], counts[k] = w[pixel] * x[pixel], w[pixel]
    return sums, counts


def _lloyd(
    x: Tensor, w: Tensor, centroids: Tensor, n_iter: int, tol: float, metric: str, empty: str
) -> tuple[Tensor, int]:
    kept = x[w > 0]
    limit = tol * float(kept.var(0, unbiased=False).mean()) if len(kept) else 0.0
    before = None
    for i in range(n_iter):
        labels, nearest = _assign(x, w, centroids, metric)
        sums, counts = _totals(x, w, labels, len(centroids))
        if empty == "farthest" and bool((counts == 0).any()):
            sums, counts = _relocate_empty(x, w, labels, nearest, sums, counts)
        full = (counts > 0)[:, None]
        means = (
            F.normalize(sums, dim=1, eps=EPS) if metric == "cosine" else sums / torch.where(full, counts[:, None], 1)
        )
        moved = torch.where(full, means, centroids)
        shift = float((moved - centroids).square().sum())
        centroids = moved
        if shift <= limit or (before is not None and torch.equal(labels, before)):
            return centroids, i + 1
        before = labels
    return centroids, n_iter


def kmeans(
    x: Tensor | list[Tensor],
    n_clusters: int,
    size: tuple[int, int] | None,
    n_iter: int,
    init: str | Tensor,
    init_samples: int,
    n_init: int,
    tol: float,
    weight: Tensor | None,
    metric: str,
    empty: str,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Centroids [B, K, D], labels [B, N], counts, inertia and n_iter of x [B, N, D] or maps [B, D_l, h, w] with size.

    Example:
        >>> x, seed = torch.tensor([[[0.0], [1.0], [9.0], [8.0]]]), torch.tensor(0)
        >>> c, *_ = kmeans(x, 2, None, 9, "random", 4, 1, 0.0, None, "euclidean", "farthest", seed)
        >>> sorted(c[0, :, 0].tolist())
        [0.5, 8.5]
    """
    if isinstance(x, list):
        assert size is not None
        x = hypercolumns(x, size)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, pixels, channels = x.shape
    centroids = torch.zeros(batch, n_clusters, channels, dtype=wide, device=x.device)
    labels = torch.zeros(batch, pixels, dtype=torch.int64, device=x.device)
    counts, inertia = centroids.new_zeros(batch, n_clusters).float(), centroids.new_zeros(batch).float()
    steps = torch.zeros(batch, dtype=torch.int32, device=x.device)
    for b in range(batch):
        xb, w, finite = _prepare_pixels(x[b], None if weight is None else weight[b], metric)
        best = math.inf
        for run in range(n_init):
            if isinstance(init, Tensor):
                c = init[b].double()
            else:
                given = torch.ones_like(w) if weight is None else weight[b]
                c = starts(xb, w, spaced_pixels(given[None])[0], n_clusters, init, init_samples, metric, seed, run)
            if metric == "cosine":
                c = F.normalize(c, dim=1, eps=EPS)
            c, i = _lloyd(xb, w, c, n_iter, tol, metric, empty)
            ids, nearest = _assign(xb, w, c, metric)
            total = (w * nearest).sum()
            if run == 0 or float(total) < best:
                best = float(total)
                centroids[b], labels[b], counts[b] = c, ids, _totals(xb, w, ids, n_clusters)[1]
                inertia[b], steps[b] = total if bool(finite.all()) else math.nan, i
    return centroids, labels, counts, inertia, steps
