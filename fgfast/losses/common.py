"""Checks of vectors and temperatures, and ids, for all losses."""

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fgfast.ids import Ids
from fgfast.ops.contrast import global_ids
from fgfast.tensors import check_tensor, shape_error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_temperature(temperature: float) -> None:
    """Raise unless the temperature is finite and at least 1e-8."""
    if not (temperature >= 1e-8 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}: give a finite number of 1e-8 or more.")


def check_vectors(**named: Tensor) -> None:
    """Raise unless all are vectors [B, D] of the same shape; the keywords are the names that users know."""
    for name, x in named.items():
        check_tensor(name, x)
        if x.dim() != 2:
            raise shape_error(name, "[B, D]", x)
    shapes = {name: tuple(x.shape) for name, x in named.items()}
    if len(set(shapes.values())) > 1:
        found = " and ".join(f"{name} has shape {shape}" for name, shape in shapes.items())
        raise ValueError(f"{found}: give all of them the same shape [B, D].")


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
