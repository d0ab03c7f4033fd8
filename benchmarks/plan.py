"""Memory of steps as ``fgfast plan`` predicts it against that of processes: ``python -m benchmarks.plan [--record]``.

Every rank is a process on a CPU that trains a timm network on random images. Measured is the most resident memory that
the networks and two steps add to what a first, smaller step left, of the rank with the most. A row whose prediction
is off by more than 20% is marked. ``--record`` writes results/plan.csv.
"""

import argparse
import gc
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.peak import ROOT, of_cpu
from fgfast.config import TrainConfig
from fgfast.data.views import Batch
from fgfast.methods.base import Method, Progress, method_class
from fgfast.ranks import Ranks
from fgfast.train.distributed import joined
from fgfast.train.optim import FiniteGuard
from fgfast.train.plan import make_batch, plan_step
from fgfast.train.step import Step

SMALL: dict[str, Any] = {"model": "resnet10t", "size": 64, "batch_size": 64}
CASES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    *(("simclr", world, SMALL) for world in (1, 2, 4)),
    *(("simclr", world, SMALL | {"micro_batch": 16, "micro_bn": "chunk"}) for world in (1, 2, 4)),
    *(("simclr", world, SMALL | {"shard": "fsdp"}) for world in (2, 4)),
    ("particle", 2, SMALL | {"parts": "grid"}),
    ("mocov3", 2, {"model": "vit_tiny_patch16_224", "size": 64, "batch_size": 16}),
    ("simclr", 2, {"model": "tf_efficientnet_lite0", "size": 32, "batch_size": 64}),
)
TOLERANCE = 0.2
MIB = 2**20


def config_of(method: str, options: dict[str, Any]) -> TrainConfig:
    """The options of a case."""
    return replace(method_class(method).Config(device="cpu", amp="off"), **options)


def run(method: str, config: TrainConfig, ranks: Ranks, steps: int) -> None:
    """Build a method and train it on one random batch, as the trainer does."""
    built: Method = method_class(method)(config)
    built.to(memory_format=torch.channels_last).train()
    if ranks.world > 1:
        built.set_rng(torch.Generator().manual_seed(0))
        built.set_group(torch.distributed.group.WORLD)
    step = Step(built, ranks)
    optimizer = step.make_optimizer()
    guard = FiniteGuard(built, optimizer)
    batch = make_batch(built.views(), config.batch_size)
    fill(batch, ranks)
    for number in range(steps):
        built.before_step(Progress(number, steps))
        terms = step(batch)
        norm = step.clip()
        guard.step(terms["loss"], norm, batch.index, number)
        optimizer.zero_grad(set_to_none=True)
        built.after_step(Progress(number + 1, steps))
        guard.mark()


def fill(batch: Batch, ranks: Ranks) -> None:
    """Give the images random values."""
    for x in (*batch.views, batch.whole, batch.boxes):
        if isinstance(x, Tensor):
            x.normal_()
    for ids in batch.labels:
        ids.random_(4)
    batch.target.zero_()
    torch.arange(len(batch), out=batch.index).mul_(ranks.world).add_(ranks.rank)
    batch.valid.fill_(True)


def measure(method: str, options: dict[str, Any], place: dict[str, str]) -> int:
    """The bytes of one rank, in a process of its own."""
    os.environ |= place
    torch.set_num_threads(1)
    with joined("cpu") as ranks:
        config = config_of(method, options)
        run(method, replace(config, batch_size=max(2, config.micro_batch)), ranks, 1)  # what libraries allocate once
        gc.collect()
        return of_cpu(lambda: run(method, config, ranks, 2))


def measured(method: str, world: int, options: dict[str, Any]) -> int:
    """Bytes of the rank that takes most, in fresh processes."""
    # glibc, which reads these when a process starts, else keeps freed activations, and the peak is an accident.
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": str(world)}
    with patch.dict(os.environ, malloc), ProcessPoolExecutor(world, mp_context=get_context("spawn")) as pool:
        started = [pool.submit(measure, method, options, place | {"RANK": str(rank)}) for rank in range(world)]
        return max(rank.result() for rank in started)


def row(method: str, world: int, options: dict[str, Any]) -> record.Row:
    """One case as a row: predicted and measured bytes."""
    predicted = plan_step(method_class(method), config_of(method, options), world).peak
    found = measured(method, world, options)
    return {
        "method": method, "ranks": world, "options": " ".join(f"{k}={v}" for k, v in options.items()),
        "predicted": predicted, "measured": found, "ratio": round(predicted / found, 3),
    }  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write results/plan.csv")
    chosen = parser.parse_args()
    rows = []
    for case in CASES:
        rows.append(row(*case))
        off = abs(rows[-1]["ratio"] - 1) > TOLERANCE
        print(rows[-1], "OFF BY MORE THAN 20%" if off else "", flush=True)
    if chosen.record:
        here = record.setting(torch.device("cpu"))
        record.overwrite([here | made for made in rows], ROOT / "benchmarks/results/plan.csv")


if __name__ == "__main__":
    main()
