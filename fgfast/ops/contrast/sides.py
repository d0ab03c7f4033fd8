"""The rows and the columns of the logit matrix, read tile by tile, and the comparison of their ids."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fgfast.ids import Ids
from fgfast.tensors import EPS, largest, shrinking

LOGIT_TILE = {"cpu": 512}  # rows and columns of a tile, by device type
LOGIT_TILE_ON_DEVICE = 2048


@dataclass
class Side:
    """The rows or the columns of the logit matrix."""

    vectors: Tensor  # [N, D], any dtype and strides
    ids: Ids | None  # [N] each; None for a bank, whose columns are negatives of every row
    inverse_norms: Tensor | None  # [N] 1 / max(norm, EPS); None when vectors are not normalised
    present: Tensor | None  # bool [N]; None when all are known to be present
    absent_bias: Tensor | None  # [N] 0, or -inf where not present: added to logits
    ranges: list[tuple[int, int]] | None  # lowest and highest image id of each tile; None when unknown
    dtype: torch.dtype  # in which the products accumulate

    def __len__(self) -> int:
        return len(self.vectors)

    def load(self, tile: slice, scale: float | Tensor | None = None) -> Tensor:
        """The vectors [n, D] of a tile as the products need them: normalised, times scale, absent ones zero."""
        loaded = self.vectors[tile].to(self.dtype)
        factor: float | Tensor | None = None if self.inverse_norms is None else self.inverse_norms[tile, None]
        if scale is not None:
            factor = scale if factor is None else factor * scale
        if factor is not None:
            loaded = loaded * factor
        if self.present is not None:
            loaded = torch.where(self.present[tile, None], loaded, 0)
        return loaded

    def backpropagate(self, tile: slice, grad: Tensor) -> None:
        """Turn the gradient [n, D] of the loaded tile into that of ``vectors``, in place."""
        if self.inverse_norms is not None:
            loaded = self.load(tile)
            inverse = self.inverse_norms[tile, None]
            dot = (loaded * grad).sum(1, keepdim=True)
            below_eps = inverse >= 1 / EPS  # where the norm is a constant
            dot = torch.where(below_eps, 0, dot)
            if self.vectors.dtype == torch.float16:  # which cannot hold 1 / EPS
                inverse = torch.where(below_eps, 0, inverse)
            grad.addcmul_(loaded, dot, value=-1).mul_(inverse)
        if self.present is not None:
            grad.copy_(torch.where(self.present[tile, None], grad, 0))


def make_side(
    vectors: Tensor,
    ids: Ids | None,
    normalize: bool,
    dtype: torch.dtype,
    negatives: str = "all",
    with_ranges: bool = True,
) -> Side:
    """Norms, presence and, on the CPU if ``with_ranges``, ranges of image ids of the vectors [N, D]."""
    inverse_norms = None
    if normalize:
        inverse_norms = vectors.new_empty(len(vectors), dtype=dtype)
        for tile in tiles(len(vectors), tile_size(vectors)):
            inverse_norms[tile] = _invert_norms(vectors[tile].to(dtype))
    if ids is None:
        return Side(vectors, None, inverse_norms, None, None, None, dtype)
    present: Tensor | None = ids.part >= 0
    ranges = None
    if vectors.device.type == "cpu":
        assert present is not None
        if with_ranges:
            ranges = _image_ranges(ids.image.to(torch.int64), present, tile_size(vectors, negatives))
        if present.all():
            present = None
    absent_bias = None
    if present is not None:
        absent_bias = torch.where(present, 0, vectors.new_full((), -torch.inf, dtype=dtype))
    return Side(vectors, ids, inverse_norms, present, absent_bias, ranges, dtype)


def _invert_norms(x: Tensor) -> Tensor:
    """1 / max(norm, EPS) [N] of every finite x [N, D]."""
    norm = torch.linalg.vector_norm(x, dim=1)
    if (x.device.type == "cpu" and norm.isfinite().all()) or not x.shape[1]:
        return norm.clamp_(min=EPS).reciprocal_()
    factor = shrinking(largest(x))
    return torch.linalg.vector_norm(x * factor, dim=1).clamp_(min=EPS).reciprocal_() * factor[:, 0]


def _image_ranges(image: Tensor, present: Tensor, size: int) -> list[tuple[int, int]]:
    """Lowest and highest image id of the present vectors of each tile of ``size``; (max, min) of int64 without any."""
    if len(image) == 0:
        return []
    limits = torch.iinfo(torch.int64)
    padded = -(-len(image) // size) * size
    low, high = image.new_full((padded,), limits.max), image.new_full((padded,), limits.min)
    low[: len(image)] = torch.where(present, image, limits.max)
    high[: len(image)] = torch.where(present, image, limits.min)
    return list(zip(low.view(-1, size).amin(1).tolist(), high.view(-1, size).amax(1).tolist(), strict=True))


def tile_size(vectors: Tensor, negatives: str = "all") -> int:
    """Rows, and columns, of a tile of logits on this device; half of that where most tiles are skipped."""
    size = LOGIT_TILE.get(vectors.device.type, LOGIT_TILE_ON_DEVICE)
    return size // 2 if negatives == "same_image" else size


def tiles(length: int, size: int) -> Iterator[slice]:
    """Slices of ``size`` that cover ``length``; the last one may be shorter.

    Example:
        >>> list(tiles(5, 3))
        [slice(0, 3, None), slice(3, 5, None)]
    """
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def may_overlap(rows: Side, row_tile: slice, columns: Side, column_tile: slice, size: int) -> bool:
    """Whether a row and a column of the tile, whose side is ``size``, may belong to the same image."""
    if columns.ids is None:
        return False
    if rows.ranges is None or columns.ranges is None:
        return True
    row_low, row_high = rows.ranges[row_tile.start // size]
    column_low, column_high = columns.ranges[column_tile.start // size]
    return column_low <= row_high and column_high >= row_low


def compare_ids(
    rows: Side, row_tile: slice, columns: Side, column_tile: slice, negatives: str
) -> tuple[Tensor, Tensor]:
    """Which columns of a tile are positives of which rows, and which are masked out for them: bool [m, n] each."""
    row_ids, column_ids = rows.ids, columns.ids
    assert row_ids is not None
    assert column_ids is not None
    same_image = row_ids.image[row_tile, None] == column_ids.image[column_tile]
    masked_out = (row_ids.part[row_tile, None] == column_ids.part[column_tile]).logical_and_(same_image)
    same_view = row_ids.view[row_tile, None] == column_ids.view[column_tile]
    positive = masked_out & ~same_view
    if rows.present is not None:
        positive &= rows.present[row_tile, None]
    if columns.present is not None:
        positive &= columns.present[column_tile]
    if negatives == "other_images":
        return positive, same_image.logical_and_(~positive)
    masked_out &= same_view
    return positive, masked_out.logical_or_(~same_image) if negatives == "same_image" else masked_out
