"""Retrieval compared with a loop over queries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgfast.evaluate.retrieval import retrieve
from tests.examples import examples


def by_loop(x: torch.Tensor, y: torch.Tensor) -> list[tuple[int, bool, float]]:
    rows, labels, results = x.double().tolist(), y.tolist(), []
    for i, query in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        cosine = {
            j: sum(a * b for a, b in zip(query, rows[j], strict=True)) / math.hypot(*query) / math.hypot(*rows[j])
            for j in others
        }
        ranked = [labels[j] for j in sorted(others, key=lambda j: -cosine[j])]
        hits = [k for k, label in enumerate(ranked, 1) if label == labels[i]]
        precision = sum(r / k for r, k in enumerate(hits, 1)) / max(1, len(hits))
        results.append((ranked[0], labels[i] in ranked[:5], precision))
    return results


@examples(25)
@given(n=st.integers(2, 23), d=st.integers(2, 7), classes=st.integers(1, 6), seed=st.integers(0, 2**31))
def test_equals_a_loop(n: int, d: int, classes: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=g), torch.randint(classes, (n,), generator=g)
    result = retrieve(x, y, chunk=4)
    expected = by_loop(x, y)
    assert result.nearest.tolist() == [row[0] for row in expected]
    assert result.rank5.tolist() == [row[1] for row in expected]
    assert result.precision.tolist() == pytest.approx([row[2] for row in expected])
    assert result.has_match.tolist() == [(y == c).sum() > 1 for c in y]


def test_the_query_itself_is_not_retrieved() -> None:
    """For equal rows of different classes the nearest image is of the other class."""
    result = retrieve(torch.ones(2, 3), torch.tensor([0, 1]))
    assert result.nearest.tolist() == [1, 0]
    assert not result.has_match.any()


def test_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="N >= 2"):
        retrieve(torch.ones(1, 3), torch.tensor([0]))
