"""The predicted shares of the limits as bars, with the goals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.static.table import WHOLE
from fgfast.report.plots import FAINT, GRID, INK, LINES

Row = dict[str, Any]


def figure(rows: Sequence[Row]) -> Figure:
    """A group of bars per operation and shape, a bar per architecture and Triton; a mark at each goal."""
    whole = [row for row in rows if row["launch"] == WHOLE]
    names = list(dict.fromkeys((row["kernel"], row["shape"], row["dtype"]) for row in whole))
    kinds = list(dict.fromkeys((row["arch"], row["triton"]) for row in whole))
    height = 0.8 / max(1, len(kinds))
    made = Figure(figsize=(9, 1 + (0.18 * len(kinds) + 0.16) * len(names)), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.add_subplot()
    for i, kind in enumerate(kinds):
        own = {
            (r["kernel"], r["shape"], r["dtype"]): float(r["predicted_share"])
            for r in whole
            if (r["arch"], r["triton"]) == kind
        }
        places = [n + (i + 0.5) * height - 0.4 for n, name in enumerate(names) if name in own]
        values = [own[name] for name in names if name in own]
        axes.barh(places, values, height * 0.9, color=LINES[i % len(LINES)], label=f"{kind[0]}, Triton {kind[1]}")
    goals = {(r["kernel"], r["shape"], r["dtype"]): float(r["goal"]) for r in whole}
    axes.plot([goals[name] for name in names], range(len(names)), "|", color=INK, markersize=12, label="goal")
    axes.set_yticks(range(len(names)), [" ".join(name) for name in names], fontsize=7, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_title(
        "Predicted share of the limit, from the machine code", loc="left", fontsize=10, fontweight="bold", color=INK
    )
    axes.grid(True, axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=7, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=7, frameon=False, labelcolor=INK, loc="lower right")
    return made


def draw(rows: Sequence[Row], path: Path) -> Path:
    """Write the figure beside a CSV file, with its name."""
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "fgfast"}):
        figure(rows).savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return path.with_suffix(".svg")
