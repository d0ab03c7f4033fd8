"""Folders of Hugging Face `datasets`: what they hold, and the one sentence for those that cannot be read."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fgfast.data.layouts import open_images
from fgfast.data.manifest import cache_folder, check_images
from fgfast.data.slices import Slice
from fgfast.data.views import Crop, ViewSpec
from fgfast.errors import UserError

from .loading import VARIANTS, loading
from .sharding import shard
from .tables import FEATURES, jpegs, parquet, save, save_dict, stream, table

SPEC = ViewSpec(crops=(Crop(size=8),))


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(UserError, match=r"The package pyarrow is not installed: pip install 'fgfast\[datasets\]'"):
        open_images(tmp_path)


pa = pytest.importorskip("pyarrow")


@pytest.mark.parametrize("write", [save_dict, parquet])
@pytest.mark.parametrize("variant", VARIANTS)
def test_splits_labels_and_images_are_read(
    tmp_path: Path, write: Callable[[Path, dict[str, Any]], None], variant: str
) -> None:
    write(tmp_path / "set", {"train": table(jpegs(6), [0, 1, 2] * 2), "test": table(jpegs(3, 50), [2, 1, 0])})
    images = open_images(tmp_path / "set")
    assert images.classes == ("wren", "jay", "rook")
    assert images.targets.tolist() == [0, 1, 2, 0, 1, 2, 2, 1, 0]
    assert images.train.tolist() == [True] * 6 + [False] * 3
    assert images.paths[:2] == ("train/00000000", "train/00000001")
    with loading(images, SPEC, 4, variant) as loader:
        index = torch.cat([batch.index[batch.valid] for batch in loader])
    assert sorted(index.tolist()) == list(range(9))


def test_the_bytes_lie_in_the_arrow_file(tmp_path: Path) -> None:
    from fgfast.data.slices import read_file

    encoded = jpegs(5)
    save(tmp_path / "set", table(encoded, [0] * 5), rows_per_batch=2)
    images = open_images(tmp_path / "set")
    files = [images.file(i) for i in range(5)]
    assert all(isinstance(file, Slice) and file.file.endswith(".arrow") for file in files)
    assert [read_file(file) for file in files] == encoded
    assert not (cache_folder() / "arrow").exists()


@pytest.mark.parametrize(
    ("labels", "features", "classes", "targets"),
    [
        (["jay", "wren", "jay"], {}, ("jay", "wren"), [0, 1, 0]),
        ([7, 3, 7], {}, ("3", "7"), [1, 0, 1]),
        ([0, None, -1], FEATURES, ("wren", "jay", "rook"), [0, -1, -1]),
        (None, {}, ("unlabelled",), [-1, -1, -1]),
    ],
)
def test_labels_are_numbers_names_or_absent(
    tmp_path: Path, labels: list | None, features: dict, classes: tuple[str, ...], targets: list[int]
) -> None:
    save(tmp_path, table(jpegs(3), labels, features))
    images = open_images(tmp_path)
    assert images.classes == classes
    assert images.targets.tolist() == targets
    assert images.train.all()


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_every_form_of_an_image_column_is_read(tmp_path: Path, kind: str) -> None:
    encoded = jpegs(4)
    column = {
        "binary": lambda: pa.array(encoded, pa.binary()),
        "large_binary": lambda: pa.array(encoded, pa.large_binary()),
        "struct": lambda: pa.array([{"bytes": x, "path": None} for x in encoded]),
    }[kind]()
    save(tmp_path, pa.table({"img": column, "fine_label": [1, 0, 1, 0], "coarse_label": [0] * 4}))
    images = open_images(tmp_path)
    assert images.targets.tolist() == [1, 0, 1, 0]
    assert len(check_images(images)) == 4


def test_the_file_format_of_arrow_is_read_too(tmp_path: Path) -> None:
    save(tmp_path, table(jpegs(3), [0, 1, 2]), new=pa.ipc.new_file)
    assert len(check_images(open_images(tmp_path))) == 3


def test_parquet_is_converted_once(tmp_path: Path) -> None:
    parquet(tmp_path / "set", {"train": table(jpegs(3), [0, 1, 2])})
    assert len(check_images(open_images(tmp_path / "set"))) == 3
    (copy,) = (cache_folder() / "arrow").iterdir()
    before = copy.stat().st_mtime_ns
    assert len(check_images(open_images(tmp_path / "set"))) == 3
    assert copy.stat().st_mtime_ns == before


def test_the_validation_split_is_scored_without_a_test_split(tmp_path: Path) -> None:
    save_dict(tmp_path / "a", {"train": table(jpegs(3), [0, 1, 2]), "validation": table(jpegs(2), [0, 1])})
    assert open_images(tmp_path / "a").train.tolist() == [True] * 3 + [False] * 2
    parts = {name: table(jpegs(2), [0, 1]) for name in ("train", "validation", "test", "unsupervised")}
    save_dict(tmp_path / "b", parts)
    images = open_images(tmp_path / "b")
    assert len(images) == 4
    assert [(part.name, part.reason) for part in images.left_out] == [
        ("validation", "test is scored"), ("unsupervised", "no split"),
    ]  # fmt: skip


def test_one_file_serves_any_number_of_ranks(tmp_path: Path) -> None:
    save(tmp_path, table(jpegs(9), [0] * 9))
    seen: list[int] = []
    for rank in range(3):
        with loading(open_images(tmp_path), SPEC, 2, "dali_files", rank=rank, world=3) as loader:
            seen += torch.cat([batch.index[batch.valid] for batch in loader]).tolist()
    assert sorted(seen) == list(range(9))


def test_shards_are_written_from_it(tmp_path: Path) -> None:
    save_dict(tmp_path / "set", {"train": table(jpegs(6), [0, 1, 2] * 2), "test": table(jpegs(3), [2, 1, 0])})
    images = open_images(tmp_path / "set")
    found = shard(images, tmp_path / "out")
    order = [found.paths.index(rel) for rel in images.paths]
    assert np.array_equal(found.targets[order], images.targets)
    assert np.array_equal(found.train[order], images.train)


def test_broken_images_are_skipped(tmp_path: Path) -> None:
    save(tmp_path, table([*jpegs(30), b"broken"], [0] * 31))
    records = check_images(open_images(tmp_path))
    assert [rel for rel, _ in records.skipped] == ["train/00000030"]


def _state(root: Path, value: object) -> None:
    (root / "state.json").write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda root: (root / "data-0.arrow").unlink(), r"data-0\.arrow is missing"),
        (lambda root: (root / "data-0.arrow").write_bytes(b""), r"data-0\.arrow cannot be read"),
        (lambda root: (root / "data-0.arrow").write_bytes(b"x" * 99), r"data-0\.arrow cannot be read"),
        (lambda root: _state(root, {"_data_files": [{"filename": "../x.arrow"}]}), "which is no file of the folder"),
        (lambda root: _state(root, {"_data_files": [{"filename": 7}]}), "which is no file of the folder"),
        (lambda root: _state(root, {"_data_files": [{"filename": "a" * 300}]}), "aaa is missing"),
        (lambda root: _state(root, {}), r"state\.json names no file"),
        (lambda root: _state(root, []), r"state\.json cannot be read"),
        (lambda root: save(root, pa.table({"text": ["a"]})), "has no column of images"),
        (lambda root: save(root, pa.table({"image": ["a"]})), "has images outside the file"),
        (lambda root: save(root, pa.table({"image": pa.array([{"path": "a"}])})), "has images outside the file"),
        (lambda root: save(root, pa.table({"image": jpegs(1), "img": jpegs(1)})), "the columns image and img of"),
        (lambda root: save(root, table([None, jpegs(1)[0]], [0, 1])), "has images outside the file"),
        (lambda root: save(root, table(jpegs(2), [0, 3])), "has the label 3, but 3 classes"),
        (lambda root: save(root, table(jpegs(2), [0.5, 1.0], {})), "neither numbers nor names, such as 0.5"),
        (lambda root: save(root, table(jpegs(2), [True, False], {})), "neither numbers nor names, such as True"),
        (
            lambda root: save(root, table(jpegs(2), [0, 1]), options=pa.ipc.IpcWriteOptions(compression="zstd")),
            "is compressed, so its images cannot be read",
        ),
        (lambda root: save(root, table([], [])), "holds no image"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(tmp_path: Path, corrupt: Callable[[Path], object], message: str) -> None:
    save(tmp_path, table(jpegs(3), [0, 1, 2]))
    corrupt(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_images(tmp_path)
    assert "\n" not in str(caught.value)


def test_splits_that_leave_a_choice_are_refused(tmp_path: Path) -> None:
    one = table(jpegs(1), [0])
    for name, splits, message in (
        ("a", ["train", "training"], "two splits for train"),
        ("b", ["test", "val"], "has no split train"),
        ("c", ["train", "../b"], "which is outside"),
    ):
        save_dict(tmp_path / name, {split: one for split in splits if ".." not in split})
        (tmp_path / name / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
        with pytest.raises(UserError, match=message):
            open_images(tmp_path / name)


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    other = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}
    save_dict(tmp_path / "a", {"train": table(jpegs(1), [0]), "test": table(jpegs(1), [0], other)})
    with pytest.raises(UserError, match="different names"):
        open_images(tmp_path / "a")
    save_dict(tmp_path / "b", {"train": table(jpegs(1), [0]), "test": table(jpegs(1), None)})
    with pytest.raises(UserError, match="has no labels, other files"):
        open_images(tmp_path / "b")


def test_a_table_beside_class_folders_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(jpegs(1)[0])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jpg").write_bytes(jpegs(1)[0])
    stream(tmp_path / "metadata.parquet", table(jpegs(1), [0]))
    assert open_images(tmp_path).classes == ("a", "b")
