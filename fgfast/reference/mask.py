"""The definition of the pivotal mask, in float64 and loops over images."""

import torch
from torch import Tensor

from fgfast.reference.draws import philox


def window_shape(kept: int, side: int) -> tuple[int, int]:
    """Rows and columns of the window of "block", nearly square; the last cells of its last rows may be too many.

    Example:
        >>> window_shape(58, 14), window_shape(15, 4)
        ((7, 9), (4, 4))
    """
    rows = int(kept**0.5)
    columns = -(-kept // rows)
    return (rows, columns) if columns <= side else (-(-kept // side), side)


def window_cells(row: int, column: int, kept: int, side: int) -> list[int]:
    """The patches of the window whose first cell is (row, column), kept of them, ascending."""
    rows, columns = window_shape(kept, side)
    cells = [(row + y) * side + column + x for y in range(rows) for x in range(columns)]
    return cells[:kept]


def scores(attention: Tensor) -> Tensor:
    """Sum over layers of log2 of the mean over heads: [L, B, heads, P] to [B, P], float64; -inf where one is 0."""
    return attention.double().mean(2).log2().sum(0)


def pivotal_mask(attention: Tensor, kept: int, strategy: str, seed: int) -> tuple[Tensor, Tensor]:
    """Mask bool [B, P] and index int64 [B, kept], ascending, of attention [L, B, heads, P]."""
    score = scores(attention)
    batch, patches = score.shape
    noise = philox(seed, batch, patches, score.device).double()
    index = torch.empty(batch, kept, dtype=torch.int64, device=score.device)
    for b in range(batch):
        if strategy == "block":
            chosen = _window(score[b], kept)
        else:
            rank = {"topk": score[b], "sample": score[b] - (-noise[b].log2()).log2(), "random": noise[b]}[strategy]
            chosen = rank.sort(descending=True, stable=True).indices[:kept]
        index[b] = chosen.sort().values
    mask = torch.zeros(batch, patches, dtype=torch.bool, device=score.device)
    return mask.scatter_(1, index, True), index


def _window(score: Tensor, kept: int) -> Tensor:
    """Patches of the window with the fewest zeros of attention, of those with the largest score, the first one."""
    side = int(len(score) ** 0.5)
    rows, columns = window_shape(kept, side)
    terms = torch.where(score > -torch.inf, score, -1e9)
    best, found = -torch.inf, []
    for row in range(side - rows + 1):
        for column in range(side - columns + 1):
            cells = window_cells(row, column, kept, side)
            total = float(terms[cells].sum())
            if total > best:
                best, found = total, cells
    return torch.tensor(found, device=score.device)


def mask_images(images: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images [B, C, H, W] with the patches zero where mask [B, rows * columns] is False."""
    rows, columns = grid
    cells = mask.view(-1, 1, rows, columns)
    pixels = cells.repeat_interleave(images.shape[2] // rows, 2).repeat_interleave(images.shape[3] // columns, 3)
    return torch.where(pixels, images, 0)
