"""Lloyd's iteration by scikit-learn's rules, for a batch of problems, without synchronising with the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast.pixels.result import LloydResult
from fgfast.pixels.source import PixelSource
from fgfast.tensors import EPS


def _relocate_empty(
    source: PixelSource, labels: Tensor, near: Tensor, sums: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Give the i-th empty cluster the i-th farthest pixel, which is subtracted from the sum of its donor."""
    n_clusters = counts.shape[1]
    empty = counts == 0
    far_near, far = torch.where(source.w > 0, near, -1).topk(n_clusters, dim=1)  # [B, K]
    rank = (empty.cumsum(1) - 1).clamp_min_(0)  # [B, K]: which of the farthest an empty cluster takes
    pixel = far.gather(1, rank)
    w = source.w.gather(1, pixel)
    w = torch.where(empty & (w > 0) & (far_near[:, :1] > 0), w, 0)  # [B, K]
    moved = source.points(pixel) * w[..., None]  # [B, K, D], row k goes to cluster k
    donors = F.one_hot(labels.gather(1, pixel).clamp_min(0), n_clusters).to(w.dtype)  # [B, K (to), K (from)]
    sums = sums + moved - torch.bmm(donors.transpose(1, 2), moved)
    return sums, counts + w - torch.bmm(donors.transpose(1, 2), w[..., None])[..., 0]


def _means(source: PixelSource, sums: Tensor, counts: Tensor) -> Tensor:
    means = sums / counts[..., None]
    return F.normalize(means, dim=2, eps=EPS) if source.cosine else means


def lloyd(source: PixelSource, centroids: Tensor, n_iter: int, tol: float, empty: str) -> LloydResult:
    """Iterate until labels repeat or centroids move less than tol x the mean variance, then assign once more.

    The inertia is that of the finite pixels. A problem that has converged keeps its state; on a CPU, where the host can
    look at the values, the loop then ends early.
    """
    host = source.device.type == "cpu"
    limit = tol * source.variance() if tol else 0.0
    done = torch.zeros(source.batch, dtype=torch.bool, device=source.device)
    steps = torch.zeros(source.batch, dtype=torch.int32, device=source.device)
    labels_before, fresh, alone = None, False, host and source.batch == 1
    for _ in range(n_iter):
        labels, near, sums, counts = source.step(centroids)
        if host and bool((counts > 0).all()):
            moved = _means(source, sums, counts)
        else:
            if empty == "farthest":
                sums, counts = _relocate_empty(source, labels, near, sums, counts)
            full = counts > 0
            moved = torch.where(full[..., None], _means(source, sums, torch.where(full, counts, 1)), centroids)
        shift = (moved - centroids).square().sum((1, 2))
        steps += ~done
        before, centroids = centroids, moved if alone else torch.where(done[:, None, None], centroids, moved)
        done = done | (shift <= limit)
        if labels_before is not None:
            done = done | (labels == labels_before).all(1)
        labels_before = labels
        if host and bool(done.all()):
            fresh = torch.equal(before, centroids)  # then this assignment already belongs to them
            break
    if not fresh:
        labels, near, _, counts = source.step(centroids)
    return LloydResult(centroids, labels, counts, (source.w * near).sum(1), steps)
