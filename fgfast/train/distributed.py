"""The ranks of a distributed run: the process group that torchrun describes, barriers, and the choice of a device."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from fgfast.backend import check_chosen
from fgfast.errors import UserError

T = TypeVar("T")


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
        UserError: there is no such device, or FGFAST_BACKEND names a backend that cannot run.
    """
    try:
        check_chosen()
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from None
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
    """Join the process group that torchrun describes in the environment; without one this process is the only rank.

    Raises:
        UserError: there is no such device, the environment describes no group, or the group cannot be joined.
    """
    chosen = choose_device(device)
    world = _variable("WORLD_SIZE", least=1, default=1)
    if not _text("WORLD_SIZE") and not will_be_first():
        raise UserError(f"RANK is {_text('RANK')} but WORLD_SIZE is not set: {_REMEDY}.")
    rank = _variable("RANK", below=world, default=0 if world == 1 else None)
    if world == 1:
        return Ranks(0, 1, chosen)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", _variable("LOCAL_RANK", below=torch.cuda.device_count()))
        torch.cuda.set_device(chosen)
    if not dist.is_initialized():
        address, port = os.environ.get("MASTER_ADDR", ""), _variable("MASTER_PORT", below=2**16)
        if not address:
            raise UserError(f"WORLD_SIZE is {world} and MASTER_ADDR is not set: {_REMEDY}.")
        try:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=world)
        except dist.DistError as error:
            raise UserError(f"Rank {rank} could not join the others at {address}:{port}: {error}") from error
    return Ranks(rank, world, chosen)


_REMEDY = "start all ranks with torchrun, or unset WORLD_SIZE and RANK to train with one process"


def _text(name: str) -> str:
    """A variable of the environment; "" if it is not set."""
    return os.environ.get(name, "").strip()


def _variable(name: str, *, least: int = 0, below: int | None = None, default: int | None = None) -> int:
    """The number in a variable of the environment; an empty one counts as not set."""
    text = _text(name)
    if not text:
        if default is None:
            raise UserError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and {name} is not set: {_REMEDY}.")
        return default
    if not text.isdecimal() or int(text) < least or (below is not None and int(text) >= below):
        wanted = f"a number, at least {least}" if below is None else f"a number, {least} to {below - 1}"
        wanted = f"{least}" if below == least + 1 else wanted
        raise UserError(f"The environment variable {name} is {text!r} and must be {wanted}: {_REMEDY}.")
    return int(text)


def barrier(ranks: Ranks) -> None:
    """Wait for the other ranks, if there are any."""
    if ranks.world > 1:
        dist.barrier()


def on_first(ranks: Ranks, action: Callable[[], T]) -> T | None:
    """Run ``action`` on the first rank while the others wait; an exception ends the others too.

    An interrupt does not: a KeyboardInterrupt leaves the others waiting, until torchrun stops them.

    Returns:
        Its value on the first rank, None on the others.

    Raises:
        UserError: on the other ranks, if it raised an exception on the first.
    """
    if ranks.world == 1:
        return action()
    error, value = None, None
    if ranks.first:
        try:
            value = action()
        except Exception as raised:  # raised again below, once the others know
            error = raised
    message = [None if error is None else str(error) or type(error).__name__]
    dist.broadcast_object_list(message, src=0, device=ranks.device)
    if error is not None:
        raise error
    if message[0] is not None:
        raise UserError(message[0])
    return value


def will_be_first() -> bool:
    """Whether this process is the first rank, or the only one, by its environment: for use before :func:`start`."""
    return not _text("RANK").strip("0")


def is_first() -> bool:
    """Whether this process is the first rank, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0
