"""The interface through which k-means reads pixels, and its implementation for a matrix in memory.

Everything is expressed by inner products <y_n, m_k>, which a feature pyramid computes without building its pixels, and
by squared distances
    |y - c|^2 = |y|^2 + |c|^2 - 2 <y, c>,   y = factor (x - shift).
The shift is a point near the pixels, the median of a few of them (a mean would follow one far pixel): without it the
right side would subtract numbers of the size of the mean, and lose the digits in which the pixels differ. It is
subtracted from each tile as it is read, or once where the pixels are few. The factor is a power of two, and is 1 unless
squares would leave the range of the dtype.
Cosine: u = y / |y|, shift 0, distance 1 - <u, c>; the factor 1 / |y| scales inner products and one-hot entries, not
pixels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from fgfast.reference.draws import spaced_pixels
from fgfast.tensors import EPS, accumulation

COPIED = 1 << 22  # elements, 16 MiB of float32: so many pixels are copied, shifted or as the sample of a start
PIXEL_TILE = 1 << 19  # elements of a tile of pixels: 2 MiB of float32, small enough for a core's cache


def one_hot(labels: Tensor, scale: Tensor, n_clusters: int) -> Tensor:
    """[B, K, n] with ``scale`` [B, n] at the label of each pixel."""
    hot = scale.new_zeros(scale.shape[0], n_clusters, scale.shape[1])
    return hot.scatter_(1, labels[:, None], scale[:, None])


def least(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The minimum over k of scores [B, K, n], and the lowest k that has it."""
    k = torch.arange(scores.shape[1], dtype=scores.dtype, device=scores.device)[:, None]
    best = scores.amin(1)
    first = torch.where(scores == best[:, None], k, scores.shape[1] - 1).amin(1)
    return best, first.to(torch.int64)


def to_relative(x: Tensor, shift: Tensor | None, factor: Tensor | None) -> Tensor:
    """Vectors x [B, n, D] as factor (x - shift), shift [B, D] and factor [B]; None for 0 and 1."""
    if factor is not None:
        x = x * factor[:, None, None]
        shift = None if shift is None else shift * factor[:, None]
    return x if shift is None else x - shift[:, None]


def from_relative(y: Tensor, shift: Tensor | None, factor: Tensor | None) -> Tensor:
    """The inverse of `to_relative`."""
    y = y if factor is None else y / factor[:, None, None]
    return y if shift is None else y + shift[:, None]


def unit(c: Tensor) -> Tensor:
    """Vectors c [..., D] divided by their lengths, whose squares may be beyond the range of the dtype."""
    largest = c.abs().amax(-1, keepdim=True).clamp_min(1) if c.numel() else 1
    return torch.nn.functional.normalize(c / largest, dim=-1, eps=EPS)


def middle(rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """Medians [B, D] of those vectors rows [B, m, D] that are finite and have a weight [B, m]; 0 if none has."""
    good = rows.isfinite().all(2, keepdim=True)  # [B, m, 1]
    good = good if weight is None else good & (weight > 0)[..., None]
    half = (good.sum(1, keepdim=True) - 1).clamp_min(0) >> 1  # [B, 1, 1]
    ordered = torch.where(good, rows, torch.inf).sort(1).values
    return ordered.gather(1, half.expand(-1, -1, rows.shape[2]))[:, 0].nan_to_num(posinf=0)


class PixelSource(ABC):
    """B problems of N pixels with D channels; ``prepare`` comes first."""

    batch: int
    pixels: int
    channels: int  # of the vectors that are computed with
    features: int  # of the pixels as they were given
    dtype: torch.dtype  # of accumulation
    device: torch.device
    cosine: bool = False
    shift: Tensor | None = None  # [B, features]
    factor: Tensor | None = None  # [B]

    @abstractmethod
    def squares(self) -> Tensor:
        """|y_n|^2 [B, N]; not finite for a pixel that is not."""

    @abstractmethod
    def largest(self) -> Tensor:
        """The largest |x| over the channels of each pixel [B, N]; not finite for a pixel that is not."""

    @abstractmethod
    def move(self, shift: Tensor | None, factor: Tensor | None) -> None:
        """Use y = factor (x - shift) from now on, shift [B, D] and factor [B], None for 0 and 1."""

    @abstractmethod
    def inner(self, m: Tensor) -> Tensor:
        """<y_n, m_k> [B, K, N] for m [B, K, D]."""

    @abstractmethod
    def assign(self, m: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Labels, the least bias_k + <y_n, m_k> (lowest k first), the sums of scale_n y_n and of scale_n of each k."""

    @abstractmethod
    def total(self, scale: Tensor) -> Tensor:
        """Sum of scale_n y_n [B, D]; a pixel of scale 0 is masked out."""

    @abstractmethod
    def rows(self, index: Tensor) -> Tensor:
        """The y [B, m, D] of pixels index [B, m]."""

    def as_given(self, c: Tensor) -> Tensor:
        """Centroids [B, K, channels] of y as centroids [B, K, features] of x (unit vectors for cosine)."""
        return from_relative(c, self.shift, None if self.cosine else self.factor)

    def relative(self, c: Tensor) -> Tensor:
        """Centroids [B, K, D] of x as centroids of y (any length for cosine)."""
        return to_relative(c, self.shift, None if self.cosine else self.factor)

    def prepare(self, metric: str, weight: Tensor | None, shift: Tensor | None = None) -> None:
        """Find the pixels that count, a shift (None: the median of a few of these) and their |y|^2."""
        self.cosine = metric == "cosine"
        wanted = torch.ones(self.batch, self.pixels, dtype=self.dtype, device=self.device)
        wanted = wanted if weight is None else weight.to(self.dtype)
        self.few = spaced_pixels(wanted)
        if shift is None and not self.cosine:
            shift = middle(self.rows(self.few), wanted.gather(1, self.few))
        self.move(None if self.cosine else shift, None)
        squares = self.squares()
        if self.device.type == "cpu":  # only the CPU may be asked for values
            squares = self._squares_in_range(squares)
        finite = squares.isfinite()
        self.all_finite = self.device.type == "cpu" and bool(finite.all())
        self.w = torch.where(finite, wanted, 0)  # [B, N]
        self.has_nonfinite = ((wanted > 0) & ~finite).any(1)  # [B]
        self.squared_norms, self.scale = torch.where(finite, squares, 0), self.w
        if self.cosine:
            self.inverse_norms = self.squared_norms.sqrt().clamp_min(EPS).reciprocal()
            self.scale = self.w * self.inverse_norms

    def _squares_in_range(self, squares: Tensor) -> Tensor:
        """|y|^2 after a change of the factor of problems whose squares overflow or vanish."""
        if not squares.numel() or not self.channels:
            return squares
        info = torch.finfo(self.dtype)
        high, low, exponents = info.max**0.75, info.tiny**0.75, round(math.log2(info.max))
        top = squares.amax(1)
        if bool(((top < high) & ((top >= low) | self.cosine)).all()):
            return squares
        top = torch.where(squares.isfinite(), squares, 0).amax(1)
        largest = self.largest()
        if self.shift is not None:
            largest = largest + self.shift.abs().amax(1, keepdim=True)
        size = torch.where(largest.isfinite(), largest, 0).amax(1)
        exponent = torch.where(size < high**0.5, 0, torch.frexp(size).exponent.clamp_max(exponents - 8))
        if not self.cosine:
            vanishing = (top < low) & (exponent == 0)
            exponent = torch.where(vanishing, -5 * exponents // 8, exponent)  # then |y| < high^(1/2)
        self.move(self.shift, torch.ldexp(torch.ones_like(size), -exponent))
        return self.squares()

    def true_inertia(self, inertia: Tensor) -> Tensor:
        """The inertia [B] in x from that in y."""
        return inertia if self.factor is None or self.cosine else inertia / self.factor / self.factor

    def sums_as_given(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Sums [B, K, D] of w x from the sums and counts of w y."""
        sums = sums if self.factor is None or self.cosine else sums / self.factor[:, None, None]
        return sums if self.shift is None else sums + counts[..., None] * self.shift[:, None]

    def variance(self) -> Tensor:
        """Mean over the features of the variance of y over the pixels that count [B]."""
        counted = (self.w > 0).to(self.dtype)
        n = counted.sum(1).clamp_min(1)
        inverse = self.inverse_norms if self.cosine else torch.ones_like(counted)
        mean = self.total(counted * inverse) / n[:, None]
        spread = (counted * self.squared_norms * inverse.square()).sum(1) / n - mean.square().sum(1)
        return spread.clamp_min(0) / max(1, self.features)

    def spread(self) -> Tensor:
        """Distance of each pixel [B, N] from the median of a few; 0 where none counts."""
        if not self.cosine:
            return self.squared_norms * (self.w > 0)
        centre = middle(self.points(self.few), self.w.gather(1, self.few))
        return self.distances(unit(centre)[:, None])[:, 0]

    def _score_terms(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """The m [B, K, D] and bias [B, K] whose scores order the centroids c for each pixel."""
        if self.cosine:
            return -c, c.new_zeros(c.shape[:2])
        return -2 * c, c.square().sum(2)

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

    def subset(self, index: Tensor) -> "Dense":
        """These pixels [B, m] of each problem as a matrix; squared norms are reused."""
        part = Dense(self.rows(index).mT)
        part.cosine, part.all_finite = self.cosine, self.all_finite
        part.w, part.scale = self.w.gather(1, index), self.scale.gather(1, index)
        part.squared_norms = self.squared_norms.gather(1, index)
        if self.cosine:
            part.inverse_norms = self.inverse_norms.gather(1, index)
        return part

    def points(self, index: Tensor) -> Tensor:
        """Pixels [B, m, D] as centroids: unit vectors for cosine, zeros in place of what is not finite."""
        rows = self.rows(index)
        rows = torch.where(rows.isfinite(), rows, 0)
        return unit(rows) if self.cosine else rows


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
        self.y: Tensor | None = None

    def move(self, shift: Tensor | None, factor: Tensor | None) -> None:
        """Use y = factor (x - shift) from now on, copied once if that is small, else tile by tile."""
        self.shift, self.factor = shift, factor
        self.y = self._relative(slice(None)) if self.x.numel() <= COPIED else None

    def _relative(self, pixels: slice) -> Tensor:
        """Y of these pixels [B, D, n]."""
        return to_relative(self.x[:, :, pixels].to(self.dtype).mT, self.shift, self.factor).mT

    def _tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for n in tiles(self.x):
            yield n, self._relative(n) if self.y is None else self.y[:, :, n]

    def squares(self) -> Tensor:
        """|y_n|^2 [B, N]."""
        out = torch.empty(self.batch, self.pixels, dtype=self.dtype, device=self.device)
        for n, y in self._tiles():
            out[:, n] = y.square().sum(1)
        return out

    def largest(self) -> Tensor:
        """The largest |x| of each pixel [B, N]."""
        return torch.linalg.vector_norm(self.x, torch.inf, 1, dtype=self.dtype)

    def inner(self, m: Tensor) -> Tensor:
        """<y_n, m_k> [B, K, N]."""
        out = torch.empty(self.batch, m.shape[1], self.pixels, dtype=self.dtype, device=self.device)
        for n, y in self._tiles():
            out[:, :, n] = torch.bmm(m, y)
        return out

    def assign(self, m: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One read of x: scores, labels and sums of a tile while it is in the cache."""
        labels = torch.empty(self.batch, self.pixels, dtype=torch.int64, device=self.device)
        best = torch.empty(self.batch, self.pixels, dtype=self.dtype, device=self.device)
        sums, counts = torch.zeros_like(m), torch.zeros_like(bias)
        for n, y in self._tiles():
            best[:, n], labels[:, n] = torch.baddbmm(bias[..., None], m, y).min(1)
            hot = one_hot(labels[:, n], scale[:, n], m.shape[1])
            sums += self._weighted_sums(y, hot)
            counts += hot.sum(2)
        return labels, best, sums, counts

    def total(self, scale: Tensor) -> Tensor:
        """Sum of scale_n y_n [B, D]."""
        sums = torch.zeros(self.batch, 1, self.channels, dtype=self.dtype, device=self.device)
        for n, y in self._tiles():
            sums += self._weighted_sums(y, scale[:, None, n])
        return sums[:, 0]

    def _weighted_sums(self, y: Tensor, hot: Tensor) -> Tensor:
        """[B, k, n] x [B, n, D]. Zero times NaN is NaN, so select first."""
        if not self.all_finite:
            y = torch.where(y.isfinite(), y, 0)
        return torch.bmm(hot, y.transpose(1, 2))

    def rows(self, index: Tensor) -> Tensor:
        """Pixels [B, m, D]."""
        picked = self.x.gather(2, index[:, None].expand(-1, self.channels, -1))
        return to_relative(picked.mT.to(self.dtype), self.shift, self.factor)
