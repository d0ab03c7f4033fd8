"""Checks of vectors and temperatures, ids, and updates of buffers, for all losses."""

import math
import operator
import warnings
from collections.abc import Callable
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fgfast.ids import Ids
from fgfast.ops.contrast import global_ids
from fgfast.ops.contrast.checks import check_alike
from fgfast.tensors import check_tensor, shape_error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_temperature(temperature: float) -> None:
    """Raise unless the temperature is a finite number, or a tensor of one, of at least 1e-8."""
    if not isinstance(temperature, Real) and not (isinstance(temperature, Tensor) and temperature.numel() == 1):
        raise TypeError(f"temperature is {temperature!r}: give a number.")
    if not (temperature >= 1e-8 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}: give a finite number of 1e-8 or more.")


def check_vectors(**named: Tensor) -> None:
    """Raise unless all are vectors [B, D] alike in shape and dtype; the keywords are the names that users know."""
    for name, x in named.items():
        check_tensor(name, x)
        if x.dim() != 2:
            raise shape_error(name, "[B, D]", x)
    shapes = {name: tuple(x.shape) for name, x in named.items()}
    if len(set(shapes.values())) > 1:
        found = " and ".join(f"{name} has shape {shape}" for name, shape in shapes.items())
        raise ValueError(f"{found}: give all of them the same shape [B, D].")
    check_alike(**named)


def check_gather(gather_distributed: bool) -> None:
    """Raise if gathering is wanted from a torch without torch.distributed."""
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed is True and this torch has no torch.distributed: give False.")


def group_of_all(gather_distributed: bool) -> "ProcessGroup | None":
    """The default process group if gathering is wanted and there is more than one process, else None."""
    ready = gather_distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if ready else None


def ids_over_ranks(ids: Ids, group: "ProcessGroup | None") -> Ids:
    """The ids with image ids that are unique over the group."""
    return ids if group is None else global_ids(ids, group)


def ids_of_two_views(n: int, device: torch.device) -> tuple[Ids, Ids]:
    """Ids of n images with one part each, in view 0 and in view 1."""
    image = torch.arange(n, device=device)
    zero = torch.zeros_like(image)
    return Ids(image, zero, zero), Ids(image, zero, zero + 1)


def arange_like(n: int, like: Tensor) -> Tensor:
    """0, ..., n - 1 on the device of ``like``."""
    return torch.arange(n, device=like.device)


class _UpdateBuffers(torch.autograd.Function):
    """Calls a function of tensors as they are outside every transform of torch.func."""

    @staticmethod
    def forward(update: Callable[..., None], *tensors: Tensor) -> Tensor:
        update(*tensors)
        return tensors[0].new_empty(0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> None:
        raise RuntimeError("The buffers of a loss cannot be updated inside torch.vmap: call this loss outside it.")


def update_buffers(update: Callable[..., None], *tensors: Tensor) -> None:
    """Call ``update``, which may change buffers in place, with detached tensors, also inside torch.func.grad."""
    detached = [x.detach() for x in tensors]
    if torch.compiler.is_compiling():
        update(*detached)
    else:
        _UpdateBuffers.apply(update, *detached)


def renamed(old: str, new: str) -> property:
    """A property under an old name that warns and returns the attribute at the path ``new``."""

    def get(self: object) -> Any:
        message = f"{type(self).__name__}.{old} will be removed in the next minor version: use {new}."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return operator.attrgetter(new)(self)

    return property(get)
