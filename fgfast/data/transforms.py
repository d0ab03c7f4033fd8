"""Optional changes of a view that single methods and ablations need; ``Crop.transforms`` takes them.

Each has its settings and draws its random numbers. The loaders apply them in a fixed order, see ``Crop``. Lengths are
fractions of the view's side, rounded to pixels: a setting for 512 pixels works at any size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fgfast.data.places import Numbers


@dataclass(frozen=True)
class Transform:
    """Base of the changes that a ``Crop`` can hold in its ``transforms``, at most one of each class.

    Attributes:
        field: the field of ``Draw`` that takes what :meth:`draw` returns; empty for a change without random numbers.
        moves: whether pixels change places within the view; no box describes such a view.
    """

    field: ClassVar[str] = ""
    moves: ClassVar[bool] = False

    def check(self, size: int) -> None:
        """Raise a ValueError that names the field if the change does not fit a view of ``size`` pixels."""

    def draw(self, size: int, batch: int, rng: Numbers) -> np.ndarray:
        """Random numbers of the change for a batch of views, in the form that its field of ``Draw`` describes."""
        raise NotImplementedError

    def _check_range(self, name: str, top: float) -> None:
        low, high = getattr(self, name)
        if not 0 < low <= high <= top:
            raise ValueError(
                f"{type(self).__name__}.{name} is ({low}, {high}): give a range with 0 < low <= high <= {top:g}."
            )


@dataclass(frozen=True)
class TrimBorder(Transform):
    """Cut off a border of the window before it is resized.

    Args:
        fraction: fraction of the window that is cut off at each of its four sides, in [0, 0.5).
    """

    fraction: float

    def check(self, size: int) -> None:
        if not 0 <= self.fraction < 0.5:
            raise ValueError(f"TrimBorder.fraction is {self.fraction}: give a fraction in [0, 0.5).")


@dataclass(frozen=True)
class Gamma(Transform):
    """Replace every value x in [0, 1] by x^g, before the other changes of colour.

    Args:
        exponent: range of g, drawn uniformly, > 0.
    """

    exponent: tuple[float, float]
    field: ClassVar[str] = "gamma"

    def check(self, size: int) -> None:
        self._check_range("exponent", float("inf"))

    def draw(self, size: int, batch: int, rng: Numbers) -> np.ndarray:
        return rng.uniform(*self.exponent, batch).astype(np.float32)


@dataclass(frozen=True)
class PatchSwap(Transform):
    """Let two square patches change places, one in the upper and one in the lower half of the view.

    Args:
        side: side of the patches as a fraction of the view's side, in (0, 0.5], at least one pixel.
    """

    side: float
    field: ClassVar[str] = "patches"
    moves: ClassVar[bool] = True

    def check(self, size: int) -> None:
        if not 1 <= round(self.side * size) <= size // 2:
            raise ValueError(
                f"PatchSwap.side is {self.side} on a view of {size} pixels: "
                f"give a fraction for 1 to {size // 2} pixels, so that each half holds a patch."
            )

    def draw(self, size: int, batch: int, rng: Numbers) -> np.ndarray:
        half, side = size // 2, round(self.side * size)
        y = rng.integers(0, half - side, (batch, 2), endpoint=True) + np.array([0, size - half])
        x = rng.integers(0, size - side, (batch, 2), endpoint=True)
        return np.stack([y, x, np.full((batch, 2), side)], 2)


@dataclass(frozen=True)
class BlockShuffle(Transform):
    """Permute the blocks of a grid.

    Args:
        grid: blocks per side, 1 to the side in pixels; if it does not divide the size, the blocks differ by a pixel
            and are stretched by nearest neighbour.
        reach: largest number of places that a block moves along each axis: first the blocks of each row, then those of
            each column are sorted by i + u, u uniform in +-(reach + 1) / 2 (DCL, whose k is half of reach + 1).
            0: every order of all blocks is equally likely.
    """

    grid: int
    reach: int = 0
    field: ClassVar[str] = "blocks"
    moves: ClassVar[bool] = True

    def check(self, size: int) -> None:
        if not 1 <= self.grid <= size:
            raise ValueError(
                f"BlockShuffle.grid is {self.grid} on a view of {size} pixels: give 1 to {size} blocks per side."
            )
        if not 0 <= self.reach < self.grid:
            raise ValueError(
                f"BlockShuffle.reach is {self.reach} with {self.grid} blocks per side: "
                "give a smaller number, or 0 for all orders."
            )

    def draw(self, size: int, batch: int, rng: Numbers) -> np.ndarray:
        n = self.grid
        if not self.reach:
            return rng.random((batch, n * n)).argsort(1).reshape(batch, n, n)
        blocks = np.broadcast_to(np.arange(n * n).reshape(n, n), (batch, n, n))
        for axis in (2, 1):  # two blocks that are reach + 1 places apart never change their order
            place = np.arange(n)[:, None] if axis == 1 else np.arange(n)
            target = place + (self.reach + 1) * (rng.random((batch, n, n)) - 0.5)
            blocks = np.take_along_axis(blocks, target.argsort(axis), axis)
        return blocks


@dataclass(frozen=True)
class Holes(Transform):
    """Paint square holes black; they may overlap. Id maps are -1 there.

    Args:
        count: range of their number, drawn uniformly, 0 <= low <= high, high >= 1.
        side: range of their sides as fractions of the view's side, in (0, 1]: uniform over whole pixels, at least one.
    """

    count: tuple[int, int]
    side: tuple[float, float] = (10 / 512, 25 / 512)
    field: ClassVar[str] = "holes"

    def check(self, size: int) -> None:
        low, high = self.count
        if not 0 <= low <= high or high < 1:
            raise ValueError(f"Holes.count is {self.count}: give a range with 0 <= low <= high and high >= 1.")
        self._check_range("side", 1)

    def draw(self, size: int, batch: int, rng: Numbers) -> np.ndarray:
        most = self.count[1]
        count = rng.integers(*self.count, (batch, 1), endpoint=True)
        side = _draw_sides(self.side, size, (batch, most), rng)
        corner = np.floor(rng.random((batch, most, 2)) * (size - side + 1)[..., None]).astype(np.int64)
        side = np.where(np.arange(most) < count, side, 0)  # a side of 0 is no hole
        return np.concatenate([corner, side[..., None]], 2)


@dataclass(frozen=True)
class PasteOnWhite(Transform):
    """Cut out the region around the mean position of the image's edges and paste it at the centre of a white view.

    The mean is over all pixels, weighted by the differences to their neighbours. Id maps are -1 around the region.

    Args:
        side: range of the region's height and width as fractions of the view's side, in (0, 1], each uniform over
            whole pixels.
    """

    side: tuple[float, float]
    field: ClassVar[str] = "paste"
    moves: ClassVar[bool] = True

    def check(self, size: int) -> None:
        self._check_range("side", 1)

    def draw(self, size: int, batch: int, rng: Numbers) -> np.ndarray:
        return _draw_sides(self.side, size, (batch, 2), rng)


DRAWN: tuple[type[Transform], ...] = (Gamma, PatchSwap, BlockShuffle, Holes, PasteOnWhite)
"""The transforms with random numbers, in the order in which these are drawn."""


def _draw_sides(fractions: tuple[float, float], size: int, shape: tuple[int, ...], rng: Numbers) -> np.ndarray:
    """Sides uniform over whole pixels, at least one."""
    low, high = (max(1, round(fraction * size)) for fraction in fractions)
    return rng.integers(low, high, shape, endpoint=True)
