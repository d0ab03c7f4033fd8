"""Nearest neighbours compared with a loop over rows."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgfast.evaluate.knn import knn_predict
from tests.examples import examples


def by_loop(train_x, train_y, test_x, k, temperature, n_classes):
    predictions = []
    for row in test_x.double().tolist():
        scored = []
        for other, label in zip(train_x.double().tolist(), train_y.tolist(), strict=True):
            cosine = sum(a * b for a, b in zip(row, other, strict=True)) / (math.hypot(*row) * math.hypot(*other))
            scored.append((cosine, label))
        votes = [0.0] * n_classes
        for cosine, label in sorted(scored, reverse=True)[:k]:
            votes[label] += math.exp(cosine / temperature)
        predictions.append(max(range(n_classes), key=votes.__getitem__))
    return predictions


@examples(25)
@given(n=st.integers(1, 23), m=st.integers(0, 9), d=st.integers(2, 7), k=st.integers(1, 30), seed=st.integers(0, 2**31))
def test_equals_a_loop(n, m, d, k, seed):
    g = torch.Generator().manual_seed(seed)
    train, test = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g)
    labels = torch.randint(4, (n,), generator=g)
    predicted = knn_predict(train, labels, test, k=k, temperature=0.1, n_classes=4, chunk=4)
    assert predicted.tolist() == by_loop(train, labels, test, k, 0.1, 4)


def test_small_temperature_does_not_overflow():
    x = torch.eye(3)
    assert knn_predict(x, torch.tensor([2, 0, 1]), x, k=2, temperature=1e-3).tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"train_x": torch.ones(2, 3)},
        {"train_y": torch.zeros(3, dtype=torch.int64)},
        {"k": 0},
        {"temperature": 0.0},
        {"train_x": torch.ones(0, 2), "train_y": torch.zeros(0, dtype=torch.int64)},
    ],
)
def test_bad_input_is_refused(change):
    good = {"train_x": torch.ones(2, 2), "train_y": torch.tensor([0, 1]), "test_x": torch.ones(1, 2)}
    with pytest.raises(ValueError, match=r"expected shape|give"):
        knn_predict(**{**good, **change})
