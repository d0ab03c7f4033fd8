"""MATLAB files are read in a process of their own: one that dies, fills the memory or never ends is one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")

from scipy.io import savemat

from fgfast.data.layouts import matlab, open_images
from fgfast.data.layouts.matlab import read_mat
from fgfast.errors import UserError
from tests.data import trees


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    savemat(
        tmp_path / "good.mat", {"labels": np.arange(3), "annotations": np.array([(1, "a")], [("x", "O"), ("y", "O")])}
    )
    return tmp_path / "good.mat"


def test_values_are_plain_numbers_and_text(vector: Path) -> None:
    (table,) = read_mat({vector: {"labels": list, "annotations": dict}})
    assert table == {"labels": [0, 1, 2], "annotations": {"x": [1], "y": ["a"]}}


@pytest.mark.parametrize(
    ("program", "fate"),
    [
        ("import os; os.abort()", "its reader ended with status -6"),
        ("print('{\"labels\": [1', flush=True)", "its reader ended with status 0"),
        ("raise SystemExit(3)", "its reader ended with status 3"),
    ],
)
def test_the_file_on_which_the_reader_ends_is_named(
    vector: Path, monkeypatch: pytest.MonkeyPatch, program: str, fate: str
) -> None:
    """The first file is read, the reader ends on the second."""
    script = vector.with_name("reader.py")
    script.write_text(f"print('{json.dumps({'labels': [1]})}', flush=True)\n{program}\n")
    monkeypatch.setattr(matlab, "READER", script)
    bad = vector.with_name("bad.mat")
    bad.touch()
    with pytest.raises(UserError) as caught:
        read_mat({vector: {"labels": list}, bad: {"labels": list}})
    assert str(caught.value) == f"{bad} is not a readable MATLAB file ({fate}): restore the file."


def test_the_file_on_which_the_reader_takes_too_long_is_named(vector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("reader", timeout, output=b'{"labels": [1]}\n{"lab')

    monkeypatch.setattr(subprocess, "run", late)
    bad = vector.with_name("bad.mat")
    bad.touch()
    with pytest.raises(UserError, match=r"bad\.mat is not .* \(it took longer than 300 seconds\): restore the file"):
        read_mat({vector: {"labels": list}, bad: {"labels": list}})


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit the memory of a process")
def test_a_file_that_asks_for_more_memory_than_allowed_is_named(vector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    savemat(vector, {"labels": np.zeros(100_000_000, np.uint8)}, do_compression=True)
    monkeypatch.setattr(matlab, "MEMORY", 200 << 20)
    with pytest.raises(UserError, match=r"good\.mat is not a readable MATLAB file \(MemoryError"):
        read_mat({vector: {"labels": list}})


def test_a_file_with_too_many_values_is_named(vector: Path) -> None:
    savemat(vector, {"labels": np.zeros(10_000_001, np.uint8)}, do_compression=True)
    with pytest.raises(UserError, match=r"good\.mat is not .* \(ValueError: a variable has 10,000,001 values\)"):
        read_mat({vector: {"labels": list}})


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"labels": dict}, "has no structure 'labels'"),
        ({"annotations": list}, "has a structure 'annotations'"),
        ({"other": list}, "has no variable 'other'"),
    ],
)
def test_a_variable_of_another_kind_is_named(
    vector: Path, monkeypatch: pytest.MonkeyPatch, kinds: dict[str, type], message: str
) -> None:
    script = vector.with_name("reader.py")
    script.write_text(f"print('{json.dumps({'labels': [1], 'annotations': {'x': [1]}})}')")
    monkeypatch.setattr(matlab, "READER", script)
    with pytest.raises(UserError, match=rf"good\.mat {message}: restore the file"):
        read_mat({vector: kinds})


def test_class_names_and_file_names_must_be_text(tmp_path: Path) -> None:
    root = trees.cars(tmp_path / "set")
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": np.array(["a", 7], object)})
    with pytest.raises(UserError, match=r"cars_meta\.mat, class 2: '7' is not text"):
        open_images(root)
