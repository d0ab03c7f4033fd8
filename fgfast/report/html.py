"""The HTML report of a run, one self-contained page: settings, results, training curves and figures."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fgfast.errors import UserError
from fgfast.evaluate.scores import read_scores
from fgfast.files import write_atomic
from fgfast.formats import read_json, read_toml
from fgfast.info import versions
from fgfast.report import plots
from fgfast.report.figures import Comparison, read_figures
from fgfast.report.findings import findings
from fgfast.report.svg import svg_text
from fgfast.train.log import read_metrics

CHECKPOINTS = {"init": "before", "last": "after"}  # column heads of the results
PROTOCOLS = {
    "knn": "kNN", "linear": "Linear probe", "parts": "Linear probe of true parts", "mlp": "MLP",
    "finetune": "Fine-tuning", "retrieval": "Retrieval, rank 1", "segmentation": "Segmentation, mIoU",
}  # fmt: skip
KEY_POINTS = {
    "nmi": "Parts under key points, NMI", "ari": "Parts under key points, ARI",
    "keypoint_error": "Key points from parts, error in sides of the box (less is better)",
    "box_iou": "All parts together, IoU with the box",
}  # fmt: skip
REMEDY = "repair or remove it"


@dataclass(frozen=True)
class ChartView:
    """A chart of the page."""

    title: str
    unit: str
    svg: Markup
    notes: list[str]


@dataclass
class Page:
    """The data for the template; a file that the run folder lacks leaves its field empty and its section out."""

    title: str
    subtitle: str = ""
    summary: list[tuple[str, str, str]] = field(default_factory=list)  # name, value, remark
    config: list[tuple[str, str]] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    gains: bool = False
    charts: list[ChartView] = field(default_factory=list)
    figures: list[Comparison] = field(default_factory=list)
    versions: list[tuple[str, str]] = field(default_factory=list)
    versions_from_run: bool = False
    notes: list[str] = field(default_factory=list)


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The items of nested tables under dotted names.

    Example:
        >>> list(flatten({"method": "particle", "optimiser": {"lr": 0.1}}))
        [('method', 'particle'), ('optimiser.lr', 0.1)]
    """
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _find(config: list[tuple[str, Any]], key: str) -> Any:
    """The least nested value called ``key`` in a flattened configuration, or None."""
    matches = [(name.count("."), value) for name, value in config if name.rsplit(".", 1)[-1] == key]
    return min(matches, key=lambda item: item[0])[1] if matches else None


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(_text(v) for v in value)
    return str(value)


def _percent(fraction: object) -> str:
    return f"{100 * fraction:.1f}" if isinstance(fraction, int | float) and math.isfinite(fraction) else ""


def _scores(row: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of a row, by the name of the line that shows them."""
    if "nmi" in row:
        return {name: row.get(key) for key, name in KEY_POINTS.items()}
    return {PROTOCOLS.get(row["protocol"], row["protocol"]): row.get("top1", row.get("miou"))}


def _add_results(page: Page, rows: list[dict[str, Any]]) -> None:
    """Fill the table: a line per score and data set, a cell per checkpoint; the last of repeated rows is shown."""
    lines: dict[tuple[str, str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        for name, value in _scores(row).items():
            key = name, str(row.get("options", "")), str(row.get("data", "")), str(row.get("path", ""))
            lines.setdefault(key, {})[str(row["checkpoint"])] = row | {"shown": value}
    seen = {str(row["checkpoint"]) for row in rows}
    ordered = [name for name in CHECKPOINTS if name in seen] + sorted(seen - set(CHECKPOINTS))
    page.checkpoints = [CHECKPOINTS.get(name, name) for name in ordered]
    several_sets = len({key[2:] for key in lines}) > 1
    for (name, options, data, _), by_checkpoint in lines.items():
        name += f" ({options.replace(',', ', ')})" if options else ""
        name += f", {data}" if several_sets and data else ""
        line: dict[str, Any] = {"name": name, "cells": [], "gain": "", "n": ""}
        for row in (by_checkpoint.get(checkpoint, {}) for checkpoint in ordered):
            low, high = _percent(row.get("low")), _percent(row.get("high"))
            line["cells"].append((_percent(row.get("shown")), (low, high) if low and high else None))
            line["n"] = row.get("n", line["n"])
        before, after = (by_checkpoint.get(checkpoint, {}).get("shown") for checkpoint in CHECKPOINTS)
        if before is not None and after is not None:
            line["gain"] = f"{100 * (after - before):+.1f}"
            page.gains = True
        page.results.append(line)


def _median(rows: list[dict[str, Any]], key: str) -> float | None:
    values = sorted(v for v in plots.series(rows, key)[1].tolist() if math.isfinite(v))
    return values[len(values) // 2] if values else None


def _add_summary(page: Page, rows: list[dict[str, Any]]) -> None:
    knn = [v for v in plots.series(rows, "knn")[1].tolist() if math.isfinite(v)]
    if knn:
        page.summary.append(
            (
                "kNN during training",
                f"{100 * knn[-1]:.1f} %",
                f"first {100 * knn[0]:.1f} %, best {100 * max(knn):.1f} %",
            )
        )
    rank = [v for v in plots.series(rows, "effective_rank")[1].tolist() if math.isfinite(v)]
    if rank:
        page.summary.append(("Effective rank", f"{rank[-1]:.1f}", f"of the features; first {rank[0]:.1f}"))
    loss = [v for v in plots.series(rows, "loss")[1].tolist() if math.isfinite(v)]
    if loss:
        page.summary.append(("Loss", f"{loss[-1]:.3g}", f"first {loss[0]:.3g}"))
    if rows:
        epoch = rows[-1].get("epoch")
        page.summary.append(("Steps", f"{int(rows[-1]['step']):,}", "" if epoch is None else f"epoch {_text(epoch)}"))
    if (speed := _median(rows, "images_per_s")) is not None:
        page.summary.append(("Speed", f"{speed:,.0f}", "images per second, median"))
    if (wait := _median(rows, "data_wait")) is not None:
        page.summary.append(("Waiting for data", f"{100 * wait:.1f} %", "of the step time, median"))
    if memory := [v for v in plots.series(rows, "memory_mb")[1].tolist() if math.isfinite(v)]:
        page.summary.append(("Memory", f"{max(memory):,.0f} MiB", "peak"))


def _add_charts(page: Page, rows: list[dict[str, Any]]) -> None:
    off = findings(rows)
    for chart in plots.charts(rows):
        svg = Markup(svg_text(chart.figure, chart.alt))  # which escapes what comes from the run
        page.charts.append(ChartView(chart.title, chart.unit, svg, off.get(chart.title, [])))


def _read_left_out(page: Page, folder: Path) -> None:
    """The figures that :func:`fgfast.report.draw.draw_run` left out."""
    for path in sorted(folder.glob("left-out*.json")):
        page.notes += read_json(path, list[str], remedy=REMEDY)


def _read_config(page: Page, path: Path) -> None:
    config = read_toml(path, remedy=REMEDY)
    environment = config.pop("environment", None)
    if isinstance(environment, dict):
        if resumed := environment.pop("resumed", None):  # what --resume changed, and when
            config["resumed"] = resumed
        page.versions = [(name, _text(value)) for name, value in flatten(environment)]
        page.versions_from_run = True
    items = list(flatten(config))
    page.config = [(name, _text(value)) for name, value in items]
    if (method := _find(items, "method")) is not None:
        page.title = str(method)
    phrases = [
        ("on", Path(str(_find(items, "data") or "")).name),
        ("with", _find(items, "model")),
        ("from", _find(items, "init")),
    ]
    texts = [f"{word} {value}" for word, value in phrases if value not in (None, "")]
    page.subtitle = " ".join(texts).replace("from none", "from random weights")


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the files of a run folder.

    The report reads config.toml, metrics.jsonl, eval.json (a list of {"protocol", "checkpoint", "top1", "miou" or the
    scores on key points, "low", "high", "n"}, 0 to 1), parts.png and pictures/*.png; a missing file is left out. The
    page is self-contained: images are embedded, and it has no scripts and no links. What is off in the curves is said
    beside them, by the rules of :func:`fgfast.report.findings.findings`. It is written atomically, and below 5 MB.

    Args:
        run: the run folder.

    Returns:
        The path of the page.

    Raises:
        UserError: the folder is missing, or config.toml or eval.json cannot be parsed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_report(Path(folder)).name
        'report.html'
    """
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"{run} is not a folder: give a run folder, the --out of fgfast pretrain.")
    page = Page(title=run.resolve().name)
    if (run / "config.toml").is_file():
        _read_config(page, run / "config.toml")
    _add_results(page, read_scores(run))
    if (run / "metrics.jsonl").is_file():
        rows, broken = read_metrics(run / "metrics.jsonl")
        if broken:
            lines = ", ".join(map(str, broken[:8])) + (" and more" if len(broken) > 8 else "")
            page.notes.append(
                f"metrics.jsonl: line {lines} could not be read (perhaps the run was killed) and is left out."
            )
        _add_summary(page, rows)
        _add_charts(page, rows)
    page.figures = read_figures(run, page.notes)
    _read_left_out(page, run / "pictures")
    page.versions = page.versions or list(versions().items())

    template = resources.files("fgfast.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.from_string(template).render(page=page, run=str(run))
    path = run / "report.html"
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))
    return path
