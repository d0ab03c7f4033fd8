"""Batch norms whose statistics are those of the images of all ranks."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fgfast.tensors import accumulation

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def synchronise_batch_norm(module: nn.Module, group: "ProcessGroup | None" = None) -> nn.Module:
    """Let every batch norm of a network normalise by the statistics of the batches of all ranks, joined.

    Evaluation mode is unchanged, as are parameters, buffers and the names of both.

    Args:
        module: a network; its batch norms are replaced in place.
        group: the process group; None is the default group.

    Returns:
        The module, or its replacement if it is itself a batch norm.
    """
    from timm.layers.norm_act import BatchNormAct2d, convert_sync_batchnorm

    if dist.is_initialized() and group is dist.group.WORLD:
        group = None  # a network that holds a process group cannot be copied
    if any(p.is_cuda for p in module.parameters()):
        return convert_sync_batchnorm(module, group)
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and not isinstance(norm, SyncNorm):
            norm.__class__ = SyncNormAct if isinstance(norm, BatchNormAct2d) else SyncNorm
            norm.group = group  # type: ignore[assignment]  # a SyncNorm now
    return module


class SyncNorm(_BatchNorm):
    """PyTorch's synchronised batch norm for a CPU: its own refuses tensors there, and DDP refuses it."""

    group: "ProcessGroup | None" = None

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2:
            raise ValueError(f"expected shape [B, C, ...], got {list(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, C, ...]; B may differ between ranks and be 0 on some."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        wide = x.to(accumulation(x.dtype))
        dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1]
        mean = wide.sum(dims) / max(1, count)
        squares = (wide - mean.view(shape)).square().sum(dims)
        own = torch.cat([mean.double(), squares.double(), mean.new_tensor([count], dtype=torch.float64)])
        means, all_squares, counts = _AllGather.apply(own, self.group).split([len(mean), len(mean), 1], 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        variance = (all_squares + counts * (means - mean).square()).sum(0) / total
        if self.track_running_stats:
            self._track(mean.detach(), variance.detach() * total / (total - 1).clamp(min=1))
        scale = (variance + self.eps).rsqrt().to(wide.dtype)
        out = (wide - mean.to(wide.dtype).view(shape)) * scale.view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a batch."""
        assert self.running_mean is not None  # where statistics are tracked
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        weight = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
        self.running_var.lerp_(variance.to(self.running_var.dtype), weight)


class SyncNormAct(SyncNorm):
    """The same for a norm of timm that ends with dropout and an activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise, drop and activate [B, C, ...]."""
        return self.act(self.drop(super().forward(x)))  # type: ignore[operator]  # modules of timm


class _AllGather(torch.autograd.Function):
    """Vectors [D] of all ranks as [W, D]; the gradient of each is the sum of those that all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: "ProcessGroup | None") -> Tensor:
        ctx.group = group
        out = own.new_empty(dist.get_world_size(group), len(own))
        dist.all_gather(list(out.unbind()), own, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group)], None
