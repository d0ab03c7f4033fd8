"""Class weights, and the MLP on frozen features."""

import numpy as np
import pytest
import torch

from fgfast.errors import UserError
from fgfast.evaluate.linear import linear_probe
from fgfast.evaluate.mlp import MLPOptions, class_weights, mlp_probe, part_of_each_class

CASSAVA = (466, 1443, 773, 2658, 316)
NAMES = ("cbb", "cbsd", "cgm", "cmd", "healthy")


def exclusive_or(seed: int, rows: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Four clouds in a plane, opposite ones of the same class: no line separates the classes."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.randint(2, (rows, 2), generator=g)
    return 2.0 * corner + 0.3 * torch.randn(rows, 2, generator=g), corner.sum(1) % 2


def test_class_weights_follow_their_formulas() -> None:
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
def test_a_class_without_an_image_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match="Class cgm has no training image"):
        class_weights(np.array([0, 1, 3, 4]), NAMES, kind)  # type: ignore[arg-type]


def test_mlp_separates_classes_that_no_line_separates() -> None:
    (x, y), (test, truth) = exclusive_or(0), exclusive_or(1)
    options = MLPOptions(hidden=32, lr=3e-2, epochs=15, batch_size=64)
    assert (mlp_probe(x, y, test, ("a", "b"), options) == truth).float().mean() > 0.97
    assert (linear_probe(x, y, test) == truth).float().mean() < 0.7


def test_predictions_depend_only_on_the_seed() -> None:
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
    scaled = mlp_probe(x * scale + shift, y, x * scale + shift, ("a", "b"), options)
    assert torch.equal(scaled, mlp_probe(x, y, x, ("a", "b"), options))


def test_training_stops_after_epochs_without_improvement(monkeypatch: pytest.MonkeyPatch) -> None:
    """With random labels the held-out loss soon rises, and the weights of the best epoch predict."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 8, generator=g), torch.randint(2, (64,), generator=g)
    losses: list[float] = []
    real = torch.nn.CrossEntropyLoss.forward

    def record(self: torch.nn.CrossEntropyLoss, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = real(self, logits, target)
        if not torch.is_grad_enabled():
            losses.append(float(loss))
        return loss

    monkeypatch.setattr(torch.nn.CrossEntropyLoss, "forward", record)
    options = MLPOptions(lr=3e-2, patience=3)
    stopped = mlp_probe(x, y, x, ("a", "b"), options)
    best = losses.index(min(losses))
    assert len(losses) == best + 4 < 100
    short = mlp_probe(x, y, x, ("a", "b"), MLPOptions(lr=3e-2, epochs=best + 1, patience=99))
    assert torch.equal(stopped, short)


def test_inverse_weights_favour_the_rare_class() -> None:
    """Of two overlapping clouds, 9 to 1, the rare class is predicted often only with inverse weights."""
    g = torch.Generator().manual_seed(0)
    y = (torch.arange(400) % 10 == 0).long()
    x = y[:, None] + torch.randn(400, 1, generator=g)
    predicted_rare = {}
    for kind in ("none", "inverse", "frequency"):
        options = MLPOptions(lr=3e-2, epochs=6, batch_size=64, class_weights=kind)  # type: ignore[arg-type]
        predicted_rare[kind] = float(mlp_probe(x, y, x, ("a", "b"), options).float().mean())
    assert predicted_rare["frequency"] <= predicted_rare["none"] < 0.15 < 0.25 < predicted_rare["inverse"]


def test_a_tenth_of_each_class_is_held_out() -> None:
    targets = np.repeat(np.arange(4), (40, 7, 2, 1))
    held = part_of_each_class(targets, 0)
    assert np.bincount(targets[held], minlength=4).tolist() == [4, 1, 1, 0]
    assert not np.array_equal(held, part_of_each_class(targets, 1))
