"""The ring over ranks: the loss and the gradients of one process on the concatenated batch."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fgfast.ids import Ids
from fgfast.ops.contrast import contrastive_loss, global_ids
from tests import ranks

pytestmark = pytest.mark.slow

IMAGES = {2: [[4, 3], [0, 5]], 4: [[3, 0, 5, 1], [2, 2, 2, 2]]}  # images per rank, including a rank without any
CASES: list[dict[str, Any]] = [
    {},
    {"negatives": "other_images", "reduction": "mean_valid"},
    {"negatives": "same_image", "reduction": "sum", "normalize": False},
    {"temperature": 0.01, "bank": True},
    {"reduction": "mean_valid", "bank": True, "compiled": True},
]


def field(images: list[int]) -> tuple[list[Tensor], list[int]]:
    """Query, key, weight, image, part and view of all ranks, 4 rows per image, and the rows of each rank."""
    g = torch.Generator().manual_seed(sum(images))
    n = 4 * sum(images)
    image = torch.cat([torch.arange(k) for k in images]).repeat_interleave(4)
    part, view = torch.randint(-1, 2, (n,), generator=g), torch.randint(0, 2, (n,), generator=g)
    vectors = [torch.randn(n, 6, generator=g, dtype=torch.float64) for _ in range(2)]
    return [*vectors, torch.rand(n, generator=g, dtype=torch.float64), image, part, view], [4 * k for k in images]


def evaluate(parts: list[Tensor], ids: Ids, case: dict[str, Any], group: Any = None) -> list[Tensor]:
    """Loss and gradients of query, key, temperature and bank, in the dtype of ``parts``; ``stored``: of the bank."""
    case = dict(case)
    query, key = parts[0].clone().requires_grad_(), parts[1].clone().requires_grad_()
    compiled = case.pop("compiled", False) and group is not None
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    temperature = torch.tensor(case.pop("temperature", 0.1), dtype=wide, requires_grad=True)
    bank, stored = None, case.pop("stored", query.dtype)
    if case.pop("bank", False):
        bank = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        bank = bank.to(stored).to(query.dtype).requires_grad_()

    def run(query: Tensor, key: Tensor) -> Tensor:
        return contrastive_loss(
            query, key, query_ids=ids, key_ids=ids._replace(view=ids.view * 2), temperature=temperature, bank=bank,
            weight=parts[2], group=group, **case,
        )  # fmt: skip

    loss = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(query, key)
    loss.backward()
    gradients = [query.grad, key.grad, temperature.grad, query.new_zeros(0) if bank is None else bank.grad]
    return [loss.detach(), *(g for g in gradients if g is not None)]


def join(got: list[list[Tensor]]) -> list[Tensor]:
    """What ``evaluate`` returns for one process, from what it returned on each rank."""
    mean = [torch.stack([g[n] for g in got]).mean(0) for n in (0, 3, 4)]  # as DDP averages
    query, key = (torch.cat([g[n] for g in got]) / len(got) for n in (1, 2))
    return [mean[0], query, key, *mean[1:]]


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    results = []
    for images in IMAGES[world]:
        parts, rows = field(images)
        mine = [p.split(rows)[rank] for p in parts]
        ids = global_ids(Ids(*mine[3:]), dist.group.WORLD)
        results.append([evaluate(mine, ids, case, dist.group.WORLD) for case in CASES])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ring_equals_one_process_on_the_concatenated_batch(world: int, tmp_path: Path) -> None:
    ranks.start(work, world, str(tmp_path), ranks=world)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for i, images in enumerate(IMAGES[world]):
        parts, _ = field(images)
        ids = Ids(torch.arange(sum(images)).repeat_interleave(4), *parts[4:])
        for j, case in enumerate(CASES):
            for x, y in zip(join([r[i][j] for r in results]), evaluate(parts, ids, case), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-8)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The name of a group of one rank, and the arguments of a ring over it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    (query, key, _, *ids), _ = field([2, 1])
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    name = dist.group.WORLD.group_name
    vectors = (query.requires_grad_(), *ids, key.requires_grad_(), *ids)
    yield name, (*vectors, None, temperature, 1.0, "all", True, "ieee", "mean", "torch", name)
    dist.destroy_process_group()


def test_opcheck(one_rank: tuple[str, tuple[Any, ...]]) -> None:
    name, args = one_rank
    torch.library.opcheck(torch.ops.fgfast.ring_contrast, args)
    grads = [torch.ones(12).double(), *(x.detach() for x in torch.ops.fgfast.ring_contrast(*args)[1:])]
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    torch.library.opcheck(torch.ops.fgfast.ring_contrast_backward, (*grads, [True, True, False, True], *detached))
    torch.library.opcheck(torch.ops.fgfast.group_sum, (torch.tensor(3), name))


def test_a_second_derivative_is_refused_in_one_sentence(one_rank: tuple[str, tuple[Any, ...]]) -> None:
    query, *rest = one_rank[1]
    (first,) = torch.autograd.grad(torch.ops.fgfast.ring_contrast(query, *rest)[0].sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^contrastive_loss over a group .*: give no group\.$"):
        first.sum().backward()


def test_global_ids_of_one_process_are_unchanged() -> None:
    ids = Ids(*torch.tensor([[3, 1], [0, -1], [0, 1]]))
    assert all(torch.equal(a, b) for a, b in zip(global_ids(ids), ids, strict=True))


def test_global_ids_refuse_negative_images() -> None:
    with pytest.raises(ValueError, match="image id -1"):
        global_ids(Ids(*torch.full((3, 2), -1)))


DIFFERENT: list[tuple[dict[str, Any], str]] = [  # an option of rank 1 and what every rank says
    ({"D": 5}, "D is 6 on rank 0 and 5 on rank 1"),
    ({"dtype": torch.float32}, "dtype is torch.float64 on rank 0 and torch.float32 on rank 1"),
    ({"negatives": "same_image"}, "negatives is 'all' on rank 0 and 'same_image' on rank 1"),
    ({"temperature": 0.2}, "temperature is 0.1 on rank 0 and 0.2 on rank 1"),
    ({"temperature": torch.tensor(0.5)}, r"temperature is 0.1 on rank 0 and tensor\(0.5\) on rank 1"),
    ({"normalize": False}, "normalize is True on rank 0 and False on rank 1"),
    ({"precision": "tf32"}, "precision is 'ieee' on rank 0 and 'tf32' on rank 1"),
    ({"reduction": "sum"}, "reduction is 'mean' on rank 0 and 'sum' on rank 1"),
    ({"backend": "triton"}, "backend is 'torch' on rank 0 and 'triton' on rank 1"),
    ({"frozen": True}, "key.requires_grad is True on rank 0 and False on rank 1"),
]


def disagree(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    ids = Ids(torch.arange(4 + rank), *torch.zeros(2, 4 + rank, dtype=torch.int64))
    messages = []
    for different, _ in DIFFERENT:
        given = {"D": 6, "dtype": torch.float64, "backend": "torch", "temperature": 0.1} | (different if rank else {})
        x = torch.randn(4 + rank, given.pop("D"), dtype=given.pop("dtype"), requires_grad=True)
        key = x.detach() if given.pop("frozen", False) else x
        try:
            contrastive_loss(x, key, query_ids=ids, key_ids=ids, group=dist.group.WORLD, **given).backward()
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    torch.save(messages, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_that_disagree_all_say_about_what(tmp_path: Path) -> None:
    """A rank may have any number of rows; in all else, the ranks would wait for each other or add what differs."""
    ranks.start(disagree, str(tmp_path), ranks=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    for message, (_, expected) in zip(first, DIFFERENT, strict=True):
        assert re.fullmatch(expected + ": give all ranks the same options.", message), message
