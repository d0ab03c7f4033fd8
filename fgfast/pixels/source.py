"""The interface through which k-means reads pixels, and its implementation for a matrix in memory.

Everything is expressed by inner products <x_n, m_k>, which a feature pyramid computes without building its pixels.
Squared distances are taken around a point mu, the mean of the pixels: with c' = c - mu,
    |x - c|^2 = |x - mu|^2 + |c'|^2 + 2 <mu, c'> - 2 <x, c'>,
which is far more precise than |x|^2 - 2 <x, c> + |c|^2 when the mean is large, and needs no extra pass over the pixels.
Cosine: u = x / |x|, distance 1 - <u, c>; the factor 1 / |x| scales inner products and one-hot entries, not pixels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from fgfast.tensors import accumulation

EPS = 1e-12
PIXEL_TILE = 1 << 19  # elements of a tile of pixels: 2 MiB of float32, small enough for a core's cache


def one_hot(labels: Tensor, scale: Tensor, n_clusters: int) -> Tensor:
    """[B, K, n] with ``scale`` [B, n] at the label of each pixel."""
    hot = scale.new_zeros(scale.shape[0], n_clusters, scale.shape[1])
    return hot.scatter_(1, labels[:, None], scale[:, None])


class PixelSource(ABC):
    """B problems of N pixels with D channels; ``prepare`` comes first."""

    batch: int
    pixels: int
    channels: int  # of the vectors that are computed with
    features: int  # of the pixels as they were given
    dtype: torch.dtype  # of accumulation
    device: torch.device

    @abstractmethod
    def squares(self, mu: Tensor | None) -> Tensor:
        """|x_n - mu|^2 [B, N], mu [B, D] or None for 0; not finite for a pixel that is not."""

    def finite(self) -> Tensor:
        """Which pixels are finite, bool [B, N]."""
        return self.squares(None).isfinite()

    @abstractmethod
    def inner(self, m: Tensor) -> Tensor:
        """<x_n, m_k> [B, K, N] for m [B, K, D]."""

    @abstractmethod
    def assign(self, m: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Labels, the least bias_k + <x_n, m_k> (lowest k first), the sums of scale_n x_n and of scale_n of each k."""

    @abstractmethod
    def total(self, scale: Tensor) -> Tensor:
        """Sum of scale_n x_n [B, D]; a pixel of scale 0 is masked out."""

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """The pixels index [B, m] themselves, [B, m, D]."""

    def as_given(self, c: Tensor) -> Tensor:
        """Centroids [B, K, channels] as [B, K, features]."""
        return c

    def prepare(self, metric: str, weight: Tensor | None, center: Tensor | None) -> None:
        """Find the pixels that count and their squared distances from center [B, D] (None: their mean; cosine: 0)."""
        self.cosine = metric == "cosine"
        center = None if self.cosine else center
        squares = self.squares(center) if self.cosine or center is not None else None
        finite = self.finite() if squares is None else squares.isfinite()
        wanted = torch.ones_like(finite, dtype=self.dtype) if weight is None else weight.to(self.dtype)
        self.all_finite = self.device.type == "cpu" and bool(finite.all())  # only the CPU may be asked
        self.w = torch.where(finite, wanted, 0)  # [B, N]
        self.has_nonfinite = ((wanted > 0) & ~finite).any(1)  # [B]
        if squares is None:
            counted = (self.w > 0).to(self.dtype)
            center = self.total(counted) / counted.sum(1, keepdim=True).clamp_min(1)
            squares = self.squares(center)
        self.squared_norms, self.scale = torch.where(finite, squares, 0), self.w
        if self.cosine:
            self.inverse_norms = self.squared_norms.sqrt().clamp_min(EPS).reciprocal()
            self.scale = self.w * self.inverse_norms
        elif center is not None:
            self.center = center

    def variance(self) -> Tensor:
        """Mean over the features of their variance over the pixels that count [B]."""
        counted = (self.w > 0).to(self.dtype)
        n = counted.sum(1).clamp_min(1)
        if self.cosine:
            mean = self.total(counted * self.inverse_norms) / n[:, None]
            spread = (counted * self.squared_norms * self.inverse_norms.square()).sum(1) / n - mean.square().sum(1)
        else:
            spread = (counted * self.squared_norms).sum(1) / n
        return spread.clamp_min(0) / max(1, self.features)

    def _score_terms(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """The m [B, K, D] and bias [B, K] whose scores order the centroids c for each pixel."""
        if self.cosine:
            return -c, c.new_zeros(c.shape[:2])
        d = c - self.center[:, None]
        return -2 * d, d.square().sum(2) + 2 * (d * self.center[:, None]).sum(2)

    def step(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Labels [B, N] (-1 where weight is 0), distances [B, N], sums [B, K, D] and counts [B, K]."""
        m, bias = self._score_terms(c)
        labels, best, sums, counts = self.assign(m, bias, self.scale)
        if self.cosine:
            counts = one_hot(labels, self.w, c.shape[1]).sum(2)
        kept = self.w > 0
        near = 1 + best * self.inverse_norms if self.cosine else best + self.squared_norms
        near = torch.where(kept, near.clamp_min(0), 0)
        return torch.where(kept, labels, -1), near, sums, counts

    def distances(self, points: Tensor) -> Tensor:
        """[B, m, N] distances of every pixel from points [B, m, D] (unit vectors for cosine), 0 where none counts."""
        m, bias = self._score_terms(points)
        scores = self.inner(m) + bias[..., None]
        near = 1 + scores * self.inverse_norms[:, None] if self.cosine else scores + self.squared_norms[:, None]
        return near.clamp_min_(0).masked_fill_((self.w <= 0)[:, None], 0)

    def points(self, index: Tensor) -> Tensor:
        """Pixels [B, m, D] as centroids: unit vectors for cosine, zeros in place of what is not finite."""
        rows = self.rows(index)
        rows = torch.where(rows.isfinite(), rows, 0)
        return torch.nn.functional.normalize(rows, dim=2, eps=EPS) if self.cosine else rows


def tiles(x: Tensor) -> Iterator[slice]:
    """Which pixels of x [B, D, N] make one tile."""
    n = max(64, PIXEL_TILE // max(1, x.shape[0] * x.shape[1]))
    return (slice(start, start + n) for start in range(0, x.shape[2], n))


class Dense(PixelSource):
    """Pixels as the columns of x [B, D, N], any strides, read tile by tile in the dtype of accumulation."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.batch, self.channels, self.pixels = x.shape
        self.features = self.channels
        self.dtype, self.device = accumulation(x.dtype), x.device

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for n in tiles(self.x):
            yield n, self.x[:, :, n].to(self.dtype)

    def squares(self, mu: Tensor | None) -> Tensor:
        """|x_n - mu|^2 [B, N]."""
        out = torch.empty(self.batch, self.pixels, dtype=self.dtype, device=self.device)
        for n, x in self._tiles():
            out[:, n] = (x if mu is None else x - mu[..., None]).square().sum(1)
        return out

    def inner(self, m: Tensor) -> Tensor:
        """<x_n, m_k> [B, K, N]."""
        out = torch.empty(self.batch, m.shape[1], self.pixels, dtype=self.dtype, device=self.device)
        for n, x in self._tiles():
            out[:, :, n] = torch.bmm(m, x)
        return out

    def assign(self, m: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One read of x: scores, labels and sums of a tile while it is in the cache."""
        labels = torch.empty(self.batch, self.pixels, dtype=torch.int64, device=self.device)
        best = torch.empty(self.batch, self.pixels, dtype=self.dtype, device=self.device)
        sums, counts = torch.zeros_like(m), torch.zeros_like(bias)
        for n, x in self._tiles():
            best[:, n], labels[:, n] = torch.baddbmm(bias[..., None], m, x).min(1)
            hot = one_hot(labels[:, n], scale[:, n], m.shape[1])
            sums += self._weighted_sums(x, hot)
            counts += hot.sum(2)
        return labels, best, sums, counts

    def total(self, scale: Tensor) -> Tensor:
        """Sum of scale_n x_n [B, D]."""
        sums = torch.zeros(self.batch, 1, self.channels, dtype=self.dtype, device=self.device)
        for n, x in self._tiles():
            sums += self._weighted_sums(x, scale[:, None, n])
        return sums[:, 0]

    def _weighted_sums(self, x: Tensor, hot: Tensor) -> Tensor:
        """[B, k, n] x [B, n, D]. Zero times NaN is NaN, so select first."""
        if not self.all_finite:
            x = torch.where(x.isfinite(), x, 0)
        return torch.bmm(hot, x.transpose(1, 2))

    def rows(self, index: Tensor) -> Tensor:
        """Pixels [B, m, D]."""
        picked = self.x.gather(2, index[:, None].expand(-1, self.channels, -1))
        return picked.transpose(1, 2).to(self.dtype)

    def subset(self, index: Tensor) -> "Dense":
        """The problems of only these pixels [B, m]; squared norms are reused."""
        part = Dense(self.rows(index).transpose(1, 2))
        part.cosine, part.all_finite = self.cosine, self.all_finite
        part.w, part.scale = self.w.gather(1, index), self.scale.gather(1, index)
        part.squared_norms = self.squared_norms.gather(1, index)
        if self.cosine:
            part.inverse_norms = self.inverse_norms.gather(1, index)
        else:
            part.center = self.center
        return part
