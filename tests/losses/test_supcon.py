"""SupConLoss: where it needs no matrix, and its place among pytorch-metric-learning's classes."""

import copy
import pickle
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fgfast import losses
from fgfast.losses import pml as subclass
from fgfast.losses import supcon
from tests.losses.peers import assert_same, pml, randint, randn

distributed = pytest.importorskip("pytorch_metric_learning.utils.distributed")
distances = pytest.importorskip("pytorch_metric_learning.distances")
X, Y = randn(0, 12, 4), randint(1, 3, 12)


@pytest.mark.parametrize("efficient", [False, True])
def test_distributed_loss_wrapper_takes_it_and_gives_the_value_of_the_peer(
    efficient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks, of which the other is simulated."""
    other = {torch.float64: randn(2, 12, 4), torch.int64: randint(3, 3, 12)}
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", lambda x: other[x.dtype])

    def wrapped(loss: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        wrapper = distributed.DistributedLossWrapper(loss, efficient)
        return lambda x: wrapper(x, Y)

    assert_same(wrapped(losses.SupConLoss()), wrapped(pml.SupConLoss()), X)


def test_a_function_may_reduce_the_losses() -> None:
    """Also in a subclass of pytorch-metric-learning's base class, which keeps a reducer of its own as a module."""
    loss = subclass.SupConLoss(reducer=lambda *_: torch.tensor(7.0))
    assert loss(X, Y) == 7


def test_its_class_depends_on_whether_pytorch_metric_learning_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(losses.SupConLoss()) is subclass.SupConLoss
    monkeypatch.delitem(sys.modules, "pytorch_metric_learning.losses")
    assert type(losses.SupConLoss()) is supcon.SupConLoss


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_a_copy_has_the_options(copied: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    loss = losses.SupConLoss(0.3, distance=distances.LpDistance(p=1))
    assert copied(loss)(X, Y) == loss(X, Y)


@pytest.mark.parametrize(
    ("distance", "matrix"),
    [
        (None, False),
        (distances.CosineSimilarity(), False),
        (distances.DotProductSimilarity(normalize_embeddings=False), False),
        (distances.CosineSimilarity(power=2), True),
        (distances.LpDistance(), True),
    ],
)
def test_only_other_distances_than_cosines_and_dot_products_need_a_matrix(
    distance: torch.nn.Module | None, matrix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(supcon, "row_losses", lambda *given: calls.append(given) or (given[0].sum(1), None))
    losses.SupConLoss(distance=distance)(X, Y)
    assert bool(calls) == matrix


def test_huge_finite_vectors_give_a_finite_loss_with_a_miner() -> None:
    pairs = tuple(torch.tensor(i) for i in ([0], [1], [2, 3], [3, 0]))
    assert losses.SupConLoss()(X.bfloat16() * 1e30, indices_tuple=pairs).isfinite()


def all_pairs(y: Tensor) -> tuple[Tensor, ...]:
    """What a miner returns that leaves out no pair."""
    same, itself = y[:, None] == y, torch.eye(len(y), dtype=torch.bool)
    return (*(same & ~itself).nonzero().T, *(~same).nonzero().T)


@pytest.mark.parametrize(
    ("distance", "mined"), [(None, False), (None, True), (distances.CosineSimilarity(power=3), False)]
)
@pytest.mark.parametrize(
    ("n", "temperature", "times"),
    [(64, 0.055, 1), (320, 0.05, 1), (320, 0.04, 4)],  # the plain path, tiles, rows below the limit
)
def test_rows_of_a_tiny_loss_count_in_float32_down_to_6e_8(
    n: int, temperature: float, times: int, distance: torch.nn.Module | None, mined: bool
) -> None:
    """Losses of about 1e-6, below the rounding error of logits of 20, are above 0 as in float64.

    Below 2^-24, half of float32's epsilon, the sum 1 + loss rounds to 1. Here three quarters of the rows then have a
    loss of 0, are not counted, and the mean is four times that of float64; the peer's is the same.
    """
    y = torch.arange(n) % (n // 2)
    x = torch.eye(n // 2)[y] + 0.0
    x[: n // 8] = randn(0, n // 8, n // 2).float()
    pairs = all_pairs(y) if mined else None
    ours, theirs = (c(temperature, distance=distance) for c in (losses.SupConLoss, pml.SupConLoss))
    value = ours(x, y, pairs)
    torch.testing.assert_close(value, theirs(x, y, pairs), rtol=1e-4, atol=0)
    torch.testing.assert_close(value.double(), times * ours(x.double(), y, pairs), rtol=1e-4, atol=0)


def test_a_step_with_a_miner_is_one_graph() -> None:
    """Nothing is read that would wait for a GPU."""
    loss, x, pairs = losses.SupConLoss(), X.float(), all_pairs(Y)
    compiled = torch.compile(lambda x: loss(x, indices_tuple=pairs), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), loss(x, Y))
