"""The ring over ranks: the loss and the gradients of one process on the concatenated batch."""

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
    """Loss, and the gradients of query, key, temperature and bank."""
    case = dict(case)
    query, key = parts[0].clone().requires_grad_(), parts[1].clone().requires_grad_()
    compiled = case.pop("compiled", False) and group is not None
    temperature = torch.tensor(case.pop("temperature", 0.1), dtype=torch.float64, requires_grad=True)
    bank = None
    if case.pop("bank", False):
        bank = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def run(query: Tensor, key: Tensor) -> Tensor:
        return contrastive_loss(
            query, key, query_ids=ids, key_ids=ids._replace(view=ids.view * 2), temperature=temperature, bank=bank,
            weight=parts[2], group=group, **case,
        )  # fmt: skip

    loss = (torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run)(query, key)
    loss.backward()
    gradients = [query.grad, key.grad, temperature.grad, query.new_zeros(0) if bank is None else bank.grad]
    return [loss.detach(), *(g for g in gradients if g is not None)]


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
            loss, query, key, temperature, bank = evaluate(parts, ids, case)
            got = [r[i][j] for r in results]
            mean = [torch.stack([g[n] for g in got]).mean(0) for n in (0, 3, 4)]  # as DDP averages
            joined = [torch.cat([g[n] for g in got]) / world for n in (1, 2)]
            for x, y in zip([*mean, *joined], [loss, temperature, bank, query, key], strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-8)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The name of a group of one rank, and the arguments of a ring over it."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    (query, key, _, *ids), _ = field([2, 1])
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    name = dist.group.WORLD.group_name
    vectors = (query.requires_grad_(), *ids, key.requires_grad_(), *ids)
    yield name, (*vectors, None, temperature, 1.0, "all", True, "ieee", name)
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
