"""Images cut into the tiles of a jigsaw puzzle, and puzzles reassembled."""

import numpy as np
import torch
from torch import Tensor

from fgfast.tensors import shape_error


def cut_tiles(images: Tensor, grid: int, side: int, source: Tensor, corner: Tensor) -> Tensor:
    """Cut images into grid x grid tiles, permute them, and crop inside each: one gather for the full batch.

    A tile has S // grid pixels per side; the remainder is a border outside all tiles. Tile number t = row x grid +
    column. From the tile ``source[b, p]``, whose corner is (y, x), the window at ``corner[b, p]`` goes to place p:

        out[b, p, :, i, j] = images[b, :, y + corner[b, p, 0] + i, x + corner[b, p, 1] + j],   0 <= i, j < side.

    Args:
        images: [B, C, S, S], any dtype; fastest in channels_last.
        grid: tiles per side.
        side: side of the crops, 1 to S // grid.
        source: int64 [B, T], the tile that goes to place p, T = grid^2 or fewer.
        corner: int64 [B, T, 2], (row, column) inside the tile, 0 to S // grid - side; not checked.

    Returns:
        [B * T, C, side, side] in channels_last, the places of each image consecutive.

    Raises:
        ValueError: wrong shapes, or tiles smaller than the crops.

    Example:
        >>> image = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> swapped = cut_tiles(image, 2, 2, torch.tensor([[1, 0, 2, 3]]), torch.zeros(1, 4, 2, dtype=torch.int64))
        >>> swapped[0, 0].tolist()
        [[2.0, 3.0], [6.0, 7.0]]
    """
    if images.ndim != 4 or images.shape[2] != images.shape[3]:
        raise shape_error("images", "[B, C, S, S]", images)
    batch, channels, size, _ = images.shape
    if source.ndim != 2 or len(source) != batch:
        raise shape_error("source", f"[{batch}, T]", source)
    if corner.shape != (*source.shape, 2):
        raise shape_error("corner", f"{[*source.shape, 2]}", corner)
    tile = size // grid
    if not 1 <= side <= tile:
        raise ValueError(f"side is {side}: a tile of {size} pixels cut {grid} times has crops of 1 to {tile}.")
    border = (size - grid * tile) // 2
    image = torch.arange(batch, device=images.device)[:, None, None]
    rows = border + (source // grid * tile + corner[..., 0])[..., None] + torch.arange(side, device=images.device)
    columns = border + source % grid * tile + corner[..., 1]  # [B, T], first pixel of each row of a crop
    start = ((image * size + rows) * size + columns[..., None]).flatten() * channels
    pixels = images.permute(0, 2, 3, 1).reshape(-1)  # a view if channels_last
    # Every run of side x C values is a row of one overlapping view: a row of a crop is copied in one piece.
    runs = pixels.unfold(0, side * channels, 1).index_select(0, start)
    return runs.view(-1, side, side, channels).permute(0, 3, 1, 2)


def join_tiles(tiles: Tensor, grid: int, order: Tensor) -> Tensor:
    """Assemble images from tiles: place p shows the tile ``order[b, p]``.

    Args:
        tiles: [B * T, C, side, side] as :func:`cut_tiles` returns them, T = grid^2.
        grid: tiles per side.
        order: int64 [B, T].

    Returns:
        [B, C, grid * side, grid * side].

    Example:
        >>> join_tiles(torch.arange(4.0).reshape(4, 1, 1, 1), 2, torch.tensor([[3, 2, 1, 0]]))[0, 0].tolist()
        [[3.0, 2.0], [1.0, 0.0]]
    """
    channels, side = tiles.shape[1], tiles.shape[-1]
    first = torch.arange(len(order), device=order.device)[:, None] * grid**2
    placed = tiles[(first + order).flatten()].view(-1, grid, grid, channels, side, side)
    return placed.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, grid * side, grid * side)


def brighten(images: Tensor, factor: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Multiply the values in [0, 1] of each normalised image by its factor, clamp, and normalise again.

    Args:
        images: float [N, C, h, w]; overwritten if channels_last.
        factor: [N], > 0.
        mean, std: statistics that the images are normalised with, one number per channel.

    Returns:
        The same shape.

    Raises:
        ValueError: the statistics are of another number of channels.

    Example:
        >>> brighten(torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1), torch.full((3,), 1.5), (0.5,), (0.5,)).flatten()
        tensor([-1.0000,  0.5000,  1.0000])
    """
    channels, width = images.shape[1], images.shape[3]
    if (len(mean), len(std)) != (channels, channels):
        raise ValueError(f"mean and std have {len(mean)} and {len(std)} numbers: give {channels}, one per channel.")
    centre, scale = (torch.tensor(v * width, dtype=images.dtype).to(images.device) for v in (mean, std))
    black, white = -centre / scale, (1 - centre) / scale  # [w C]: the values of a row, for a long inner loop
    gain = factor.to(images.dtype).view(-1, 1, 1)
    rows = images.permute(0, 2, 3, 1).flatten(2)  # [N, h, w C], a view if channels_last
    rows = rows.mul_(gain).add_((1 - gain) * black).clamp_(black, white)
    return rows.unflatten(2, (width, channels)).permute(0, 3, 1, 2)


def draw_puzzles(
    count: int, places: int, batch: int, spare: int, brightness: tuple[float, float], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random numbers of the puzzles of a batch, drawn on the host like all others of the data loaders.

    Args:
        count: number of permutations P.
        places: number of tiles T.
        batch: B.
        spare: pixels by which a tile is larger than a crop, >= 0.
        brightness: range of the brightness factors.
        rng: the random number generator.

    Returns:
        The index of each image's permutation, int64 [B], the corners of the crops, int64 [B, T, 2], and the
        brightness factors, float32 [B, T].
    """
    label = rng.integers(count, size=batch)
    corner = rng.integers(spare + 1, size=(batch, places, 2))
    return label, corner, rng.uniform(*brightness, (batch, places)).astype(np.float32)
