"""Processes for distributed tests, forked from a server that has already imported the packages."""

import multiprocessing
from collections.abc import Callable
from typing import Any

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
