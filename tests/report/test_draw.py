"""Figures, scores and reports of a run that is not finished: they change nothing that its training reads."""

import hashlib
import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from fgfast.cli import main
from fgfast.evaluate.protocols import evaluate
from fgfast.methods.base import METHODS, method_class
from fgfast.report import draw
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.methods.common_checks import stopping

CPU = torch.device("cpu")
WRITTEN = ("eval.json", "report.html", "parts.png", "parts-init.png", "pictures/")  # by the commands that read a run


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The panels of each figure, which is not written: compressing it takes longest."""
    found: dict[str, Any] = {}

    def write_grid(rows: object, path: Path, *, description: str) -> Path:
        found[path.name] = rows
        return path

    monkeypatch.setattr(draw, "write_grid", write_grid)
    return found


def stop(method: str, data: Path, out: Path, step: int = 1) -> Path:
    """A run that was stopped after some of its four steps."""
    kind = method_class(method).Config
    options: dict[str, object] = {
        "data": str(data), "out": str(out), "model": TINY, "size": 32, "batch_size": 9, "epochs": 2, "log_every": 1,
        "knn_every": 0, "device": "cpu", "threads": 1, "amp": "off", "hidden": 16, "projection": 8,
        "model_args": "output_stride=8", "rounds": 2, "n_parts": 4, "map_size": 16,
    }  # fmt: skip
    if method == "srgan":
        options |= {"model": "srgan", "model_args": "", "width": 4, "blocks": 1}
    if method == "jigsaw":
        options |= {"size": 64}
    known = {f.name for f in fields(kind)}
    with pytest.raises(KeyboardInterrupt):
        pretrain(stopping(method, step), kind(**{k: v for k, v in options.items() if k in known}))
    return out


def read_by_training(run: Path) -> dict[str, str]:
    files = {str(p.relative_to(run)): p for p in run.rglob("*") if p.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if not name.startswith(WRITTEN)
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_figures_and_scores_change_nothing_that_training_reads(
    drawn: Path, tmp_path: Path, method: str, figures: dict[str, Any]
) -> None:
    run = stop(method, drawn, tmp_path / "run")
    before = read_by_training(run)
    draw.draw_run(run, drawn, device=CPU)
    evaluate(run, "knn", drawn, device=CPU)
    assert json.loads((run / "pictures" / "left-out.json").read_text()) == []
    assert {"neighbours.png"} < figures.keys()
    assert read_by_training(run) == before


@pytest.mark.slow
def test_commands_change_nothing_that_training_reads(drawn: Path, tmp_path: Path) -> None:
    """Between two rounds, each of which has its parts."""
    run, data = stop("particle", drawn, tmp_path / "run", step=2), ["--data", str(drawn)]
    before = read_by_training(run)
    for command in (
        ["pictures", str(run), *data, "--checkpoint", "init", "--device", "cpu"],
        ["eval", "finetune", str(run), *data, "--epochs", "1", "--device", "cpu"],
        ["discover", str(run), *data, "--out", str(tmp_path / "maps"), "--device", "cpu"],
        ["report", str(run)],
        ["info"],
    ):
        assert main(command) == 0
    assert read_by_training(run) == before


def test_figures_show_the_parts_that_training_uses(
    drawn: Path, tmp_path: Path, figures: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Those of the round; where they are lost, parts are found for the images shown, and that is said."""
    run = stop("particle", drawn, tmp_path / "run")
    caplog.set_level(logging.WARNING, "fgfast")
    draw.draw_run(run, drawn, device=CPU)
    assert "are found for the images shown" not in caplog.text
    for path in run.glob("parts_0/*/*.png"):
        path.unlink()
    before = read_by_training(run)
    draw.draw_run(run, drawn, checkpoint="init", device=CPU)
    assert "are found for the images shown" in caplog.text
    assert read_by_training(run) == before
    assert {"views.png", "views-init.png"} <= figures.keys()
