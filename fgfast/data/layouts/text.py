"""Parsers of lists in text files; an error names the file, the line and the remedy."""

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

import numpy as np

from fgfast.errors import UserError

K = TypeVar("K", bound=Hashable)


def read_rows(path: Path, parse: Callable[[str], tuple], *, layout: str, comment: str | None = None) -> list[tuple]:
    """Parse every line that is neither empty nor a comment.

    Args:
        path: the list.
        parse: converts a line without surrounding blanks to a row; raises ValueError or IndexError if it cannot.
        layout: name of the data set, for the message if the file is missing.
        comment: prefix of comment lines.

    Raises:
        UserError: the file is missing or unreadable, or a line does not parse.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {layout} has this file, restore it.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore the file.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line and not (comment and line.startswith(comment)):
            try:
                rows.append(parse(line))
            except (ValueError, IndexError) as error:
                raise UserError(f"{path}:{number}: {line[:80]!r} does not parse: correct the line.") from error
    return rows


def named(key: Callable[[str], K]) -> Callable[[str], tuple[K, str]]:
    """A parser of "KEY some name"."""

    def parse(line: str) -> tuple[K, str]:
        first, name = line.split(maxsplit=1)
        return key(first), name

    return parse


def numbers(count: int, key: Callable[[str], Hashable] = int) -> Callable[[str], tuple]:
    """A parser of a key and count - 1 finite numbers."""

    def parse(line: str) -> tuple:
        first, *rest = line.split()
        if len(rest) != count - 1:
            raise ValueError(f"{len(rest) + 1} fields instead of {count}")
        values = [float(field) for field in rest]
        if not np.isfinite(values).all():
            raise ValueError("a number is not finite")
        return (key(first), *values)

    return parse


def align_rows(rows: list[tuple], path: Path, count: int, ids: dict, listed_in: str) -> np.ndarray:
    """Sort rows (key, a, b, ..) into an array [N, count - 1] in the order of ``ids``.

    Raises:
        UserError: an image is not in ``ids``, or has no row.
    """
    table = np.full((len(ids), count - 1), np.nan)
    for number, *values in rows:
        if number not in ids:
            raise UserError(f"{path} names image {number}, which {listed_in} does not have: correct one of the two.")
        table[ids[number]] = values
    missing = np.isnan(table[:, 0])
    if missing.any():
        number = list(ids)[int(missing.argmax())]
        raise UserError(f"{path} has no line for image {number} of {listed_in}: add the line.")
    return table
