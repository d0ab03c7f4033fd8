"""Roofline and scaling plots of results.csv, from the newest row of each measurement; and the figure of the README.

``python -m benchmarks.plots --readme`` measures NT-Xent over batch sizes on this CPU (minutes) and draws it.
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.cases import contrast
from benchmarks.peak import weigh
from benchmarks.record import CEILING, RESULTS, overwrite, read
from benchmarks.timing import Clock, measure
from fgfast.report.plots import FAINT, GRID, INK, LINES, save_figure

Row = dict[str, Any]
MARKERS = "osD^vP*"


def newest(rows: Iterable[Row], device: str) -> list[Row]:
    """The last row with a time of each operation, variant, shape and dtype on a device.

    Example:
        >>> a = {"device": "x", "op": "pool", "variant": "v", "shape": "B=1", "dtype": "bf16", "ms_50": "1"}
        >>> [row["ms_50"] for row in newest([a, {**a, "ms_50": "2"}, {**a, "device": "y"}], "x")]
        ['2']
    """
    found = {}
    for row in rows:
        if row["device"] == device and row["ms_50"] != "":
            found[row["op"], row["variant"], row["shape"], row["dtype"]] = row
    return list(found.values())


def extent(shape: str) -> tuple[str, dict[str, int]]:
    """The words and the sizes of a shape.

    Example:
        >>> extent("pairs M=4 D=2")
        ('pairs', {'M': 4, 'D': 2})
    """
    words = [word for word in shape.split() if "=" not in word]
    sizes = {name: int(n) for name, _, n in (word.partition("=") for word in shape.split() if "=" in word)}
    return " ".join(words), sizes


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tidy(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_xlabel(x, fontsize=8, color=FAINT)
    axes.set_ylabel(y, fontsize=8, color=FAINT)
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _is_ours(row: Row) -> bool:
    return row["variant"].startswith("fgfast") and "," not in row["variant"]


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Operations per second over operations per byte, under bandwidth and matrix rates; None without ceilings."""
    ceilings = [row for row in rows if row["op"] == CEILING]
    points = [row for row in rows if float(row["bytes"] or 0) and row["op"] != CEILING and _is_ours(row)]
    copies = [float(row["bytes"]) for row in ceilings if row["variant"] == "copy"]
    if not copies or not points:
        return None
    rates = {row["dtype"]: float(row["operations"]) for row in ceilings if row["variant"] != "copy"}
    intensity = [float(row["operations"]) / float(row["bytes"]) for row in points]
    figure = _figure(7.5, 4.6)
    axes = figure.add_subplot()
    low, high = min(intensity) / 3, max(*intensity, max(rates.values()) / copies[0]) * 3
    for (dtype, rate), style in zip(rates.items(), ("-", "--", "-.", ":"), strict=False):
        corner = rate / copies[0]
        axes.plot([low, corner, high], [low * copies[0], rate, rate], style, color=FAINT, linewidth=1.2, label=dtype)
    ops = list(dict.fromkeys(row["op"] for row in points))
    for i, op in enumerate(ops):
        own = [(x, row) for x, row in zip(intensity, points, strict=True) if row["op"] == op]
        reached = [float(row["operations"]) / float(row["ms_50"]) * 1e3 for _, row in own]
        axes.plot([x for x, _ in own], reached, MARKERS[i % 7], color=LINES[i % len(LINES)], markersize=5, label=op)
    _tidy(axes, f"Limits and measurements: {rows[0]['device']}", "operations per byte", "operations per second")
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    return figure


def series(rows: Iterable[Row], axis: str) -> dict[str, dict[str, list[tuple[int, Row]]]]:
    """Panels by fixed sizes, and in each the points of every variant along an axis; at least three points."""
    panels: dict[str, dict[str, list[tuple[int, Row]]]] = {}
    for row in rows:
        words, sizes = extent(row["shape"])
        if axis in sizes and row["op"] != CEILING:
            fixed = " ".join(f"{name}={n}" for name, n in sizes.items() if name not in (axis, "T" * (axis == "M")))
            panel = " ".join(filter(None, (row["op"], words, fixed, row["dtype"])))
            panels.setdefault(panel, {}).setdefault(row["variant"], []).append((sizes[axis], row))
    return {
        name: {variant: sorted(points, key=lambda p: p[0]) for variant, points in lines.items()}
        for name, lines in panels.items()
        if max(len(points) for points in lines.values()) >= 3
    }


def scaling(rows: Sequence[Row]) -> Figure | None:
    """Time, and memory where it was measured, against M, N, D and K; None without a series of three points."""
    wanted = [("M", "ms_50", "ms"), ("M", "peak_mib", "peak MiB"), *((a, "ms_50", "ms") for a in "NDK")]
    panels = []
    for axis, column, unit in wanted:
        for name, lines in series(rows, axis).items():
            points = {v: [(n, float(r[column] or 0)) for n, r in own] for v, own in lines.items()}
            kept = {v: [(n, y) for n, y in own if y > 0] for v, own in points.items() if any(y > 0 for _, y in own)}
            if kept:
                panels.append((axis, unit, name, kept))
    if not panels:
        return None
    columns = min(3, len(panels))
    lines_of_panels = math.ceil(len(panels) / columns)
    figure = _figure(4.6 * columns, 3.4 * lines_of_panels)
    for i, (axis, unit, name, kept) in enumerate(panels):
        axes = figure.add_subplot(lines_of_panels, columns, i + 1)
        for j, (variant, own) in enumerate(kept.items()):
            xs, ys = [n for n, _ in own], [y for _, y in own]
            axes.plot(xs, ys, color=LINES[j % len(LINES)], marker=MARKERS[j % 7], markersize=3, label=variant)
        _tidy(axes, name, axis, unit)
        axes.legend(fontsize=7, frameon=False, labelcolor=INK)
    return figure


def draw(rows: Iterable[Row], device: str, folder: Path) -> list[Path]:
    """Write roofline.png and scaling.png of a device, where there are rows to draw."""
    latest = newest(rows, device)
    figures = {"roofline.png": roofline(latest), "scaling.png": scaling(latest)}
    return [save_figure(figure, folder / name) for name, figure in figures.items() if figure is not None]


BATCHES = RESULTS / "contrast-batch.csv"


def measure_batches() -> list[Row]:
    """Median time and peak memory of NT-Xent, forward and backward, D = 128 on this CPU, by batch size and variant."""
    rows: list[Row] = []
    for case in contrast.batch_sizes(torch.device("cpu")):
        results = measure(case, Clock(), budget_ms=5000.0, least=3, without=("torch.compile", "metric-learning"))
        weigh(results)
        batch = extent(case.shape)[1]["M"] // 2
        for r in results:
            ms, mib = (f"{r.quantile(0.5):.4g}", f"{(r.peak or 0) / 2**20:.1f}") if r.times else ("", "")
            rows.append({"batch": batch, "variant": r.variant, "ms": ms, "peak_mib": mib, "note": r.skipped})
            print(*rows[-1].values(), flush=True)
    return rows


def batch_figure(rows: Sequence[Row]) -> Figure:
    """Time and peak memory against batch size, a line per variant."""
    names = {"eager": "plain formula", "lightly": "lightly"}
    figure = _figure(7.2, 2.9)
    for i, (column, title) in enumerate((("ms", "time, ms"), ("peak_mib", "peak memory, MiB"))):
        axes = figure.add_subplot(1, 2, i + 1)
        for j, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
            points = [(int(r["batch"]), float(r[column])) for r in rows if r["variant"] == variant and r[column]]
            label = names.get(variant, "fgfast")
            axes.plot(*zip(*points, strict=True), color=LINES[j], marker=MARKERS[j], markersize=4, label=label)
        _tidy(axes, title, "batch size", "")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := sorted({int(row["batch"]) for row in rows}), [f"{n:,}" for n in ticks])
        axes.minorticks_off()
    figure.axes[0].legend(fontsize=8, frameon=False, labelcolor=INK)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: ``python -m benchmarks.plots --readme [--redraw]``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description="Draw the figure of the README.")
    parser.add_argument("--readme", action="store_true", required=True, help="NT-Xent over batch sizes, on this CPU")
    parser.add_argument("--redraw", action="store_true", help="from the stored numbers, without measuring")
    if not parser.parse_args(arguments).redraw:
        overwrite(measure_batches(), BATCHES)
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "fgfast"}):
        figure = batch_figure(read(BATCHES))
        figure.savefig(BATCHES.with_suffix(".svg"), metadata={"Date": None})
    print(BATCHES, BATCHES.with_suffix(".svg"))


if __name__ == "__main__":
    main()
