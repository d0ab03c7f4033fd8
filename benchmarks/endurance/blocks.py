"""Many small trials in processes of their own: one that crashes or hangs is an outcome too, and the others go on."""

import contextlib
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from benchmarks.endurance.processes import context

SUCCESS, DOCUMENTED = "success", "documented"  # outcomes; every other text is a finding
MEMORY = 8 << 30  # bytes that a trial may take
Trial = Callable[[int, Path], str]


class _Worker:
    """A process that does every ``step``-th trial from ``at`` on, and the file in which it writes their outcomes."""

    def __init__(self, trial: Trial, at: int, n: int, step: int, folder: Path) -> None:
        self.trial, self.at, self.n, self.step, self.folder = trial, at, n, step, folder
        self.file = folder / "outcomes"
        self.process: BaseProcess | None = None
        folder.mkdir(parents=True)
        self.file.touch()
        self._start()

    def _start(self) -> None:
        self.process = None
        if self.at < self.n:
            arguments = (self.trial, range(self.at, self.n, self.step), self.folder, self.file)
            self.process = context().Process(target=_work, args=arguments, daemon=True)
            self.process.start()
        self.size, self.changed = -1, time.monotonic()

    def look(self, silent: float) -> bool:
        """Whether the worker is still at work; one that crashed or hangs goes on with the next trial."""
        if self.process is None:
            return False
        self.process.join(0)
        size = self.file.stat().st_size
        if size != self.size:
            self.size, self.changed = size, time.monotonic()
        hangs = time.monotonic() - self.changed > silent
        if self.process.is_alive() and not hangs:
            return True
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        if code == 0 and not hangs:
            self.process = None
            return False
        begun = [int(line.split()[1]) for line in self.file.read_text().splitlines() if line.startswith("begin ")]
        stopped = begun[-1] if begun else self.at
        with self.file.open("a") as file:
            file.write(f"end {stopped} {f'no end within {silent:.0f} s' if hangs else f'crash, exit status {code}'}\n")
        self.at = stopped + self.step
        self._start()
        return self.process is not None


def run_trials(trial: Trial, n: int, folder: Path, *, workers: int = 2, silent: float = 120.0) -> list[str]:
    """The outcomes of ``trial(number, folder)`` for the numbers 0 to n - 1; ``trial`` can be sent to a process."""
    team = [_Worker(trial, i, n, workers, folder / f"worker{i}") for i in range(min(workers, n))]
    while [worker for worker in team if worker.look(silent)]:
        time.sleep(0.05)
    outcomes = ["no outcome"] * n
    for worker in team:
        for line in worker.file.read_text().splitlines():
            kind, number, *text = line.split(" ", 2)
            if kind == "end":
                outcomes[int(number)] = text[0]
    return outcomes


def outcome_of(action: Callable[[], object]) -> str:
    """SUCCESS, DOCUMENTED for a UserError of one line, or what else was raised and where."""
    from fgfast.errors import UserError

    try:
        action()
    except UserError as error:
        return DOCUMENTED if str(error).strip() and "\n" not in str(error) else f"a message of {str(error)!r}"
    except BaseException as error:
        return describe(error)
    return SUCCESS


def describe(error: BaseException) -> str:
    """The type of an error, its place in fgfast and its message, on one line."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/fgfast/" in frame.filename]
    place = f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno}" if frames else "outside fgfast"
    return " ".join(f"{type(error).__name__} at {place}: {error}".split())[:300]


def _work(trial: Trial, numbers: range, folder: Path, file: Path) -> None:
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    output = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(output, standard)
    import torch

    torch.set_num_threads(1)
    with file.open("a", buffering=1) as outcomes:
        for number in numbers:
            outcomes.write(f"begin {number}\n")
            try:
                text = trial(number, folder)
            except Exception as error:  # a mistake of the trial itself, or one of fgfast that it does not expect
                traceback.print_exc()
                text = describe(error)
            outcomes.write(f"end {number} {' '.join(text.split())}\n")
    sys.exit(0)
