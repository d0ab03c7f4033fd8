"""Every method on 2 and 3 ranks computes what one process computes on the joined batch, however uneven the ranks are.

There is neither BatchNorm nor dropout; PyTorch's own random numbers differ between the ranks. Networks and images are
float64 where the method allows it: in float32, batches of other sizes round differently, and a ReLU at zero can turn
that into gradients that differ by more than the tolerance.
"""

import os
import socket
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fgfast.data.views import Batch
from fgfast.methods.base import Progress
from tests import ranks
from tests.methods.method_cases import CASES, STEPS, build, joined_batch

pytestmark = pytest.mark.slow
FLOAT32 = ("lodisc", "particle random", "srgan", "synthpair")  # cases that take float32 inside


def in_float64(batch: Batch) -> Batch:
    """The batch with float64 images."""

    def of(value: Any) -> Any:
        if isinstance(value, list):
            return [of(x) for x in value]
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return Batch(**{f.name: of(getattr(batch, f.name)) for f in fields(batch)})


def of_rank(batch: Batch, rank: int, world: int) -> Batch:
    """Every world-th image."""
    parts: dict[str, Any] = {}
    for name, value in ((f.name, getattr(batch, f.name)) for f in fields(batch)):
        parts[name] = [x[rank::world] for x in value] if isinstance(value, list) else value
        if isinstance(value, Tensor):
            parts[name] = value[rank::world]
    return Batch(**parts)


def train(case: str, rank: int, world: int, group: Any) -> list[dict[str, Tensor]]:
    """The terms, gradients and buffers of each step, averaged over the ranks as DistributedDataParallel does it."""
    method, wide = build(case), not case.startswith(FLOAT32)
    if wide:
        method.double()
    if world > 1:
        method.set_group(group)
        method.set_rng(torch.Generator().manual_seed(1))
    torch.manual_seed(1 if world == 1 else 100 + rank)
    params = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(params, lr=1e-3, momentum=0.9)
    rows = []
    for step in range(STEPS):
        method.before_step(Progress(step, STEPS))
        optimizer.zero_grad()
        batch = joined_batch(step, getattr(method.config, "local_crops", 0))
        terms = method(of_rank(in_float64(batch) if wide else batch, rank, world))
        terms["loss"].backward()
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        row = {name: value.detach() for name, value in terms.items()} | {
            "gradient": torch.cat([p.grad.flatten() for p in params if p.grad is not None])
        }
        if world > 1:
            for value in row.values():
                torch.distributed.all_reduce(value, group=group)
                value /= world
        torch.nn.utils.vector_to_parameters(row["gradient"], [p.grad for p in params if p.grad is not None])
        optimizer.step()
        method.after_step(Progress(step + 1, STEPS))
        rows.append(row | {f"buffer {name}": b.clone() for name, b in method.named_buffers()})
    return rows


def _train_all(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=3)
    pair = torch.distributed.new_group([0, 1])
    for case in CASES:
        of_three = train(case, rank, 3, torch.distributed.group.WORLD)
        other = train(case, 0, 1, None) if rank == 2 else train(case, rank, 2, pair)
        if rank:
            torch.save({1 if rank == 2 else 2: other, 3: of_three}, f"{folder}/{case} {rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of ranks 1 and 2 for all cases."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks.start(_train_all, port, str(out), ranks=3)
    return out


@pytest.mark.parametrize("case", CASES)
def test_ranks_compute_what_one_process_does(folder: Path, case: str) -> None:
    """Means of the terms, averaged gradients (relative to the largest one) and buffers, in each step."""
    of_pair, of_one = (torch.load(folder / f"{case} {rank}.pt", weights_only=True) for rank in (1, 2))
    largest = max(float(row["gradient"].norm()) for row in of_one[1])
    assert largest > 0
    for world, rows in ((2, of_pair[2]), (3, of_one[3])):
        for step, (row, expected) in enumerate(zip(rows, of_one[1], strict=True)):
            assert row.keys() == expected.keys()
            for name, value in row.items():
                error, size = (float(x.double().norm()) for x in (value - expected[name], expected[name]))
                assert error <= 1e-5 * (largest if name == "gradient" else max(1.0, size)), (world, step, name)
