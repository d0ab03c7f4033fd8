"""Readers of run folders, comparisons and options, given damaged inputs; see ``tests.fuzz``."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from fgfast.cli.parse import parse_method, parse_settings
from fgfast.compare import Comparison, Entry
from fgfast.compare.entries import run_config
from fgfast.compare.store import (
    read_correct,
    read_rows,
    read_tuning,
    store_correct,
    store_row,
    store_tuning,
    training_summary,
)
from fgfast.config import check_ranges, validate
from fgfast.config_text import to_toml
from fgfast.errors import UserError
from fgfast.evaluate.options import parse_protocols
from fgfast.evaluate.scores import read_scores, store_score
from fgfast.methods.base import METHODS, method_class
from fgfast.methods.run_folder import read_run
from fgfast.models.backbone import parse_model_args
from fgfast.report.html import Page, _add_summary, write_report
from fgfast.report.plots import loss_terms, series
from fgfast.train.log import RunLog, read_metrics
from tests.fuzz import NUMBERS, Reader, damage, damage_file
from tests.report import runs

MODEL_ARGS = "channels=(16, 32, 64),output_stride=16,act='relu',rate=0.5,flag=True,none=None,d={'a': [1, 2]},n=-3"
SETTINGS = ("lr=0.1", "epochs=7", "optimizer=sgd", "compile=true", "model_args=channels=(8,16)", "init={seed}/last.pt")
ENTRIES = ("simclr:lr=0.1,epochs=3", "particle:parts=grid,n_parts=4", "random", "start", "srgan:blocks=3")
PROTOCOLS = ("linear", "knn", "mlp:hidden=16,lr=0.1", "finetune:stages=all,epochs=5", "retrieval", "parts")
SCORE = {"protocol": "knn", "checkpoint": "last", "path": "/data", "options": "", "top1": 0.5}


@cache
def _run() -> Path:
    """A run folder without damage, written once."""
    folder = runs.make_run(Path(tempfile.mkdtemp(prefix="fgfast-fuzz-")) / "run")
    config = method_class("particle").Config(data="/data/birds", out=str(folder), lr=0.01)
    record = {"step": 3, "date": "2026-01-01 10:00:00", "before": {"epochs": 3, "environment": {"torch": "2.11"}}}
    (folder / "config.toml").write_text(to_toml(config, "particle", [record], "20 images"))
    runs.write_jsonl(folder / "metrics.jsonl", runs.metrics(60))
    rows = [SCORE, SCORE | {"protocol": "mlp", "low": 0.4, "high": 0.6, "n": 9, "settings": {"lr": 0.1, "epochs": 3}}]
    (folder / "eval.json").write_text(json.dumps(rows))
    (folder / "pictures" / "left-out.json").write_text('["The nearest neighbours are left out: there is one image."]')
    return folder


def _damaged_run(rng: random.Random, folder: Path, name: str) -> Path:
    run = folder / "run"
    shutil.copytree(_run(), run)
    damage_file(rng, run / name)
    if rng.random() < 0.99:  # without what takes the report its time
        for path in (run / "parts.png", *run.glob("pictures/*.png"), run / "metrics.jsonl"):
            if path != run / name:
                path.unlink()
    return run


def _use_run(name: str, rng: random.Random, folder: Path) -> None:
    """Read a run whose file is damaged, write to it and report on it: one refusal does not hide the next."""
    run = _damaged_run(rng, folder, name)
    drawn = name != "metrics.jsonl" or rng.random() < 0.1
    refused = []
    for use in (_read, _log, _store, write_report if drawn else _summary):
        try:
            use(run)
        except UserError as error:
            refused.append(error)
    if refused:
        raise rng.choice(refused)


def _read(run: Path) -> None:
    name, config = read_run(run)
    check_ranges(config)
    config.check()
    again = to_toml(config, name)
    (run / "again").mkdir()
    (run / "again" / "config.toml").write_text(again, encoding="utf-8")
    assert read_run(run / "again") == (name, config)


def _log(run: Path) -> None:
    """What a resumed run does with its files; what it writes is valid whatever was there."""
    for start in (30, 0):
        with mock.patch.object(RunLog, "_open_board", return_value=None), RunLog(run, 100, start) as log:
            log.write(
                {"step": start + 5, "loss": float("nan"), "images_per_s": 1.0, "data_wait": 0.0, "memory_mb": 1.0}
            )
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line, parse_constant=_refuse)["step"] for line in lines]
        assert steps == sorted(steps)
        assert steps[-1] == start + 5
        (run / "log.txt").read_text(encoding="utf-8")
    assert read_metrics(run / "metrics.jsonl")[1] == []


def _summary(run: Path) -> None:
    """The numbers of the report, without its figures."""
    rows, _ = read_metrics(run / "metrics.jsonl")
    _add_summary(Page("run"), rows)
    for term in loss_terms(rows):
        series(rows, term)


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _store(run: Path) -> None:
    training_summary(run)
    store_score(run, SCORE)
    assert SCORE in read_scores(run)


def _resumed_config(rng: random.Random, folder: Path) -> None:
    """The options and the record of a run that is resumed."""
    run = _damaged_run(rng, folder, "config.toml")
    argv = ["--out", str(run), "--resume", "--data", "d"]
    _, config = parse_method([rng.choice(("particle", "simclr")), *argv])
    validate(config)


def _config_file(rng: random.Random, folder: Path) -> None:
    """A file of --config."""
    name = rng.choice([*METHODS])
    config = method_class(name).Config(data="d", out="o")
    path = folder / "options.toml"
    path.write_text(to_toml(config, name))
    damage_file(rng, path)
    _, read = parse_method([name, "--config", str(path)])
    validate(read)


@cache
def finished_comparison() -> Path:
    """A finished comparison, written once: nothing of it is trained."""
    folder = Path(tempfile.mkdtemp(prefix="fgfast-fuzz-"))
    for rel in ("train/a/0.png", "train/b/0.png", "test/a/0.png", "test/b/0.png"):
        (folder / "birds" / rel).parent.mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(folder / "birds" / rel)
    comparison = comparison_of(folder)
    for entry in comparison.entries:
        for seed in comparison.seeds:
            config = comparison.run_config(entry, folder / "birds", seed)
            run = Path(config.out)
            run.mkdir(parents=True)
            (run / "config.toml").write_text(to_toml(replace(config, data="/moved"), entry.method))
            row = {"data": "birds", "method": entry.label, "seed": seed, "lr": 0.1, "seconds": 1.5, "nmi": -0.25}
            for protocol in comparison.scored:
                correct = np.random.default_rng(seed).random(20) < 0.5
                store_correct(run, protocol, correct)
                row[protocol] = float(correct.mean())
            store_row(folder / "out", row, [*comparison.scored])
    store_tuning(folder / "out", "birds simclr", {"0.1": 0.5, "0.01": 0.25})
    return folder


def comparison_of(folder: Path) -> Comparison:
    """The comparison that :func:`finished_comparison` wrote to a folder."""
    return Comparison(
        out=folder / "out", data=[folder / "birds"], methods=["simclr", "random"], seeds=[0, 1], baseline="random",
        protocols=["linear", "knn"], lrs=[0.1, 0.01],
    )  # fmt: skip


def _use_comparison(pattern: str, rng: random.Random, folder: Path) -> None:
    """Check the stored rows of a comparison, tabulate it, and store more."""
    copy = folder / "comparison"
    shutil.copytree(finished_comparison(), copy)
    damage_file(rng, rng.choice(sorted(copy.rglob(pattern))))
    comparison = comparison_of(copy)
    out = copy / "out"
    run = Path(comparison.run_config(comparison.entries[0], copy / "birds", 0).out)
    uses: list[Callable[[], object]] = [
        comparison._check_stored_rows, lambda: read_correct(run, "knn"), lambda: read_tuning(out),
        lambda: store_row(out, {"data": "x", "method": "=y", "seed": 0}, ["linear"]),
        lambda: store_correct(run, "knn", np.ones(3, bool)), lambda: store_tuning(out, "a", {"0.1": 1.0}),
    ]  # fmt: skip
    if rng.random() < 0.1:  # it draws a chart
        uses.insert(1, comparison.table)
    refused = []
    for use in uses:
        try:
            use()
        except UserError as error:
            refused.append(error)
    if refused:
        raise rng.choice(refused)
    assert ("x", "=y", "0") in read_rows(out)


def _text(rng: random.Random, text: str) -> str:
    """A damaged text, with nesting, numbers and names that no one writes."""
    if rng.random() < 0.3:
        at = rng.randrange(len(text) + 1)
        pieces = (
            "(" * 3000,
            "[" * 200,
            "-" * 3000,
            ")(",
            "**",
            "=",
            ",",
            "\0",
            "\udcff",
            "{[]: 1}",
            *NUMBERS,
            "1+" * 2000,
        )
        return text[:at] + rng.choice(pieces) + text[at:]
    return damage(rng, text.encode())[:100_000].decode("utf-8", "surrogateescape")  # as much as a system passes on


def _model_args(rng: random.Random, folder: Path) -> None:
    parsed = parse_model_args(_text(rng, MODEL_ARGS))
    assert all(isinstance(key, str) for key in parsed)


def _settings(rng: random.Random, folder: Path) -> None:
    """--set, --methods and --protocols of a comparison."""
    shared = parse_settings([_text(rng, rng.choice(SETTINGS))])
    entry = Entry.parse(rng.choice(ENTRIES))
    validate(replace(run_config(entry, shared, Path("d"), folder, 0), out="o"))


def _entries(rng: random.Random, folder: Path) -> None:
    entry = Entry.parse(_text(rng, rng.choice(ENTRIES)))
    validate(run_config(entry, {}, Path("d"), folder, 0))


def _protocols(rng: random.Random, folder: Path) -> None:
    parse_protocols([_text(rng, rng.choice(PROTOCOLS))])


READERS: dict[str, Reader] = {
    "config.toml": partial(_use_run, "config.toml"),
    "config.toml of a resumed run": _resumed_config,
    "--config": _config_file,
    "eval.json": partial(_use_run, "eval.json"),
    "metrics.jsonl": partial(_use_run, "metrics.jsonl"),
    "left-out.json": partial(_use_run, "pictures/left-out.json"),
    "compare.csv": partial(_use_comparison, "compare.csv"),
    "tuned.json": partial(_use_comparison, "tuned.json"),
    "correct.npz": partial(_use_comparison, "correct.npz"),
    "config.toml of a comparison": partial(_use_comparison, "config.toml"),
    "--model-args": _model_args,
    "--set": _settings,
    "--methods": _entries,
    "--protocols": _protocols,
}
