"""The log of a run in training: metrics.jsonl, log.txt, TensorBoard and a progress bar.

Keys of metrics.jsonl, one JSON object per line (a number that is not finite is null):
    step, epoch            steps done; epochs done as a fraction
    loss, NAME             the loss of this step and every other term that the method returns
    lr, grad_norm          learning rate; gradient norm before clipping
    images_per_s           images (not views) per second since the previous line, without the time of evaluation
    passes_per_s           encoder passes per second, over the same time
    data_wait              fraction of that time spent waiting for data, 0 to 1
    memory_mb              peak memory of the device (CUDA) or of the process (CPU), MiB
    skipped                steps skipped so far because the loss was not finite

Lines of an evaluation have step, epoch and:
    knn                    online kNN top-1, 0 to 1
    effective_rank         of the features of training images, from 1 (collapse) to their width
    uniformity, alignment  of these features, from 0 (collapse) downwards; of two views of an image, 0 to 4
    held_out_NAME          a term of the method on held-out images, in evaluation mode
    psnr, ssim             srgan: of generated windows of held-out images (dB; -1 to 1)
    psnr_bicubic, ...      srgan: the same of bicubic enlargement
"""

import errno
import importlib.util
import io
import json
import math
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import torch

from fgfast.errors import one_line
from fgfast.files import write_atomic
from fgfast.formats import read_bytes, refuse

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from fgfast.train.online import WandbRun


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated on a CUDA device, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read the rows of a metrics.jsonl of a finished, running or killed run.

    A run that is killed while it writes leaves a broken line, and a resumed one repeats the steps since its last
    checkpoint: broken lines are left out and reported, and of repeated steps the later rows are taken. What is not
    finite is None, also in files of earlier versions, which wrote NaN and Infinity.

    Args:
        path: the file.

    Returns:
        The rows in order of step, and the numbers (from 1) of the lines that could not be read.

    Raises:
        UserError: the file is missing or cannot be read at all.
    """
    rows: list[dict[str, Any]] = []
    broken: list[int] = []
    text = read_bytes(path, limit=2**33).decode("utf-8-sig", errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if (row := _parse_row(line)) is None:
            broken.append(number)
            continue
        if rows and rows[-1]["step"] > row["step"]:
            rows = [earlier for earlier in rows if earlier["step"] < row["step"]]
        rows.append(row)
    return rows, broken


def has_scores(path: Path, step: int) -> bool:
    """Whether a metrics.jsonl, which may be missing, has a row of scores of a step."""
    return path.is_file() and any(row["step"] == step and "loss" not in row for row in read_metrics(path)[0])


def _parse_row(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None if it is not a row with a step and plain values."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not all(isinstance(v, int | float | str | None) for v in row.values()):
        return None
    row = {key: _finite(value) for key, value in row.items()}
    step = row.get("step")
    return row if isinstance(step, int | float) and type(step) is not bool and step >= 0 else None


def _finite(value: Any) -> Any:
    """None for a number that is not finite or that no array holds."""
    known = math.isfinite(value) if isinstance(value, float) else not isinstance(value, int) or abs(value) < 2**63
    return value if known else None


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


class RunLog:
    """Writes rows to metrics.jsonl and TensorBoard, messages to log.txt and standard error, and a progress bar.

    What fails at Weights & Biases in training is said, and training goes on without it: all rows are in metrics.jsonl.

    Args:
        run: the run folder.
        total: number of steps of the complete run.
        start: steps done before; rows of later steps, left by a killed run, are dropped.
        enabled: False on all ranks but the first, which then write nothing.
        online: takes every row too, or None.
    """

    def __init__(
        self, run: Path, total: int, start: int = 0, enabled: bool = True, online: "WandbRun | None" = None
    ) -> None:
        self.enabled, self.online = enabled, online
        if not enabled:
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        for name in ("log.txt", "metrics.jsonl"):
            if (run / name).is_dir():
                refuse(run / name, "it is a folder")
        self.text = _open_text(run / "log.txt", keep=start > 0)
        self.console = Console(stderr=True)
        self.file = self._open_metrics(run / "metrics.jsonl", start)
        self.board = self._open_board(run / "tensorboard", start)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[row]}"), console=self.console,
            refresh_per_second=2,
            disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task(one_line(run.name), total=total, completed=start, row="")
        if online is not None:
            self.record(online.where)

    def _open_metrics(self, path: Path, start: int) -> io.FileIO:
        """metrics.jsonl with the rows up to ``start`` alone, whatever a kill left behind them."""
        rows, broken = read_metrics(path) if start and path.is_file() else ([], [])
        rows = [row for row in rows if row["step"] <= start]
        if broken:
            self.print(f"lines of metrics.jsonl that cannot be read are dropped: {', '.join(map(str, broken[:8]))}")
        content = b"".join(map(_line, rows))
        write_atomic(path, lambda p: p.write_bytes(content), durable=True)
        return path.open("ab", buffering=0)  # a row is one write, so that a kill leaves all of it or nothing

    def _open_board(self, folder: Path, start: int) -> "SummaryWriter | None":
        if importlib.util.find_spec("tensorboard") is None:
            self.print("no curves for TensorBoard are written: pip install tensorboard")
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def __enter__(self) -> "RunLog":
        if self.enabled:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self.bar.stop()
            self._send(lambda online: online.close(failed=kind is not None))
            self.file.close()
            self.text.close()
            if self.board is not None:
                self.board.close()

    def _send(self, action: "Callable[[WandbRun], None]") -> None:
        if self.online is None:
            return
        try:
            action(self.online)
        except Exception as error:  # whatever a service and its network raise, which must not end the training
            self.online = None
            reason = str(error) or type(error).__name__
            self.print(f"Weights & Biases gets no further rows, metrics.jsonl has them ({reason})")

    def record(self, message: str) -> None:
        """Write a message to log.txt."""
        if self.enabled:
            self.text.write(one_line(message) + "\n")
            self.text.flush()

    def print(self, message: str) -> None:
        """Write a message to standard error and log.txt."""
        self.record(message)
        if self.enabled:
            self.console.print(one_line(message), highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        if self.enabled:
            self.bar.update(self.task, completed=step)

    def sync(self) -> None:
        """Wait until all rows are on the disk: before a checkpoint, which must not outlive them in a power failure."""
        if self.enabled:
            os.fsync(self.file.fileno())

    def write(self, row: dict[str, Any]) -> None:
        """Write a row, its numbers rounded to six figures; what is not finite becomes null, and log.txt names it."""
        if not self.enabled:
            return
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        if lost := [f"{k} = {v}" for k, v in row.items() if _finite(v) is not v]:
            self.record(f"step {row['step']}: {', '.join(lost)} is written as null")
        row = {k: _finite(v) for k, v in row.items()}
        line = _line(row)
        if self.file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)
        for key, value in row.items():
            if self.board is not None and key not in ("step", "epoch") and value is not None:
                self.board.add_scalar(key, value, row["step"])
        self._send(lambda online: online.write(row))
        if "loss" in row:
            self._show(row)
            return
        scores = [f"online kNN top-1 {_shown(row, 'knn', '.1%')}"] if "knn" in row else []
        if "effective_rank" in row:
            scores.append(f"effective rank {_shown(row, 'effective_rank', '.1f')}")
            scores.append(f"uniformity {_shown(row, 'uniformity', '.2f')}")
            scores.append(f"alignment {_shown(row, 'alignment', '.2f')}")
        if "psnr" in row:
            scores.append(f"PSNR {_shown(row, 'psnr', '.2f')} dB (bicubic {_shown(row, 'psnr_bicubic', '.2f')})")
            scores.append(f"SSIM {_shown(row, 'ssim', '.3f')} (bicubic {_shown(row, 'ssim_bicubic', '.3f')})")
        self.print("  ".join([f"step {row['step']}", *scores]))

    def _show(self, row: dict[str, Any]) -> None:
        """Show a row of training beside the bar, or now and then as a message."""
        shown = (
            f"loss {_shown(row, 'loss', '.3f')}  {_shown(row, 'images_per_s', '.0f')} img/s  "
            f"wait {_shown(row, 'data_wait', '.0%')}  {_shown(row, 'memory_mb', '.0f')} MiB"
        )
        self.bar.update(self.task, row=shown)
        if not self.console.is_terminal and row["step"] % 200 == 0:
            self.print(f"step {row['step']}/{self.bar.tasks[0].total:.0f}  {shown}")


def _shown(row: dict[str, Any], key: str, form: str) -> str:
    return "not finite" if row[key] is None else format(row[key], form)


def _open_text(path: Path, *, keep: bool) -> TextIO:
    """log.txt for messages at its end, on a line of their own and after valid UTF-8 even if a kill cut the last one."""
    before = path.read_bytes() if keep and path.is_file() else b""
    text = before.decode("utf-8", errors="backslashreplace")
    content = (text if not text or text.endswith("\n") else text + "\n").encode()
    if content != before or not keep:
        write_atomic(path, lambda p: p.write_bytes(content))
    return path.open("a", encoding="utf-8", errors="backslashreplace")
