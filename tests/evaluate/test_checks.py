"""Features that are not finite, or do not fit, are refused by every score before it computes anything."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fgfast.evaluate.health import alignment, effective_rank, uniformity
from fgfast.evaluate.knn import knn_predict
from fgfast.evaluate.linear import linear_probe
from fgfast.evaluate.mlp import mlp_probe
from fgfast.evaluate.retrieval import retrieve
from fgfast.evaluate.sweep import SweepOptions, sweep_probe

Y = torch.tensor([0, 1] * 5)
GOOD = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
PROBES: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "knn_predict": lambda x, y, test: knn_predict(x, y, test, k=1),
    "linear_probe": linear_probe,
    "mlp_probe": lambda x, y, test: mlp_probe(x, y, test, ("a", "b")),
    "sweep_probe": lambda x, y, test: sweep_probe(x, y, test, SweepOptions()),
}
SCORES: dict[str, Callable[[Tensor], object]] = {
    "retrieve": lambda x: retrieve(x, Y), "effective_rank": effective_rank, "uniformity": uniformity,
    "alignment": lambda x: alignment(x, GOOD), "alignment of y": lambda x: alignment(GOOD, x),
}  # fmt: skip


def spoiled(value: float) -> Tensor:
    x = GOOD.clone()
    x[7, 1] = value
    x[9] = value
    return x


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_a_probe_refuses_features_that_are_not_finite(probe: Callable[..., object], value: float) -> None:
    for name, train, test in (("train_x", spoiled(value), GOOD), ("test_x", GOOD, spoiled(value))):
        with pytest.raises(ValueError, match=rf"^{name} is not finite in row 7 \(2 of 10 rows\): leave such rows out"):
            probe(train, Y, test)


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_a_probe_refuses_shapes_that_do_not_fit(probe: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match=r"expected shapes \[N, D\] and \[M, D\], got \[10, 3\] and \[10, 2\]"):
        probe(GOOD, Y, GOOD[:, :2])
    with pytest.raises(ValueError, match=r"train_y: expected shape \[10\], got \[9\]"):
        probe(GOOD, Y[:9], GOOD)


@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES)
def test_a_probe_refuses_what_is_no_tensor_or_no_class(probe: Callable[..., object]) -> None:
    rows: Any = GOOD.tolist()
    for train, test, name in ((rows, GOOD, "train_x"), (GOOD, rows, "test_x")):
        with pytest.raises(TypeError, match=rf"^{name} is a list: give a torch\.Tensor"):
            probe(train, Y, test)
    with pytest.raises(TypeError, match=r"^train_y has dtype torch\.float32: give integers"):
        probe(GOOD, Y.float(), GOOD)


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_a_score_refuses_what_is_no_tensor(score: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=r"^[xy] is a list: give a torch\.Tensor"):
        score(GOOD.tolist())


def test_retrieval_refuses_classes_that_are_no_integers() -> None:
    with pytest.raises(TypeError, match=r"^y has dtype torch\.float32: give integers"):
        retrieve(GOOD, Y.float())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_a_score_refuses_features_that_are_not_finite(score: Callable[[Tensor], object], value: float) -> None:
    with pytest.raises(ValueError, match=r"^[xy] is not finite in row 7 \(2 of 10 rows\): leave such rows out"):
        score(spoiled(value))
