"""One reader for each format that people mend by hand: any file gives a value of the wanted type or a UserError.

The message names the file, the place in it, what is wrong, and the remedy:
"RUN/eval.json cannot be read ([3].top1: expected `float`, got `str`): repair or remove it."
"""

import codecs
import csv
import io
import json
import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fgfast.errors import UserError
from fgfast.info import require

T = TypeVar("T")

LIMIT = 2**28
"""Largest size of a file in bytes, unless its reader says otherwise."""
DEPTH = 100
"""Most levels of tables and lists in values of no given type."""
REMEDY = "restore or remove it"


def read_json(
    path: Path, kind: type[T], *, remedy: str = REMEDY, limit: int = LIMIT, plain: bool = False, strict: bool = True
) -> T:
    """The content of a JSON file, checked against a type.

    Args:
        path: the file.
        kind: what it must hold: any type that msgspec decodes to, such as ``list[dict[str, float | None]]``, a
            dataclass, a TypedDict or a msgspec.Struct (with ``forbid_unknown_fields=True`` for no other keys).
        remedy: end of the message, what to do.
        limit: largest size in bytes.
        plain: return lists and dictionaries as they are in the file, with the keys that ``kind`` does not name.
        strict: also refuse keys given twice and integers beyond 64 bits; False saves the time that this takes for large
            files, which no one edits.

    Raises:
        UserError: the file is missing, cannot be read, or holds something else.
    """
    text = read_text(path, remedy=remedy, limit=limit)
    return parse_json(text, kind, str(path), remedy=remedy, plain=plain, strict=strict)


def parse_json(
    text: str, kind: type[T], name: str, *, remedy: str = REMEDY, plain: bool = False, strict: bool = True
) -> T:
    """The value of a JSON text as :func:`read_json` reads it; ``name`` stands for the file in the message."""
    require("msgspec")
    import msgspec

    if not text or text.isspace():
        refuse(name, "it is empty", remedy)
    try:
        if strict:
            json.loads(
                text, object_pairs_hook=_no_key_twice, parse_int=_integer, parse_float=_number, parse_constant=_number
            )
        value = msgspec.json.decode(text, type=kind)
        if plain:
            value = msgspec.json.decode(text)
            _check_values(value)
        return value
    except json.JSONDecodeError as error:
        refuse(name, f"line {error.lineno}, column {error.colno}: {error.msg}", remedy)
    except RecursionError:
        refuse(name, "it nests too many levels", remedy)
    except msgspec.MsgspecError as error:
        refuse(name, _place_first(str(error)), remedy)
    except ValueError as error:
        refuse(name, str(error), remedy)


def read_toml(path: Path, *, remedy: str = REMEDY, limit: int = 2**20) -> dict[str, Any]:
    """The table of a TOML file, with at most :data:`DEPTH` levels and no integer beyond 64 bits.

    Raises:
        UserError: the file is missing, cannot be read, or does not parse.
    """
    text = read_text(path, remedy=remedy, limit=limit)
    try:
        table = tomllib.loads(text)
        _check_values(table)
    except RecursionError:
        refuse(path, "it nests too many levels", remedy)
    except ValueError as error:
        refuse(path, str(error).partition(";")[0], remedy)
    return table


def read_csv(path: Path, columns: Sequence[str], *, remedy: str = REMEDY, limit: int = LIMIT) -> list[dict[str, str]]:
    """The rows of a CSV file with a head, as :func:`csv_text` writes it or without its escapes.

    Args:
        path: the file.
        columns: names that the head must hold.
        remedy: end of the message, what to do.
        limit: largest size in bytes.

    Raises:
        UserError: the file is missing, cannot be read or lacks a column, or a row has not one value for each column.
    """
    text = read_text(path, remedy=remedy, limit=limit)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        lines = [(reader.line_num, [_unescape(cell) for cell in row]) for row in reader if row]
    except csv.Error as error:
        refuse(path, f"line {reader.line_num}: {error}", remedy)
    head = lines[0][1] if lines else []
    if missing := [name for name in columns if name not in head]:
        refuse(path, f"it has no column {missing[0]}", remedy)
    if twice := [name for name in head if head.count(name) > 1]:
        refuse(path, f"it has two columns {twice[0]}", remedy)
    for number, row in lines[1:]:
        if len(row) != len(head):
            named = ", ".join(row[head.index(name)] for name in columns if head.index(name) < len(row))
            refuse(path, f"line {number}, the row of {named}, has {len(row)} values for {len(head)} columns", remedy)
    return [dict(zip(head, row, strict=True)) for _, row in lines[1:]]


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as CSV with a head; an absent value is an empty cell.

    A cell that a spreadsheet would run as a formula, as it begins with = + - @ or a control character and is no number,
    gets an apostrophe in front, which :func:`read_csv` takes away.

    Example:
        >>> csv_text(["name", "change"], [{"name": "=cmd()", "change": -0.5}]).splitlines()
        ['name,change', "'=cmd(),-0.5"]
    """
    stream = io.StringIO(newline="")
    writer = csv.writer(stream)
    writer.writerow([_escape(name) for name in columns])
    writer.writerows([_escape(str(row.get(name, ""))) for name in columns] for row in rows)
    return stream.getvalue()


def read_text(path: Path, *, remedy: str = REMEDY, limit: int = LIMIT) -> str:
    """The text of a file in UTF-8, without the byte order mark that it may start with.

    Raises:
        UserError: the file is missing, cannot be read, or is not UTF-8.
    """
    content = read_bytes(path, remedy=remedy, limit=limit)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        line = content.count(b"\n", 0, error.start) + 1
        refuse(path, "it is UTF-16 and must be UTF-8" if utf16 else f"line {line} is not UTF-8", remedy)


def read_bytes(path: Path, *, remedy: str = REMEDY, limit: int = LIMIT) -> bytes:
    """The content of a file, which must be a plain one: a device or a pipe could last for ever.

    Raises:
        UserError: the file is missing, cannot be read, is not a plain file, or is larger than ``limit``.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                refuse(path, "it is not a plain file", remedy)
            if found.st_size > limit:
                refuse(path, f"it has more than {limit:,} bytes", remedy)
            return file.read()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy}.") from None
    except OSError as error:
        refuse(path, error.strerror or str(error), remedy)
    except ValueError as error:  # a path with a null byte
        refuse(path, str(error), remedy)


def shorten(text: str, most: int = 300) -> str:
    """``text`` without its middle if it has more than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 80]} ... {text[-75:]}"


def refuse(name: object, reason: str, remedy: str = REMEDY) -> NoReturn:
    """Raise the UserError of a file that cannot be read."""
    raise UserError(f"{name} cannot be read ({shorten(reason.rstrip('.'))}): {remedy}.") from None


def _place_first(message: str) -> str:
    """The message of msgspec with the place in front."""
    text, _, place = message.partition(" - at `$")
    text = text if text.startswith("JSON") else text[:1].lower() + text[1:]
    place = place.rstrip("`").lstrip(".")
    return f"{place}: {text}" if place else text


def _no_key_twice(pairs: list[tuple[str, Any]]) -> None:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is given twice")


def _integer(text: str) -> None:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"{text[:40]} is beyond 64 bits")


def _number(text: str) -> None:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text[:40]} is not a finite number")


def _check_values(root: Any) -> None:
    """Raise a ValueError for nesting and integers that would break what uses a value of any type."""
    level: list[Any] = [root]
    for _ in range(DEPTH):
        level = [v for x in level for v in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ())]
        for value in level:
            if isinstance(value, int) and not -(2**63) <= value < 2**64:
                raise ValueError(f"an integer of {value.bit_length()} bits is beyond 64 bits")
    if level:
        raise ValueError(f"it nests more than {DEPTH} levels")


_ESCAPED: Callable[[str], Any] = re.compile(
    "'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"
).match  # the last four: full width


def _escape(cell: str) -> str:
    return "'" + cell if _ESCAPED(cell) and not _is_number(cell) else cell


def _unescape(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _ESCAPED(cell) else cell


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return cell == cell.strip()
