"""Retrieval compared with a loop over queries and with scikit-learn, its ties and its memory."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgfast.evaluate import retrieval
from fgfast.evaluate.retrieval import retrieve
from tests.examples import examples
from tests.memory import Memory


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
    check(x, y, chunk=4)


def check(x: torch.Tensor, y: torch.Tensor, **options: int) -> None:
    result, expected = retrieve(x, y, **options), by_loop(x, y)
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


@examples(25)
@given(n=st.integers(2, 30), d=st.integers(1, 3), classes=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_images_of_equal_similarity_are_ranked_in_the_order_of_the_set(n: int, d: int, classes: int, seed: int) -> None:
    """Vectors along the axes have similarities of exactly -1, 0 (of either sign) and 1."""
    g = torch.Generator().manual_seed(seed)
    x = torch.eye(d)[torch.randint(d, (n,), generator=g)] * (2 * torch.randint(2, (n, 1), generator=g) - 1)
    check(x, torch.randint(classes, (n,), generator=g))


@pytest.mark.parametrize("sizes", [(40, 1, 1, 2, 3), (1,) * 20, (30,), (17, 17)])
def test_blocks_of_any_size_give_the_same_ranks(monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]) -> None:
    """Blocks of one query, of some, and of classes of very different sizes; columns that fill no last block."""
    g = torch.Generator().manual_seed(0)
    y = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    y = 5 * y[torch.randperm(len(y), generator=g)] - 3  # any integers
    x = torch.randn(len(y), 4, generator=g)
    for block, columns in ((1, 1), (500, 7), (10**6, 10**6)):
        monkeypatch.setattr(retrieval, "BLOCK", block)
        monkeypatch.setattr(retrieval, "COLUMNS", columns)
        check(x, y)


def test_the_average_precision_is_that_of_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 6, generator=g, dtype=torch.float64), torch.randint(7, (300,), generator=g)
    unit = torch.nn.functional.normalize(x, dim=1)
    expected = [
        average_precision_score(np.delete(y == y[i], i), np.delete(unit @ unit[i], i)) for i in range(len(x))
    ]  # fmt: skip
    np.testing.assert_allclose(retrieve(x, y).precision, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("one_class", [False, True])
def test_memory_does_not_grow_with_the_square(monkeypatch: pytest.MonkeyPatch, one_class: bool) -> None:
    """6,000 images have 144 MB of similarities; a class of half of them changes nothing."""
    monkeypatch.setattr(retrieval, "BLOCK", 1 << 18)
    x = torch.randn(6000, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6000) // (3000 if one_class else 5)
    with Memory() as memory:
        assert retrieve(x, y, chunk=6000).has_match.all()
    assert memory.peak < 20 * 2**20
