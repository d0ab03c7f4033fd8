"""Atomic writes: a file is complete or absent, whatever interrupts the write."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fgfast.errors import UserError


def write_atomic(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Let ``write`` write a partial file beside ``path``, then rename it to ``path``.

    If ``write`` fails, the old file stays as it was. Several processes may write the same path.

    Args:
        path: the file; its folder is created if it is missing.
        write: writes the file whose path it is given.
        durable: wait until the data is on the disk, because a power failure could otherwise leave an empty file.

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
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        write(partial)
        if durable:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            error.filename = str(path)  # the file that the user knows; the error of a full disk names none
        raise


def check_folder(folder: Path) -> None:
    """Raise a UserError if files cannot be written to a folder, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"{existing} is a file: give another folder.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{existing} cannot be written: change its permissions, or give another folder.")


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as JSON, atomically."""
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))
