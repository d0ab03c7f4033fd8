"""The rows and the columns of the logit matrix, read tile by tile, and the comparison of their ids."""

import math
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

    def identify(self, tile: slice) -> tuple[Ids, Tensor | None]:
        """The ids of a tile, and which of its vectors are present."""
        assert self.ids is not None
        return Ids(*(i[tile] for i in self.ids)), None if self.present is None else self.present[tile]

    def load(self, tile: slice | None = None, scale: float | Tensor | None = None) -> Tensor:
        """The vectors [n, D] of a tile as the products need them: normalised, times scale, absent ones zero."""
        loaded = of_tile(self.vectors, tile).to(self.dtype)
        factor: float | Tensor | None = None
        if self.inverse_norms is not None:
            factor = of_tile(self.inverse_norms, tile).unsqueeze(1)
        if scale is not None:
            factor = scale if factor is None else factor * scale
        if factor is not None:
            loaded = loaded * factor
        if self.present is not None:
            loaded = torch.where(of_tile(self.present, tile)[:, None], loaded, 0)
        return loaded

    def backpropagate(self, tile: slice | None, grad: Tensor, loaded: Tensor | None = None) -> None:
        """Turn the gradient [n, D] of the tile, ``loaded`` anew if need be, into that of ``vectors``, in place."""
        if self.inverse_norms is not None:
            loaded = self.load(tile) if loaded is None else loaded
            inverse = of_tile(self.inverse_norms, tile).unsqueeze(1)
            dot = (loaded * grad).sum(1, keepdim=True)
            if inverse.device.type != "cpu" or not (inverse.numel() and float(inverse.max()) < 0.5 / EPS):
                below_eps = inverse >= 1 / EPS  # where the norm is a constant
                dot = torch.where(below_eps, 0, dot)
                if self.vectors.dtype == torch.float16:  # which cannot hold 1 / EPS
                    inverse = torch.where(below_eps, 0, inverse)
            grad.addcmul_(loaded, dot, value=-1).mul_(inverse)
        if self.present is not None:
            grad.copy_(torch.where(of_tile(self.present, tile)[:, None], grad, 0))


def of_tile(x: Tensor, tile: slice | None) -> Tensor:
    """The entries of a tile; None means all."""
    return x if tile is None else x[tile]


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
        of_tiles = [_invert_norms(vectors[tile].to(dtype)) for tile in tiles(len(vectors), tile_size(vectors))]
        inverse_norms = of_tiles[0] if len(of_tiles) == 1 else torch.cat([vectors.new_empty(0, dtype=dtype), *of_tiles])
    if ids is None:
        return Side(vectors, None, inverse_norms, None, None, None, dtype)
    ranges = None
    if with_ranges and vectors.device.type == "cpu":
        ranges = _image_ranges(ids.image.to(torch.int64), ids.part >= 0, tile_size(vectors, negatives))
    if vectors.device.type == "cpu" and (not len(vectors) or int(ids.part.min()) >= 0):
        return Side(vectors, ids, inverse_norms, None, None, ranges, dtype)
    present = ids.part >= 0
    absent_bias = torch.where(present, 0, vectors.new_full((), -torch.inf, dtype=dtype))
    return Side(vectors, ids, inverse_norms, present, absent_bias, ranges, dtype)


def _invert_norms(x: Tensor) -> Tensor:
    """1 / max(norm, EPS) [N] of every finite x [N, D]."""
    norm = torch.linalg.vector_norm(x, dim=1)
    if not x.numel() or (x.device.type == "cpu" and float(norm.max()) < math.inf):
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
    rows: Ids, row_present: Tensor | None, columns: Ids, column_present: Tensor | None, negatives: str
) -> tuple[Tensor, Tensor]:
    """Which columns are positives of which rows, and which are masked out for them: bool [m, n] each."""
    same_image, same_part, same_view = (r.unsqueeze(1) == c for r, c in zip(rows, columns, strict=True))
    same_part &= same_image
    masked_out = same_part & same_view
    positive = same_part.logical_xor_(masked_out)
    if row_present is not None:
        positive &= row_present[:, None]
    if column_present is not None:
        positive &= column_present
    if negatives == "other_images":
        return positive, same_image.logical_and_(~positive)
    return positive, masked_out.logical_or_(~same_image) if negatives == "same_image" else masked_out
