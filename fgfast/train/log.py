"""The log of a run in training: metrics.jsonl, log.txt, TensorBoard and a progress bar.

Keys of metrics.jsonl, one JSON object per line:
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
    held_out_NAME          a term of the method on held-out images, in evaluation mode
    psnr, ssim             srgan: of generated windows of held-out images (dB; -1 to 1)
    psnr_bicubic, ...      srgan: the same of bicubic enlargement
"""

import importlib.util
import json
import resource
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from fgfast.errors import one_line

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: allocated on a CUDA device, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Read the rows of a metrics.jsonl of a finished, running or killed run.

    A run that is killed while it writes leaves a broken line, and a resumed one repeats the steps since its last
    checkpoint: broken lines are left out and reported, and of repeated steps the later rows are taken.

    Args:
        path: the file.

    Returns:
        The rows in order of step, and the numbers (from 1) of the lines that could not be read.
    """
    rows: list[dict[str, Any]] = []
    broken: list[int] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            broken.append(number)
            continue
        if not isinstance(row, dict) or not isinstance(row.get("step"), int | float):
            broken.append(number)
            continue
        if rows and rows[-1]["step"] > row["step"]:
            rows = [earlier for earlier in rows if earlier["step"] < row["step"]]
        rows.append(row)
    return rows, broken


class RunLog:
    """Writes rows to metrics.jsonl and TensorBoard, messages to log.txt and standard error, and a progress bar.

    Args:
        run: the run folder.
        total: number of steps of the complete run.
        start: steps done before; rows of later steps, left by a killed run, are dropped.
        enabled: False on all ranks but the first, which then write nothing.
    """

    def __init__(self, run: Path, total: int, start: int = 0, enabled: bool = True) -> None:
        self.enabled = enabled
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

        from fgfast.files import write_atomic

        path = run / "metrics.jsonl"
        earlier = [r for r in read_metrics(path)[0] if r["step"] <= start] if start and path.is_file() else []
        text = "".join(json.dumps(r) + "\n" for r in earlier)
        write_atomic(path, lambda p: p.write_text(text))
        self.file = path.open("a")
        self.text = (run / "log.txt").open("a" if start else "w", encoding="utf-8", errors="backslashreplace")
        self.console = Console(stderr=True)
        self.board = self._open_board(run / "tensorboard", start)
        self.bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[row]}"), console=self.console,
            refresh_per_second=2,
            disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task(one_line(run.name), total=total, completed=start, row="")

    def _open_board(self, folder: Path, start: int) -> "SummaryWriter | None":
        if importlib.util.find_spec("tensorboard") is None:
            self.print("no curves for TensorBoard are written: pip install tensorboard")
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder), purge_step=start or None)

    def __enter__(self) -> "RunLog":
        if self.enabled:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.enabled:
            self.bar.stop()
            self.file.close()
            self.text.close()
            if self.board is not None:
                self.board.close()

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

    def write(self, row: dict[str, Any]) -> None:
        """Write a row, its numbers rounded to six figures."""
        if not self.enabled:
            return
        row = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for key, value in row.items():
            if self.board is not None and key not in ("step", "epoch"):
                self.board.add_scalar(key, value, row["step"])
        if "loss" in row:
            shown = (
                f"loss {row['loss']:.3f}  {row['images_per_s']:.0f} img/s  wait {row['data_wait']:.0%}  "
                f"{row['memory_mb']:.0f} MiB"
            )
            self.bar.update(self.task, row=shown)
            if not self.console.is_terminal and row["step"] % 200 == 0:
                self.print(f"step {row['step']}/{self.bar.tasks[0].total:.0f}  {shown}")
            return
        scores = [f"online kNN top-1 {row['knn']:.1%}"] if "knn" in row else []
        if "psnr" in row:
            scores.append(f"PSNR {row['psnr']:.2f} dB (bicubic {row['psnr_bicubic']:.2f})")
            scores.append(f"SSIM {row['ssim']:.3f} (bicubic {row['ssim_bicubic']:.3f})")
        self.print("  ".join([f"step {row['step']}", *scores]))
