"""fgfast: cluster pixels into parts, pool them, contrast them. The public names; importing this loads only torch."""

from typing import TYPE_CHECKING, Any

from fgfast import interrupt as interrupt  # first: in the command, Ctrl-C then works while torch is imported
from fgfast.backend import use_backend
from fgfast.ids import Ids
from fgfast.losses import (
    CLIPLoss,
    DetConBLoss,
    DetConSLoss,
    DINOLoss,
    InfoNCELoss,
    KoLeoLoss,
    NTXentLoss,
    PartContrastiveLoss,
    SigLIPLoss,
    SupConLoss,
    cached_contrast,
)
from fgfast.ops.assign_and_pool import assign_and_pool
from fgfast.ops.contrast import contrastive_loss, global_ids
from fgfast.ops.kmeans import KMeansResult, KMeansStep, kmeans, kmeans_step
from fgfast.ops.mask import PivotalMask, mask_images, pivotal_mask
from fgfast.ops.part_pool import PartPool, labels_to_grid, part_pool
from fgfast.ops.perturb import Perturbed, perturb

if TYPE_CHECKING:
    from fgfast.estimator import KMeans


def __getattr__(name: str) -> Any:
    """KMeans when it is first asked for, as it loads scikit-learn."""
    if name == "KMeans":
        from fgfast.estimator import KMeans

        return KMeans
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__version__ = "0.1.0"

__all__ = [
    "CLIPLoss",
    "DINOLoss",
    "DetConBLoss",
    "DetConSLoss",
    "Ids",
    "InfoNCELoss",
    "KMeans",
    "KMeansResult",
    "KMeansStep",
    "KoLeoLoss",
    "NTXentLoss",
    "PartContrastiveLoss",
    "PartPool",
    "Perturbed",
    "PivotalMask",
    "SigLIPLoss",
    "SupConLoss",
    "__version__",
    "assign_and_pool",
    "cached_contrast",
    "contrastive_loss",
    "global_ids",
    "kmeans",
    "kmeans_step",
    "labels_to_grid",
    "mask_images",
    "part_pool",
    "perturb",
    "pivotal_mask",
    "use_backend",
]
