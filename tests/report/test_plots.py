"""Training curves and bar charts."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from fgfast.report import plots
from fgfast.report.svg import VARIABLES, svg_text
from tests.report import runs


def titles(rows: list[dict[str, object]]) -> list[str]:
    return [chart.title for chart in plots.charts(rows)]


def test_curves_have_a_panel_per_logged_quantity() -> None:
    assert titles(runs.metrics()) == [
        "Loss", "Loss terms", "kNN accuracy", "Learning rate", "Gradient norm", "Speed", "Waiting for data",
        "Peak memory", "Momentum of the target network",
    ]  # fmt: skip


def test_the_health_of_the_features_has_panels_and_is_no_loss_term() -> None:
    rows = [{"step": s, "effective_rank": 9.0, "uniformity": -2.0, "alignment": 0.3} for s in (1, 2)]
    assert titles(rows) == ["Effective rank of the features", "Uniformity, alignment"]
    assert plots.loss_terms(rows) == []


def test_curves_leave_out_quantities_that_are_absent_or_never_finite() -> None:
    assert titles([{"step": 1, "loss": 1.0, "grad_norm": float("nan")}]) == ["Loss"]
    assert titles([]) == []
    assert titles([{"step": 1}]) == []


def test_loss_terms_are_the_keys_that_the_trainer_does_not_use() -> None:
    assert plots.loss_terms(runs.metrics()) == ["part", "consistency"]
    assert plots.loss_terms([{"step": 1, "note": "text", "flag": True}]) == []


def test_smoothing_keeps_a_constant_and_leaves_a_gap_at_nan() -> None:
    values = np.array([2.0, 2.0, np.nan, 2.0, 2.0])
    np.testing.assert_allclose(plots.smooth(values, 3), values)
    np.testing.assert_allclose(plots.smooth(np.array([1.0, 2.0, 6.0, 7.0]), 4), [1.5, 3.0, 5.0, 6.5])
    assert plots.smooth(np.array([]), 1).size == 0


def test_curves_are_smoothed_in_the_order_of_steps() -> None:
    faint, line = plots.charts(runs.metrics(2000))[0].figure.axes[0].lines
    assert len(faint.get_xdata()) == len(line.get_xdata()) == 400
    assert np.std(np.diff(line.get_ydata())) < np.std(np.diff(faint.get_ydata()))


def test_bars_have_a_panel_per_group_and_a_bar_per_label() -> None:
    rows = [
        {"data": data, "method": method, "top1": 0.1 * i, "low": 0.1 * i - 0.01, "high": 0.1 * i + 0.01}
        for data in ("synthetic", "cub")
        for i, method in enumerate(("random", "simclr", "particle"))
    ]
    figure = plots.bars(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["synthetic", "cub"]
    assert [len(axes.patches) for axes in figure.axes] == [3, 3]
    assert figure.axes[0].patches[2].get_width() == pytest.approx(20.0)


def test_bars_average_seeds_and_parse_strings() -> None:
    rows = [{"method": "simclr", "top1": top1, "low": "", "high": ""} for top1 in ("0.2", "0.3", "0.4")]
    axes = plots.bars(rows).axes[0]
    assert axes.patches[0].get_width() == pytest.approx(30.0)
    assert axes.texts[0].get_text() == "30.0"


def test_bars_without_results_are_an_error() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        plots.bars([])


def test_saved_figures_are_white_pngs(tmp_path: Path) -> None:
    path = plots.save_figure(plots.bars([{"method": "simclr", "top1": 0.3}]), tmp_path / "a" / "curves.png")
    with Image.open(path) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert [p.name for p in path.parent.iterdir()] == ["curves.png"]


def test_pyplot_is_not_used() -> None:
    assert "matplotlib.pyplot" not in Path(plots.__file__).read_text()


def test_what_is_null_or_too_large_to_draw_leaves_a_gap() -> None:
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1e308}, {"step": 3, "loss": None}, {"step": 4, "loss": 2.0}]
    steps, values = plots.series(rows, "loss")
    assert steps.tolist() == [1, 2, 4]
    np.testing.assert_array_equal(values, [1.0, np.nan, 2.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (chart,) = plots.charts(rows)
        assert "from 1 to 2" in svg_text(chart.figure, chart.alt)


def test_charts_take_their_colours_from_the_page_and_share_no_names() -> None:
    charts = plots.charts(runs.metrics(100))
    texts = [svg_text(chart.figure, chart.alt) for chart in charts]
    for text in texts:
        assert set(re.findall(r"(?:fill|stroke): ([^;\"]*)", text)) <= {
            "none",
            *(f"var({v}, {c})" for c, v in VARIABLES.items()),
        }
    names = [name for text in texts for name in set(re.findall(r'id="([^"]*)"', text))]
    assert len(names) == len(set(names))
    assert ">0.0010<" in texts[charts.index(next(chart for chart in charts if chart.title == "Learning rate"))]
