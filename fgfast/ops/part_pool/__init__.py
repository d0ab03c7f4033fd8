"""Part pooling: :mod:`part_pool` and :mod:`grid` check and register, :mod:`tiled` computes."""

from fgfast.ops.part_pool.grid import labels_to_grid
from fgfast.ops.part_pool.part_pool import PartPool, part_pool

__all__ = ["PartPool", "labels_to_grid", "part_pool"]
