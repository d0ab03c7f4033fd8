"""The ranks of a distributed run: the process group that torchrun or Slurm describes, and the choice of a device."""

import contextlib
import inspect
import itertools
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fgfast.backend import check_chosen
from fgfast.errors import UserError
from fgfast.ranks import OtherRankError, Ranks
from fgfast.train.heartbeat import DONE, FAILED, INTERRUPTED, Heartbeat
from fgfast.train.rendezvous import Connection, connect, hosted_by_torchrun, meet, within

_LOST = re.compile(
    r"gloo/|Connection (closed|reset) by peer|Broken pipe|Timed out waiting|NCCL error|NCCL communicator"
)
_joins = itertools.count()


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


@contextmanager
def joined(device: str, timeout: float = 300.0) -> Iterator[Ranks]:
    """Train together with the processes that torchrun or Slurm describes in the environment, if it describes any.

    Within, a rank that fails, is killed or does not answer for ``timeout`` seconds ends the others too: one of them
    prints a sentence, by an exception if its main thread still runs and otherwise from another thread, which then ends
    the process with exit status 2. Afterwards there is no process group, except for one that was there before.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N"; with several ranks "cuda" is the one of LOCAL_RANK.
        timeout: seconds for which a rank may be silent, or busy while the others wait for it.

    Raises:
        UserError: there is no such device, the environment describes no group, or a rank is missing, dead or wrong.
        OtherRankError: what another rank reports.
    """
    rank, world = _place()
    if world == 1:
        yield Ranks(0, 1, choose_device(device))
        return
    ours = not dist.is_initialized()
    host = None if hosted_by_torchrun() else 0
    prefix = f"fgfast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_joins)}"
    late = f"Rank {rank} waited for rank 0, which does not answer: start all ranks again."
    try:
        connection = _connect(rank, world, timeout) if ours else Connection(dist.distributed_c10d._get_default_store())
        store = connection.part(prefix)
        members = within(timeout + 10, lambda: meet(store, connection.is_lost, rank, world, timeout), late)
    except dist.DistError as error:
        raise UserError(f"Rank {rank} lost rank 0 before all ranks had joined: start all ranks again.") from error
    except UserError:
        if rank == host:
            time.sleep(1)  # the others read why from its store
        raise
    heart = Heartbeat(store, connection.is_lost, rank, members, host, timeout)
    how = FAILED
    try:
        chosen = _device_of_rank(device)
        if ours:
            dist.init_process_group(
                "nccl" if chosen.type == "cuda" else "gloo", store=connection.part(f"{prefix}/group"), rank=rank,
                world_size=world, timeout=timedelta(seconds=timeout + 4 * heart.interval),
            )  # fmt: skip  # longer than the heartbeat's, which knows the name
        yield Ranks(rank, world, chosen)
        how = DONE
    except OtherRankError:
        raise
    except Exception as error:
        if is_of_another_rank(error):
            raise heart.explain(error) from error
        verdict = heart.fail(str(error) if isinstance(error, UserError) else f"Rank {rank} failed: {error}")
        if verdict.printer != rank:
            raise OtherRankError(verdict.sentence) from error
        raise
    except BaseException:
        how = INTERRUPTED
        raise
    finally:
        if ours and dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()
        heart.leave(how)


def is_of_another_rank(error: BaseException) -> bool:
    """Whether an exception of a collective says that another rank does not take part: no further one will work."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(_LOST.search(str(error))))


def check_equal(ranks: Ranks, values: dict[str, Any]) -> None:
    """Check that all ranks were started alike.

    Args:
        ranks: the ranks.
        values: what must be equal, by its name in the message: "--lr", "the version of torch".

    Raises:
        UserError: on the first rank, if a rank has another value; it names the rank, and both values.
        OtherRankError: on the others.
    """
    if ranks.world == 1:
        return
    texts = {name: str(value) for name, value in values.items()}
    every: list[dict[str, str]] = [{} for _ in range(ranks.world)]
    dist.all_gather_object(every, texts)
    first = every[0]
    for rank, other in enumerate(every):
        for name in sorted(first.keys() | other.keys(), key=[*first, *other].index):
            here, there = first.get(name, "nothing"), other.get(name, "nothing")
            if here != there:
                raise (UserError if ranks.first else OtherRankError)(
                    f"{name} is {there} on rank {rank} and {here} on rank 0: start all ranks alike."
                )


def _device_of_rank(device: str) -> torch.device:
    chosen = choose_device(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", _variable("LOCAL_RANK", below=torch.cuda.device_count()))
        torch.cuda.set_device(chosen)
    return chosen


def _connect(rank: int, world: int, timeout: float) -> Connection:
    address, port = _text("MASTER_ADDR"), _variable("MASTER_PORT", below=2**16)
    if not address:
        raise UserError(f"WORLD_SIZE is {world} and MASTER_ADDR is not set: {_REMEDY}.")
    late = f"Something other than rank 0 listens at MASTER_ADDR {address}, MASTER_PORT {port}: set another port."
    return within(timeout + 10, lambda: connect(rank, world, address, port, timeout), late)


_REMEDY = "start all ranks with torchrun, or unset WORLD_SIZE and RANK to train with one process"


def _place() -> tuple[int, int]:
    """The rank of this process, and the number of ranks."""
    world = _variable("WORLD_SIZE", least=1, default=1)
    if not _text("WORLD_SIZE") and not will_be_first():
        raise UserError(f"RANK is {_text('RANK')} but WORLD_SIZE is not set: {_REMEDY}.")
    return _variable("RANK", below=world, default=0 if world == 1 else None), world


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


def will_be_first() -> bool:
    """Whether this process is the first rank, or the only one, by its environment: for use before :func:`joined`."""
    return not _text("RANK").strip("0")


def is_first() -> bool:
    """Whether this process is the first rank, or the only one."""
    return dist.get_rank() == 0 if dist.is_initialized() else will_be_first()


def distribute(step: nn.Module, ranks: Ranks) -> nn.Module:
    """The step of a method with gradients that are averaged over the ranks.

    To find unused parameters in each step costs a walk over the graph, and keeps the buckets in which gradients are
    added up: without it they change after the first step of a process, and a resumed run on three or more ranks adds
    in another order.
    """
    ddp = nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # torch 2.15 warns about the older name
    options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    if ranks.device.type == "cuda":
        options["device_ids"] = [ranks.device.index]
    return ddp(step, find_unused_parameters=True, **options)
