"""Files that are there whole or not at all, whatever happens while they are written."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomic(path: Path, write: Callable[[Path], object], *, durable: bool = False) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place of ``path`` in one step.

    The old file stays as it was when ``write`` fails, whatever the reason. Several processes may write one path.

    Args:
        path: the file; its folder is made where it is missing.
        write: fills the path that it is given.
        durable: wait until the disk has it, so that a loss of power cannot leave an empty file.

    Raises:
        OSError: what ``write`` raised, with ``path`` as its file name where it named none or the partial file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomic(Path(folder, "a.txt"), lambda p: p.write_text("whole"))
        ...     Path(folder, "a.txt").read_text()
        'whole'
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
            error.filename = str(path)  # what the user knows; a full disk names no file at all
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON in place of ``path``."""
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))
