"""Parsers of lists and the checks that every reader makes; an error names the file, the line and the remedy."""

import codecs
import math
import posixpath
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fgfast.data.inside import leads_out
from fgfast.errors import UserError
from fgfast.formats import read_bytes

LIMIT = 2**32
"""Bytes of the largest list that is read."""

Place = Callable[[int], str]
"""Where the entry with an index is, for messages: a file and a line or an entry."""


class Rows(list[tuple[Any, ...]]):
    """The parsed lines of a list.

    Args:
        path: the list.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.lines: list[int] = []

    def place(self, i: int) -> str:
        """File and line of row ``i``."""
        return f"{self.path}:{self.lines[i]}"


def read_text(path: Path, layout: str) -> str:
    """The text of a list of the data set ``layout``, in UTF-8, with or without a byte order mark, or UTF-16 with one.

    Raises:
        UserError: the file is missing or unreadable.
    """
    raw = read_bytes(path, remedy=f"{layout} has this file, restore it", limit=LIMIT)
    try:
        wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read ({error}): restore the file.") from error


def read_rows(
    path: Path, parse: Callable[[str], tuple[Any, ...]], *, layout: str, key: str, comment: str | None = None
) -> Rows:
    """Parse every line that is neither empty nor a comment; no two rows may have the same first field.

    The file is UTF-8, with or without a byte order mark, or UTF-16 with one.

    Args:
        path: the list.
        parse: converts a line without surrounding blanks to a row; raises ValueError if it cannot.
        layout: name of the data set, for the message if the file is missing.
        key: what the first field is, for messages.
        comment: prefix of comment lines.

    Raises:
        UserError: the file is missing or unreadable, a line does not parse, or two rows have the same key.
    """
    text = read_text(path, layout)
    rows = Rows(path)
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):  # splitlines() also splits at form feeds
        line = line.strip()
        if line and not (comment and line.startswith(comment)):
            try:
                rows.append(parse(line))
            except ValueError as error:
                raise UserError(f"{path}:{number}: {line[:80]!r} does not parse: correct the line.") from error
            rows.lines.append(number)
    check_unique([row[0] for row in rows], key, rows.place)
    return rows


def integer(text: str) -> int:
    """A whole number in plain digits; ``int`` also accepts underscores.

    Example:
        >>> integer("-12")
        -12
    """
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def number(text: str) -> float:
    """A finite number; ``float`` also accepts underscores."""
    value = float(text)
    if "_" in text or not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value


def named(key: Callable[[str], Hashable]) -> Callable[[str], tuple[Any, ...]]:
    """A parser of "KEY some name"."""

    def parse(line: str) -> tuple[Any, ...]:
        first, name = line.split(maxsplit=1)
        return key(first), name

    return parse


def numbers(count: int, *keys: Callable[[str], Hashable]) -> Callable[[str], tuple[Any, ...]]:
    """A parser of keys and finite numbers, ``count`` fields in all; several keys become one tuple."""

    def parse(line: str) -> tuple[Any, ...]:
        fields = line.split()
        if len(fields) != count:
            raise ValueError(f"{len(fields)} fields instead of {count}")
        key = tuple(convert(field) for convert, field in zip(keys, fields, strict=False))
        return (key if len(key) > 1 else key[0], *map(number, fields[len(keys) :]))

    return parse


def check_unique(values: Iterable[Hashable], what: str, place: Place) -> None:
    """Raise a UserError that names both places of a value that occurs twice.

    Example:
        >>> check_unique(["a", "b", "a"], "image", lambda i: f"list.txt:{i + 1}")
        Traceback (most recent call last):
        fgfast.errors.UserError: list.txt:3: the image a is also in list.txt:1: keep one of the two.
    """
    first: dict[Hashable, int] = {}
    for i, value in enumerate(values):
        j = first.setdefault(value, i)
        if j != i:
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise UserError(f"{place(i)}: the {what} {shown} is also in {place(j)}: keep one of the two.")


def check_paths(paths: Sequence[str], place: Place, folder: str = "") -> tuple[str, ...]:
    """The paths in their shortest form ("a/1.jpg" for "./a//1.jpg"), all different and inside the folder of the set.

    Args:
        paths: the paths as a list gives them.
        place: where each of them is.
        folder: the folder of the set that they are relative to.

    Raises:
        UserError: a path leaves its folder (see ``fgfast.data.inside``), or is that of another entry.
    """
    short = tuple(posixpath.normpath(posixpath.join(folder, rel)) for rel in paths)
    for i, rel in enumerate(paths):
        if short[i] == (folder or ".") or leads_out(rel):
            raise UserError(f"{place(i)}: the path {rel!r} leaves the folder of the set: give one inside it.")
    check_unique(short, "image", place)
    return short


def check_split(values: Sequence[float] | np.ndarray, place: Place) -> np.ndarray:
    """The values of a split, 0 or 1, as bool [N]."""
    for i, value in enumerate(values):
        if value not in (0, 1):
            raise UserError(f"{place(i)}: the split {value:g} must hold 0 (test) or 1 (train): correct the line.")
    return np.asarray(values) == 1


def check_boxes(boxes: np.ndarray, place: Place) -> np.ndarray:
    """Boxes (x, y, w, h) as float32 [N, 4], after a check that they are finite and not empty."""
    wrong = ~(np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1))
    if wrong.any():
        i = int(wrong.argmax())
        x, y, w, h = boxes[i]
        raise UserError(f"{place(i)}: the box is {w:g} x {h:g} pixels at ({x:g}, {y:g}): correct it.")
    return boxes.astype(np.float32)


def corner_boxes(corners: np.ndarray) -> np.ndarray:
    """(x, y, w, h) float [N, 4] from 1-based, inclusive (xmin, ymin, xmax, ymax)."""
    return np.concatenate([corners[:, :2] - 1, corners[:, 2:] - corners[:, :2] + 1], 1)


def check_listed(rows: Rows, keys: Iterable[Hashable], ids: Collection[Hashable], listed_in: str) -> None:
    """Raise a UserError if the image of a row is not among ``ids``."""
    for i, key in enumerate(keys):
        if key not in ids:
            raise UserError(
                f"{rows.place(i)}: the line names image {key}, which {listed_in} does not have: correct one of the two."
            )


def align_rows(rows: Rows, ids: dict[Any, int], listed_in: str, *, others: bool = False) -> tuple[np.ndarray, Place]:
    """Sort rows (key, a, b, ..) into the order of ``ids``.

    Args:
        rows: the rows.
        ids: index by image.
        listed_in: where the images are listed, for messages.
        others: ignore rows of other images.

    Returns:
        The values [N, count of a, b, ..], and the place of each row.

    Raises:
        UserError: an image is not in ``ids``, or has no row, or there is none.
    """
    if not ids:
        raise UserError(f"{rows.path.with_name(listed_in)} lists no image: restore the file.")
    if not others:
        check_listed(rows, (row[0] for row in rows), ids, listed_in)
    order = {row[0]: i for i, row in enumerate(rows)}
    for key in ids:
        if key not in order:
            raise UserError(f"{rows.path} has no line for image {key} of {listed_in}: add the line.")
    picked = [order[key] for key in ids]
    return np.array([rows[i][1:] for i in picked], np.float64), lambda i: rows.place(picked[i])
