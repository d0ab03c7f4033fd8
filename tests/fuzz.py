"""Damaged inputs for readers: whatever a file holds, a reader returns or raises a UserError, in bounded time."""

import copy
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from fgfast.errors import UserError

Reader = Callable[[random.Random, Path], None]
"""Makes one damaged input in an empty folder and reads it: a UserError is well, any other exception is a finding."""

SECONDS = 20.0
"""A reader that takes longer is a finding."""
MEMORY = 4 << 30
"""Bytes by which a reader may raise the peak of the process."""

NUMBERS = ("1e999", "-1e999", "1e-999", "9" * 5000, "-1", "0", "1_0", "0x1f", "1.5", "NaN", "Infinity", "2147483648")
NUMBERS += ("18446744073709551616", "-9223372036854775809", "\u0661", "+-1", "1e400")
VALUES: tuple[Any, ...] = (None, True, False, 0, -1, 1.5, 2**31, 2**63, 10**400, 1e308, "", "x", "\0", "../x", "/etc/x")
VALUES += ([], {}, [[]], [None], {"a": 1}, "a" * 100_000, "\ud800", float("nan"), float("inf"), "C:\\x", "..\\x")
MARKS = (
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xfe\xff",
    b"\0",
    b"\xff",
    b"\r",
    b"\x0c",
    b"=",
    b'"',
    b"#",
    b"../",
    b"\\",
    b"[",
)


def damage(rng: random.Random, content: bytes) -> bytes:
    """The content with one to three defects of bytes or lines."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(_DEFECTS)(rng, content)
    return content


def damage_file(rng: random.Random, path: Path) -> None:
    """Damage a file: mostly its bytes, or the values of a JSON file; sometimes a folder or a link takes its place."""
    kind = rng.random()
    if kind < 0.03:
        path.unlink()
        rng.choice((path.mkdir, lambda: path.symlink_to(path), lambda: None, lambda: os.mkfifo(path)))()
    elif path.suffix == ".json" and kind < 0.6:
        path.write_bytes(damage_json(rng, path.read_bytes()))
    else:
        path.write_bytes(damage(rng, path.read_bytes()))


def damage_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON text with one to three other values, keys or repeated keys."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        value = _change(rng, value)
    text = json.dumps(value)
    if rng.random() < 0.2 and text.startswith("{"):
        text = "{" + text[1:-1] + "," + text[1:] if len(text) > 2 else text  # every key twice
    return text.encode()


def _change(rng: random.Random, value: Any) -> Any:
    """The value with another one at a random place."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice((copy.deepcopy(rng.choice(VALUES)), [value], {"a": value}))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    if rng.random() < 0.1:
        del value[key]
    else:
        value[key] = _change(rng, value[key])
    return value


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _insert(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice((*MARKS, rng.randbytes(rng.randrange(1, 40)))) + content[at:]


def _replace(rng: random.Random, content: bytes) -> bytes:
    return rng.choice((b"", rng.randbytes(rng.randrange(200)), b"[" * 100_000, b'{"a":' * 100_000, b"\n", b"\0" * 100))


def _lines(rng: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    i, j = (rng.randrange(len(lines)) for _ in range(2))
    action = rng.randrange(4)
    if action == 0:
        lines.insert(i, lines[j])
    elif action == 1:
        del lines[i]
    elif action == 2:
        lines[i], lines[j] = lines[j], lines[i]
    else:
        lines[i] = lines[i][:1000] * rng.choice((2, 1000))
    return b"\n".join(lines)


def _word(rng: random.Random, content: bytes) -> bytes:
    """Another word or number in the place of one."""
    words = content.split(b" ")
    words[rng.randrange(len(words))] = rng.choice((*NUMBERS, "x", "../x.jpg", "/etc/x", "C:\\x", "true", "[]")).encode()
    return b" ".join(words)


def _move(rng: random.Random, content: bytes) -> bytes:
    """A stretch of bytes at another place."""
    start = rng.randrange(len(content) + 1)
    piece = content[start : start + rng.choice((4, 16, 64))]
    at = rng.randrange(len(content) + 1)
    return content[:at] + piece + content[at + len(piece) * rng.randrange(2) :]


_DEFECTS = (_flip, _flip, _flip, _cut, _cut, _insert, _replace, _lines, _word, _move)


def run(reader: Reader, n: int, seed: int = 0) -> list[str]:
    """Read ``n`` damaged inputs and return what went wrong, a traceback for each, with the seed of the input."""
    failures = []
    for i in range(n):
        peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        with _folder() as folder, _time_limit():
            try:
                reader(random.Random(f"{seed}:{i}"), folder)
            except UserError as error:
                text = str(error)
                if "\n" in text or not text.endswith(".") or ": " not in text:
                    failures.append(f"input {seed}:{i}: no sentence with a remedy: {text[:500]}")
            except Exception:
                failures.append(f"input {seed}:{i}: {traceback.format_exc(limit=-6)}")
        seconds = time.monotonic() - start
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
        if seconds > SECONDS or growth > MEMORY:
            failures.append(f"input {seed}:{i}: took {seconds:.1f} s and {growth >> 20} MB")
    return failures


class TooSlow(Exception):
    """A reader that does not end; no OSError, which readers catch."""


@contextmanager
def _time_limit() -> Iterator[None]:
    """Interrupt what takes longer than SECONDS; only the main thread of a process can be interrupted."""

    def stop(*_: object) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _folder() -> Iterator[Path]:
    """An empty folder, with the cache folder beside it."""
    top = Path(tempfile.mkdtemp())
    try:
        (top / "input").mkdir()
        with mock.patch.dict(os.environ, FGFAST_CACHE=str(top / "cache")):
            yield top / "input"
    finally:
        shutil.rmtree(top)
