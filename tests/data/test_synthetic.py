"""The synthetic set: reproducible bytes, ground truth that matches the images, no partial or lost files."""

import errno
import hashlib
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fgfast.data import synthetic
from fgfast.data._attributes import ATTRIBUTES, design_classes
from fgfast.data._bird import KEYPOINTS, PARTS
from fgfast.data.layouts import open_images
from fgfast.data.maps import ABSENT, map_path, read_maps_info
from fgfast.data.synthetic import generate
from fgfast.errors import UserError
from tests.examples import examples

SMALL = {"classes": 3, "images": 20, "size": 48, "seed": 5}  # 7, 7 and 6 images: the remainder is distributed


@pytest.fixture(scope="module")
def birds(tmp_path_factory) -> Path:
    return generate(tmp_path_factory.mktemp("synthetic") / "birds", **SMALL)


def digests(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*") if p.is_file()
    }


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_workers(birds, tmp_path):
    assert digests(generate(tmp_path / "again", **SMALL, workers=2)) == digests(birds)


def test_another_seed_gives_other_images(birds, tmp_path):
    other = digests(generate(tmp_path / "other", **{**SMALL, "seed": 6}))
    assert not set(other.values()) & {v for k, v in digests(birds).items() if k.startswith("images/")}


def test_the_set_is_read_as_cub(birds):
    images = open_images(birds)
    assert len(images) == 20
    assert np.bincount(images.targets).tolist() == [7, 7, 6]
    assert np.bincount(images.targets[images.train]).tolist() == [4, 4, 3]
    assert images.part_names == tuple(KEYPOINTS) == tuple(sorted(KEYPOINTS))
    assert images.keypoints is not None
    assert images.keypoints.shape == (20, len(KEYPOINTS), 3)
    assert images.masks == birds / "part_masks"
    for path in images.paths:
        with Image.open(images.root / path) as image:
            assert (image.mode, image.size, image.format) == ("RGB", (48, 48), "JPEG")


def test_lists_have_the_format_of_cub(birds):
    first = {p.name: p.read_text().splitlines()[0] for p in [*birds.glob("*.txt"), *birds.glob("parts/*.txt")]}
    assert first["images.txt"] == "1 001.Northern_Finch/Northern_Finch_0001.jpg"
    assert (first["image_class_labels.txt"], first["classes.txt"]) == ("1 1", "1 001.Northern_Finch")
    assert (first["train_test_split.txt"], first["parts.txt"]) == ("1 1", "1 back")
    number, *box = first["bounding_boxes.txt"].split()
    assert number == "1"
    assert len(box) == 4
    assert all(len(v.split(".")[1]) == 2 for v in box)
    assert len(first["part_locs.txt"].split()) == 5


def test_part_maps_are_grey_with_known_ids(birds):
    images = open_images(birds)
    info = read_maps_info(birds / "part_masks")
    assert (info["n_parts"], info["size"], info["run"]) == (len(PARTS), [48, 48], "truth-5")
    assert info["parts"] == list(PARTS)
    for path in images.paths:
        with Image.open(map_path(birds / "part_masks", path)) as image:
            assert (image.mode, image.size) == ("L", (48, 48))
            ids = np.unique(np.asarray(image))
        assert set(ids.tolist()) <= {*range(len(PARTS)), ABSENT}
        assert {PARTS.index("body"), PARTS.index("head"), ABSENT} <= set(ids.tolist())


def test_boxes_and_key_points_agree_with_the_part_maps(birds):
    images = open_images(birds)
    assert images.boxes is not None
    assert images.keypoints is not None
    part_of = list(KEYPOINTS.values())
    for path, box, points in zip(images.paths, images.boxes, images.keypoints, strict=True):
        labels = np.asarray(Image.open(map_path(birds / "part_masks", path)))
        ys, xs = np.nonzero(labels != ABSENT)
        assert box.tolist() == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
        for part, (x, y, visible) in zip(part_of, points, strict=True):
            assert visible in (0, 1)
            if visible:
                assert labels[int(y), int(x)] == part
            else:
                assert (x, y) == (0, 0)
    assert images.keypoints[:, :, 2].mean() > 0.6


def test_crest_point_is_visible_only_in_crested_classes(birds):
    images = open_images(birds)
    assert images.keypoints is not None
    attributes = json.loads((birds / "synthetic.json").read_text())["attributes"]
    bare = np.array([attributes[name]["crest"] == "none" for name in images.classes])[images.targets]
    crest = images.keypoints[:, list(KEYPOINTS).index("crest"), 2]
    assert not crest[bare].any()


@examples(15)
@given(classes=st.integers(2, 120), seed=st.integers(0, 2**32), difficulty=st.floats(0, 1))
def test_all_classes_differ(classes, seed, difficulty):
    rows = design_classes(classes, seed, difficulty)
    assert rows.shape == (classes, len(ATTRIBUTES))
    assert min((a != b).sum() for a, b in combinations(rows, 2)) >= 1


def test_difficulty_reduces_the_distance_of_classes():
    def nearest(difficulty: float) -> int:
        return min((a != b).sum() for a, b in combinations(design_classes(20, 0, difficulty), 2))

    assert nearest(0.0) > nearest(0.5) > nearest(1.0)


def test_class_names_are_unique():
    assert len({synthetic._class_name(i)[4:] for i in range(1000)}) == 1000


def test_without_nuisance_a_class_has_one_pose(tmp_path):
    root = generate(tmp_path / "still", classes=2, images=4, size=64, nuisance=0.0)
    images = open_images(root)
    maps = [np.asarray(Image.open(map_path(root / "part_masks", path))) for path in images.paths]
    same = (maps[0] == maps[1]).mean(), (maps[0] == maps[1][:, ::-1]).mean()  # flips remain
    assert max(same) > 0.93


def test_the_same_set_is_reused(birds):
    before = (birds / "images.txt").stat().st_mtime_ns
    assert generate(birds, **SMALL) == birds
    assert (birds / "images.txt").stat().st_mtime_ns == before


def test_another_set_is_replaced_only_by_force(tmp_path):
    root = generate(tmp_path / "s", classes=2, images=4, size=32)
    with pytest.raises(UserError, match="force"):
        generate(root, classes=2, images=6, size=32)
    assert len(open_images(root)) == 4
    generate(root, classes=2, images=6, size=32, force=True)
    assert len(open_images(root)) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["thesis.txt", "synthetic.json"])
@pytest.mark.parametrize("text", ["years of work", "[" * 100_000, '{"a": 1}', "\xe9"])
def test_foreign_files_are_never_touched(tmp_path, force, name, text):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="not a synthetic set"):
        generate(tmp_path, classes=2, images=4, size=32, force=force)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "new").mkdir()
    assert len(open_images(generate(tmp_path / "new", classes=2, images=4, size=32))) == 4


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"classes": 1}, "classes"),
        ({"classes": 5, "images": 9}, "images"),
        ({"size": 31}, "size"),
        ({"seed": -1}, "seed"),
        ({"difficulty": 1.5}, "difficulty"),
        ({"nuisance": float("nan")}, "nuisance"),
        ({"nuisance": -0.1}, "nuisance"),
        ({"workers": 0}, "workers"),
        ({"images": 10.5}, "images"),
    ],
)
def test_invalid_values_are_named(tmp_path, values, word):
    with pytest.raises(UserError, match=word):
        generate(tmp_path / "x", **{"classes": 2, "images": 4, "size": 32, **values})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence_and_leaves_no_files(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space"):
        generate(tmp_path / "x", classes=2, images=4, size=32, workers=1)
    assert not list(tmp_path.iterdir())


def test_a_failed_replacement_keeps_the_old_set(tmp_path, monkeypatch):
    root = generate(tmp_path / "s", classes=2, images=4, size=32)
    before = digests(root)

    def stop(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "_draw_some", stop)
    with pytest.raises(KeyboardInterrupt):
        generate(root, classes=2, images=6, size=32, force=True)
    assert digests(root) == before
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        generate(tmp_path / "file", classes=2, images=4, size=32)
    with pytest.raises(UserError, match="cannot be written"):
        generate(tmp_path / "file" / "below", classes=2, images=4, size=32)
