"""The ranks of a distributed run: the process group that torchrun describes, barriers, and the choice of a device."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fgfast.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0


def choose_device(name: str) -> torch.device:
    """The device of "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not a device: choose auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r} is not supported: choose auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name} was given and no CUDA device was found: choose --device cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name} was given and there are {torch.cuda.device_count()} CUDA devices: choose a lower number."
        )
    return device


def start(device: str) -> Ranks:
    """Join the process group that torchrun describes in the environment; without one this process is the only rank."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device)
    if world == 1:
        return Ranks(0, 1, chosen)
    rank = int(os.environ["RANK"])
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=world)
    return Ranks(rank, world, chosen)


def barrier(ranks: Ranks) -> None:
    """Wait for the other ranks, if there are any."""
    if ranks.world > 1:
        dist.barrier()


def is_first() -> bool:
    """Whether this process is the first rank, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0
