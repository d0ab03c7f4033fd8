"""Processes for distributed tests, forked from a server that has already imported the packages."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

# Imported once per pytest worker: importing torch takes every rank seconds.
PRELOADED = ["torch", "torch._dynamo", "torchvision", "timm", "fgfast", "fgfast.train.loop"]


def start(function: Callable[..., None], *arguments: Any, ranks: int) -> None:
    """Run function(rank, *arguments) in one process per rank and wait for all of them.

    The fork server never runs a torch operation, so it has no threads that a fork would lose. It has the environment
    variables of the first call.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(function, args=arguments, nprocs=ranks, start_method="forkserver")


def free_port() -> int:
    """A port of this machine that no program uses."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def join(rank: int, world: int, port: int) -> None:
    """Set the environment of a rank, as torchrun does."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)


def run_together(
    function: Callable[[int, int, str], int], scenarios: list[str], world: int, folder: Path, within: float
) -> dict[str, list[tuple[int, str]]]:
    """Exit status and standard error of each rank of each scenario, run all at once.

    Ranks that stand still when all others of the scenario have ended are killed.

    Args:
        function: function(rank, port, scenario) returns the exit status.
        scenarios: their names.
        world: ranks of each.
        folder: for their standard error.
        within: seconds for all of them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    processes = {}
    for i, scenario in enumerate(scenarios):
        port = free_port()
        arguments = [(function, rank, port, scenario, folder / f"{i}-{rank}.txt") for rank in range(world)]
        processes[scenario] = [context.Process(target=_call, args=a, daemon=True) for a in arguments]
        for process in processes[scenario]:
            process.start()
    end = time.monotonic() + within
    while any(p.exitcode is None for group in processes.values() for p in group):
        for group in processes.values():
            for process in group:
                others = [p for p in group if p is not process]
                if time.monotonic() > end or (_is_stopped(process) and all(p.exitcode is not None for p in others)):
                    process.kill()
        time.sleep(0.02)
    return {
        scenario: [(p.exitcode or 0, (folder / f"{i}-{rank}.txt").read_text()) for rank, p in enumerate(group)]
        for i, (scenario, group) in enumerate(processes.items())
    }


def _is_stopped(process: Any) -> bool:
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _call(function: Callable[[int, int, str], int], rank: int, port: int, scenario: str, errors: Path) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    raise SystemExit(function(rank, port, scenario))
