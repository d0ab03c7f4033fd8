"""The files of a comparison, which several processes may write: compare.csv, tuned.json, and correct.npz of a run."""

import csv
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fgfast.errors import UserError
from fgfast.files import write_atomic, write_json
from fgfast.train.log import read_metrics

COLUMNS = (
    "data", "method", "seed", "lr", "steps", "passes", "seconds", "images_per_s", "data_wait", "linear",
    "knn", "nmi", "ari",
)  # fmt: skip

Key = tuple[str, str, str]  # data set, method, seed


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a file lock that ends with the process; yields False if ``wait`` is False and another process holds it."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn the errors of a damaged file into a UserError that names it."""
    damage = (ValueError, KeyError, TypeError, AttributeError, EOFError, csv.Error, zipfile.BadZipFile, zlib.error)
    try:
        yield
    except damage as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise UserError(f"{file} cannot be read ({reason}): restore or remove it.") from error


def read_rows(folder: Path) -> dict[Key, dict[str, str]]:
    """The rows of compare.csv by data set, method and seed.

    Raises:
        UserError: the file is damaged, or has other columns.
    """
    file = folder / "compare.csv"
    if not file.exists():
        return {}
    with _reading(file):
        reader = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig")))
        if missing := [name for name in ("data", "method", "seed") if name not in (reader.fieldnames or ())]:
            raise ValueError(f"it has no column {missing[0]}")
        rows = {(row["data"], row["method"], row["seed"]): row for row in reader}
        for key, row in rows.items():  # csv has None for what a line lacks, and under None what it has too much
            if None in row or None in row.values():
                raise ValueError(f"the row of {', '.join(map(str, key))} has not one value for each column")
        return rows


def store_row(folder: Path, row: dict[str, Any], protocols: list[str]) -> None:
    """Add a row to compare.csv, in place of an earlier row of the same run."""
    text = io.StringIO()
    with lock(folder / "compare.csv.lock"):
        rows: dict[Key, dict[str, Any]] = {**read_rows(folder)}
        columns = dict.fromkeys([*COLUMNS, *(name for r in rows.values() for name in r), *protocols])
        rows[row["data"], row["method"], str(row["seed"])] = row
        writer = csv.DictWriter(text, list(columns), extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows.values())
        write_atomic(folder / "compare.csv", lambda p: p.write_text(text.getvalue(), encoding="utf-8"))


def read_tuning(folder: Path) -> dict[str, dict[str, float]]:
    """tuned.json: the score of each learning rate tried, for each data set and method.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / "tuned.json"
    if not file.exists():
        return {}
    with _reading(file):
        tables = json.loads(file.read_text(encoding="utf-8"))
        return {name: {rate: float(score) for rate, score in table.items()} for name, table in tables.items()}


def store_tuning(folder: Path, name: str, scores: dict[str, float]) -> None:
    """Replace the scores of one data set and method in tuned.json."""
    with lock(folder / "tuned.json.lock"):
        write_json(folder / "tuned.json", read_tuning(folder) | {name: scores})


def read_correct(run: Path, protocol: str) -> np.ndarray:
    """Which test images of a run are classified correctly, bool [N].

    Raises:
        UserError: correct.npz is damaged, or lacks the protocol.
    """
    with _reading(run / "correct.npz"), _open_arrays(run / "correct.npz") as arrays:
        return arrays[protocol]


def store_correct(run: Path, protocol: str, correct: np.ndarray) -> None:
    """Add what is correct under one protocol to correct.npz of a run."""
    file = run / "correct.npz"
    arrays: dict[str, np.ndarray] = {}
    if file.exists():
        with _reading(file), _open_arrays(file) as stored:
            arrays = dict(stored)
    write_atomic(file, partial(_save_arrays, arrays=arrays | {protocol: correct}))


def _open_arrays(file: Path) -> Any:
    if not zipfile.is_zipfile(file):  # numpy would propose to unpickle it
        raise ValueError("it is no npz file")
    return np.load(file)


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def training_summary(run: Path) -> dict[str, Any]:
    """Steps, encoder passes, seconds of training, images per second and data wait of a run, from its metrics."""
    file = run / "metrics.jsonl"
    rows = [r for r in read_metrics(file)[0] if "loss" in r] if file.is_file() else []
    if not rows:
        return {"steps": 0, "passes": 0, "seconds": 0, "images_per_s": "", "data_wait": ""}
    steps = np.diff([0, *(r["step"] for r in rows)])
    from fgfast.methods.run_folder import read_run

    _, config = read_run(run)
    seconds = steps * config.batch_size / np.array([r["images_per_s"] for r in rows])
    passes = seconds * np.array([r["passes_per_s"] for r in rows])
    wait = float((seconds * [r["data_wait"] for r in rows]).sum() / seconds.sum())
    return {
        "steps": rows[-1]["step"], "passes": round(float(passes.sum())), "seconds": round(float(seconds.sum()), 1),
        "images_per_s": round(rows[-1]["step"] * config.batch_size / float(seconds.sum()), 1),
        "data_wait": round(wait, 4),
    }  # fmt: skip
