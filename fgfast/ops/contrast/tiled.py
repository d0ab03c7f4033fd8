r"""The contrastive loss by tiles of the logit matrix, in plain PyTorch: the "torch" backend.

Logits are kept in base 2, :math:`s'_{ij} = \log_2 e \cdot s_{ij}`, because ``exp2`` is vectorised on every CPU. A tile
is one matrix product into a buffer that all tiles reuse; each tile adds to three numbers per row. Forward:
:math:`Z_i = \sum_j 2^{s'_{ij}}`, the sum of the positive logits and the count of positives. Backward recomputes each
tile and forms
:math:`\partial L / \partial s_{ij} = g_i (2^{s'_{ij} - \log_2 Z_i} - [j \in P_i] / |P_i|)` in place, then

.. math:: \partial L / \partial q_i = \tfrac 1 T \sum_j \partial L / \partial s_{ij} \, k_j, \qquad
          \partial L / \partial k_j = \tfrac 1 T \sum_i \partial L / \partial s_{ij} \, q_i .

- On the CPU, where ids may be read without a sync, sorting the ids lists the few columns that have the image and part
  of a row, and a tile looks only at its own list. If the list is too long, ``negatives`` asks for whole images or
  columns come from other ranks, ids are compared in the tiles whose ranges of image ids overlap; in the others every
  present column is a negative, or, under "same_image", none. On other devices ids are compared in every tile.
- With unit vectors logits are bounded by 1 / T. Up to ``fgfast.tensors.BOUNDED`` no running maximum is kept.
- Where query is key, s is symmetric: only one triangle of the logits is computed and each tile serves its rows and its
  columns. This halves the exponentials and the products of the forward pass and of the recomputation, and one product
  per side gives both gradients.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fgfast.ops.contrast.positives import ListedPositives, MaskedPositives, Pairs, Positives
from fgfast.ops.contrast.sides import Side, compare_ids, may_overlap, tile_size, tiles
from fgfast.ops.contrast.statistics import LN2, RowStatistics
from fgfast.tensors import BOUNDED, LOG2E


def logit_scale(tensor: Tensor | None, number: float, dtype: torch.dtype) -> float | Tensor:
    """log2(e) / T, the factor that turns a product of unit vectors into a logit in base 2.

    Example:
        >>> round(logit_scale(None, 1.0, torch.float32), 4)
        1.4427
    """
    return LOG2E / number if tensor is None else LOG2E / tensor.detach().to(dtype)


def has_bounded_logits(scale: float | Tensor, normalize: bool) -> bool:
    """Whether every |s'| is known, without a device sync, to be at most BOUNDED."""
    known = not isinstance(scale, Tensor) or scale.device.type == "cpu"
    return normalize and known and float(scale) <= BOUNDED


@dataclass
class LogitTile:
    """One tile of logits in base 2; masked-out entries are -inf."""

    logits: Tensor  # [m, n]
    positives: Positives | None


class LogitTiles:
    """Computes tiles of logits in one buffer that all of them use."""

    def __init__(
        self, rows: Side, columns: Side, scale: float | Tensor, negatives: str, symmetric: bool = False,
        pairs: Pairs | None = None,
    ):  # fmt: skip
        self.rows, self.columns, self.scale, self.negatives, self.symmetric = rows, columns, scale, negatives, symmetric
        self.size, self.pairs = tile_size(rows.vectors, negatives), pairs
        self.buffer = self.new_buffer()

    def new_buffer(self) -> Tensor:
        """Memory for the largest tile."""
        n = min(len(self.rows), self.size) * min(len(self.columns), self.size)
        return self.rows.vectors.new_empty(n, dtype=self.rows.dtype)

    def row_tiles(self) -> Iterator[slice]:
        return tiles(len(self.rows), self.size)

    def column_tiles(self, row_tile: slice) -> Iterator[slice]:
        """The column tiles of a row tile; with symmetric logits those on and above the diagonal."""
        every = tiles(len(self.columns), self.size)
        return (tile for tile in every if not (self.symmetric and tile.start < row_tile.start))

    def compute(self, row_tile: slice, query: Tensor, column_tile: slice, key: Tensor) -> LogitTile | None:
        """The logits of loaded queries (times scale) and keys, or None if all of them are masked out."""
        rows, columns = self.rows, self.columns
        ids_are_compared = self.pairs is None and may_overlap(rows, row_tile, columns, column_tile, self.size)
        if not ids_are_compared and self.negatives == "same_image" and columns.ids is not None:
            return None
        height, width = len(query), len(key)
        logits = torch.mm(query, key.T, out=self.buffer[: height * width].view(height, width))
        positives: Positives | None = None
        if ids_are_compared:
            positive, masked_out = compare_ids(*rows.identify(row_tile), *columns.identify(column_tile), self.negatives)
            logits.masked_fill_(masked_out, -torch.inf)
            positives = MaskedPositives(row_tile, column_tile, positive)
        elif self.pairs is not None:
            row, column, positive = self.pairs.of_tile(row_tile.start, column_tile.start)
            if len(row):
                flat = (row - row_tile.start) * width + (column - column_tile.start)
                logits.view(-1).index_fill_(0, flat[~positive], -torch.inf)
                positives = ListedPositives(row[positive], column[positive], flat[positive])
        if columns.absent_bias is not None:
            logits += columns.absent_bias[column_tile]
        if self.symmetric and rows.absent_bias is not None:
            logits += rows.absent_bias[row_tile, None]
        return LogitTile(logits, positives)


def forward_tiles(logit_tiles: LogitTiles, statistics: RowStatistics) -> None:
    """Add every tile to the statistics."""
    rows, columns = logit_tiles.rows, logit_tiles.columns
    for row_tile in logit_tiles.row_tiles():
        query = rows.load(row_tile, logit_tiles.scale)
        for column_tile in logit_tiles.column_tiles(row_tile):
            tile = logit_tiles.compute(row_tile, query, column_tile, columns.load(column_tile))
            if tile is None:
                continue
            mirrored = logit_tiles.symmetric and column_tile.start > row_tile.start
            logits = tile.logits
            if tile.positives is not None:
                tile.positives.collect(logits, statistics, mirrored)
            if statistics.maximum is not None:
                before = statistics.maximum[row_tile].clone()
                maximum = torch.maximum(before, logits.amax(1))
                statistics.maximum[row_tile] = maximum
                maximum = torch.where(maximum == -torch.inf, 0, maximum)
                logits.sub_(maximum[:, None])
                statistics.total[row_tile] *= torch.exp2(before - maximum)
            torch.exp2(logits, out=logits)
            statistics.total[row_tile] += logits.sum(1)
            if mirrored:
                statistics.total[column_tile] += logits.sum(0)


@dataclass
class Coefficients:
    """The factors of each row in the backward pass, [M] each.

    Rows without a positive have grad 0, lse inf and positive_weight 0, which makes their gradient 0.
    """

    grad: Tensor  # g: upstream gradient of the loss of the row
    lse: Tensor  # base 2
    positive_weight: Tensor  # 1 / number of positives

    @classmethod
    def make(cls, grad: Tensor, lse: Tensor, count: Tensor) -> "Coefficients":
        valid = count > 0
        return cls(
            torch.where(valid, grad.to(lse.dtype), 0),
            torch.where(valid, lse, torch.inf),
            torch.where(valid, 1 / count.clamp(min=1), 0),
        )


def backward_tiles(
    logit_tiles: LogitTiles, coefficients: Coefficients, d_rows: Tensor | None, d_columns: Tensor | None
) -> None:
    """Add T dL/d(unit vector) of every tile to d_rows [M, D] and d_columns [T, D] (which may be one tensor)."""
    rows, columns = logit_tiles.rows, logit_tiles.columns
    for row_tile in logit_tiles.row_tiles():
        query = rows.load(row_tile)
        scaled_query = query * logit_tiles.scale
        for column_tile in logit_tiles.column_tiles(row_tile):
            key = columns.load(column_tile)
            tile = logit_tiles.compute(row_tile, scaled_query, column_tile, key)
            if tile is None:
                continue
            logits = tile.logits
            torch.exp2(logits.sub_(coefficients.lse[row_tile, None]), out=logits)
            if tile.positives is not None:
                tile.positives.subtract(logits, coefficients.positive_weight, None)
            logits.mul_(coefficients.grad[row_tile, None])
            if d_rows is not None:
                d_rows[row_tile].addmm_(logits, key)
            if d_columns is not None:
                d_columns[column_tile].addmm_(logits.T, query)


def backward_symmetric(logit_tiles: LogitTiles, coefficients: Coefficients, grad: Tensor) -> None:
    """``backward_tiles`` where query is key and logits are bounded.

    G = dL/ds + (dL/ds)^T is symmetric; grad [M, D] += G x.
    """
    side = logit_tiles.rows
    softmax_weight = coefficients.grad * torch.exp2(-coefficients.lse)
    positive_weight = coefficients.grad * coefficients.positive_weight
    buffer = logit_tiles.new_buffer()
    for row_tile in logit_tiles.row_tiles():
        query = side.load(row_tile)
        scaled_query = query * logit_tiles.scale
        for column_tile in logit_tiles.column_tiles(row_tile):
            key = query if column_tile.start == row_tile.start else side.load(column_tile)
            tile = logit_tiles.compute(row_tile, scaled_query, column_tile, key)
            if tile is None:
                continue
            logits = tile.logits
            both_weights = buffer[: logits.numel()].view_as(logits)
            torch.add(softmax_weight[row_tile, None], softmax_weight[column_tile], out=both_weights)
            torch.exp2(logits, out=logits).mul_(both_weights)
            if tile.positives is not None:
                tile.positives.subtract(logits, positive_weight, positive_weight)
            grad[row_tile].addmm_(logits, key)
            if column_tile.start > row_tile.start:
                grad[column_tile].addmm_(logits.T, query)


def sum_inner_products(side: Side, grad: Tensor) -> Tensor:
    """Sum of <unit vector, grad> over the side, for grad as ``backward_tiles`` computes it."""
    total = grad.new_zeros(())
    for tile in tiles(len(side), tile_size(side.vectors)):
        total += (side.load(tile) * grad[tile]).sum()
    return total


def temperature_gradient(inner_products: Tensor, scale: float | Tensor, temperature: Tensor) -> Tensor:
    """dL/dT = -1/T sum of s dL/ds, from the inner product of the rows with their gradient."""
    return (inner_products * scale * -LN2 / temperature).to(temperature.device)


def finish_gradient(side: Side, grad: Tensor, scale: float | Tensor) -> None:
    """Turn T dL/d(unit vector) into dL/d(vector), in place."""
    for tile in tiles(len(side), tile_size(side.vectors)):
        side.backpropagate(tile, grad[tile].mul_(scale * LN2))
