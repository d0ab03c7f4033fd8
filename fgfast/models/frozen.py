"""Modules that stay in evaluation mode while a network is trained, such as BatchNorms that keep their statistics."""

from functools import cache
from typing import Any, Self

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Let every BatchNorm of a network normalise by its running statistics, in training too, and keep these.

    Scales and shifts are trained as before. Parameters, buffers and the names of both are unchanged; copies of the
    network keep their statistics too.

    Args:
        module: a network; the classes of its BatchNorms are replaced in place.

    Returns:
        The module.

    Example:
        >>> import torch
        >>> norm = freeze_batch_norm(nn.Sequential(nn.BatchNorm1d(2))).train()
        >>> x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
        >>> torch.allclose(norm(x), x, atol=1e-4), norm[0].running_mean.tolist()
        (True, [0.0, 0.0])
    """
    for norm in module.modules():
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
            hold(norm)
    return module


def hold(module: nn.Module) -> None:
    """Keep a module in evaluation mode, with all within it, and copies of it too: its class is replaced in place."""
    if not isinstance(module, Frozen):
        kind: Any = type(module)
        module.__class__ = _frozen(kind)
    module.eval()


class Frozen(nn.Module):
    """A module that is always in evaluation mode."""

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode."""
        return super().train(False)


@cache
def _frozen(kind: Any) -> Any:
    """The subclass of a kind of module, such as timm's BatchNorm with an activation, that stays in evaluation mode."""
    return type(f"Frozen{kind.__name__}", (Frozen, kind), {})
