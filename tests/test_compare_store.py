"""The files of a comparison: one UserError for whatever damages them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fgfast.compare.store import (
    read_correct,
    read_rows,
    read_tuning,
    store_correct,
    store_row,
    store_tuning,
)
from fgfast.errors import UserError

HEAD = b"data,method,seed,knn\n"


def refuse(file: Path, content: bytes, read: Callable[[], object], reason: str) -> None:
    file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read()
    assert str(caught.value).startswith(f"{file} cannot be read (")
    assert str(caught.value).endswith("): restore or remove it.")
    assert reason in str(caught.value)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no column data"), (b"x,y\n1,2\n", "no column data"), (b"data;method;seed\n", "no column data"),
        (HEAD + b"caf\xe9,simclr,0,1\n", "'utf-8'"), (HEAD + b"birds,simclr,0\n", "the row of birds, simclr, 0"),
        (HEAD + b"birds,simclr,0,1,2\n", "the row of birds, simclr, 0"),
    ],
)  # fmt: skip
def test_damaged_rows_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    refuse(tmp_path / "compare.csv", content, lambda: read_rows(tmp_path), reason)
    refuse(tmp_path / "compare.csv", content, lambda: store_row(tmp_path, {}, []), reason)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 3}', b'{"a": {"0.1": "x"}}', b'{"\xe9": {}}'])
def test_damaged_rates_are_refused(tmp_path: Path, content: bytes) -> None:
    refuse(tmp_path / "tuned.json", content, lambda: read_tuning(tmp_path), "")
    refuse(tmp_path / "tuned.json", content, lambda: store_tuning(tmp_path, "a", {}), "")


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_cut_predictions_are_refused(tmp_path: Path, kept: float) -> None:
    store_correct(tmp_path, "knn", np.array([True, False]))
    whole = (tmp_path / "correct.npz").read_bytes()
    content = whole[: int(kept * len(whole))]
    refuse(tmp_path / "correct.npz", content, lambda: read_correct(tmp_path, "knn"), "no npz file")
    refuse(tmp_path / "correct.npz", content, lambda: store_correct(tmp_path, "knn", np.ones(2, bool)), "no npz file")


def test_predictions_with_another_byte_are_refused(tmp_path: Path) -> None:
    store_correct(tmp_path, "knn", np.array([True, False]))
    whole = (tmp_path / "correct.npz").read_bytes()
    place = whole.index(b"knn.npy") + 40
    content = whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
    refuse(tmp_path / "correct.npz", content, lambda: read_correct(tmp_path, "knn"), "")


def test_a_protocol_without_predictions_is_refused(tmp_path: Path) -> None:
    store_correct(tmp_path, "knn", np.array([True, False]))
    with pytest.raises(UserError, match="linear is not a file in the archive"):
        read_correct(tmp_path, "linear")


def test_names_in_any_script_round_trip(tmp_path: Path) -> None:
    row = {"data": "bïrds 鳥", "method": "simclr", "seed": "0", "knn": "0.5"}
    store_row(tmp_path, row, ["knn"])
    stored = read_rows(tmp_path)["bïrds 鳥", "simclr", "0"]
    assert row.items() <= stored.items()
    assert "鳥".encode() in (tmp_path / "compare.csv").read_bytes()
