"""Losses as modules, one per file: each a few lines over ``contrastive_loss``, with the field's names and values."""

from fgfast.losses.cached import cached_contrast
from fgfast.losses.clip import CLIPLoss
from fgfast.losses.detcon import DetConBLoss, DetConSLoss
from fgfast.losses.dino import DINOLoss
from fgfast.losses.infonce import InfoNCELoss
from fgfast.losses.koleo import KoLeoLoss
from fgfast.losses.ntxent import NTXentLoss
from fgfast.losses.part_contrast import PartContrastiveLoss
from fgfast.losses.siglip import SigLIPLoss
from fgfast.losses.supcon import SupConLoss

__all__ = [
    "CLIPLoss", "DINOLoss", "DetConBLoss", "DetConSLoss", "InfoNCELoss", "KoLeoLoss", "NTXentLoss",
    "PartContrastiveLoss", "SigLIPLoss", "SupConLoss", "cached_contrast",
]  # fmt: skip
