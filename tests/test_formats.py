"""The reader of each format: a value of the wanted type, or a sentence that names file, place and remedy."""

import csv
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgfast.errors import UserError
from fgfast.formats import csv_text, read_bytes, read_csv, read_json, read_text, read_toml
from tests import fuzz
from tests.examples import examples
from tests.fuzz_files import READERS


@dataclass
class Score:
    """A type to read."""

    top1: float
    n: int = 0


def refused(read: Callable[..., object], path: Path, *args: Any, **options: Any) -> str:
    """The reason why a reader refuses a file; the message names the file and the remedy."""
    with pytest.raises(UserError) as caught:
        read(path, *args, remedy="mend it", **options)
    message = str(caught.value)
    assert message.startswith(f"{path} cannot be read (")
    assert message.endswith("): mend it.")
    assert len(message) < 500 + len(str(path))
    return message.removeprefix(f"{path} cannot be read (").removesuffix("): mend it.")


def test_a_large_file_of_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.json").write_text("garbage")
    assert refused(read_json, tmp_path / "images.json", dict, strict=False).startswith("JSON is malformed")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"), (b" \n", "it is empty"), (b'[{"top1": 1}', "line 1, column 13: Expecting"),
        (b'[{"top1": "x"}]', "[0].top1: expected `float`, got `str`"),
        (b'[{"top1": 1}, {}]', "[1]: object missing required field `top1`"),
        (b'[{"top1": 1, "n": 1.5}]', "[0].n: expected `int`, got `float`"),
        (b'[{"top1": 1, "n": true}]', "[0].n: expected `int`, got `bool`"),
        (b'{"top1": 1}', "expected `array`, got `object`"), (b"[" * 100_000, "it nests too many levels"),
        (b'{"a":' * 100_000, "it nests too many levels"), (b'[{"top1": 1e999}]', "1e999 is not a finite number"),
        (b'[{"top1": NaN}]', "NaN is not a finite number"), (b'[{"top1": -Infinity}]', "-Infinity is not a finite"),
        (b'[{"top1": 1, "n": 18446744073709551616}]', "18446744073709551616 is beyond 64 bits"),
        (b"[" + b"9" * 5000 + b"]", "beyond 64 bits"), (b'[{"top1": 1, "top1": 2}]', "the key 'top1' is given twice"),
        (b'[\n{"top1": \xe9}]', "line 2 is not UTF-8"), ("[]".encode("utf-16"), "it is UTF-16 and must be UTF-8"),
    ],
)  # fmt: skip
def test_json_is_refused_with_the_place(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "scores.json"
    path.write_bytes(content)
    assert reason in refused(read_json, path, list[Score])


def test_json_gives_the_type_asked_for(tmp_path: Path) -> None:
    """Also after a byte order mark; ``plain`` keeps what the type does not name."""
    path = tmp_path / "scores.json"
    path.write_bytes(b'\xef\xbb\xbf[{"top1": 1, "n": 2, "more": [null]}]')
    assert read_json(path, list[Score]) == [Score(1.0, 2)]
    assert read_json(path, list[Score], plain=True) == [{"top1": 1, "n": 2, "more": [None]}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a = 1\na = 2", "Cannot overwrite a value"), (b"a = [" + b"[" * 100_000, "it nests too many levels"),
        (b"a" + b".a" * 200 + b" = 1", "it nests more than 100 levels"), (b"a = 9223372036854775808" * 2, "at line 1"),
        (b"a = 0x" + b"f" * 5000, "beyond 64 bits"), (b"a = " + b"9" * 5000, "4300 digits"), (b"\xff = 1", "line 1 is"),
    ],
)  # fmt: skip
def test_toml_is_refused_with_the_place(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    assert reason in refused(read_toml, path)


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    """A pipe that no one writes to would be waited for, and a device never ends."""
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    assert refused(read_bytes, tmp_path) == "Is a directory"
    assert refused(read_bytes, tmp_path / "loop").startswith("Too many levels of symbolic links")
    assert refused(read_bytes, tmp_path / "pipe") == refused(read_bytes, Path("/dev/zero")) == "it is not a plain file"
    with pytest.raises(UserError, match="none is missing: mend it"):
        read_text(tmp_path / "none", remedy="mend it")


def test_no_file_is_read_beyond_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert refused(read_json, path, list[int], limit=1000) == "it has more than 1,000 bytes"


CELLS = st.text(st.characters(codec="utf-8"), max_size=5) | st.sampled_from(
    ["=1+1", "@SUM(A1)", "+x", "-x", "'=x", "''-x", "\t=x", "\r=x", "\n", "-0.5", "+1", "'", "\uff1d1", '"', ","]
)


def table(rows: list[tuple[str, str]]) -> str:
    return csv_text(["a", "=b"], [{"a": a, "=b": b} for a, b in rows])


@given(st.lists(st.tuples(CELLS, CELLS), max_size=5))
@examples(50)
def test_cells_round_trip(rows: list[tuple[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        path.write_bytes(table(rows).encode())
        assert read_csv(path, ["a", "=b"]) == [{"a": a, "=b": b} for a, b in rows]


@given(st.lists(st.tuples(CELLS, CELLS), max_size=5))
@examples(50)
def test_no_cell_is_a_formula(rows: list[tuple[str, str]]) -> None:
    for cell in (cell for row in csv.reader(io.StringIO(table(rows), newline="")) for cell in row):
        assert not cell.startswith(("=", "@", "\t", "\r", "\n", "\uff1d"))
        if cell.startswith(("+", "-")):
            float(cell)


@pytest.mark.parametrize("number", ["-0.5", "-1e-05", "+3", "0", "12.25"])
def test_numbers_stay_numbers(number: str) -> None:
    assert csv_text(["a"], [{"a": number}]) == f"a\r\n{number}\r\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it has no column a"), (b"b\n1\n", "it has no column a"), (b"a,a\n", "it has two columns a"),
        (b"a,b\n\n1\n", "line 3, the row of 1, has 1 values for 2 columns"), (b'a\n"1', "line 2: unexpected end"),
        (b'a\n"1"2\n', "line 2: ',' expected"), (b"a\n" + b"1" * 200_000, "line 2: field larger than"),
    ],
)  # fmt: skip
def test_tables_are_refused_with_the_line(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    assert reason in refused(read_csv, path, ["a"])


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(name: str) -> None:
    assert not fuzz.run(READERS[name], 10)
