"""The record of a run: rows of results.csv, and the device and versions that they belong to."""

import csv
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import fgfast
from benchmarks.ceilings import Ceilings, fraction_of_limit, rows
from benchmarks.timing import Measurement

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "device", "driver", "versions", "commit", "op", "variant", "shape", "dtype", "ms_20", "ms_50", "ms_80", "bytes",
    "peak_mib", "share_of_limit", "operations", "error", "note",
)  # fmt: skip
CEILING = "ceiling"  # the op of the two measured ceilings, stored as bytes or operations per second
PACKAGES = ("triton", "flash-kmeans", "fastkmeans", "inf-cl", "cut-cross-entropy", "lightly")

Row = dict[str, Any]


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=RESULTS.parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def commit() -> str:
    """The measured commit, followed by a plus when tracked files differ from it; FGFAST_COMMIT without git."""
    name = _output_of("git", "rev-parse", "--short", "HEAD")
    changed = bool(name and _output_of("git", "status", "--porcelain", "--untracked-files=no"))
    return f"{name}{'+' * changed}" if name else os.environ.get("FGFAST_COMMIT", "")


def versions() -> str:
    """Packages and versions in one cell."""
    found = [f"fgfast {fgfast.__version__}", f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join([*found, f"CUDA {torch.version.cuda}"] if torch.cuda.is_available() else found)


def setting(device: torch.device) -> Row:
    """Device, driver, versions and commit."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0],
        "versions": versions(),
        "commit": commit(),
    }


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def of_ceilings(found: Ceilings) -> list[Row]:
    """The ceilings as rows: bytes or operations of 1,000 ms."""
    made = []
    for variant, dtype, per_second in rows(found):
        column = "bytes" if variant == "copy" else "operations"
        made.append({"op": CEILING, "variant": variant, "dtype": dtype, "ms_50": 1000, column: round(per_second)})
    return made


def of_result(result: Measurement, found: Ceilings) -> Row:
    """One variant of a case as a row; without a time the note has the reason."""
    case = result.case
    low, middle, high = (_number(result.quantile(q)) if result.times else "" for q in (0.2, 0.5, 0.8))
    return {
        "op": case.op, "variant": result.variant, "shape": case.shape, "dtype": case.dtype, "ms_20": low,
        "ms_50": middle, "ms_80": high, "bytes": case.bytes, "operations": case.operations,
        "peak_mib": "" if result.peak is None else f"{result.peak / 2**20:.1f}",
        "share_of_limit": _number(fraction_of_limit(result, found), 3), "error": _number(result.error, 2),
        "note": result.skipped or result.note,
    }  # fmt: skip


def append(made: Iterable[Row], here: Row, path: Path) -> None:
    """Add rows of this device to the file, which is created when it is missing.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    if not new:
        with path.open(newline="") as file:
            if tuple(next(csv.reader(file), ())) != COLUMNS:
                raise ValueError(f"{path} has other columns than this version writes: move it away.")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({**here, **row} for row in made)


def overwrite(made: Sequence[Row], path: Path) -> None:
    """Replace the file by these rows, whose keys are the columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(made[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(made)


def read(path: Path) -> list[Row]:
    """All rows of a file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
