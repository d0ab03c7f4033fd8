"""What is remembered from batch to batch: the variance of features, the queue of keys; and what is kept out of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RunningVariance(nn.Module):
    r"""Variance of each dimension of features scaled to norm 1, over batches that fade.

    .. math:: v_d = E[\tilde r_d^2] - E[\tilde r_d]^2, \qquad \tilde r = r / \|r\|,

    where a batch counts ``decay`` times as much as the one after it; the first one is not mixed with zeros.

    Args:
        dim: D, the width of the features.
        decay: 0 (the last batch alone) to below 1.

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
        self.register_buffer("moments", torch.zeros(2, dim, dtype=torch.float64))  # of 1 and 2, not yet normalised
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))  # the weight that they have gathered

    @torch.no_grad()
    def update(self, features: Tensor, valid: Tensor | None = None, group: "ProcessGroup | None" = None) -> None:
        """Take in features [B, D]; rows where valid [B] is False do not count, those of all ranks of group do."""
        with torch.autocast(features.device.type, enabled=False):
            rows = F.normalize(features.double(), dim=1)
        kept = torch.ones(len(rows), dtype=torch.bool, device=rows.device) if valid is None else valid
        rows = torch.where(kept[:, None], rows, 0)
        sums = torch.cat([rows.sum(0), rows.square().sum(0), kept.sum()[None].double()])
        if group is not None:
            dist.all_reduce(sums, group=group)
        share = (1 - self.decay) * (sums[-1] > 0).double()
        self.moments.lerp_((sums[:-1] / sums[-1].clamp(min=1)).view_as(self.moments), share)
        self.seen.lerp_(torch.ones_like(self.seen), share)

    @property
    def variance(self) -> Tensor:
        """Variance float32 [D]; zeros before the first batch."""
        mean, square = self.moments / self.seen.clamp(min=torch.finfo(torch.float64).tiny)
        return (square - mean.square()).clamp(min=0).float()


class KeyQueue(nn.Module):
    """The last keys of a momentum encoder, newest first, the same on every rank: the bank of MoCo.

    Args:
        size: Q, how many.
        dim: their width.

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
        """Put keys [B, D] in front, those of all ranks of group; rows where valid [B] is False stay out."""
        if group is not None:
            keys, valid = _gathered(keys, group), _gathered(valid.to(torch.uint8), group)
        every = torch.cat([keys.to(self.keys.dtype), self.keys])
        kept = torch.cat([valid.to(torch.uint8), valid.new_ones(len(self.keys), dtype=torch.uint8)])
        order = kept.argsort(descending=True, stable=True)  # how many stay out is known to the device alone
        self.keys.copy_(every[order[: len(self.keys)]])


def _gathered(x: Tensor, group: "ProcessGroup") -> Tensor:
    """The rows of all ranks, which have as many each."""
    out = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


@contextmanager
def freeze_bn_stats(*modules: nn.Module) -> Iterator[None]:
    """Let batch norms normalise by the batch, as in training, without taking it into their running statistics.

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
