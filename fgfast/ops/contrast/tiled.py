r"""The contrastive loss by tiles of the logit matrix, in plain PyTorch: the "torch" backend.

Logits are kept in base 2, :math:`s'_{ij} = \log_2 e \cdot s_{ij}`, because ``exp2`` is vectorised on every CPU. A tile
is one matrix product into a buffer that every tile uses again; what survives it is three numbers a row. Forward:
:math:`Z_i = \sum_j 2^{s'_{ij}}`, the sum and the count of positives. Backward recomputes each tile and forms
:math:`\partial L / \partial s_{ij} = g_i (2^{s'_{ij} - \log_2 Z_i} - [j \in P_i] / |P_i|)` in place, then

.. math:: \partial L / \partial q_i = \tfrac 1 T \sum_j \partial L / \partial s_{ij} \, k_j, \qquad
          \partial L / \partial k_j = \tfrac 1 T \sum_i \partial L / \partial s_{ij} \, q_i .

- On the CPU, where ids may be read without a sync, a row and the few columns of its image and part are listed, by
  sorting ids, and a tile looks at its list alone. Where they are many, ``negatives`` asks for whole images or columns
  come from other ranks, ids are compared in the tiles whose ranges of image ids overlap; in the others every present
  column is a negative, or, under "same_image", none. On other devices ids are compared in every tile.
- With unit vectors logits are bounded by 1 / T. Up to :data:`BOUNDED` no running maximum is kept.
- Where query is key, s is symmetric: a tile serves its rows and its columns, which halves the exponentials and the
  products of the forward pass and of the recomputation, and lets one product a side do for both gradients.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fgfast.ids import Ids
from fgfast.tensors import BOUNDED, LOG2E

LOGIT_TILE = {"cpu": 512}  # rows and columns of a tile, by device type
LOGIT_TILE_ON_DEVICE = 2048
MOST_PAIRS = 1 << 18  # pairs that are listed at most: 29 MiB while they are found, 6 MiB then
EPS = 1e-12
LN2 = math.log(2)


def logit_scale(tensor: Tensor | None, number: float, dtype: torch.dtype) -> float | Tensor:
    """log2(e) / T: what takes a product of unit vectors to a logit in base 2.

    Example:
        >>> round(logit_scale(None, 1.0, torch.float32), 4)
        1.4427
    """
    return LOG2E / number if tensor is None else LOG2E / tensor.detach().to(dtype)


@dataclass
class Side:
    """The rows or the columns of the logit matrix, read tile by tile."""

    x: Tensor  # [N, D], any dtype and strides
    ids: Ids | None  # [N] each; None for a bank, whose columns are negatives of every row
    inverse: Tensor | None  # [N] 1 / max(norm, eps); None when vectors are not normalised
    present: Tensor | None  # bool [N]; None when all are known to be present
    absent: Tensor | None  # [N] 0, or -inf where not present: added to logits
    ranges: list[tuple[int, int]] | None  # lowest and highest image id of each tile; None when unknown
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.x)

    def load(self, start: int, stop: int, scale: float | Tensor | None = None) -> Tensor:
        """Vectors start..stop as the products need them: normalised, times scale, absent ones zero. [n, D]"""
        tile = self.x[start:stop].to(self.dtype)
        factor: float | Tensor | None = None if self.inverse is None else self.inverse[start:stop, None]
        if scale is not None:
            factor = scale if factor is None else factor * scale
        if factor is not None:
            tile = tile * factor
        if self.present is not None:
            tile = torch.where(self.present[start:stop, None], tile, 0)
        return tile

    def gradient(self, start: int, stop: int, grad: Tensor) -> None:
        """Carry the gradient [n, D] of the loaded tile back to x, in place."""
        if self.inverse is not None:
            loaded = self.load(start, stop)
            inverse = self.inverse[start:stop, None]
            dot = (loaded * grad).sum(1, keepdim=True)
            dot = torch.where(inverse < 1 / EPS, dot, 0)  # under eps the norm is a constant
            grad.addcmul_(loaded, dot, value=-1).mul_(inverse)
        if self.present is not None:
            grad.copy_(torch.where(self.present[start:stop, None], grad, 0))


def make_side(
    x: Tensor, ids: Ids | None, normalize: bool, dtype: torch.dtype, negatives: str = "all", ranged: bool = True
) -> Side:
    """Norms, presence and, on the CPU where ``ranged``, ranges of image ids of the vectors x [N, D]."""
    inverse = None
    if normalize:
        inverse = x.new_empty(len(x), dtype=dtype)
        for start, stop in tiles(len(x), tile_size(x)):
            norm = torch.linalg.vector_norm(x[start:stop].to(dtype), dim=1)
            inverse[start:stop] = norm.clamp_(min=EPS).reciprocal_()
    if ids is None:
        return Side(x, None, inverse, None, None, None, dtype)
    present: Tensor | None = ids.part >= 0
    ranges = None
    if x.device.type == "cpu":
        assert present is not None
        ranges = _ranges(ids.image.to(torch.int64), present, tile_size(x, negatives)) if ranged else None
        if present.all():
            present = None
    absent = None if present is None else torch.where(present, 0, x.new_full((), -torch.inf, dtype=dtype))
    return Side(x, ids, inverse, present, absent, ranges, dtype)


def _ranges(image: Tensor, present: Tensor, size: int) -> list[tuple[int, int]]:
    """Lowest and highest image id of the present ones in each ``size`` vectors (highest under lowest: none is)."""
    if len(image) == 0:
        return []
    limits = torch.iinfo(torch.int64)
    n = -(-len(image) // size) * size
    low, high = image.new_full((n,), limits.max), image.new_full((n,), limits.min)
    low[: len(image)] = torch.where(present, image, limits.max)
    high[: len(image)] = torch.where(present, image, limits.min)
    return list(zip(low.view(-1, size).amin(1).tolist(), high.view(-1, size).amax(1).tolist(), strict=True))


def tile_size(x: Tensor, negatives: str = "all") -> int:
    """Rows, and columns, of a tile of logits on the device of x; half of that where most tiles are skipped."""
    size = LOGIT_TILE.get(x.device.type, LOGIT_TILE_ON_DEVICE)
    return size // 2 if negatives == "same_image" else size


def tiles(n: int, size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of tiles of ``size`` that cover n."""
    for start in range(0, n, size):
        yield start, min(start + size, n)


def may_share(rows: Side, a: int, columns: Side, c: int, size: int) -> bool:
    """Whether a row and a column of the tile of ``size`` that starts at a, c may be of one image."""
    if columns.ids is None:
        return False
    if rows.ranges is None or columns.ranges is None:
        return True
    (low, high), (lowest, highest) = rows.ranges[a // size], columns.ranges[c // size]
    return lowest <= high and highest >= low


def compare(rows: Side, a: int, b: int, columns: Side, c: int, d: int, negatives: str) -> tuple[Tensor, Tensor]:
    """Which of columns c..d are positives of rows a..b, and which do not count for them: bool [b - a, d - c] each."""
    of_row, of_column = rows.ids, columns.ids
    assert of_row is not None
    assert of_column is not None
    same_image = of_row.image[a:b, None] == of_column.image[c:d]
    dropped = (of_row.part[a:b, None] == of_column.part[c:d]).logical_and_(same_image)
    same_view = of_row.view[a:b, None] == of_column.view[c:d]
    positive = dropped & ~same_view
    if rows.present is not None:
        positive &= rows.present[a:b, None]
    if columns.present is not None:
        positive &= columns.present[c:d]
    if negatives == "other_images":
        return positive, same_image.logical_and_(~positive)
    dropped &= same_view
    return positive, dropped.logical_or_(~same_image) if negatives == "same_image" else dropped


@dataclass
class Pairs:
    """Rows and columns that share image and part, both present: a positive where views differ, else the same thing."""

    row: Tensor  # int64 [P]
    column: Tensor  # int64 [P]
    positive: Tensor  # bool [P]
    tile: Tensor  # int64 [P], ascending: (number of the row tile) x across + (number of the column tile)
    across: int
    size: int

    def of_tile(self, a: int, c: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and which are positive, of the tile that starts at a, c."""
        number = a // self.size * self.across + c // self.size
        start, stop = torch.searchsorted(self.tile, torch.tensor([number, number + 1])).tolist()
        return self.row[start:stop], self.column[start:stop], self.positive[start:stop]


def find_pairs(rows: Ids, columns: Ids | None, size: int) -> Pairs | None:
    """The pairs of rows and columns (None: the rows) by tiles of ``size``, or None where they are too many."""
    sides = [rows] if columns is None else [rows, columns]
    image, part = (torch.cat([ids[i].to(torch.int64) for ids in sides]) for i in (0, 1))
    kinds, kind = torch.unique(part, return_inverse=True)
    name = torch.unique(image, return_inverse=True)[1] * len(kinds) + kind
    m = len(rows.image)
    own = name[:m].masked_fill_(part[:m] < 0, -1)
    other, order = (own if columns is None else name[m:].masked_fill_(part[m:] < 0, -1)).sort()
    low, high = (torch.searchsorted(other, own, right=right) for right in (False, True))
    count = (high - low).masked_fill_(own < 0, 0)
    total = int(count.sum())
    if total > MOST_PAIRS:
        return None
    row = torch.arange(m).repeat_interleave(count, output_size=total)
    first = (low - count.cumsum(0) + count)[row]  # of a row's columns in the order, less the pairs before it
    column = order[first + torch.arange(total)]
    across = -(-len(other) // size)
    tile, order = (row // size * across + column // size).sort()
    row, column = row[order], column[order]
    view = (rows if columns is None else columns).view
    return Pairs(row, column, rows.view[row] != view[column], tile, across, size)


class Positives(ABC):
    """The positives of a tile."""

    @abstractmethod
    def collect(self, logits: Tensor, stats: "Stats", mirrored: bool) -> None:
        """Add sums and counts of positive logits to their rows, and where ``mirrored`` to their columns."""

    @abstractmethod
    def subtract(self, logits: Tensor, of_row: Tensor, of_column: Tensor | None) -> None:
        """Subtract of_row [M] (plus of_column [T]) at every positive, in place."""


@dataclass
class Compared(Positives):
    """A mask of the tile."""

    rows: slice  # of the whole matrix
    columns: slice
    mask: Tensor  # bool

    def collect(self, logits: Tensor, stats: "Stats", mirrored: bool) -> None:
        """See the base."""
        chosen = torch.where(self.mask, logits, 0)
        for to, dim in ((self.rows, 1), (self.columns, 0)) if mirrored else ((self.rows, 1),):
            stats.positive[to] += chosen.sum(dim)
            stats.count[to] += self.mask.sum(dim)

    def subtract(self, logits: Tensor, of_row: Tensor, of_column: Tensor | None) -> None:
        """See the base."""
        share = of_row[self.rows, None] if of_column is None else of_row[self.rows, None] + of_column[self.columns]
        logits.sub_(torch.where(self.mask, share, 0))


@dataclass
class Listed(Positives):
    """Positives one by one."""

    row: Tensor  # int64 [P], of the whole matrix
    column: Tensor
    flat: Tensor  # places in the tile

    def collect(self, logits: Tensor, stats: "Stats", mirrored: bool) -> None:
        """See the base."""
        chosen = logits.view(-1)[self.flat]
        for to in (self.row, self.column) if mirrored else (self.row,):
            stats.positive.index_add_(0, to, chosen)
            stats.count.index_add_(0, to, torch.ones_like(chosen))

    def subtract(self, logits: Tensor, of_row: Tensor, of_column: Tensor | None) -> None:
        """See the base."""
        share = of_row[self.row] if of_column is None else of_row[self.row] + of_column[self.column]
        logits.view(-1).index_add_(0, self.flat, share, alpha=-1)


@dataclass
class LogitTile:
    """One tile of logits in base 2: what does not count is -inf."""

    logits: Tensor  # [b - a, d - c]
    positives: Positives | None


class Products:
    """Makes tiles of logits in one buffer that all of them use."""

    def __init__(
        self, rows: Side, columns: Side, scale: float | Tensor, negatives: str, symmetric: bool = False,
        pairs: Pairs | None = None,
    ):  # fmt: skip
        self.rows, self.columns, self.scale, self.negatives, self.symmetric = rows, columns, scale, negatives, symmetric
        self.size, self.pairs = tile_size(rows.x, negatives), pairs
        self.buffer = self.scratch()

    def scratch(self) -> Tensor:
        """Memory for the largest tile."""
        n = min(len(self.rows), self.size) * min(len(self.columns), self.size)
        return self.rows.x.new_empty(n, dtype=self.rows.dtype)

    def row_tiles(self) -> Iterator[tuple[int, int]]:
        return tiles(len(self.rows), self.size)

    def column_tiles(self, a: int) -> Iterator[tuple[int, int]]:
        """Column tiles for the row tile that starts at a: where query is key, the diagonal and what is right of it."""
        return (tile for tile in tiles(len(self.columns), self.size) if not (self.symmetric and tile[0] < a))

    def __call__(self, a: int, b: int, query: Tensor, c: int, d: int, key: Tensor) -> LogitTile | None:
        """The tile of rows a..b and columns c..d, or None where nothing counts; query carries the scale."""
        rows, columns = self.rows, self.columns
        compared = self.pairs is None and may_share(rows, a, columns, c, self.size)
        if not compared and self.negatives == "same_image" and columns.ids is not None:
            return None
        logits = torch.mm(query, key.T, out=self.buffer[: (b - a) * (d - c)].view(b - a, d - c))
        positives: Positives | None = None
        if compared:
            positive, dropped = compare(rows, a, b, columns, c, d, self.negatives)
            logits.masked_fill_(dropped, -torch.inf)
            positives = Compared(slice(a, b), slice(c, d), positive)
        elif self.pairs is not None:
            row, column, positive = self.pairs.of_tile(a, c)
            if len(row):
                flat = (row - a) * (d - c) + (column - c)
                logits.view(-1).index_fill_(0, flat[~positive], -torch.inf)
                positives = Listed(row[positive], column[positive], flat[positive])
        if columns.absent is not None:
            logits += columns.absent[c:d]
        if self.symmetric and rows.absent is not None:
            logits += rows.absent[a:b, None]
        return LogitTile(logits, positives)


@dataclass
class Stats:
    """What forward keeps of each row, in base 2."""

    top: Tensor | None  # [M] running maximum; None when logits are bounded
    total: Tensor  # [M] sum of 2^(s' - top)
    positive: Tensor  # [M] sum of s' over positives
    count: Tensor  # [M] positives

    @classmethod
    def zeros(cls, rows: Side, bounded: bool) -> "Stats":
        zero = rows.x.new_zeros(len(rows), dtype=rows.dtype)
        return cls(None if bounded else torch.full_like(zero, -torch.inf), zero, zero.clone(), zero.clone())

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [M] in nats, log2-sum-exp2 [M], positives [M]: all of them 0 for a row that does not count."""
        valid = self.count > 0
        lse = self.total.log2() if self.top is None else self.total.log2() + self.top
        lse = torch.where(valid, lse, 0)
        loss = torch.where(valid, lse - self.positive / self.count.clamp(min=1), 0) * LN2
        return loss, lse, self.count


def forward_tiles(products: Products, stats: Stats) -> None:
    """Add every tile to stats."""
    rows, columns = products.rows, products.columns
    for a, b in products.row_tiles():
        query = rows.load(a, b, products.scale)
        for c, d in products.column_tiles(a):
            tile = products(a, b, query, c, d, columns.load(c, d))
            if tile is None:
                continue
            mirrored = products.symmetric and c > a
            logits = tile.logits
            if tile.positives is not None:
                tile.positives.collect(logits, stats, mirrored)
            if stats.top is not None:
                before = stats.top[a:b].clone()
                top = torch.maximum(before, logits.amax(1))
                stats.top[a:b] = top
                top = torch.where(top == -torch.inf, 0, top)
                logits.sub_(top[:, None])
                stats.total[a:b] *= torch.exp2(before - top)
            torch.exp2(logits, out=logits)
            stats.total[a:b] += logits.sum(1)
            if mirrored:
                stats.total[c:d] += logits.sum(0)


@dataclass
class Coefficients:
    """What backward needs of each row, [M] each; rows that do not count have no gradient, lse inf and share 0."""

    grad: Tensor  # g: upstream times weight
    lse: Tensor  # base 2
    share: Tensor  # 1 / positives

    @classmethod
    def make(cls, grad: Tensor, lse: Tensor, count: Tensor) -> "Coefficients":
        valid = count > 0
        return cls(
            torch.where(valid, grad.to(lse.dtype), 0),
            torch.where(valid, lse, torch.inf),
            torch.where(valid, 1 / count.clamp(min=1), 0),
        )


def backward_tiles(products: Products, k: Coefficients, d_rows: Tensor | None, d_columns: Tensor | None) -> None:
    """Add T dL/d(unit vector) of every tile to d_rows [M, D] and d_columns [T, D] (which may be one tensor)."""
    rows, columns = products.rows, products.columns
    for a, b in products.row_tiles():
        query = rows.load(a, b)
        scaled = query * products.scale
        for c, d in products.column_tiles(a):
            key = columns.load(c, d)
            tile = products(a, b, scaled, c, d, key)
            if tile is None:
                continue
            logits = tile.logits
            torch.exp2(logits.sub_(k.lse[a:b, None]), out=logits)
            if tile.positives is not None:
                tile.positives.subtract(logits, k.share, None)
            logits.mul_(k.grad[a:b, None])
            if d_rows is not None:
                d_rows[a:b].addmm_(logits, key)
            if d_columns is not None:
                d_columns[c:d].addmm_(logits.T, query)


def backward_symmetric(products: Products, k: Coefficients, grad: Tensor) -> None:
    """The same where query is key and logits are bounded: G = dL/ds + (dL/ds)^T is symmetric, grad [M, D] += G x."""
    side = products.rows
    by_lse, by_share = k.grad * torch.exp2(-k.lse), k.grad * k.share
    scratch = products.scratch()
    for a, b in products.row_tiles():
        query = side.load(a, b)
        scaled = query * products.scale
        for c, d in products.column_tiles(a):
            key = query if c == a else side.load(c, d)
            tile = products(a, b, scaled, c, d, key)
            if tile is None:
                continue
            logits = tile.logits
            both = scratch[: logits.numel()].view_as(logits)
            torch.add(by_lse[a:b, None], by_lse[c:d], out=both)
            torch.exp2(logits, out=logits).mul_(both)
            if tile.positives is not None:
                tile.positives.subtract(logits, by_share, by_share)
            grad[a:b].addmm_(logits, key)
            if c > a:
                grad[c:d].addmm_(logits.T, query)


def inner(side: Side, grad: Tensor) -> Tensor:
    """Sum of <unit vector, grad> over the side, as backward_tiles leaves grad."""
    total = grad.new_zeros(())
    for a, b in tiles(len(side), tile_size(side.x)):
        total += (side.load(a, b) * grad[a:b]).sum()
    return total


def temperature_gradient(inner: Tensor, scale: float | Tensor, temperature: Tensor) -> Tensor:
    """dL/dT = -1/T sum of s dL/ds, from the inner product of the rows with their gradient."""
    return (inner * scale * -LN2 / temperature).to(temperature.device)


def finish_gradient(side: Side, grad: Tensor, scale: float | Tensor) -> None:
    """Turn T dL/d(unit vector) into dL/dx, in place."""
    for a, b in tiles(len(side), tile_size(side.x)):
        side.gradient(a, b, grad[a:b].mul_(scale * LN2))


def bounded(scale: float | Tensor, normalize: bool) -> bool:
    """Whether every |s'| is known, without a device sync, to be at most BOUNDED."""
    known = not isinstance(scale, Tensor) or scale.device.type == "cpu"
    return normalize and known and float(scale) <= BOUNDED
