"""What follows the work of a command."""

import contextlib
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from fgfast.errors import UserError


@contextlib.contextmanager
def finished(run: Path, rest: str) -> Iterator[None]:
    """What follows the work of a command: if it fails, that is said, and the work stays finished.

    The traceback is printed too if it is none of the failures that are expected, but a bug.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, UserError | OSError | ModuleNotFoundError):
            traceback.print_exc()
        reason = str(error).rstrip(".") or type(error).__name__
        print(f"fgfast: {run} is complete without {rest} ({reason}).", file=sys.stderr)
