"""The contrastive loss.

:mod:`contrast` chooses the backend and registers the operation, :mod:`checks` checks the arguments, :mod:`tiled` and,
where logits are few, :mod:`dense` are the "torch" backend, :mod:`ring` spans the ranks of a process group, between
which :mod:`exchange` sends.
"""

from fgfast.ops.contrast.contrast import contrastive_loss
from fgfast.ops.contrast.ring import global_ids

__all__ = ["contrastive_loss", "global_ids"]
