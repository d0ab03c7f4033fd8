"""The kernels on blocks of columns from the ranks of a group: results, launches and memory."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fgfast.ids import Ids
from fgfast.kernels.common import interpreted
from fgfast.kernels.contrast import launch, problem
from fgfast.ops.contrast import contrastive_loss, global_ids, ring
from fgfast.ops.contrast.exchange import Ring
from tests import ranks
from tests.kernels.contrast_fields import CHANNELS, WHOLE, count_launches, cut
from tests.memory import Memory
from tests.ops.test_contrast_ring import IMAGES, evaluate, field, join

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not interpreted(), reason="ranks on the CPU, as a machine with one GPU has no others"),
]

CASES: list[tuple[dict[str, Any], torch.dtype, problem.TileShape, int]] = [  # options, dtype, tile and programs
    ({"bank": True}, torch.float32, WHOLE, 1),
    ({"negatives": "other_images", "reduction": "mean_valid"}, torch.float32, CHANNELS, 4),
    ({"negatives": "same_image", "reduction": "sum", "normalize": False, "bank": True}, torch.float32, WHOLE, 4),
    ({"temperature": 0.01, "bank": True, "reduction": "mean_valid"}, torch.float32, CHANNELS, 1),  # unbounded
    ({"bank": True}, torch.bfloat16, WHOLE, 4),
    ({"bank": True}, torch.float16, CHANNELS, 1),
]


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    results = []
    for images in IMAGES[world]:
        parts, rows = field(images)
        mine = [p.split(rows)[rank] for p in parts]
        ids = global_ids(Ids(*mine[3:]), dist.group.WORLD)
        for case, dtype, tile, programs in CASES:
            vectors = [p.to(dtype) for p in mine[:2]] + mine[2:]
            with pytest.MonkeyPatch.context() as patch:
                cut(patch, tile, programs)
                results.append(evaluate(vectors, ids, {**case, "backend": "triton"}, dist.group.WORLD))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_kernels_over_ranks_equal_the_definition_of_the_concatenated_batch(world: int, tmp_path: Path) -> None:
    """To 1e-5 of the largest entry in float32, or 2^-22 / T: a logit and the log-sum-exp are up to 1 / T, each rounded
    twice to 2^-24. In half precision to 2^-7: the rounding of dL/ds and of the results.
    """
    ranks.start(work, world, str(tmp_path), ranks=world)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for i, images in enumerate(IMAGES[world]):
        parts, _ = field(images)
        ids = Ids(torch.arange(sum(images)).repeat_interleave(4), *parts[4:])
        for j, (case, dtype, *_) in enumerate(CASES):
            exact = [p.to(dtype).double() for p in parts[:2]] + parts[2:]
            expected = evaluate(exact, ids, {**case, "backend": "reference", "stored": dtype})
            got = join([r[i * len(CASES) + j] for r in results])
            close = max(1e-5, 2**-22 / case.get("temperature", 0.1)) if dtype == torch.float32 else 2**-7
            for x, y in zip(got, expected, strict=True):
                largest = y.abs().max().item() if y.numel() else 0.0
                torch.testing.assert_close(x.double(), y, rtol=0, atol=close * largest)


def simulate(patch: pytest.MonkeyPatch, size: int) -> Memory:
    """Make this process rank 0 of ``size`` ranks that all have its keys; returns the memory of both passes."""
    memory = Memory()

    class Simulated(Ring):
        def __init__(self, group: Any, columns: Tensor, *unused: Any) -> None:
            self.size, self.rank, self.counts = size, 0, [len(columns)] * size
            memory.__enter__()  # what keeps the sums of the rows is made next

        def start(self, tensors: list[Tensor], step: int) -> tuple[list[Tensor], list[Any]]:
            return [t.clone() for t in tensors], []

        def pass_around(self, *arguments: Any) -> Tensor | None:
            try:
                return super().pass_around(*arguments)
            finally:
                memory.__exit__(None, None, None)

    patch.setattr(ring, "Ring", Simulated)
    patch.setattr(ring, "process_group", lambda name: None)
    patch.setattr(dist, "get_world_size", lambda group: size)
    return memory


class Group:
    """Stands for a process group."""

    group_name = "simulated"


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The number of launches of each kernel."""
    counter: Counter[str] = Counter()

    count_launches(monkeypatch, counter, problem, launch)
    return counter


def run(m: int, d: int, bank: bool, backend: str, temperature: float | Tensor = 0.1) -> None:
    """Forward and backward of one rank."""
    g = torch.Generator().manual_seed(0)
    query, key, negatives = (torch.randn(n, d, generator=g).requires_grad_() for n in (m, m, 7))
    ids = Ids(torch.arange(m) // 2, *torch.zeros(2, m, dtype=torch.int64))
    group: Any = Group()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "_group_sum", lambda x, name: x)
        contrastive_loss(
            query, key, query_ids=ids, key_ids=ids._replace(view=ids.view + 1), bank=negatives if bank else None,
            group=group, backend=backend, temperature=temperature, reduction="mean",
        ).backward()  # fmt: skip


@pytest.mark.parametrize("programs", [1, 4])
def test_one_launch_per_block(programs: int, launches: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, WHOLE, programs)
    for size, bank in ((2, 0), (4, 1)):
        simulate(monkeypatch, size)
        launches.clear()
        run(40, 8, bool(bank), "triton", torch.tensor(0.1, requires_grad=True))
        blocks = size + bank
        assert launches == {
            # forward: rows and blocks; backward: these, and own keys and bank to finish their gradients
            "prepare": 2 * (1 + blocks) + 1 + bank,
            "forward": blocks, "join": 1, "gradient": 2 * blocks, "inner": 1, "finish": 2 + bank,
        }  # fmt: skip


@pytest.mark.parametrize(("backend", "temperature"), [("triton", 0.1), ("triton", 0.01), ("torch", 0.1)])
def test_memory_does_not_grow_with_the_number_of_ranks(
    backend: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, WHOLE)
    m, d = 32, 48
    peaks = []
    for size in (2, 3, 6):  # from 3 ranks on a block is held that is not this rank's while another one arrives
        memory = simulate(monkeypatch, size)
        run(m, d, True, backend, temperature)
        peaks.append(memory.peak)
    assert peaks[0] < peaks[1] == peaks[2], peaks
    if backend == "triton":
        # Gradient of the rows; of that of the keys own part, what is sent and what arrives; keys held and arriving.
        vectors, ids, per_vector = 4 * m * d, 8 * 3 * m, 96 * m
        assert peaks[2] <= 4 * vectors + 2 * (vectors + ids) + per_vector, peaks
