"""Damaged files of a data set: every reader returns or raises one sentence that names the file."""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("scipy")
pytest.importorskip("msgspec")

from fgfast.data.layouts import open_images
from fgfast.errors import UserError
from tests import fuzz
from tests.data import trees
from tests.data.fuzz import MATLAB, READERS

DEEP = 100_000
NASTY = [
    b"", b" \n", b"[" * DEEP, b'{"images": ' * DEEP, b'{"images": ' + b"[" * DEEP + b"]" * DEEP + b"}", b"null", b"[]",
    b"1", b'"text"', b'{"images": []}', b"\xff\xfe\x00", b'{"images": "\xff"}', b"\x00",
    b'{"images": [], "images": []}',
    b"NaN", b"\x80",
]  # fmt: skip


@pytest.mark.parametrize("name", ["train2018.json", "categories.json"])
@pytest.mark.parametrize("content", NASTY, ids=range(len(NASTY)))
def test_damaged_json_is_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    root = trees.inaturalist(tmp_path)
    (root / name).write_bytes(content)
    if (name, content) == ("categories.json", b"[]"):
        assert len(open_images(root)) == 5
        return
    with pytest.raises(UserError, match=rf"{name} cannot be read \(.{{1,320}}\): .*restore[^:]*\.$"):
        open_images(root)


@pytest.mark.parametrize(
    "number", ["1e999", "9" * 5000, str(2**64), "1.5", "-1e999", '"4"', "true", "null", "NaN", "[4]"]
)
@pytest.mark.parametrize(("name", "before"), [("val2018.json", '"category_id": 4'), ("val2018.json", '"id": 2')])
def test_a_wrong_number_is_one_sentence(tmp_path: Path, name: str, before: str, number: str) -> None:
    root = trees.inaturalist(tmp_path)
    text = (root / name).read_text()
    assert before in text
    (root / name).write_text(text.replace(before, before.split(":")[0] + ": " + number, 1))
    with pytest.raises(UserError, match=rf"{name} cannot be read \(.*\): restore the file\.$"):
        open_images(root)


@pytest.mark.parametrize("place", [os.mkfifo, lambda path: path.symlink_to(path)])
@pytest.mark.parametrize(
    ("tree", "name"), [(trees.cub, "classes.txt"), (trees.pets, "annotations/trimaps/Abyssinian_1.png")]
)
def test_what_is_no_file_in_place_of_a_list_is_named(
    tmp_path: Path, tree: Callable[[Path], Path], name: str, place: Callable[[Path], object]
) -> None:
    root = tree(tmp_path / "set")
    (root / name).unlink()
    place(root / name)
    with pytest.raises(UserError, match=rf"{name} cannot be read"):
        open_images(root)


def test_damaged_trimaps_of_the_cache_are_converted_again(tmp_path: Path) -> None:
    root = trees.pets(tmp_path)
    masks = open_images(root).masks
    assert masks is not None
    for name, content in {"maps.json": b"[", "Abyssinian_1.jpg.png": b"x"}.items():
        sound = (masks / name).read_bytes()
        (masks / name).write_bytes(content)
        assert open_images(root).masks == masks
        assert (masks / name).read_bytes() == sound


def test_a_category_without_a_group_has_none(tmp_path: Path) -> None:
    root = trees.inaturalist(tmp_path)
    for name in ("train2018.json", "val2018.json"):
        table = json.loads((root / name).read_text())
        table["categories"][0]["supercategory"] = None
        (root / name).write_text(json.dumps(table))
    assert open_images(root).groups == ("Amphibia", "")


@pytest.fixture
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Without the warnings of skipped images, one for each input."""
    caplog.set_level(logging.ERROR, "fgfast")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_input_is_read_or_one_sentence(name: str) -> None:
    assert fuzz.run(READERS[name], 8) == []


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_damaged_inputs_of_every_reader(name: str, seed: int) -> None:
    assert fuzz.run(READERS[name], 1000, seed + 1) == []


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", MATLAB)
def test_five_hundred_damaged_matlab_files_of_every_reader(name: str, seed: int) -> None:
    assert fuzz.run(MATLAB[name], 100, seed + 1) == []


def _raise(error: Exception) -> fuzz.Reader:
    def reader(rng: object, folder: Path) -> None:
        raise error

    return reader


@pytest.mark.parametrize(
    ("error", "n"), [(UserError("a file is empty: restore it."), 0), (UserError("wrong"), 3), (ValueError("x: y."), 3)]
)
def test_only_a_sentence_with_a_remedy_is_no_finding(error: Exception, n: int) -> None:
    assert len(fuzz.run(_raise(error), 3)) == n


def test_a_reader_that_does_not_end_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    assert "TooSlow" in fuzz.run(lambda rng, folder: time.sleep(30), 1)[0]
