"""Gradient caching: the gradients of the whole batch from chunks of it, for vectors and parts, on 1, 2 and 4 ranks."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

from fgfast import InfoNCELoss, NTXentLoss, PartContrastiveLoss, cached_contrast
from tests import ranks

B, K, D = 8, 3, 6
BANK = torch.randn(7, D, generator=torch.Generator().manual_seed(1))


class Maps(nn.Module):
    """Feature maps [b, 2, 8, 4, 4] of two views [b, 2, 3, 8, 8]."""

    def __init__(self, dropout: float = 0.0, *norms: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), *norms, nn.GELU(), nn.Dropout(dropout), nn.Conv2d(8, 8, 1)
        )

    def forward(self, views: Tensor) -> Tensor:
        return self.layers(views.flatten(0, 1)).unflatten(0, (-1, 2))


class Vectors(Maps):
    """Vectors [b, 2, 8]."""

    def forward(self, views: Tensor) -> Tensor:
        return super().forward(views).mean((3, 4))


class Parts(Maps):
    """Pooled parts of each image, and their areas."""

    def forward(self, views: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        pool = PartContrastiveLoss(K, nn.Identity()).pool
        return pool(*super().forward(views).unbind(1), *ids.unbind(1))


Make = Callable[[nn.Module, Any], Callable[[Any], Tensor]]


def ntxent(head: nn.Module, group: Any) -> Callable[[Tensor], Tensor]:
    loss = NTXentLoss(0.2, group=group)
    return lambda r: loss(*head(r.transpose(0, 1).flatten(0, 1)).chunk(2))


def with_a_bank(head: nn.Module, group: Any) -> Callable[[Tensor], Tensor]:
    loss = InfoNCELoss(0.2, group=group)

    def value(r: Tensor) -> Tensor:
        query, key = head(r.transpose(0, 1).flatten(0, 1)).chunk(2)
        return loss(query, key.detach(), BANK.to(query))

    return value


def of_parts(head: nn.Module, group: Any) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    loss = PartContrastiveLoss(K, head, group=group)
    return lambda r: loss.contrast(*r)


CASES: dict[str, tuple[type[Maps], Make]] = {
    "NT-Xent": (Vectors, ntxent), "InfoNCE with a bank": (Vectors, with_a_bank), "parts": (Parts, of_parts),
}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def batch_of(case: str) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    views = torch.randn(B, 2, 3, 8, 8, generator=g)
    return (views, torch.randint(-1, K, (B, 2, 8, 8), generator=g)) if case == "parts" else (views,)


def gradients(
    case: str, chunk: int | None, *, group: Any = None, rank: int = 0, world: int = 1, autocast: bool = False,
    norm: bool = False, divided: bool = False,
) -> Tensor:  # fmt: skip
    """All gradients, averaged over ranks, in chunks or in one big batch (None).

    ``norm`` puts BatchNorm in the head, ``divided`` divides the encoder among the ranks (FSDP2).
    """
    torch.manual_seed(2)
    kind, make = CASES[case]
    encoder = kind()
    head = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16) if norm else nn.LayerNorm(16), nn.Linear(16, D))
    nets: list[Any] = [encoder, head]
    if world > 1:
        nets = [DDP(n, process_group=group) for n in nets[divided:]]
    if divided:
        nets = [fully_shard(encoder, mesh=init_device_mesh("cpu", (world,))), *nets]
    loss, mine = make(nets[1], group), tuple(x[rank::world] for x in batch_of(case))
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        value = loss(nets[0](*mine)) if chunk is None else cached_contrast(nets[0], mine, loss, chunk)
    if chunk is None:
        value.backward()
    found = [p.grad for net in (encoder, head) for p in net.parameters()]
    found = [g.full_tensor() if isinstance(g, DTensor) else g for g in found]
    return torch.cat([value.detach()[None], *(g.flatten() for g in found if g is not None)])


def check_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected) > 100
    assert (found - expected).norm() <= tolerance * expected.norm()


@every_case
@pytest.mark.parametrize("chunk", [1, 3, B, B + 5])  # single images, an uneven rest, all, more than there are
def test_chunks_give_the_gradients_of_the_batch(case: str, chunk: int) -> None:
    check_equal(gradients(case, chunk), gradients(case, None))


@every_case
def test_heads_see_the_whole_batch(case: str) -> None:
    """Their BatchNorm has its statistics."""
    check_equal(gradients(case, 3, norm=True), gradients(case, None, norm=True))


@every_case
def test_chunks_under_autocast_differ_by_its_rounding_alone(case: str) -> None:
    """They are as close to the big batch under autocast as that is to float32."""
    whole = gradients(case, None, autocast=True)
    rounding = (whole - gradients(case, None)).norm()
    assert rounding > 0
    assert (gradients(case, 3, autocast=True) - whole).norm() <= rounding


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=4)
    pair = dist.new_group([0, 1])
    results: dict[Any, Tensor] = {
        "divided": gradients("NT-Xent", 1, group=dist.group.WORLD, rank=rank, world=4, divided=True)
    }
    for case in CASES:
        results[4, case] = gradients(case, 1, group=dist.group.WORLD, rank=rank, world=4)
        if rank < 2:
            results[2, case] = gradients(case, 3, group=pair, rank=rank, world=2)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Tensor]:
    """What the first of four ranks, and of two among them, computed."""
    folder = tmp_path_factory.mktemp("cached")
    ranks.start(work, str(folder), ranks=4)
    return dict(torch.load(folder / "0.pt"))


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("world", [2, 4])
def test_chunks_on_several_ranks_give_the_gradients_of_the_joined_batch(
    world: int, case: str, of_ranks: dict[Any, Tensor]
) -> None:
    """Synchronised once, with the last chunk; the first entry is the loss, of which each rank has its own."""
    check_equal(of_ranks[world, case][1:], gradients(case, None)[1:])


@pytest.mark.slow
def test_chunks_of_a_divided_encoder_give_the_gradients_of_the_joined_batch(of_ranks: dict[Any, Tensor]) -> None:
    """FSDP2 gathers its weights for every pass, and divides the sum of all gradients once."""
    check_equal(of_ranks["divided"][1:], gradients("NT-Xent", None)[1:])


def test_dropout_drops_the_same_in_both_runs_and_later_draws_go_on() -> None:
    """The gradient is that of a graph over the same chunks; the random state is that after one run."""
    results = []
    loss = NTXentLoss()
    for cached in (True, False):
        torch.manual_seed(3)
        encoder = Vectors(0.5)
        (views,) = batch_of("NT-Xent")
        if cached:
            cached_contrast(encoder, views, lambda r: loss(*r.unbind(1)), 2)
        else:
            loss(*torch.cat([encoder(v) for v in views.split(2)]).unbind(1)).backward()
        results.append([*(p.grad for p in encoder.parameters()), torch.rand(3)])
    torch.testing.assert_close(results[0], results[1])


def test_batch_norm_is_refused_or_takes_each_chunk_once() -> None:
    torch.manual_seed(4)
    encoder, loss = Vectors(0.0, nn.BatchNorm2d(8)), NTXentLoss()
    (views,) = batch_of("NT-Xent")
    before = {name: b.clone() for name, b in encoder.named_buffers()}
    message = re.escape(
        "The BatchNorm 'layers.1' of the encoder would use the statistics of a chunk: give batch_norm='chunk' to allow "
        "it, or replace it by another norm."
    )
    with pytest.raises(ValueError, match=message):
        cached_contrast(encoder, views, lambda r: loss(*r.unbind(1)), 4)
    assert all(torch.equal(b, before[name]) for name, b in encoder.named_buffers())
    cached_contrast(encoder, views, lambda r: loss(*r.unbind(1)), 4, batch_norm="chunk")
    found = {name: b.clone() for name, b in encoder.named_buffers()}
    encoder.load_state_dict(before, strict=False)
    for chunk in views.split(4):
        encoder(chunk)
    torch.testing.assert_close(found, dict(encoder.named_buffers()))
    cached_contrast(encoder.eval(), views, lambda r: loss(*r.unbind(1)), 4)  # nothing depends on the chunk


def test_a_scaled_loss_gives_scaled_gradients() -> None:
    found, loss = [], NTXentLoss()
    for scale in (1.0, 1024.0):
        torch.manual_seed(5)
        encoder = Vectors()
        cached_contrast(encoder, batch_of("NT-Xent")[0], lambda r, s=scale: s * loss(*r.unbind(1)), 3)
        found.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]) / scale)
    torch.testing.assert_close(*found)


def test_gradients_are_added_to_those_that_are_there() -> None:
    torch.manual_seed(6)
    encoder, loss = Vectors(), NTXentLoss()
    once = []
    for _ in range(2):
        cached_contrast(encoder, batch_of("NT-Xent")[0], lambda r: loss(*r.unbind(1)), 3)
        once.append([p.grad.clone() for p in encoder.parameters() if p.grad is not None])
    torch.testing.assert_close(once[1], [2 * g for g in once[0]])


def test_an_empty_batch_and_a_frozen_encoder_go_through() -> None:
    encoder = Vectors()
    assert cached_contrast(encoder, torch.zeros(0, 2, 3, 8, 8), lambda r: r.sum(), 2) == 0
    head = nn.Linear(8, 1)
    cached_contrast(encoder.requires_grad_(False), batch_of("NT-Xent")[0], lambda r: head(r).sum(), 2)
    assert head.weight.grad is not None


@pytest.mark.parametrize(
    ("encoder", "batch", "chunk", "error", "message"),
    [
        (nn.Identity(), torch.zeros(2), 0, ValueError, "chunk is 0: give 1 or more."),
        (torch.relu, torch.zeros(2), 1, TypeError, "encoder is a builtin_function_or_method: give a module, or"),
        (nn.Identity(), "images", 1, TypeError, "batch holds no tensor: give tensors [B, ...]."),
        (nn.Identity(), [torch.zeros(2, 3), torch.zeros(3)], 1, ValueError, "shapes [[2, 3], [3]]: give each B rows."),
        (nn.Identity(), torch.zeros(()), 1, ValueError, "shapes [[]]: give each B rows."),
        (
            nn.Flatten(0),
            torch.zeros(2, 3),
            1,
            ValueError,
            "encoder gives shape [3] for 1 rows: give row i for row i of",
        ),
    ],
)
def test_what_cannot_be_cached_is_named(
    encoder: Any, batch: Any, chunk: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        cached_contrast(encoder, batch, torch.sum, chunk)
