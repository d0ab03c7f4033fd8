"""Statistics over batches: a running variance, a queue of keys, and batch norms that do not update theirs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fgfast.losses.over_ranks import join_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RunningVariance(nn.Module):
    r"""Variance of each dimension of L2-normalised features, over batches with exponentially decaying weights.

    .. math:: v_d = E[\tilde r_d^2] - E[\tilde r_d]^2, \qquad \tilde r = r / \|r\|,

    where the weight of a batch is ``decay`` times that of the next one; the estimate is not biased towards zero at the
    start.

    Args:
        dim: D, the width of the features.
        decay: in [0, 1); 0 takes only the last batch.

    Example:
        >>> running = RunningVariance(2)
        >>> running.update(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))
        >>> running.variance.tolist()
        [0.25, 0.25]
    """

    moments: Tensor
    seen: Tensor

    def __init__(self, dim: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("moments", torch.zeros(2, dim, dtype=torch.float64))  # first and second, unnormalised
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))  # their total weight

    @torch.no_grad()
    def update(self, features: Tensor, valid: Tensor | None = None, group: "ProcessGroup | None" = None) -> None:
        """Add features [B, D] of all ranks of group, without the rows where valid [B] is False."""
        with torch.autocast(features.device.type, enabled=False):
            rows = F.normalize(features.double(), dim=1)
        kept = torch.ones(len(rows), dtype=torch.bool, device=rows.device) if valid is None else valid
        rows = torch.where(kept[:, None], rows, 0)
        sums = torch.cat([rows.sum(0), rows.square().sum(0), kept.sum()[None].double()])
        if group is not None:
            dist.all_reduce(sums, group=group)
        weight = (1 - self.decay) * (sums[-1] > 0).double()
        self.moments.lerp_((sums[:-1] / sums[-1].clamp(min=1)).view_as(self.moments), weight)
        self.seen.lerp_(torch.ones_like(self.seen), weight)

    @property
    def variance(self) -> Tensor:
        """Variance float32 [D]; zeros before the first batch."""
        mean, square = self.moments / self.seen.clamp(min=torch.finfo(torch.float64).tiny)
        return (square - mean.square()).clamp(min=0).float()


class KeyQueue(nn.Module):
    """The last keys of a momentum encoder, newest first, the same on every rank: the memory bank of MoCo.

    Args:
        size: Q, the number of keys.
        dim: width of the keys.

    Example:
        >>> queue = KeyQueue(3, 2)
        >>> queue.push(torch.eye(2), torch.tensor([True, False]))
        >>> queue.keys[0].tolist()
        [1.0, 0.0]
    """

    keys: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=1))

    @torch.no_grad()
    def push(self, keys: Tensor, valid: Tensor, group: "ProcessGroup | None" = None) -> None:
        """Insert keys [B, D] at the front, those of all ranks of group as a joined batch, only ``valid`` rows."""
        if group is not None:
            keys, valid = join_rows(keys, group), join_rows(valid.to(torch.uint8), group)
        candidates = torch.cat([keys.to(self.keys.dtype), self.keys])
        kept = torch.cat([valid.to(torch.uint8), valid.new_ones(len(self.keys), dtype=torch.uint8)])
        order = kept.argsort(descending=True, stable=True)  # the number of valid keys is known only on the device
        self.keys.copy_(candidates[order[: len(self.keys)]])


@contextmanager
def freeze_bn_stats(*modules: nn.Module) -> Iterator[None]:
    """Let batch norms normalise by the batch, as in training, without updating their running statistics.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> with freeze_bn_stats(norm):
        ...     _ = norm(torch.tensor([[1.0], [3.0]]))
        >>> norm.running_mean.item()
        0.0
    """
    norms = [m for module in modules for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for norm in norms:
        norm.track_running_stats = not norm.training
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
