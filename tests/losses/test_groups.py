"""Every loss over the ranks of a group: the value and the gradients of one process on the joined batch."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgfast import losses
from fgfast.losses.memory_bank import MemoryBank
from tests import ranks

D = 6
SPLITS = [(3, 5), (4, 0), (0, 0)]  # images of each rank
BANK = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

# Tensors of n images in, and a loss of those of one rank; the floats among the tensors get gradients.
Make = Callable[[int, torch.Generator], list[Tensor]]
Call = Callable[..., Tensor]


def randn(n: int, g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(n, *(shape or (D,)), generator=g, dtype=torch.float64)


def pair(n: int, g: torch.Generator) -> list[Tensor]:
    return [randn(n, g), randn(n, g)]


def with_classes(n: int, g: torch.Generator) -> list[Tensor]:
    return [randn(n, g), torch.randint(0, 3, (n,), generator=g)]


def with_references(n: int, g: torch.Generator) -> list[Tensor]:
    return [*with_classes(n, g), *with_classes(n, g)]


def regions(n_vectors: int, n: int, g: torch.Generator) -> list[Tensor]:
    masks = [torch.randint(-1, 3, (n, 4), generator=g) for _ in range(2)]
    return [*(randn(n, g, 4, D) for _ in range(n_vectors)), *masks]


def maps(n: int, g: torch.Generator) -> list[Tensor]:
    return [*(randn(n, g, D, 4, 4) for _ in range(2)), *(torch.randint(-1, 3, (n, 8, 8), generator=g) for _ in "12")]


def pairs_with_scale(n: int, g: torch.Generator) -> list[Tensor]:
    unit = [nn.functional.normalize(x, dim=1) for x in pair(n, g)]
    return [*unit, torch.tensor(9.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)]


def ntxent(group: Any, *out: Tensor) -> Tensor:
    return losses.NTXentLoss(group=group)(*out)


def ntxent_with_a_bank(group: Any, *out: Tensor) -> Tensor:
    torch.manual_seed(0)
    loss = losses.NTXentLoss(memory_bank_size=(11, D), group=group).double()
    return loss(*out) + loss(*out)  # the second call meets the vectors of all ranks


def supcon(group: Any, x: Tensor, labels: Tensor, *references: Tensor) -> Tensor:
    loss = losses.SupConLoss(0.2, group=group)
    if not references:
        return loss(x, labels)
    ref_emb, *ref_labels = references
    return loss(x, labels, ref_emb=ref_emb, ref_labels=ref_labels[0] if ref_labels else None)


def supcon_of(convert: Callable[[Tensor], Tensor], group: Any, x: Tensor, labels: Tensor) -> Tensor:
    return supcon(group, x, convert(labels))


CASES: dict[str, tuple[Make, Call]] = {
    "NTXentLoss": (pair, ntxent),
    "NTXentLoss with a bank": (pair, ntxent_with_a_bank),
    "InfoNCELoss": (pair, lambda group, *x: losses.InfoNCELoss(group=group)(*x)),
    "InfoNCELoss with a bank": (pair, lambda group, *x: losses.InfoNCELoss(0.3, True, group)(*x, BANK)),
    "DetConBLoss": (partial(regions, 4), lambda group, *x: losses.DetConBLoss(group=group)(*x)),
    "DetConSLoss": (partial(regions, 2), lambda group, *x: losses.DetConSLoss(group=group)(*x)),
    "PartContrastiveLoss": (
        maps, lambda group, *x: losses.PartContrastiveLoss(3, nn.Identity(), nn.Identity(), group=group)(*x)
    ),
    "SupConLoss": (with_classes, supcon),
    "SupConLoss of floats": (with_classes, partial(supcon_of, lambda y: (y - 1) / 3)),
    "SupConLoss of booleans": (with_classes, partial(supcon_of, lambda y: y > 0)),
    "SupConLoss with labels of NaN": (with_classes, partial(supcon_of, lambda y: torch.where(y > 1, torch.nan, y))),
    "SupConLoss of one class": (with_classes, partial(supcon_of, torch.zeros_like)),
    "SupConLoss of one class on the first rank": (
        lambda n, g: [randn(n, g), (torch.arange(n) >= SPLITS[0][0]).long()], supcon
    ),
    "SupConLoss against references": (with_references, supcon),
    "SupConLoss against references of the same labels": (
        lambda n, g: [*with_classes(n, g), randn(n, g)], lambda group, *x: supcon(group, *x)
    ),
    "KoLeoLoss": (lambda n, g: [randn(n, g)], lambda group, x: losses.KoLeoLoss(group=group)(x)),
    "KoLeoLoss of valid rows": (
        lambda n, g: [randn(n, g), torch.arange(n) % 3 != 1],
        lambda group, x, valid: losses.KoLeoLoss(group=group)(x, valid=valid),
    ),
    "CLIPLoss": (pairs_with_scale, lambda group, *x: losses.CLIPLoss(group=group)(*x)),
    "CLIPLoss, local": (pairs_with_scale, lambda group, *x: losses.CLIPLoss(True, group=group)(*x)),
}  # fmt: skip
ONE_VALUE = {"CLIPLoss", "KoLeoLoss", "KoLeoLoss of valid rows"}  # the loss of all images on every rank


def joined(name: str, images: tuple[int, ...]) -> list[Tensor]:
    return CASES[name][0](sum(images), torch.Generator().manual_seed(sum(images)))


def mine(x: Tensor, images: tuple[int, ...], rank: int) -> Tensor:
    """The rows of a rank, or a scalar, which every rank has."""
    return x.split(list(images))[rank] if x.dim() else x


def evaluate(name: str, given: list[Tensor], group: Any = None) -> list[Tensor]:
    """The loss, and the gradients of the floats."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in given]
    loss = CASES[name][1](group, *inputs)
    loss.backward()
    return [loss.detach(), *(torch.zeros_like(x) if x.grad is None else x.grad for x in inputs if x.requires_grad)]


def enqueued(rows: Tensor, group: Any = None) -> Tensor:
    torch.manual_seed(0)
    bank = MemoryBank((11, D), group=group)
    bank(rows.float(), update=True)
    return bank.bank


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    results: dict[Any, Any] = {}
    group = dist.group.WORLD
    for images in SPLITS:
        for name in CASES:
            results[name, images] = evaluate(name, [mine(x, images, rank) for x in joined(name, images)], group)
        results["bank", images] = enqueued(mine(joined("InfoNCELoss", images)[0], images, rank), group)
    x = pairs_with_scale(4, torch.Generator().manual_seed(4))
    halves = [mine(v, (2, 2), rank) for v in x[:2]]
    results["rank and world_size"] = losses.CLIPLoss(rank=rank, world_size=world)(*halves, x[2], output_dict=True)
    for given in ((rank, 3), (1 - rank, 2)):
        try:
            losses.CLIPLoss(rank=given[0], world_size=given[1])(*halves, x[2])
        except ValueError as error:
            results[given] = str(error)
    alone = [dist.new_group([r]) for r in range(world)]
    try:
        losses.InfoNCELoss(group=alone[1 - rank])
    except TypeError as error:
        results["another group"] = str(error)
    results["a group of its own"] = evaluate("InfoNCELoss", halves, alone[rank])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two ranks computed."""
    folder = tmp_path_factory.mktemp("groups")
    ranks.start(work, 2, str(folder), ranks=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("images", SPLITS)
@pytest.mark.parametrize("name", CASES)
def test_the_average_over_ranks_is_one_process_on_the_joined_batch(
    name: str, images: tuple[int, ...], results: list[dict[Any, Any]]
) -> None:
    given = joined(name, images)
    loss, *expected = evaluate(name, given)
    (first, *of_first), (second, *of_second) = (r[name, images] for r in results)
    torch.testing.assert_close((first + second) / 2, loss, rtol=1e-5, atol=1e-12)
    if name in ONE_VALUE:
        assert first == second
    for x, y, gradient in zip(of_first, of_second, expected, strict=True):
        got = torch.cat([x, y]) if gradient.dim() else x + y
        torch.testing.assert_close(got / 2, gradient, rtol=1e-5, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("images", SPLITS)
def test_a_bank_of_a_group_holds_the_vectors_of_all_ranks(
    images: tuple[int, ...], results: list[dict[Any, Any]]
) -> None:
    expected = enqueued(joined("InfoNCELoss", images)[0])
    assert all(torch.equal(r["bank", images], expected) for r in results)


@pytest.mark.slow
def test_clip_takes_the_default_group_if_there_are_several_ranks(results: list[dict[Any, Any]]) -> None:
    image, text, scale, _ = pairs_with_scale(4, torch.Generator().manual_seed(4))
    for r in results:
        torch.testing.assert_close(
            r["rank and world_size"]["contrastive_loss"], losses.CLIPLoss()(image, text, scale), rtol=1e-9, atol=0
        )


@pytest.mark.slow
def test_ranks_that_disagree_with_the_group_are_one_clear_error(results: list[dict[Any, Any]]) -> None:
    for rank, r in enumerate(results):
        for given in ((rank, 3), (1 - rank, 2)):
            assert r[given] == (
                f"rank is {given[0]} of {given[1]} and this process is rank {rank} of 2 of the process group: give its "
                "rank and world_size."
            )


@pytest.mark.slow
def test_a_group_of_other_ranks_is_refused_and_one_of_a_single_rank_works(results: list[dict[Any, Any]]) -> None:
    given = pairs_with_scale(4, torch.Generator().manual_seed(4))[:2]
    for rank, r in enumerate(results):
        assert re.fullmatch(r"group is .*: give a torch.distributed process group of this process, or None\.",
                            r["another group"])  # fmt: skip
        expected = evaluate("InfoNCELoss", [mine(x, (2, 2), rank) for x in given])
        for x, y in zip(r["a group of its own"], expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [
    losses.NTXentLoss, losses.InfoNCELoss, losses.DetConBLoss, losses.DetConSLoss, losses.SupConLoss, losses.CLIPLoss,
    losses.KoLeoLoss,
    partial(losses.PartContrastiveLoss, 3, nn.Identity()), MemoryBank,
])  # fmt: skip
def test_what_is_no_group_is_refused(make: Callable[..., nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"group is \[0, 1\]: give a torch\.distributed process group"):
        make(group=[0, 1])


def test_a_backend_that_cannot_send_from_the_device_is_named(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    x = torch.eye(3)
    message = "group has the backend nccl, which has no cpu, where the vectors are: give a group of another backend."
    for call in (lambda: losses.InfoNCELoss(group=group)(x, x), lambda: losses.SupConLoss(group=group)(x, x[0])):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


@pytest.mark.parametrize(
    ("options", "given", "named"),
    [
        ({}, {"indices_tuple": (torch.tensor([0]),) * 3}, "indices_tuple is a tuple"),
        ({"reducer": lambda *_: 0}, {}, "reducer is a function"),
        ({"distance": nn.CosineSimilarity()}, {}, "distance is a CosineSimilarity"),
    ],
)
def test_supcon_refuses_over_a_group_what_needs_all_pairs(
    options: dict[str, Any], given: dict[str, Any], named: str, group: Any
) -> None:
    if "distance" in options:
        options["distance"].is_inverted = True
    loss = losses.SupConLoss(group=group, **options)
    with pytest.raises(ValueError, match=f"{named}, which SupConLoss does not support over a group: leave one out"):
        loss(torch.eye(3), torch.tensor([0, 0, 1]), **given)
