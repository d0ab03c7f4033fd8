"""The loss classes: values and gradients of the libraries whose signatures they have, and the oracles of the papers."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgfast import losses
from fgfast.ids import Ids
from fgfast.ops.contrast import contrastive_loss

lightly = pytest.importorskip("lightly.loss")
pml = pytest.importorskip("pytorch_metric_learning.losses")


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *vectors: Tensor) -> None:
    """Values and gradients agree to float64, or to float32 where the peer computes parts in it."""
    results = []
    for loss in (ours, theirs):
        inputs = [x.clone().requires_grad_() for x in vectors]
        value = loss(*inputs)
        results.append([value.detach().double(), *torch.autograd.grad(value, inputs)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("b", [2, 24, 200])  # two rows: one negative pair; 200: tiles
def test_ntxent_is_lightlys(b: int) -> None:
    assert_same(losses.NTXentLoss(0.2), lightly.NTXentLoss(0.2), randn(0, b, 16), randn(1, b, 16))


def test_ntxent_is_metric_learnings_where_a_label_has_two_rows() -> None:
    labels = torch.arange(12).repeat(2)
    peer = pml.NTXentLoss(temperature=0.2)
    assert_same(
        losses.NTXentLoss(0.2), lambda a, b: peer(torch.cat([a, b]), labels), randn(0, 12, 16), randn(1, 12, 16)
    )


def test_ntxent_with_a_memory_bank_is_lightlys_over_several_batches() -> None:
    ours, theirs = losses.NTXentLoss(0.2, (20, 16)).double(), lightly.NTXentLoss(0.2, (20, 16)).double()
    theirs.memory_bank.bank = ours.bank.clone()
    for step in range(5):  # 20 is not a multiple of 8: the end of the bank is met
        for loss in (ours, theirs):
            x = randn(step, 8, 16).requires_grad_()
            loss.last = loss(x, randn(step + 50, 8, 16)).item()
        assert ours.last == pytest.approx(theirs.last, rel=1e-5)
        torch.testing.assert_close(ours.bank, theirs.memory_bank.bank.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("b", "m", "ids"), [(4, 5, 3), (3, 6, 20), (1, 1, 1), (40, 8, 4)])  # repeats, absentees, one
def test_detcon_is_lightlys(b: int, m: int, ids: int) -> None:
    g = torch.Generator().manual_seed(1)
    masks = [torch.randint(0, ids, (b, m), generator=g) for _ in range(2)]
    x = [randn(i, b, m, 7) for i in range(4)]
    ours, theirs = losses.DetConBLoss(), lightly.DetConBLoss()
    assert_same(lambda *v: ours(*v, *masks), lambda *v: theirs(*v, *masks), *x)
    ours_s, theirs_s = losses.DetConSLoss(), lightly.DetConSLoss()
    assert_same(lambda *v: ours_s(*v, *masks), lambda *v: theirs_s(*v, *masks), *x[:2])


def naive_detcon(pred: Tensor, same: Tensor, other: Tensor, mask: Tensor, mask_other: Tensor, local: bool) -> Tensor:
    """One view of DetCon-B by loops over image and region; targets of its own view and of the other."""
    b, m, _ = pred.shape
    pred, same, other = (F.normalize(x, dim=-1) for x in (pred, same, other))
    total = pred.new_zeros(())
    for i in range(b):
        for r in range(m):
            logits, label = [], []
            for j in range(b):
                for s in range(m):
                    positive = i == j and mask[i, r] == mask_other[j, s]
                    if positive or i != j or local:
                        logits.append(pred[i, r] @ other[j, s] / 0.1)
                        label.append(float(positive))
                    if (i != j or local) and not (i == j and mask[i, r] == mask[j, s]):
                        logits.append(pred[i, r] @ same[j, s] / 0.1)
                        label.append(0.0)
            y = pred.new_tensor(label)
            if y.any():
                weight = 1 / (mask[i] == mask[i, r]).sum()
                total = total - weight * (y / y.sum() * torch.stack(logits).log_softmax(0)).sum()
    return total / (b * m)


@pytest.mark.parametrize("local", [True, False])
def test_detcon_is_the_loop_over_images_and_regions(local: bool) -> None:
    masks = torch.randint(0, 5, (2, 3, 4), generator=torch.Generator().manual_seed(3))
    p, t = randn(0, 2, 3, 4, 6), randn(1, 2, 3, 4, 6)
    expected = sum(naive_detcon(p[v], t[v], t[1 - v], masks[v], masks[1 - v], local) for v in (0, 1))
    if local:
        torch.testing.assert_close(losses.DetConBLoss()(*p, *t, *masks), expected)
    view, image, _ = (i.reshape(-1) for i in torch.meshgrid(*map(torch.arange, masks.shape), indexing="ij"))
    ids = Ids(image, masks.reshape(-1), view)
    weight = 1 / (masks[..., None] == masks[..., None, :]).sum(-1).reshape(-1)
    got = contrastive_loss(
        p.flatten(0, 2), t.flatten(0, 2), query_ids=ids, key_ids=ids, weight=weight,
        negatives="all" if local else "other_images",
    )  # fmt: skip
    torch.testing.assert_close(2 * got, expected)


def test_detcon_with_one_region_an_image_is_infonce_with_same_view_negatives() -> None:
    p, t = randn(0, 2, 6, 1, 5), randn(1, 2, 6, 1, 5)
    masks = torch.zeros(2, 6, 1, dtype=torch.int64)
    expected = torch.zeros((), dtype=torch.float64)
    for v in (0, 1):
        query, same, other = (F.normalize(x[:, 0], dim=-1) for x in (p[v], t[v], t[1 - v]))
        own = (query @ same.T / 0.1).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf)
        expected += F.cross_entropy(torch.cat([query @ other.T / 0.1, own], 1), torch.arange(6))
    torch.testing.assert_close(losses.DetConBLoss()(*p, *t, *masks), expected)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 2, 0], [3, 3, 3, 3], [0, 1, 2], list(range(7)) * 60])
def test_supcon_is_metric_learnings(labels: list[int]) -> None:
    y = torch.tensor(labels)
    ours, theirs = losses.SupConLoss(0.1), pml.SupConLoss(0.1)
    assert_same(lambda x: ours(x, y) + 0 * x.sum(), lambda x: theirs(x, y) + 0 * x.sum(), randn(0, len(y), 8))


def test_supcon_against_references_is_metric_learnings() -> None:
    y, r = torch.tensor([0, 1, 5, 1]), torch.tensor([1, 0, 0, 2, 1])
    ours, theirs = losses.SupConLoss(), pml.SupConLoss()
    assert_same(
        lambda x, z: ours(x, y, ref_emb=z, ref_labels=r),
        lambda x, z: theirs(x, y, ref_emb=z, ref_labels=r),
        randn(0, 4, 8),
        randn(1, 5, 8),
    )


def test_infonce_is_cross_entropy_over_keys_or_bank() -> None:
    query, key, bank = randn(0, 6, 5), randn(1, 6, 5), randn(2, 9, 5)

    def moco3(query: Tensor, key: Tensor) -> Tensor:
        logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.2
        return F.cross_entropy(logits, torch.arange(6)) * 2 * 0.2

    def moco2(query: Tensor, key: Tensor, bank: Tensor) -> Tensor:
        q, k, n = (F.normalize(x, dim=1) for x in (query, key, bank))
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ n.T], 1) / 0.2
        return F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))

    assert_same(losses.InfoNCELoss(0.2, scale=True), moco3, query, key)
    assert_same(losses.InfoNCELoss(0.2), moco2, query, key, bank)


def test_dino_is_lightlys_with_warm_up_and_centre() -> None:
    options: dict[str, Any] = {"output_dim": 12, "warmup_teacher_temp": 0.03, "warmup_teacher_temp_epochs": 4}
    ours, theirs = losses.DINOLoss(**options).double(), lightly.DINOLoss(**options).double()
    teacher, student = [randn(i, 5, 12) for i in range(2)], [randn(i + 9, 5, 12) for i in range(4)]

    def at(epoch: int | None, loss: nn.Module) -> Callable[..., Tensor]:
        return lambda *x: loss(teacher, list(x), epoch=epoch)

    for epoch in (0, 1, 3, 4, 9, None):
        assert_same(at(epoch, ours), at(epoch, theirs), *student)
        torch.testing.assert_close(ours.center, theirs.center)
    assert ours(teacher, student, teacher_temp=0.5) == pytest.approx(theirs(teacher, student, teacher_temp=0.5).item())


class TestPartContrastiveLoss:
    def inputs(self, k: int = 4) -> tuple[list[Tensor], list[Tensor]]:
        g = torch.Generator().manual_seed(0)
        return [randn(i, 3, 6, 4, 4) for i in range(2)], [
            torch.randint(-1, k, (3, 16, 16), generator=g) for _ in range(2)
        ]

    def naive(self, maps: list[Tensor], ids: list[Tensor], targets: list[Tensor], heads: list[nn.Module]) -> Tensor:
        """Vote, mean, heads and contrast by loops over images and parts."""
        rows, keys, where = [], [], []
        for v in (0, 1):
            for b in range(3):
                votes = F.one_hot(ids[v][b] + 1, 5)[..., 1:].reshape(4, 4, 4, 4, 4).sum((1, 3))
                grid = torch.where(votes.sum(-1) > 0, votes.argmax(-1), -1)
                for part in range(4):
                    cells = grid == part
                    if cells.any():
                        where.append((b, part, v))
                        rows.append(maps[v][b][:, cells].mean(1))
                        keys.append(targets[v][b][:, cells].mean(1))
        query, key = heads[1](heads[0](torch.stack(rows))), heads[2](torch.stack(keys))
        ids_ = Ids(*torch.tensor(where).T)
        return contrastive_loss(query, key, query_ids=ids_, key_ids=ids_, reduction="mean_valid", backend="reference")

    def test_is_the_loop_over_images_and_parts(self) -> None:
        maps, ids = self.inputs()
        targets = [randn(i + 5, 3, 6, 4, 4) for i in range(2)]
        heads = [nn.Linear(6, 5).double(), nn.Linear(5, 5).double(), nn.Linear(6, 5).double()]
        loss = losses.PartContrastiveLoss(4, *heads)
        assert_same(
            lambda a, b: loss(a, b, *ids, *targets), lambda a, b: self.naive([a, b], ids, targets, heads), *maps
        )
        own = losses.PartContrastiveLoss(4, heads[0])
        plain = [heads[0], nn.Identity(), heads[0]]
        assert_same(lambda a, b: own(a, b, *ids), lambda a, b: self.naive([a, b], ids, [a, b], plain), *maps)

    def test_targets_get_no_gradient(self) -> None:
        maps, ids = self.inputs()
        targets = [m.clone().requires_grad_() for m in maps]
        loss = losses.PartContrastiveLoss(4, nn.Linear(6, 5).double())
        loss(maps[0].requires_grad_(), maps[1], *ids, *targets).backward()
        assert maps[0].grad is not None
        assert targets[0].grad is None

    def test_max_parts_draws_present_parts_once_each(self) -> None:
        loss = losses.PartContrastiveLoss(8, nn.Identity(), max_parts=3)
        areas = torch.tensor([[[1, 0, 2, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]] * 2).float()
        for _ in range(20):
            chosen, part = loss._sample(areas)
            assert chosen[0].tolist() == [0, 2, 4]
            assert sorted(part[0, 1].tolist()) == [-1, -1, 0]

    def test_nothing_present_gives_zero(self) -> None:
        maps, ids = self.inputs()
        loss = losses.PartContrastiveLoss(4, nn.Linear(6, 5).double())
        assert loss(*maps, *(i * 0 - 1 for i in ids)) == 0


@pytest.mark.parametrize("name", ["NTXentLoss", "DetConBLoss", "DetConSLoss", "SupConLoss", "InfoNCELoss"])
@pytest.mark.parametrize("temperature", [0.0, -0.1, float("inf"), float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(name: str, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature is"):
        getattr(losses, name)(temperature=temperature)


def test_bad_input_is_one_clear_error() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="memory_bank_size is 5"):
        losses.NTXentLoss(memory_bank_size=5)
    with pytest.raises(ValueError, match="belong together"):
        losses.SupConLoss()(x, torch.zeros(2), ref_emb=x)
    with pytest.raises(ValueError, match="leave the miner out"):
        losses.SupConLoss()(x, torch.zeros(2), (x, x, x, x))
    with pytest.raises(ValueError, match="center_mode is 'median'"):
        losses.DINOLoss(center_mode="median")
    with pytest.raises(ValueError, match="different views"):
        losses.DINOLoss(output_dim=3)([x], [x])
    with pytest.raises(ValueError, match="n_parts is 0"):
        losses.PartContrastiveLoss(0, nn.Identity())
    maps = torch.zeros(1, 3, 2, 2)
    ids = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="target1 and target2"):
        losses.PartContrastiveLoss(2, nn.Identity())(maps, maps, ids, ids, maps)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: losses.NTXentLoss()(x, x[:3]), ValueError, "out0 has shape (4, 8) and out1 has shape (3, 8)"),
        (lambda x: losses.NTXentLoss()(x[0], x[0]), ValueError, "out0 has shape (8,)"),
        (lambda x: losses.NTXentLoss()([1.0], x), TypeError, "out0 is a list"),
        (lambda x: losses.InfoNCELoss()(x, x[:, :3]), ValueError, "key has shape (4, 3)"),
        (lambda x: losses.SupConLoss()(x, torch.zeros(4)), TypeError, "labels has dtype torch.float32"),
        (lambda x: losses.SupConLoss()(x[0], torch.zeros(8).long()), ValueError, "embeddings has shape (8,)"),
        (
            lambda x: losses.SupConLoss()(x, torch.zeros(4).long(), None, x, torch.zeros(3).long()),
            ValueError,
            "ref_labels has shape (3,)",
        ),
        (
            lambda x: losses.SupConLoss()(x, torch.zeros(4).long(), None, x[:, :3], torch.zeros(4).long()),
            ValueError,
            "ref_emb has 3 channels and embeddings has 8",
        ),
        (
            lambda x: losses.DetConSLoss()(x[None], x[None], [0], torch.zeros(1, 4)),
            TypeError,
            "mask_view0 is a list",
        ),
        (
            lambda x: losses.DetConSLoss()(x[None], x[None], torch.zeros(1, 4), torch.zeros(1, 4)),
            TypeError,
            "mask_view0 has dtype torch.float32",
        ),
        (
            lambda x: losses.PartContrastiveLoss(2, nn.Identity())(
                x.view(2, 4, 2, 2), x.view(2, 4, 2, 2)[:1], *[torch.zeros(2, 2, 2).long()] * 2
            ),
            ValueError,
            "features1 has shape (2, 4, 2, 2) and features2 has shape (1, 4, 2, 2)",
        ),
    ],
)
def test_messages_name_the_arguments_of_the_class(
    call: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    """Who calls a loss is told of its own arguments, not of those of the operation below."""
    with pytest.raises(error, match=re.escape(message)):
        call(randn(0, 4, 8))


def test_labels_and_ids_that_do_not_fit_are_refused() -> None:
    """Shapes are told before anything is indexed."""
    x = randn(0, 4, 8)
    with pytest.raises(ValueError, match="one label a row"):
        losses.SupConLoss()(x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[B, M, D\]"):
        losses.DetConBLoss()(x, x, x, x, torch.zeros(4).long(), torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"\[B, M, D\]"):
        losses.DetConSLoss()(x[None], x[None], torch.zeros(1, 3).long(), torch.zeros(1, 3).long())
