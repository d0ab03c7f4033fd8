"""Atomic writes: a file is complete or absent, whatever interrupts the write."""

import contextlib
import functools
import hashlib
import json
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fgfast.errors import UserError

ABANDONED = 3600.0  # seconds without a write after which a partial file is nobody's
# The machine and the process that write; files of earlier versions name no machine.
_PARTIAL = re.compile(r"\..+\.(?:([0-9a-f]{8})-(\d+)-\d+|\d+\.\d+)\.partial")


def write_atomic(
    path: Path,
    write: Callable[[Path], object],
    *,
    durable: bool = False,
    before_rename: Callable[[], object] = lambda: None,
) -> None:
    """Let ``write`` write a partial file beside ``path``, then rename it to ``path``.

    If ``write`` fails, the old file stays as it was. Several processes may write the same path.

    Args:
        path: the file; its folder is created if it is missing.
        write: writes the file whose path it is given.
        durable: wait until the data is on the disk, because a power failure could otherwise leave an empty file.
        before_rename: called when the partial file is complete; if it fails, the old file stays as it was too.

    Raises:
        OSError: an error of ``write``; if it names no file or the partial one, it names ``path`` instead.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomic(Path(folder, "a.txt"), lambda p: p.write_text("complete"))
        ...     Path(folder, "a.txt").read_text()
        'complete'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{_machine_code()}-{os.getpid()}-{threading.get_native_id()}.partial")
    try:
        write(partial)
        if durable:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        before_rename()
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            error.filename = str(path)  # the file that the user knows; the error of a full disk names none
        raise


def is_leftover(path: Path) -> bool:
    """Whether a file has a name of :func:`write_atomic` for a file that is not complete; it may still be written."""
    return _PARTIAL.fullmatch(path.name) is not None


def clear_leftovers(folder: Path) -> list[Path]:
    """Remove the partial files that processes which were killed have left in a folder and below it.

    A file is removed if the process that wrote it ran on this machine and has ended, or if nothing was written to it
    for :data:`ABANDONED` seconds by the clock of its file system: a process of another machine cannot be asked.

    Returns:
        The files removed. One that cannot be removed does no harm and stays.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     clear_leftovers(Path(folder))
        []
    """
    found = [Path(root, name) for root, _, names in os.walk(folder) for name in names if _PARTIAL.fullmatch(name)]
    removed = []
    for path in found:
        with contextlib.suppress(OSError):
            if _is_abandoned(path):
                path.unlink()
                removed.append(path)
    return removed


def _is_abandoned(path: Path) -> bool:
    match = _PARTIAL.fullmatch(path.name)
    if match and match[1] == _machine_code() and not is_running(int(match[2])):
        return True
    with tempfile.TemporaryFile(dir=path.parent) as now:
        return os.fstat(now.fileno()).st_mtime - path.lstat().st_mtime > ABANDONED


def is_running(pid: int, started: int | None = None) -> bool:
    """Whether a process of this machine runs; one that was killed and that its parent has not noticed does not.

    Args:
        pid: its number.
        started: its start as :func:`state_and_start` gives it, to tell it from a later process of the same number.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it runs, as another user
    process = state_and_start(pid)
    return process is None or (process[0] != "Z" and started in (None, process[1]))


def state_and_start(pid: int) -> tuple[str, int] | None:
    """The state letter of a process and its start in clock ticks since that of the machine; None if not to be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def machine() -> str:
    """Identifies this machine since its start and its process numbers: those of another container are not ours."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


@functools.cache
def _machine_code() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:8]


def check_folder(folder: Path) -> None:
    """Raise a UserError if files cannot be written to a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is a file: give another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} cannot be written: change its permissions, or give another folder.")


def digest_of(value: Any) -> str:
    """SHA-256 of a value that JSON can hold, in hexadecimal digits; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as JSON, atomically."""
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))
