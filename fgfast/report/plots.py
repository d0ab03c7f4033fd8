"""Training curves of a run and bar charts that compare runs, as matplotlib figures without global state."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from fgfast.files import write_atomic

Row = Mapping[str, Any]

INK, FAINT, GRID = "#202124", "#5f6368", "#e8eaed"
# Okabe and Ito's colours, dark ones first and without yellow: lines need more contrast with white than areas do.
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#202124")

DRAWN = 1e100  # axes overflow beyond about 1e300

# Keys of metrics.jsonl that are not terms of the loss.
NOT_LOSS = frozenset({
    "step", "epoch", "round", "loss", "lr", "grad_norm", "images_per_s", "data_wait", "memory_mb", "ema", "knn",
    "effective_rank", "uniformity", "alignment", "passes_per_s", "weight_decay", "time", "seconds", "skipped",
})  # fmt: skip


def series(rows: Sequence[Row], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Steps and values of the rows with a number under ``key``; NaN, and what is too large to draw, leaves a gap.

    Example:
        >>> series([{"step": 1, "loss": 2.0}, {"step": 2, "knn": 0.5}], "loss")[0].tolist()
        [1.0]
    """
    pairs = [(row["step"], row[key]) for row in rows if _is_number(row.get("step")) and _is_number(row.get(key))]
    steps, values = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    return steps, np.where(np.abs(values) < DRAWN, values, np.nan)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def loss_terms(rows: Sequence[Row]) -> list[str]:
    """Names of the loss terms in ``rows``: every key with a number that the trainer does not use otherwise.

    Example:
        >>> loss_terms([{"step": 1, "loss": 3.0, "part": 2.0, "lr": 0.1}])
        ['part']
    """
    return list(dict.fromkeys(k for row in rows for k, v in row.items() if k not in NOT_LOSS and _is_number(v)))


def smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Centred running mean over an odd number of values, at most ``window``, fewer at the ends; NaN stays NaN."""
    if not len(values):
        return values
    finite = np.isfinite(values)
    kernel = np.ones((min(window, len(values)) + 1) // 2 * 2 - 1)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    count = np.convolve(finite.astype(np.float64), kernel, mode="same")
    return np.where(finite, total / np.maximum(count, 1.0), np.nan)


def _style_axes(axes: Axes, title: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(FAINT)


def _format_step(value: float, _: object = None) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _plot(axes: Axes, rows: Sequence[Row], keys: Sequence[str], *, scale: float = 1.0, smoothed: bool = False) -> None:
    for colour, key in zip(LINES * (1 + len(keys) // len(LINES)), keys, strict=False):
        steps, values = series(rows, key)
        values = values * scale
        window = max(1, len(values) // 25) if smoothed else 1
        if window > 1:
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        # A line of one or two points is invisible.
        marker = "o" if len(values) <= 25 else None
        axes.plot(steps, smooth(values, window), color=colour, linewidth=1.6, marker=marker, markersize=3, label=key)
    if len(keys) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)


@dataclass(frozen=True)
class Chart:
    """One chart of a run.

    Args:
        title: what it shows.
        unit: of its values, or a remark on them.
        alt: the same with the first and the last values.
        figure: the curves over steps, transparent.
    """

    title: str
    unit: str
    alt: str
    figure: Figure


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Draw charts of training: loss, its terms, kNN accuracy, health, learning rate, gradient norm, speed, wait, ...

    Only quantities that the rows hold get a chart. Noisy ones are smoothed over a 25th of the run, with the raw values
    behind in a faint colour.

    Args:
        rows: rows of metrics.jsonl: "step" and any of "loss", further loss terms, "lr", "grad_norm", "images_per_s",
            "data_wait" (fraction of the step time, 0 to 1), "memory_mb", "ema", "knn" (accuracy, 0 to 1),
            "effective_rank", "uniformity", "alignment".

    Example:
        >>> found = charts([{"step": s, "loss": 5.0 / s, "lr": 0.1} for s in range(1, 50)])
        >>> found[0].title, found[0].alt, found[1].title
        ('Loss', 'Loss over steps 1 to 49: from 5 to 0.102', 'Learning rate')
    """
    panels: list[tuple[str, str, list[str], float, bool]] = [  # title, unit, keys, scale, smoothed
        ("Loss", "", ["loss"], 1.0, True),
        ("Loss terms", "", loss_terms(rows), 1.0, True),
        ("kNN accuracy", "%", ["knn"], 100.0, False),
        ("Effective rank of the features", "1: collapse", ["effective_rank"], 1.0, False),
        ("Uniformity, alignment", "both 0: collapse", ["uniformity", "alignment"], 1.0, False),
        ("Learning rate", "", ["lr"], 1.0, False),
        ("Gradient norm", "before clipping", ["grad_norm"], 1.0, True),
        ("Speed", "images/s", ["images_per_s"], 1.0, True),
        ("Waiting for data", "% of the step time", ["data_wait"], 100.0, True),
        ("Peak memory", "MiB", ["memory_mb"], 1.0, False),
        ("Momentum of the target network", "", ["ema"], 1.0, False),
    ]
    found = []
    for title, unit, names, scale, smoothed in panels:
        keys = [key for key in names if np.isfinite(series(rows, key)[1]).any()]
        if not keys:
            continue
        figure = Figure(figsize=(4.2, 2.3))  # without a layout engine, which takes most of the time of a page
        axes = figure.add_axes((0.13, 0.19, 0.85, 0.74))
        _plot(axes, rows, keys, scale=scale, smoothed=smoothed)
        _style_axes(axes)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_format_step))
        axes.set_xlabel("step", fontsize=8, color=FAINT)
        if title in ("Speed", "Waiting for data", "Peak memory"):
            axes.set_ylim(bottom=0)
        found.append(Chart(title, unit, f"{title} over {_ends(rows, keys, scale)}", figure))
    return found


def _ends(rows: Sequence[Row], keys: Sequence[str], scale: float) -> str:
    """The first and last steps and finite values of some quantities, in words."""
    texts, least, most = [], math.inf, 0.0
    for key in keys:
        steps, values = series(rows, key)
        steps, values = steps[np.isfinite(values)], scale * values[np.isfinite(values)]
        least, most = min(least, steps[0]), max(most, steps[-1])
        texts.append(f"{key + ' ' if len(keys) > 1 else ''}from {values[0]:.3g} to {values[-1]:.3g}")
    return f"steps {least:.0f} to {most:.0f}: {', '.join(texts)}"


def bars(
    results: Sequence[Row],
    *,
    value: str = "top1",
    low: str = "low",
    high: str = "high",
    label: str = "method",
    group: str = "data",
    unit: str = "top-1, %",
    scale: float = 100.0,
) -> Figure:
    """Compare results: a panel per group with a bar and its interval per label, in order of appearance.

    Rows with the same label and group are seeds: the bar is their mean, each seed is a dot, and the whisker spans the
    lowest to the highest. The whisker of a single row is its own interval, if it has one.

    Args:
        results: rows, for instance of compare.csv; numbers may be strings.
        value, low, high: keys of the number and of the ends of its interval.
        label, group: keys of the names of the bar and of the panel; rows without a group key share one panel.
        unit: label of the axis.
        scale: factor on every number, 100 to show fractions as per cent.

    Returns:
        The figure.

    Raises:
        ValueError: there is no row.

    Example:
        >>> rows = [{"method": "simclr", "top1": 0.31, "low": 0.29, "high": 0.33}, {"method": "particle", "top1": 0.36}]
        >>> figure = bars(rows)
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['simclr', 'particle']
    """
    if not results:
        raise ValueError("results is empty: give at least one row.")
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in results:
        groups.setdefault(str(row.get(group, "")), {}).setdefault(str(row[label]), []).append(row)
    labels = list(dict.fromkeys(str(row[label]) for row in results))
    colours = {name: LINES[i % len(LINES)] for i, name in enumerate(labels)}
    height = 0.9 + 0.38 * max(len(members) for members in groups.values())
    figure = Figure(figsize=(min(12.0, 5.0 * len(groups) + 1.0), height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for i, (title, members) in enumerate(groups.items()):
        axes = figure.add_subplot(1, len(groups), i + 1)
        names = [name for name in labels if name in members]
        for y, name in enumerate(names):
            _draw_bar(axes, y, colours[name], [_scaled(row, (value, low, high), scale) for row in members[name]])
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(min(0.0, axes.get_xlim()[0]), axes.get_xlim()[1] * 1.1)  # room for the numbers
        _style_axes(axes, title)
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", labelcolor=INK, labelsize=9)
        axes.set_xlabel(unit, fontsize=8, color=FAINT)
    return figure


def _scaled(row: Row, keys: tuple[str, str, str], scale: float) -> tuple[float, float, float]:
    """The value and the interval of ``row``, NaN where absent or empty."""
    value, low, high = (math.nan if row.get(key) in (None, "") else float(row[key]) * scale for key in keys)
    return value, low, high


def _draw_bar(axes: Axes, y: int, colour: str, seeds: Sequence[tuple[float, float, float]]) -> None:
    values = np.array([seed[0] for seed in seeds])
    mean = float(values.mean())
    low, high = (values.min(), values.max()) if len(seeds) > 1 else seeds[0][1:]
    axes.barh(y, mean, height=0.62, color=colour, alpha=0.85)
    if len(seeds) > 1:
        axes.plot(values, np.full(len(values), y), "o", color="white", markeredgecolor=INK, markersize=4, zorder=4)
    right = mean
    if math.isfinite(low) and math.isfinite(high):
        axes.errorbar((low + high) / 2, y, xerr=(high - low) / 2, color=INK, capsize=3, linewidth=1.2, zorder=3)
        right = max(mean, float(high))
    axes.annotate(f"{mean:.1f}", (right, y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=INK)


def png_bytes(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path, dpi: int = 150) -> Path:
    """Write the figure to a PNG file, atomically."""
    write_atomic(path, lambda p: p.write_bytes(png_bytes(figure, dpi)))
    return path
