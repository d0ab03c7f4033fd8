"""Weights of classes, and the MLP on frozen features."""

import numpy as np
import pytest
import torch

from fgfast.errors import UserError
from fgfast.evaluate.linear import linear_probe
from fgfast.evaluate.mlp import MLPOptions, class_weights, mlp_probe, tenth

CASSAVA = (466, 1443, 773, 2658, 316)
NAMES = ("cbb", "cbsd", "cgm", "cmd", "healthy")


def exclusive_or(seed: int, rows: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Four clouds in a plane, opposite ones of one class: no line separates them."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.randint(2, (rows, 2), generator=g)
    return 2.0 * corner + 0.3 * torch.randn(rows, 2, generator=g), corner.sum(1) % 2


def test_weights_are_those_of_the_hand() -> None:
    targets = np.repeat(np.arange(5), CASSAVA)
    frequency = class_weights(targets, NAMES, "frequency")
    inverse = class_weights(targets, NAMES, "inverse")
    assert frequency is not None
    assert inverse is not None
    assert frequency.tolist() == pytest.approx([n / 5656 for n in CASSAVA])
    assert inverse.tolist() == pytest.approx([5656 / 5 / n for n in CASSAVA])
    assert float((inverse * torch.tensor(CASSAVA)).sum()) == pytest.approx(5656)  # the mean weight of an image is 1
    assert class_weights(targets, NAMES, "none") is None


@pytest.mark.parametrize("kind", ["none", "inverse", "frequency"])
def test_a_class_without_an_image_is_named(kind: str) -> None:
    with pytest.raises(UserError, match="Class cgm has no training image"):
        class_weights(np.array([0, 1, 3, 4]), NAMES, kind)  # type: ignore[arg-type]


def test_mlp_separates_what_a_line_cannot() -> None:
    (x, y), (test, truth) = exclusive_or(0), exclusive_or(1)
    options = MLPOptions(hidden=32, lr=3e-2, epochs=15, batch_size=64)
    assert (mlp_probe(x, y, test, ("a", "b"), options) == truth).float().mean() > 0.97
    assert (linear_probe(x, y, test) == truth).float().mean() < 0.7


def test_same_seed_same_predictions_and_the_global_generator_is_left_alone() -> None:
    x, y = exclusive_or(0, 60)
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(2)) * 3
    before = torch.get_rng_state()
    one, two = (mlp_probe(x, y, noise, ("a", "b"), MLPOptions(epochs=2)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, two)
    assert not torch.equal(one, mlp_probe(x, y, noise, ("a", "b"), MLPOptions(epochs=2, seed=1)))


def test_scale_and_shift_of_a_feature_change_nothing() -> None:
    x, y = exclusive_or(0, 100)
    scale, shift = torch.tensor([256.0, 2**-7]), torch.tensor([0.0, 0.0])
    options = MLPOptions(epochs=3)
    moved = mlp_probe(x * scale + shift, y, x * scale + shift, ("a", "b"), options)
    assert torch.equal(moved, mlp_probe(x, y, x, ("a", "b"), options))


def test_training_ends_after_epochs_without_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are noise: the held-out loss soon rises, and the best epoch's weights are what predicts."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 8, generator=g), torch.randint(2, (64,), generator=g)
    losses: list[float] = []
    real = torch.nn.CrossEntropyLoss.forward

    def noted(self: torch.nn.CrossEntropyLoss, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = real(self, logits, target)
        if not torch.is_grad_enabled():
            losses.append(float(loss))
        return loss

    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", noted)
    options = MLPOptions(lr=3e-2, patience=3)
    stopped = mlp_probe(x, y, x, ("a", "b"), options)
    best = losses.index(min(losses))
    assert len(losses) == best + 4 < 100
    short = mlp_probe(x, y, x, ("a", "b"), MLPOptions(lr=3e-2, epochs=best + 1, patience=99))
    assert torch.equal(stopped, short)


def test_weights_move_predictions_to_the_rare_class() -> None:
    """Two clouds over one another, 9 to 1: only inverse weights let the rare class win where it is as dense."""
    g = torch.Generator().manual_seed(0)
    y = (torch.arange(400) % 10 == 0).long()
    x = y[:, None] + torch.randn(400, 1, generator=g)
    share = {}
    for kind in ("none", "inverse", "frequency"):
        options = MLPOptions(lr=3e-2, epochs=6, batch_size=64, class_weights=kind)  # type: ignore[arg-type]
        share[kind] = float(mlp_probe(x, y, x, ("a", "b"), options).float().mean())
    assert share["frequency"] <= share["none"] < 0.15 < 0.25 < share["inverse"]


def test_a_tenth_of_each_class_is_held_out() -> None:
    targets = np.repeat(np.arange(4), (40, 7, 2, 1))
    held = tenth(targets, 0)
    assert np.bincount(targets[held], minlength=4).tolist() == [4, 1, 1, 0]
    assert not np.array_equal(held, tenth(targets, 1))
