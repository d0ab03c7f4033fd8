"""fgfast: cluster pixels into parts, pool them, contrast them. The public names; importing this loads torch alone."""

from fgfast.backend import use_backend
from fgfast.ops.part_pool import PartPool, labels_to_grid, part_pool

__version__ = "0.1.0"

__all__ = ["PartPool", "__version__", "labels_to_grid", "part_pool", "use_backend"]
