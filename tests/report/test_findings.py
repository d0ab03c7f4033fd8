"""Each rule on what is worth a look, on both sides of its limit."""

from typing import Any

import numpy as np
import pytest

from fgfast.evaluate.health import COLLAPSED
from fgfast.report.findings import findings
from fgfast.report.plots import charts
from tests.report import runs


def rows(**values: list[float]) -> list[dict[str, Any]]:
    return [
        {"step": i, **dict(zip(values, row, strict=True))} for i, row in enumerate(zip(*values.values(), strict=True))
    ]


def noisy(fall: float) -> list[float]:
    """50 losses of deviation 0.1 that fall in a line: two standard errors of two fifths are 0.063."""
    noise = 0.1 * np.tile([1.0, -1.0], 25)
    return (5 - fall * np.linspace(0, 1, 50) + noise).tolist()


@pytest.mark.parametrize(
    ("chart", "off", "fine"),
    [
        ("Loss", {"loss": noisy(0.0)}, {"loss": noisy(0.2)}),
        ("Loss", {"loss": noisy(-1.0)}, {"loss": noisy(1.0)}),
        ("Loss", {"loss": noisy(0.02)}, {"loss": noisy(0.0)[:9]}),
        ("Loss", {"skipped": [0.0, 1.0]}, {"skipped": [0.0, 0.0]}),
        ("kNN accuracy", {"knn": [0.1, 0.3, 0.26]}, {"knn": [0.1, 0.3, 0.28]}),
        ("Effective rank of the features", {"effective_rank": [20.0, 9.9]}, {"effective_rank": [20.0, 10.1]}),
        ("Uniformity, alignment", {"uniformity": [COLLAPSED / 2]}, {"uniformity": [2 * COLLAPSED]}),
        ("Waiting for data", {"data_wait": [0.9, 0.051, 0.051]}, {"data_wait": [0.9, 0.049, 0.049]}),
    ],
)  # fmt: skip
def test_a_rule_speaks_only_beyond_its_limit(
    chart: str, off: dict[str, list[float]], fine: dict[str, list[float]]
) -> None:
    assert list(findings(rows(**off))) == [chart]
    assert findings(rows(**fine)) == {}


def test_a_run_in_order_and_an_empty_one_have_none() -> None:
    assert findings(runs.metrics()) == {}
    assert findings([]) == {}
    assert findings([{"step": 1, "loss": None, "knn": float("nan")}] * 20) == {}


def test_every_rule_belongs_to_a_chart() -> None:
    wrong = [
        {
            "step": i, "loss": 1.0, "skipped": 2, "knn": 0.5 / (i + 1), "effective_rank": 9.0 / (i + 1),
            "uniformity": 0.0, "data_wait": 0.5,
        }
        for i in range(20)
    ]  # fmt: skip
    found = findings(wrong)
    assert found.keys() <= {chart.title for chart in charts(wrong)}
    assert [len(sentences) for sentences in found.values()] == [2, 1, 1, 1, 1]
