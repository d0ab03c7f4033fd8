"""The contrastive loss: :mod:`contrast` checks and registers, :mod:`tiled` computes, :mod:`ring` spans ranks."""

from fgfast.ops.contrast.contrast import contrastive_loss
from fgfast.ops.contrast.ring import global_ids

__all__ = ["contrastive_loss", "global_ids"]
