"""The positives of a tile of logits: as a mask made by comparing ids, or as a list made by sorting them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fgfast.ids import Ids
from fgfast.ops.contrast.sides import of_tile
from fgfast.ops.contrast.statistics import RowStatistics

MAX_PAIRS = 1 << 18  # longest list of pairs: 29 MiB while it is built, 6 MiB afterwards


@dataclass
class Pairs:
    """Present rows and columns with the same image and part: positives where views differ, else the same vector."""

    row: Tensor  # int64 [P]
    column: Tensor  # int64 [P]
    positive: Tensor  # bool [P]
    tile: Tensor  # int64 [P], ascending: (number of the row tile) x tiles_across + (number of the column tile)
    tiles_across: int
    size: int  # rows, and columns, of a tile

    def of_tile(self, row_start: int, column_start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and which are positive, of the tile that starts at this row and column."""
        number = row_start // self.size * self.tiles_across + column_start // self.size
        start, stop = torch.searchsorted(self.tile, torch.tensor([number, number + 1])).tolist()
        return self.row[start:stop], self.column[start:stop], self.positive[start:stop]


def find_pairs(rows: Ids, columns: Ids | None, size: int) -> Pairs | None:
    """The pairs of rows and columns (None: the rows) by tiles of ``size``; None if there are over ``MAX_PAIRS``."""
    sides = [rows] if columns is None else [rows, columns]
    image, part = (torch.cat([ids[i].to(torch.int64) for ids in sides]) for i in (0, 1))
    distinct_parts, part_number = torch.unique(part, return_inverse=True)
    key = torch.unique(image, return_inverse=True)[1] * len(distinct_parts) + part_number  # one per (image, part)
    n_rows = len(rows.image)
    row_key = key[:n_rows].masked_fill_(part[:n_rows] < 0, -1)
    column_key, order = (row_key if columns is None else key[n_rows:].masked_fill_(part[n_rows:] < 0, -1)).sort()
    low, high = (torch.searchsorted(column_key, row_key, right=right) for right in (False, True))
    count = (high - low).masked_fill_(row_key < 0, 0)
    total = int(count.sum())
    if total > MAX_PAIRS:
        return None
    row = torch.arange(n_rows).repeat_interleave(count, output_size=total)
    offset = (low - count.cumsum(0) + count)[row]  # first matching column of the row, minus the pairs before the row
    column = order[offset + torch.arange(total)]
    tiles_across = -(-len(column_key) // size)
    tile, order = (row // size * tiles_across + column // size).sort()
    row, column = row[order], column[order]
    view = (rows if columns is None else columns).view
    return Pairs(row, column, rows.view[row] != view[column], tile, tiles_across, size)


class Positives(ABC):
    """The positives of a tile."""

    @abstractmethod
    def sums(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and number of the positive logits of each row of a tile that has all rows."""

    @abstractmethod
    def collect(self, logits: Tensor, statistics: RowStatistics, mirrored: bool) -> None:
        """Add sums and counts of positive logits to their rows and, if ``mirrored``, to their columns."""

    @abstractmethod
    def subtract(self, logits: Tensor, row_weight: Tensor, column_weight: Tensor | None) -> None:
        """Subtract row_weight [M] (plus column_weight [T]) at every positive, in place."""


@dataclass
class MaskedPositives(Positives):
    """Positives as a mask of the tile."""

    rows: slice | None  # of the full matrix; None: all
    columns: slice | None
    mask: Tensor  # bool

    def sums(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        return torch.where(self.mask, logits, logits.new_zeros(())).sum(1), self.mask.sum(1, dtype=logits.dtype)

    def collect(self, logits: Tensor, statistics: RowStatistics, mirrored: bool) -> None:
        """See the base class."""
        positive_logits = torch.where(self.mask, logits, 0)
        for target, dim in ((self.rows, 1), (self.columns, 0)) if mirrored else ((self.rows, 1),):
            statistics.positive[target] += positive_logits.sum(dim)
            statistics.count[target] += self.mask.sum(dim)

    def subtract(self, logits: Tensor, row_weight: Tensor, column_weight: Tensor | None) -> None:
        """See the base class."""
        weight = of_tile(row_weight, self.rows).unsqueeze(1)
        if column_weight is not None:
            weight = weight + of_tile(column_weight, self.columns)
        logits.sub_(torch.where(self.mask, weight, logits.new_zeros(())))


@dataclass
class ListedPositives(Positives):
    """Positives as a list of places."""

    row: Tensor  # int64 [P], of the full matrix
    column: Tensor
    flat: Tensor  # positions in the flattened tile

    def sums(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        zero, positive_logits = logits.new_zeros(len(logits)), logits.view(-1)[self.flat]
        return (
            zero.index_add(0, self.row, positive_logits),
            zero.index_add(0, self.row, torch.ones_like(positive_logits)),
        )

    def collect(self, logits: Tensor, statistics: RowStatistics, mirrored: bool) -> None:
        """See the base class."""
        positive_logits = logits.view(-1)[self.flat]
        for target in (self.row, self.column) if mirrored else (self.row,):
            statistics.positive.index_add_(0, target, positive_logits)
            statistics.count.index_add_(0, target, torch.ones_like(positive_logits))

    def subtract(self, logits: Tensor, row_weight: Tensor, column_weight: Tensor | None) -> None:
        """See the base class."""
        weight = row_weight[self.row]
        if column_weight is not None:
            weight = weight + column_weight[self.column]
        logits.view(-1).index_add_(0, self.flat, weight, alpha=-1)
