"""The order of the images of an epoch where they lie in shards: random, and yet every shard is read in one go.

The shards are shuffled, then the images of each: a stream that touches one shard after another. It is cut into
:data:`LANES` pieces of equal length, which the order takes in turns. Rank r of W takes every W-th image, as it does of
any set, and so it reads the lanes l with l mod W = r: W ranks read different shards if W divides the number of lanes.
The order itself does not depend on the number of ranks, workers or images a step, and any place of it is known without
reading what comes before: a run is resumed in the middle of a shard, also on another number of ranks.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

LANES = 24
"""Places in the stream that are read at the same time; a multiple of 1, 2, 3, 4, 6, 8, 12 and 24 ranks."""


class ShardOrder:
    """The order of images that lie in shards.

    Args:
        which: the shard of each image, int [N].
        lanes: pieces of the stream that are read in turns.
    """

    def __init__(self, which: np.ndarray, lanes: int = LANES) -> None:
        self.lanes = lanes
        shards, self._which = np.unique(which, return_inverse=True)
        self.n_shards = len(shards)

    def of_epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The N images in the order of an epoch, int64 [N], read-only, the same on every rank.

        Example:
            >>> order = ShardOrder(np.array([0, 0, 1, 1]), lanes=2).of_epoch(seed=0, epoch=0)
            >>> sorted(order.tolist()), sorted(order[::2].tolist()) in ([0, 1], [2, 3])  # a shard for each of two ranks
            ([0, 1, 2, 3], True)
        """
        return _of_epoch(self, seed, epoch)

    def draw(self, seed: int, epoch: int) -> np.ndarray:
        """The same, drawn anew."""
        n = len(self._which)
        rng = np.random.default_rng(seed + epoch)
        place = rng.permutation(self.n_shards)[self._which] + rng.random(n)
        stream = np.argsort(place, kind="stable")
        turn, lane = np.divmod(np.arange(n), self.lanes)
        length, longer = divmod(n, self.lanes)
        start = np.arange(self.lanes) * length + np.minimum(np.arange(self.lanes), longer)
        order = stream[start[lane] + turn]
        order.flags.writeable = False
        return order


@lru_cache(maxsize=3)
def _of_epoch(shards: ShardOrder, seed: int, epoch: int) -> np.ndarray:
    return shards.draw(seed, epoch)
