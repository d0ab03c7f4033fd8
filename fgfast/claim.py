"""Claims on folders: one process at a time writes to a run folder, on one machine or on several that share it.

The process that creates the file .claim holds the folder. Its claim is over when the process has ended or, if it is one
of another machine, when it has not touched the file for :data:`SILENT` seconds. Whoever takes over the claim with the
token T creates .claim.T, which only one process can: the last file of this chain is the claim that counts. Exclusive
creation also works on network file systems, where locks may be missing.
"""

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from fgfast.errors import UserError
from fgfast.files import is_running, machine, state_and_start

log = logging.getLogger("fgfast")

NAME = ".claim"
HEARTBEAT = 30.0  # seconds
SILENT = 300.0  # seconds; network file systems may show a touch a minute late
ATTEMPTS = 100


@dataclass(frozen=True)
class Claim:
    """A process that holds a folder, or held it: the content of a claim file."""

    token: str
    pid: int
    host: str
    machine: str
    started: int | None  # see state_and_start
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def confirm(self, folder: Path) -> None:
        """Raise a UserError if ``folder`` is no longer held, because this process was suspended for minutes."""
        last = _chain(folder)[1]
        if last != self:
            by = "removed by hand" if last is None else f"taken over by {last}"
            raise UserError(f"The claim of this process on {folder} was {by}: it stops and leaves the folder as it is.")


@contextlib.contextmanager
def claim_folder(folder: Path) -> Iterator[Claim]:
    """Hold ``folder``, which is created if it is missing, as long as the block runs.

    Raises:
        UserError: another process holds it.

    Example:
        >>> with tempfile.TemporaryDirectory() as run, claim_folder(Path(run)):
        ...     with claim_folder(Path(run)):
        ...         pass
        Traceback (most recent call last):
        ...
        fgfast.errors.UserError: ... is in use by process ...
    """
    folder.mkdir(parents=True, exist_ok=True)
    file, claim = _take(folder)
    ended = threading.Event()
    threading.Thread(target=_touch, args=(file, ended), daemon=True).start()
    try:
        yield claim
    finally:
        ended.set()
        with contextlib.suppress(OSError):  # what is left behind is recognised as the claim of a process that has ended
            _release(folder, claim)


def is_claim(file: Path) -> bool:
    """Whether a file in a folder is part of a claim."""
    return file.name == NAME or file.name.startswith(NAME + ".")


def _of_this_process() -> Claim:
    pid, since = os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S")
    process = state_and_start(pid)
    return Claim(secrets.token_hex(8), pid, socket.gethostname(), machine(), process and process[1], since)


def _take(folder: Path) -> tuple[Path, Claim]:
    claim = _of_this_process()
    for _ in range(ATTEMPTS):
        files, held, free = _chain(folder)
        if held is not None and (reason := _why_over(held, files[-1])) is None:
            raise UserError(
                f"{folder} is in use by {held}: wait for its end, or give another --out "
                f"(if there is no such process, remove {files[-1]})."
            )
        try:
            file = free.open("x", encoding="utf-8")
        except FileExistsError:
            continue
        try:
            with file:
                json.dump(asdict(claim), file)
        except BaseException:
            free.unlink(missing_ok=True)
            raise
        if _chain(folder)[1] == claim:
            if held is not None:
                log.warning("%s was in use by %s, which %s: this process takes it over.", folder, held, reason)
            return free, claim
        free.unlink(missing_ok=True)  # the chain ended meanwhile: its last holder released the folder
    raise UserError(f"{folder} changes hands all the time: start one process there at a time.")


def _release(folder: Path, claim: Claim) -> None:
    files, held, _ = _chain(folder)
    if held == claim:
        for file in files:  # the first one first: without it the others count no longer
            file.unlink(missing_ok=True)


def _touch(file: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):  # a file system that does not answer now may do so at the next heartbeat
            os.utime(file)


def _chain(folder: Path) -> tuple[list[Path], Claim | None, Path]:
    """The claim files of a folder, the claim that counts, and the file that the next claim creates."""
    files: list[Path] = []
    last, free = None, folder / NAME
    while (found := _read(free)) is not None:
        if free in files:
            raise UserError(f"The claim {free} names itself as the next: remove it if no process uses {folder}.")
        files.append(free)
        last, free = found, folder / f"{NAME}.{found.token}"
    return files, last, free


def _read(file: Path) -> Claim | None:
    """The claim in a file, None if there is no such file, and one of an unknown process if it holds no claim."""
    for _ in range(10):
        try:
            claim = Claim(**json.loads(file.read_text(encoding="utf-8")))
            if _is_sound(claim):
                return claim
        except (OSError, ValueError, TypeError, RecursionError):
            if not os.path.lexists(file):
                return None
        time.sleep(0.02)  # it is being written
    return Claim(file.name, 0, "a host that is not known", "", None, "a time that is not known")


def _is_sound(claim: Claim) -> bool:
    """Whether the values are some that :func:`_of_this_process` gives: anyone may have written the file."""
    texts = (claim.token, claim.host, claim.machine, claim.since)
    return (
        all(isinstance(text, str) for text in texts)
        and re.fullmatch("[0-9a-f]{16}", claim.token) is not None
        and type(claim.pid) is int
        and 0 < claim.pid < 2**31
        and (claim.started is None or type(claim.started) is int)
    )


def _why_over(claim: Claim, file: Path) -> str | None:
    """Why a claim does not hold any longer, as a clause; None if it does."""
    if claim.machine == machine():
        return None if is_running(claim.pid, claim.started) else "has ended"
    with tempfile.TemporaryFile(dir=file.parent) as now, contextlib.suppress(FileNotFoundError):
        # both times are of the clock of the file system, as those of two machines differ
        if os.fstat(now.fileno()).st_mtime - file.lstat().st_mtime <= SILENT:
            return None
    return f"has not been heard of for {SILENT / 60:.0f} minutes"
