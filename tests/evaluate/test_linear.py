"""The linear probe: separable classes, invariances, the choice of C, and errors."""

import pytest
import torch

from fgfast.errors import UserError
from fgfast.evaluate.linear import linear_probe


def blobs(seed: int, rows: int = 60, noise: float = 0.3):
    g = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[0.0, 0.0, 3.0], [0.0, 3.0, 0.0], [3.0, 0.0, 0.0]])
    y = torch.arange(rows) % 3
    return centres[y] + noise * torch.randn(rows, 3, generator=g), y


def test_separable_classes_are_learned():
    x, y = blobs(0)
    test, truth = blobs(1)
    assert torch.equal(linear_probe(x, y, test), truth)


def test_scale_and_shift_of_a_feature_change_nothing():
    x, y = blobs(0, noise=2.0)
    test, _ = blobs(1, noise=2.0)
    scale, shift = torch.tensor([1e3, 1e-3, 1.0]), torch.tensor([5.0, -2.0, 0.0])
    assert torch.equal(linear_probe(x, y, test), linear_probe(x * scale + shift, y, test * scale + shift))


def test_constant_feature_changes_nothing():
    x, y = blobs(0, noise=2.0)
    test, _ = blobs(1, noise=2.0)
    wide = [torch.cat([t, torch.full((len(t), 1), 7.0)], dim=1) for t in (x, test)]
    assert torch.equal(linear_probe(x, y, test), linear_probe(wide[0], y, wide[1]))


def test_classes_keep_their_numbers():
    x, y = blobs(0)
    assert set(linear_probe(x, 10 * y + 3, x).tolist()) == {3, 13, 23}


def test_the_best_penalty_on_every_fifth_row_of_a_class_is_used():
    g = torch.Generator().manual_seed(0)
    x, y = blobs(0, rows=90, noise=1.5)
    x = torch.cat([x, torch.randn(90, 60, generator=g)], dim=1)
    held = torch.arange(90) // 3 % 5 == 4  # classes alternate: row r has index r // 3 in its class
    grid = [1e-4, 1e-2, 1.0, 100.0]
    scores = [(linear_probe(x[~held], y[~held], x[held], C=c) == y[held]).sum().item() for c in grid]
    assert len(set(scores)) > 1
    best = grid[scores.index(max(scores))]
    test = torch.randn(300, 63, generator=g)
    assert torch.equal(linear_probe(x, y, test, C=grid), linear_probe(x, y, test, C=best))


def test_one_class_is_refused():
    with pytest.raises(UserError, match="two classes"):
        linear_probe(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64), torch.randn(1, 2))


@pytest.mark.parametrize("C", [0.0, -1.0, []])
def test_bad_penalty_is_refused(C):
    with pytest.raises(ValueError, match="positive"):
        linear_probe(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), torch.randn(1, 2), C=C)


def test_no_test_rows_give_no_predictions():
    x, y = blobs(0)
    assert linear_probe(x, y, x[:0]).shape == (0,)
