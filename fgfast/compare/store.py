"""The files of a comparison, which several processes may write: compare.csv, tuned.json, and correct.npz of a run."""

import io
import math
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fgfast.files import write_atomic, write_json
from fgfast.formats import LIMIT, csv_text, read_bytes, read_csv, read_json, refuse
from fgfast.train.log import read_metrics

KEY = ("data", "method", "seed")
COLUMNS = (
    *KEY, "lr", "steps", "passes", "seconds", "images_per_s", "data_wait", "linear",
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


def read_rows(folder: Path, scores: Iterable[str] = ()) -> dict[Key, dict[str, str]]:
    """The rows of compare.csv by data set, method and seed.

    Args:
        folder: folder of the comparison.
        scores: further columns that must hold numbers.

    Raises:
        UserError: the file is damaged, has other columns, two rows of one run, or a text in place of a number.
    """
    file = folder / "compare.csv"
    if not file.exists():
        return {}
    rows: dict[Key, dict[str, str]] = {}
    for row in read_csv(file, KEY):
        key = row["data"], row["method"], row["seed"]
        if key in rows:
            refuse(file, f"it has two rows of {', '.join(key)}")
        for name in (*COLUMNS[len(KEY) :], *scores):
            if (text := row.get(name)) and not _is_number(text):
                refuse(file, f"the row of {', '.join(key)} has {name} = {text!r}, which is not a number")
        rows[key] = row
    return rows


def _is_number(text: str) -> bool:
    try:
        return not math.isinf(float(text))
    except ValueError:
        return False


def store_row(folder: Path, row: dict[str, Any], protocols: list[str]) -> None:
    """Add a row to compare.csv, in place of an earlier row of the same run."""
    with lock(folder / "compare.csv.lock"):
        rows: dict[Key, dict[str, Any]] = {**read_rows(folder)}
        columns = dict.fromkeys([*COLUMNS, *(name for r in rows.values() for name in r), *protocols])
        rows[row["data"], row["method"], str(row["seed"])] = row
        content = csv_text([*columns], rows.values()).encode()
        write_atomic(folder / "compare.csv", lambda p: p.write_bytes(content), durable=True)


def read_tuning(folder: Path) -> dict[str, dict[str, float]]:
    """tuned.json: the score of each learning rate tried, for each data set and method.

    Raises:
        UserError: the file is damaged.
    """
    file = folder / "tuned.json"
    return read_json(file, dict[str, dict[str, float]]) if file.exists() else {}


def store_tuning(folder: Path, name: str, scores: dict[str, float]) -> None:
    """Replace the scores of one data set and method in tuned.json."""
    with lock(folder / "tuned.json.lock"):
        write_json(folder / "tuned.json", read_tuning(folder) | {name: scores})


def read_correct(run: Path, protocol: str) -> np.ndarray:
    """Which test images of a run are classified correctly, bool [N].

    Raises:
        UserError: correct.npz is damaged, or lacks the protocol.
    """
    arrays = read_arrays(run)
    if protocol not in arrays:
        refuse(run / "correct.npz", f"it has no {protocol}")
    return arrays[protocol]


def store_correct(run: Path, protocol: str, correct: np.ndarray) -> None:
    """Add what is correct under one protocol to correct.npz of a run."""
    arrays = read_arrays(run) | {protocol: correct}
    write_atomic(run / "correct.npz", partial(_save_arrays, arrays=arrays), durable=True)


def read_arrays(run: Path) -> dict[str, np.ndarray]:
    """The arrays in correct.npz of a run by protocol, bool [N] with N above 0; none if there is no such file.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    file = run / "correct.npz"
    if not file.exists():
        return {}
    content = read_bytes(file)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(info.file_size for info in archive.infolist()) > LIMIT:
                raise ValueError(f"it unpacks to more than {LIMIT:,} bytes")
            return {info.filename.removesuffix(".npy"): _array(archive, info) for info in archive.infolist()}
    except Exception as error:  # of various types, as any byte may be another one
        refuse(file, str(error) or type(error).__name__)


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One array, read here because numpy.load reserves whatever memory the file asks for."""
    stream = io.BytesIO(archive.read(info))
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{info.filename} is of an unknown version")
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    values = np.frombuffer(stream.read(), np.uint8)
    if dtype != np.dtype(bool) or shape != values.shape or not values.size or values.max() > 1:
        raise ValueError(f"{info.filename} is no list of what is correct")
    return values.astype(bool)


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def training_summary(run: Path) -> dict[str, Any]:
    """Steps, encoder passes, seconds of training, images per second and data wait of a run, from its metrics."""
    file = run / "metrics.jsonl"
    rows = [r for r in read_metrics(file)[0] if "loss" in r] if file.is_file() else []
    if not rows:
        return {"steps": 0, "passes": 0, "seconds": 0, "images_per_s": "", "data_wait": ""}
    from fgfast.methods.run_folder import read_run

    _, config = read_run(run)
    speed, passes_per_s, data_wait = (_values(rows, key) for key in ("images_per_s", "passes_per_s", "data_wait"))
    seconds = np.diff([0, *(r["step"] for r in rows)]) * config.batch_size / np.where(speed > 0, speed, math.nan)
    total, passes = float(np.nansum(seconds)), float(np.nansum(seconds * passes_per_s))
    known = 0 < total < math.inf and passes < math.inf
    return {
        "steps": rows[-1]["step"], "passes": round(passes) if known else 0, "seconds": round(total, 1) if known else 0,
        "images_per_s": round(rows[-1]["step"] * config.batch_size / total, 1) if known else "",
        "data_wait": round(float(np.nansum(seconds * data_wait)) / total, 4) if known else "",
    }  # fmt: skip


def _values(rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """The numbers from 0 up of one key, float64 [rows]; NaN where a row has none."""
    values = (row.get(key) for row in rows)
    return np.array([v if isinstance(v, int | float) and v >= 0 else math.nan for v in values], np.float64)
