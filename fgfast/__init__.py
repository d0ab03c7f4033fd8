"""fgfast: cluster pixels into parts, pool them, contrast them. The public names; importing this loads torch alone."""

from fgfast.backend import use_backend
from fgfast.ops.contrast import contrastive_loss
from fgfast.ops.ids import Ids
from fgfast.ops.part_pool import PartPool, labels_to_grid, part_pool

__version__ = "0.1.0"

__all__ = ["Ids", "PartPool", "__version__", "contrastive_loss", "labels_to_grid", "part_pool", "use_backend"]
