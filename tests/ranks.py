"""Processes of a distributed test, forked from one that has imported what they need."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

# Imported once for all tests of a worker: an import of torch alone is seconds of every rank.
PRELOADED = ["torch", "torch._dynamo", "torchvision", "timm", "fgfast", "fgfast.train.loop"]


def start(function: Callable[..., None], *arguments: Any, ranks: int) -> None:
    """Run function(rank, *arguments) in a process for each rank and wait for them.

    The server of the processes has run no operation of torch, so there are no threads that a fork would lose. Its
    environment is that of the first call.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(function, args=arguments, nprocs=ranks, start_method="forkserver")
