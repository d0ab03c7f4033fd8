"""Hypercolumns as a pixel source that never builds them.

Bilinear resizing is a linear map, up(f) = Wy f Wx^T with two weights per row, the same for all channels. So it
commutes with everything that k-means does to channels:
    <up(f), c> = up(<f, c>)                        K score maps are resized instead of D channels,
    sum_n h_n up(f)_n = <f, Wy^T h Wx>             sums are the adjoint: the one-hot maps come down to the level.
|up(f)|^2 is not linear, but each pixel mixes a 2 x 2 block of cells, so five maps of inner products of neighbouring
cells, made at the level's own resolution, give it exactly:
    |up(f)|^2 = A0 G00 B0^T + 2 A0 G01 B1^T + 2 A1 G10 B0^T + 2 A1 (G11 + G-11) B1^T,
A0 = Wy * Wy, A1[i, y] = Wy[i, y] Wy[i, y + 1] (B from Wx in the same way), Gab(y, x) = <f(y, x), f(y + a, x + b)>.
A level of D channels and n < D cells lies in a space of n dimensions: its QR decomposition f = Q r reduces it to a
level r of n channels with the same inner products, norms and distances, and a centroid c of r is Q c of f. That pays
where n is far less than D, as in the deepest stages of a CNN. A centroid from outside need not lie in that space: one
more channel, zero in every pixel, holds its distance from it.
The shift of :mod:`fgfast.pixels.source` is subtracted from the cells: the weights of a pixel sum to one.
The resizing is that of torch.nn.functional.interpolate(mode="bilinear", align_corners=False), without antialiasing.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast.pixels.source import PixelSource, least, one_hot
from fgfast.tensors import accumulation, exact


def mixed_cells(length: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bilinear resizing along one axis, align_corners=False: the first of two cells, int64 [size], and the fraction
    [size] of the second; 0 for the last cell.

    Example:
        >>> mixed_cells(2, 4, torch.float32, torch.device("cpu"))
        (tensor([0, 0, 0, 1]), tensor([0.0000, 0.2500, 0.7500, 0.0000]))
    """
    position = ((torch.arange(size, device=device, dtype=dtype) + 0.5) * (length / size) - 0.5).clamp_min(0)
    low = position.floor().clamp_max(length - 1)
    return low.long(), torch.where(low < length - 1, position - low, 0)


def weights(length: int, low: Tensor, fraction: Tensor) -> Tensor:
    """`mixed_cells` as a matrix [size, length].

    Example:
        >>> weights(2, *mixed_cells(2, 4, torch.float32, torch.device("cpu"))).tolist()
        [[1.0, 0.0], [0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]
    """
    low, fraction = low[:, None], fraction[:, None]
    cell = torch.arange(length, device=low.device)
    return (cell == low) * (1 - fraction) + (cell == low + 1) * fraction


BATCHES = 1 << 15  # small products that a GPU makes in one launch
FEW = 4  # a level with that many times fewer cells than channels is rank-reduced by QR


def whole_rows(m: Tensor) -> Tensor:
    """[B, K, n] with rows of zeros up to a multiple of 4 on the CPU, whose BLAS is slow with one to three left over."""
    missing = -m.shape[1] % 4
    return F.pad(m, (0, 0, 0, missing)) if missing and m.device.type == "cpu" else m


class Level:
    """One feature map [B, D, h, w] with its resizing; cells that are not finite are set to zero and marked."""

    def __init__(self, f: Tensor, size: tuple[int, int]) -> None:
        f = f.to(accumulation(f.dtype))
        self.channels, self.height, self.width = f.shape[1:]
        self.same = tuple(f.shape[2:]) == size
        self.down = mixed_cells(self.height, size[0], f.dtype, f.device)
        self.across = mixed_cells(self.width, size[1], f.dtype, f.device)
        self.wy, self.wx = weights(self.height, *self.down), weights(self.width, *self.across)
        self.bad: Tensor | None = None
        if f.device.type != "cpu" or not bool(f.sum().isfinite()):  # the sum of finite numbers may overflow
            self.bad_cells = ~torch.linalg.vector_norm(f, torch.inf, 1).isfinite()  # [B, h, w]
            self.bad = self.up(self.bad_cells.to(f.dtype)) > 0
            f = torch.where(self.bad_cells[:, None], 0, f)
        self.given = self.f = f.flatten(2).mT  # [B, h w, D]
        self.moved = False
        self.reflectors: tuple[Tensor, Tensor] | None = None
        self.outside: Tensor | None = None  # unit vectors [B, K, D - n] from the space of the cells to the centroids

    def move(self, shift: Tensor | None, factor: Tensor | None) -> None:
        """Use factor (f - shift) from now on, a copy; reduce it to the R of its QR decomposition if that is small."""
        n, self.channels = self.given.shape[1:]
        self.moved = True
        self._copy(self.given)
        if factor is not None:
            self.f.mul_(factor[:, None, None])
            shift = None if shift is None else shift * factor[:, None]
        if shift is not None:
            self.f.sub_(shift[:, None])
        if self.bad is not None:
            self.f.masked_fill_(self.bad_cells.flatten(1)[..., None], 0)
        if self.f.device.type == "cpu" and FEW * n <= self.channels:
            self.reflectors = torch.geqrf(self.f.mT)
            self.channels = n + 1
            self._copy(self.reflectors[0][:, : n + 1].triu().mT)  # the last channel is 0

    def _copy(self, cells: Tensor) -> None:
        """Channels next to each other, and after each problem cells of zeros, for `squares` to read beyond its end."""
        batch, n, channels = cells.shape
        self.padded = cells.new_empty(batch, n + self.width + 2, channels)
        self.padded[:, n:].zero_()
        self.f = self.padded[:, :n].copy_(cells)

    def reduced(self, c: Tensor) -> Tensor:
        """Vectors [B, K, D] in the space of the given map as [B, K, channels]."""
        if self.reflectors is None:
            return c
        n = self.channels - 1
        inside, outside = torch.ormqr(*self.reflectors, c.mT, transpose=True).mT.tensor_split([n], 2)
        length = torch.linalg.vector_norm(outside, dim=2, keepdim=True)
        self.outside = outside / torch.where(length > 0, length, 1)
        return torch.cat([inside, length], 2)

    def as_given(self, c: Tensor) -> Tensor:
        """The inverse of `reduced`, of the same centroids after they have moved."""
        if self.reflectors is None:
            return c
        inside, length = c.tensor_split([self.channels - 1], 2)
        missing = self.reflectors[0].shape[1] - self.channels + 1
        outside = length.expand(-1, -1, missing) if self.outside is None else length * self.outside
        return torch.ormqr(*self.reflectors, torch.cat([inside, outside], 2).mT).mT

    def up(self, maps: Tensor) -> Tensor:
        """Resize [..., h, w] to [..., H, W]."""
        return maps if self.same else self.wy @ (maps @ self.wx.T)

    def _products(self, first: int, count: int) -> Tensor:
        """Inner products [B, h, w, count] of each cell with ``count`` cells that follow it, from ``first`` on."""
        n, channels = self.padded.shape[1:]
        cells = self.padded.flatten(0, 1)[: -self.width - 2]
        near = cells.as_strided((len(cells), count, channels), (channels, channels, 1), first * channels)
        tiles = zip(cells[:, None].split(BATCHES), near.mT.split(BATCHES), strict=True)
        found = torch.cat([torch.bmm(a, b) for a, b in tiles])
        return found.as_strided(
            (len(self.f), self.height, self.width, count), (n * count, self.width * count, count, 1)
        )

    def squares(self) -> Tensor:
        """|up(f)|^2 [B, H, W], of cells that have been moved."""
        if self.same:
            return self.f.square().sum(2).unflatten(1, (self.height, self.width))
        g00, g01 = self._products(0, 2).unbind(3)
        before, g10, after = self._products(self.width - 1, 3).unbind(3)
        g01, g10, g11 = g01[..., :-1], g10[:, :-1], after[:, :-1, :-1] + before[:, :-1, 1:]
        a0, b0 = self.wy.square(), self.wx.square()
        a1, b1 = 2 * self.wy[:, :-1] * self.wy[:, 1:], 2 * self.wx[:, :-1] * self.wx[:, 1:]
        out = a0 @ (g00 @ b0.T + g01 @ b1.T) + a1 @ (g10 @ b0.T + g11 @ (b1 / 2).T)
        return out.clamp_min_(0)

    @cached_property
    def taps(self) -> tuple[Tensor, Tensor]:
        """The cells [N, taps] that each pixel mixes, and their weights."""
        (y, wy), (x, wx) = (
            (torch.stack([low, (low + 1).clamp_max(length - 1)], 1), torch.stack([1 - fraction, fraction], 1))
            for length, (low, fraction) in ((self.height, self.down), (self.width, self.across))
        )
        cell, weight = y[:, None, :, None] * self.width + x[:, None], wy[:, None, :, None] * wx[:, None]
        return cell.flatten(2).flatten(0, 1), weight.flatten(2).flatten(0, 1)

    def rows(self, index: Tensor) -> Tensor:
        """up(f) [B, m, channels] at pixels index [B, m]."""
        cell, weight = (of_pixel[index] for of_pixel in self.taps)  # [B, m, taps]
        if not self.moved:
            near = self.f.mT.gather(2, cell.flatten(1)[:, None].expand(-1, self.channels, -1))
            return (near.unflatten(2, cell.shape[1:]) * weight[:, None]).sum(3).mT
        if len(index) > 1:
            cell = cell + self.padded.shape[1] * torch.arange(len(index), device=index.device)[:, None, None]
        cell, weight = cell.flatten(0, 1), weight.flatten(0, 1)
        mixed = F.embedding_bag(cell, self.padded.flatten(0, 1), mode="sum", per_sample_weights=weight)
        return mixed.unflatten(0, index.shape)


class Pyramid(PixelSource):
    """Levels [B, D_l, h_l, w_l] resized to (H, W), their channels concatenated in list order.

    Args:
        maps: the levels.
        size: (H, W).
    """

    def __init__(self, maps: list[Tensor], size: tuple[int, int]) -> None:
        self.size = size
        self.levels = [Level(f, size) for f in maps]
        self.batch, self.pixels = maps[0].shape[0], size[0] * size[1]
        self.given = [f.shape[1] for f in maps]
        self.features = sum(self.given)
        self.dtype, self.device = self.levels[0].f.dtype, maps[0].device
        self.resized = [level for level in self.levels if not level.same]
        if self.resized:
            self.down = torch.cat([level.wy for level in self.resized], 1)  # [H, sum of h_l]
        self.split, self.channels = self.given, self.features  # until levels are reduced

    def move(self, shift: Tensor | None, factor: Tensor | None) -> None:
        """Use y = factor (x - shift) from now on."""
        self.shift, self.factor = shift, factor
        parts = [None] * len(self.levels) if shift is None else shift.split(self.given, 1)
        for level, part in zip(self.levels, parts, strict=True):
            level.move(part, factor)
        self.split = [level.channels for level in self.levels]
        self.channels = sum(self.split)

    def relative(self, c: Tensor) -> Tensor:
        """Centroids [B, K, features] of x as centroids [B, K, channels] of y."""
        parts = zip(self.levels, super().relative(c).split(self.given, 2), strict=True)
        return torch.cat([level.reduced(part) for level, part in parts], 2)

    def as_given(self, c: Tensor) -> Tensor:
        """Centroids [B, K, channels] of y as [B, K, features] of x."""
        parts = zip(self.levels, c.split(self.split, 2), strict=True)
        return super().as_given(torch.cat([level.as_given(part) for level, part in parts], 2))

    def _marked(self, out: Tensor) -> Tensor:
        """Infinite where a pixel [B, H, W] interpolates a cell that is not finite; flattened to [B, N]."""
        for level in self.levels:
            if level.bad is not None:
                out.masked_fill_(level.bad, torch.inf)
        return out.flatten(1)

    def squares(self) -> Tensor:
        """|y_n|^2 [B, N]."""
        out = torch.zeros(self.batch, *self.size, dtype=self.dtype, device=self.device)
        with exact(self.device):
            for level in self.levels:
                out += level.squares()
        return self._marked(out)

    def largest(self) -> Tensor:
        """A bound of |x| over the channels of each pixel [B, N]: the largest of each map."""
        most = torch.stack([level.given.abs().amax((1, 2)) for level in self.levels]).amax(0)
        return self._marked(most[:, None, None].expand(-1, *self.size).clone())

    def inner(self, m: Tensor) -> Tensor:
        """<y_n, m_k> [B, K, N]: scores at each level, resized along x each, along y together."""
        k, m = m.shape[1], whole_rows(m)
        own, rows = None, []
        for level, part in zip(self.levels, m.split(self.split, 2), strict=True):
            scores = torch.bmm(part, level.f.mT)[:, :k]  # [B, K, h w]
            if level.same:
                own = scores if own is None else own + scores
            else:
                rows.append(scores.unflatten(2, (level.height, level.width)) @ level.wx.T)
        if rows:
            up = (self.down @ torch.cat(rows, 2)).flatten(2)
            own = up if own is None else own + up
        assert own is not None
        return own

    def _weighted_sums(self, maps: Tensor) -> Tensor:
        """Sum of maps [B, K, N] times pixels: the adjoint of ``inner`` [B, K, D]."""
        maps = maps.unflatten(2, self.size)
        rows = iter((self.down.T @ maps).split([level.height for level in self.resized], 2) if self.resized else ())
        sums = []
        for level in self.levels:
            small = maps if level.same else next(rows) @ level.wx  # [B, K, h, w]
            sums.append(torch.bmm(whole_rows(small.flatten(2)), level.f)[:, : maps.shape[1]])  # [B, K, D_l]
        return torch.cat(sums, 2)

    def assign(self, m: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two reads of the levels: scores, then sums."""
        best, labels = least(self.inner(m).add_(bias[..., None]))
        hot = one_hot(labels, scale, m.shape[1])
        return labels, best, self._weighted_sums(hot), hot.sum(2)

    def total(self, scale: Tensor) -> Tensor:
        """Sum of scale_n y_n [B, D]."""
        return self._weighted_sums(scale[:, None])[:, 0]

    def _rows(self, index: Tensor) -> Tensor:
        """Pixels [B, m, channels], with zero in place of a cell that is not finite."""
        return torch.cat([level.rows(index) for level in self.levels], 2)

    def rows(self, index: Tensor) -> Tensor:
        """Pixels [B, m, D], infinite where they interpolate a cell that is not finite."""
        rows = self._rows(index)
        for level in self.levels:
            if level.bad is not None:
                rows = rows.masked_fill(level.bad.flatten(1).gather(1, index)[..., None], torch.inf)
        return rows
