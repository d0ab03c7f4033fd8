"""The sigmoid loss over ranks: the loss and the gradients of one process on the joined batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fgfast.losses import SigLIPLoss
from fgfast.ops.sigmoid import sigmoid_loss
from tests import ranks
from tests.ops.test_sigmoid import make

pytestmark = pytest.mark.slow

ROWS = {2: [[4, 4], [7, 2], [0, 5]], 3: [[3, 0, 5]]}  # pairs per rank, including a rank without any
DTYPES = (torch.float64, torch.bfloat16)


def evaluate(inputs: list[Tensor], loss: SigLIPLoss, compiled: bool = False) -> list[Tensor]:
    """The loss and every gradient."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    value = run(*inputs)
    return [value.detach(), *torch.autograd.grad(value, inputs)]


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    results = []
    for rows in ROWS[world]:
        for dtype in DTYPES:
            image, text, t, b = make(sum(rows), n=sum(rows), dtype=dtype)
            mine = [image.split(rows)[rank], text.split(rows)[rank], t, b]
            loss = SigLIPLoss(rank=rank, world_size=world, dist_impl="gather")
            results.append(evaluate(mine, loss, compiled=rows == [7, 2]))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_give_the_loss_and_gradients_of_one_process(world: int, tmp_path: Path) -> None:
    ranks.start(work, world, str(tmp_path), ranks=world)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    cases = [(rows, dtype) for rows in ROWS[world] for dtype in DTYPES]
    for i, (rows, dtype) in enumerate(cases):
        loss, image, text, t, b = evaluate(make(sum(rows), n=sum(rows), dtype=dtype), SigLIPLoss())
        got = [r[i] for r in results]
        mean = [torch.stack([g[n] for g in got]).mean(0) for n in (0, 3, 4)]  # as DDP averages
        joined = [torch.cat([g[n] for g in got]) / world for n in (1, 2)]
        for x, y in zip([*mean, *joined], [loss, t, b, image, text], strict=True):
            # bfloat16 gradients are rounded on both sides
            rtol = 1e-5 if x.dtype != torch.bfloat16 else 2**-7
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * float(y.abs().max()))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[tuple[Any, ...]]:
    """The arguments of the operation over a group of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield *(x.requires_grad_() for x in make(0, n=3)), "torch", dist.group.WORLD.group_name
    dist.destroy_process_group()


def test_opcheck(one_rank: tuple[Any, ...]) -> None:
    torch.library.opcheck(torch.ops.fgfast.sigmoid_loss, one_rank)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in one_rank]
    grad = torch.tensor(2.0, dtype=torch.float64)
    torch.library.opcheck(torch.ops.fgfast.sigmoid_loss_backward, (grad, True, *detached))


def test_a_second_derivative_is_refused_in_one_sentence(one_rank: tuple[Any, ...]) -> None:
    image, *rest = one_rank
    loss = torch.ops.fgfast.sigmoid_loss(image, *rest)
    (first,) = torch.autograd.grad(loss, image, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^SigLIPLoss over ranks .*: give world_size=1\.$"):
        first.sum().backward()


def test_a_group_of_one_rank_is_one_process(one_rank: tuple[Any, ...]) -> None:
    inputs = one_rank[:4]
    got = sigmoid_loss(*inputs, group=dist.group.WORLD)
    torch.testing.assert_close(got, sigmoid_loss(*inputs))
