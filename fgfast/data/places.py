"""Random numbers of the images of all ranks, of which each rank gets its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np


@dataclass(frozen=True)
class Places:
    """Draws the numbers of all images of a step and returns those of some, with the methods of a generator.

    The first axis of every shape is the images. How many numbers are drawn never depends on their sizes.

    Args:
        rng: the generator.
        total: number of images.
        mine: the images whose numbers are returned.
    """

    rng: np.random.Generator
    total: int
    mine: slice

    def random(self, shape: int | tuple[int, ...]) -> np.ndarray:
        """Numbers in [0, 1)."""
        return self.rng.random(self._all(shape))[self.mine]

    def uniform(self, low: float, high: float, shape: int | tuple[int, ...]) -> np.ndarray:
        """Numbers in [low, high)."""
        return self.rng.uniform(low, high, self._all(shape))[self.mine]

    def integers(
        self, low: int, high: int, shape: int | tuple[int, ...], dtype: type = np.int64, endpoint: bool = False
    ) -> np.ndarray:
        """Whole numbers in [low, high), or to high with ``endpoint``."""
        return self.rng.integers(low, high, self._all(shape), dtype, endpoint)[self.mine]

    def _all(self, shape: int | tuple[int, ...]) -> tuple[int, ...]:
        return (self.total, *(() if isinstance(shape, int) else shape[1:]))


Numbers: TypeAlias = np.random.Generator | Places
"""What random numbers of the images of a batch are drawn from."""
