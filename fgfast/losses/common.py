"""Checks of arguments, the process group, ids, and updates of buffers, for all losses."""

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
from fgfast.losses.over_ranks import rank_and_world
from fgfast.ops.contrast import global_ids
from fgfast.ops.contrast.checks import check_alike
from fgfast.tensors import check_float, check_tensor, shape_error

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


def as_scalar(name: str, x: Tensor | float, like: Tensor) -> Tensor:
    """A number, or a tensor of one, as a 0-d tensor of floats; on the CPU or the device of ``like``."""
    if not isinstance(x, Tensor):
        if isinstance(x, bool) or not isinstance(x, Real):
            raise TypeError(f"{name} is a {type(x).__name__}: give a number or a tensor of one.")
        return torch.full((), x, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)
    check_float(name, x)
    if x.numel() != 1:
        raise shape_error(name, "[] or [1]", x)
    if x.device not in (like.device, torch.device("cpu")):
        raise ValueError(f"{name} is on {x.device} and image_features on {like.device}: move it there.")
    return x.reshape(())


def check_gather(gather_distributed: bool) -> None:
    """Raise if gathering is wanted from a torch without torch.distributed."""
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed is True and this torch has no torch.distributed: give False.")


def check_group(group: "ProcessGroup | None") -> None:
    """Raise unless the group is None, or a process group of which this process is a member."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group is {group!r}: give a torch.distributed process group of this process, or None.")


def choose_group(gather_distributed: bool, group: "ProcessGroup | None" = None) -> "ProcessGroup | None":
    """The given group, or else the default group if gathering is wanted and there is more than one process."""
    ready = gather_distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if group is None and ready else group


def group_of_ranks(rank: int, world_size: int, group: "ProcessGroup | None" = None) -> "ProcessGroup | None":
    """The given group, or else the default group if ``world_size`` is above 1.

    Raises:
        ValueError: ``world_size`` is not 1, and it or ``rank`` is not that of this process in the group.
    """
    if world_size == 1:
        return group
    if group is None and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    found = rank_and_world(group)
    if found != (rank, world_size):
        raise ValueError(
            f"rank is {rank} of {world_size} and this process is rank {found[0]} of {found[1]} of the process group: "
            "give its rank and world_size."
        )
    return group


def ids_over_ranks(ids: Ids, group: "ProcessGroup | None") -> Ids:
    """The ids with image ids that are unique over the group."""
    if group is None:
        return ids
    device = ids.image.device.type
    if f"{device}:" not in dist.get_backend_config(group):
        raise ValueError(
            f"group has the backend {dist.get_backend(group)}, which has no {device}, where the vectors are: give a "
            "group of another backend."
        )
    return global_ids(ids, group)


def ids_of_two_views(n: int, device: torch.device, group: "ProcessGroup | None" = None) -> tuple[Ids, Ids]:
    """Ids of n images with one part each, in view 0 and in view 1; image ids are unique over the group."""
    image = torch.arange(n, device=device)
    zero = torch.zeros_like(image)
    first = ids_over_ranks(Ids(image, zero, zero), group)
    return first, first._replace(view=zero + 1)


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
