"""Image folders: what they are read as, what is left out, what is refused, and the line that says so."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy")

from fgfast.config import TrainConfig
from fgfast.config_text import to_toml
from fgfast.data import splits
from fgfast.data.imageset import ImageSet, LeftOut, describe
from fgfast.data.layouts import open_images
from fgfast.data.layouts.folders import image_set
from fgfast.data.splits import labelled_splits, pretext_splits, training_images
from fgfast.errors import UserError
from fgfast.methods.refining import PLAIN
from fgfast.methods.run_folder import read_run
from fgfast.methods.supervised import SupervisedConfig
from tests.data import trees

KNOWN = {
    trees.cassava: ("train", "extraimages"), trees.cub: ("images",), trees.nabirds: ("images",),
    trees.aircraft: (), trees.cars: ("cars_train", "cars_test", "devkit"), trees.pets: ("images", "annotations"),
    trees.flowers: ("jpg",), trees.inaturalist: ("train_val2018",),
}  # fmt: skip
"""The readers' trees and the folders in them that are no data sets."""


def classes(split: str, *names: str) -> list[str]:
    return [f"{split}/{name}/{i}.jpg" for name in names for i in range(2)]


TRAIN, TEST = classes("train", "a", "b"), classes("test", "a", "b")


def contents(images: ImageSet) -> tuple[list[str], list[int], tuple[str, ...], list[bool]]:
    return images.files(), images.targets.tolist(), images.classes, images.train.tolist()


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_splits_have_their_usual_names_in_any_case(data: st.DataObject) -> None:
    def name(*words: str) -> str:
        text = data.draw(st.sampled_from(words)) + data.draw(st.sampled_from(["", "set", "_data", " images", "2017"]))
        return data.draw(st.sampled_from([text, text.upper(), text.capitalize()]))

    prefix = data.draw(st.sampled_from(["", "birds_", "seg-"]))
    train = prefix + name("train", "training", "trn")
    held_out = prefix + name("val", "valid", "validation", "dev", "test", "testing", "eval")
    with TemporaryDirectory() as folder:
        images = open_images(trees.touch(Path(folder), [f"{train}/a/1.jpg", f"{train}/b/1.jpg", f"{held_out}/b/2.jpg"]))
    assert images.classes == ("a", "b")
    assert images.train_set().paths == (f"{train}/a/1.jpg", f"{train}/b/1.jpg")
    assert images.test_set().paths == (f"{held_out}/b/2.jpg",)


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        ([*TRAIN, *TEST, *classes("valid", "a")], [("valid/", 2, "test/ is scored")]),
        ([*TRAIN, *TEST, "val/a/1.jpg", "dev/a/1.jpg"], [("dev/", 1, "test/ is sc"), ("val/", 1, "test/ is scored")]),
        ([*TRAIN, "test/1.jpg", "val/a/1.jpg"], [("test/", 1, "its images are in no class folder")]),
        ([*TRAIN, "test/1.jpg"], [("test/", 1, "its images are in no class folder")]),
        ([*TRAIN, *TEST, "other/a/1.jpg", "b.jpg"], [("other/", 1, "no split"), ("images beside train/", 1, "in")]),
        ([*TRAIN, *TEST, "Unlabelled/1.jpg"], [("Unlabelled/", 1, "no labels; --unlabelled")]),
        ([*TRAIN, *TEST, "train/no_labels/1.jpg"], [("train/no_labels/", 1, "no labels; --unlabelled")]),
        (["a/1.jpg", "b/1.jpg", "unlabeled/1.jpg"], [("unlabeled/", 1, "no labels; --unlabelled")]),
        (["a/1.jpg", "b/1.jpg", "names.csv"], [("names.csv", 0, "no list of a known layout")]),
        (["images/1.jpg", "masks/1.png", "labels/1.txt"], [("masks/", 1, "masks or labels of other images")]),
        (
            [f"{split}/{name}.jpg" for split in ("train", "test") for name in ("images/1", "trimaps/1")],
            [(f"{split}/trimaps/", 1, "masks or labels of other images") for split in ("train", "test")],
        ),
        (["1.jpg", "labels.txt", "x.json"], [("labels.txt and 1 more", 0, "no list of a known layout")]),
        ([*TRAIN, *TEST, "part_masks/a/1.png"], []),
        (["a/1.jpg", "b/deep/1.jpg", "readme.txt"], []),
    ],
)  # fmt: skip
def test_what_is_left_out_is_recorded_and_said(
    tmp_path: Path, files: list[str], left_out: list[tuple[str, int, str]]
) -> None:
    images = open_images(trees.touch(tmp_path, files))
    assert [(part.name, part.n_images) for part in images.left_out] == [(name, n) for name, n, _ in left_out]
    assert not {"unlabelled", "unlabeled", "no_labels"} & set(images.classes) or len(images.classes) == 1
    line = describe(images)
    for name, n, reason in left_out:
        assert f"{name} ({f'{n} image' if n else ''}{'s' * (n > 1)}{', ' * (n > 0)}{reason}" in line


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([*TRAIN, *TEST, *classes("testing", "a")], r"two splits to score, test/ and testing/"),
        ([*TRAIN, *classes("val", "a"), *classes("valid", "a")], r"two splits to score, val/ and valid/"),
        ([*TRAIN, *TEST, *classes("Train", "a")], r"two training splits, Train/ and train/"),
        (["test/1.jpg", "val/1.jpg"], r"test/ but no train/: move"),
        (["test/a/1.jpg", "cat/1.jpg"], r"test/ but no train/: .* rename it if it is a class like cat"),
        (["bus/1.jpg", "train/1.jpg"], r"neither val/ nor test/: .* rename it if it is a class like bus"),
        ([*classes("train/train", "a"), *TEST], r"train holds the split train/: move its class folders up"),
        ([*classes("p_train/p_train", "a"), *classes("p_test/p_test", "a")], r"p_train holds the split p_train/"),
        ([*TRAIN, "test/readme.txt"], r"test holds no image"),
        ([*TRAIN, *TEST, "train/x.jpg"], r"train mixes images and folders: move x\.jpg"),
        ([*TRAIN, *TEST, "test/x.jpg"], r"test mixes images and folders: move x\.jpg"),
        ([*TRAIN, *classes("Test", "a", "z")], r"Class z of .*Test is not in train/"),
        (
            [f"{name}/{split}/1.jpg" for name in "ab" for split in ("train", "test")],
            r"a is a data set beside b/: give ",
        ),
        ([*(f"x/{rel}" for rel in TRAIN + TEST), "y/1.jpg"], r"x is a data set beside y/: give "),
        (["x/images.txt", "y/imagelabels.mat"], r"x is a data set beside y/: give "),
        (["x/images.txt", "y/1.jpg"], r"x is a data set beside y/: give "),
        ([*classes("train/images", "a", "b"), *TEST], r"train has one folder, images/, with folders inside: move them"),
        (classes("images", "a", "b") + classes("masks", "a", "b"), r"one folder, images/, with folders inside: give "),
        (classes("birds", "a", "b"), r"one folder, birds/, with folders inside: give .*birds"),
        (["images/1.jpg", "train.csv"], r"one folder, images/, and train\.csv, in no known layout"),
        (["car_ims/1.jpg", "cars_annos.mat"], r"one folder, car_ims/, and cars_annos\.mat, in no known layout"),
    ],
)
def test_a_folder_that_can_be_read_in_two_ways_is_refused(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_images(trees.touch(tmp_path, files))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("linked", ["", "a", "a/deep", "a/1.jpg"])
@pytest.mark.parametrize("store", ["train", "elsewhere"])
def test_an_image_that_is_in_both_splits_by_a_link_is_refused(tmp_path: Path, store: str, linked: str) -> None:
    """Both may link to a third place."""
    trees.touch(tmp_path / "above", [f"{store}/a/deep/0.jpg", f"{store}/a/1.jpg", f"{store}/b/1.jpg"])
    for split in {"train", "val"} - {store}:
        (tmp_path / "above" / split / linked).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "above" / split / linked).symlink_to(tmp_path / "above" / store / linked)
    for file in ("train/b/2.jpg", "val/b/2.jpg"):
        if not (tmp_path / "above" / file).exists():
            trees.touch(tmp_path / "above", [file])
    with pytest.raises(UserError, match=r"train/a/.*jpg and .*val/a/.*jpg are the same image"):
        open_images(tmp_path / "above")


@pytest.mark.parametrize("linked", ["test/a/1.jpg", "test/a", "test", "train/a/1.jpg"])
@pytest.mark.parametrize("inwards", [True, False])
def test_an_image_of_the_set_is_no_unlabelled_one_by_a_link(tmp_path: Path, linked: str, inwards: bool) -> None:
    """The links may lead from the unlabelled images to the set, or from the set to them."""
    data, extra = trees.touch(tmp_path / "set", [*TRAIN, *TEST]), tmp_path / "extra"
    link, target = extra / linked, data / linked
    link.parent.mkdir(parents=True)
    if inwards:
        link.symlink_to(target)
    else:
        target.rename(link)
        target.symlink_to(link)
    with pytest.raises(UserError, match=rf"{extra}/{linked}.* is in --data and in --unlabelled"):
        open_images(data).with_folder(extra)


@pytest.mark.parametrize("name", ["test", "val", "dev", "eval", "Dev", "test_1"])
def test_without_splits_a_class_may_have_the_name_of_a_test_split(tmp_path: Path, name: str) -> None:
    assert set(open_images(trees.touch(tmp_path, ["a/1.jpg", "b/1.jpg", f"{name}/1.jpg"])).classes) == {"a", "b", name}


def test_class_names_may_be_words_for_splits_inside_the_splits(tmp_path: Path) -> None:
    files = [*classes("train", "bus", "train"), *classes("test", "bus", "train")]
    assert open_images(trees.touch(tmp_path, files)).classes == ("bus", "train")


@pytest.mark.parametrize("names", [("bus", "freight_train"), ("freight_train", "screen_test"), ("tests", "trains")])
def test_a_prefix_makes_splits_only_if_a_training_and_another_split_share_it(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    assert open_images(trees.touch(tmp_path, [f"{name}/1.jpg" for name in names])).classes == names


@pytest.mark.parametrize("tree", KNOWN)
def test_a_known_set_is_read_from_the_folder_above_it(tmp_path: Path, tree: Callable[[Path], Path]) -> None:
    (tmp_path / "above").mkdir()
    expected = open_images(tree(tmp_path / "above" / "set"))
    trees.touch(tmp_path / "above", ["segmentations/a/0.png", "attributes.txt"])
    images = open_images(tmp_path / "above")
    assert contents(images) == contents(expected)
    assert str(tmp_path / "above" / "set") in describe(images)
    assert f"{tmp_path}/above/segmentations/ (1 image, beside set/)" in describe(images)


def test_an_image_folder_with_splits_is_read_from_the_folder_above_it(tmp_path: Path) -> None:
    expected = open_images(trees.touch(tmp_path / "above" / "set", [*TRAIN, *TEST]))
    images = open_images(tmp_path / "above")
    assert contents(images) == contents(expected)
    assert str(tmp_path / "above" / "set") in describe(images)


def test_levels_of_aircraft_are_read_from_the_folder_above_them(tmp_path: Path) -> None:
    trees.aircraft(tmp_path / "set")
    assert open_images(tmp_path, level="family").classes == ("Boeing 707", "F/A-18")


@pytest.mark.parametrize(("tree", "inside"), [(tree, inside) for tree, names in KNOWN.items() for inside in names])
def test_a_part_of_a_known_set_is_refused(tmp_path: Path, tree: Callable[[Path], Path], inside: str) -> None:
    root = tree(tmp_path / "set")
    with pytest.raises(UserError, match=f"is a part of the .* set in {root}: give {root}"):
        open_images(root / inside)


def test_the_description_is_one_line_with_every_count(tmp_path: Path) -> None:
    root = trees.touch(tmp_path / "a\nb\udcff", [*TRAIN, *TEST, "train/c/1.jpg", "train/d/1.jpg", "val/a/1.jpg"])
    line = describe(open_images(root), held_out=2)
    assert line.endswith(
        r"a\nb\udcff with train/ and test/: 4 classes (a, b, c, ...), 6 training images (2 of them held out), "
        "4 test images, 0 without labels; left out: val/ (1 image, test/ is scored)"
    )
    assert line.isprintable()


def test_the_description_of_a_run_says_what_is_not_used(tmp_path: Path) -> None:
    data = str(trees.cassava(tmp_path / "set"))
    line = pretext_splits(TrainConfig(data=data)).describe()
    assert "8 training images, 2 test images, 3 without labels; left out: test/ (1 image, its labels were" in line
    line = pretext_splits(SupervisedConfig(data=data)).describe()
    assert "0 without labels; " in line
    assert "images without labels (3 images, the method learns from labels)" in line
    line = labelled_splits(TrainConfig(data=data, holdout=0.25)).describe()
    assert "8 training images (2 of them held out)" in line
    assert "images without labels (3 images, scores need labels)" in line


def test_the_description_in_config_toml_is_no_option(tmp_path: Path) -> None:
    of_weights = {"mean": "0.5,0.5,0.5", "std": "0.5,0.5,0.5", "interpolation": "bicubic", **PLAIN._asdict()}
    config = SupervisedConfig(data="a b", out="c", lr=0.5, **of_weights)
    text = to_toml(config, "supervised", images='data: "a" \\ [b] = ö; left out: c')
    assert text.startswith('# data: "a"')
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    assert read_run(tmp_path) == ("supervised", config)


def test_a_folder_given_as_unlabelled_is_not_left_out(tmp_path: Path) -> None:
    data = trees.touch(tmp_path, [*TRAIN, *TEST, "unlabelled/1.jpg", "val/a/1.jpg"])
    images = pretext_splits(TrainConfig(data=str(data), unlabelled=str(data / "unlabelled"))).images
    assert [part.name for part in images.left_out] == ["val/"]
    assert (images.targets == -1).sum() == 1


@pytest.mark.parametrize("tree", [trees.cub, trees.nabirds, trees.aircraft, trees.pets, trees.flowers])
def test_images_in_no_list_are_left_out(tmp_path: Path, tree: Callable[[Path], Path]) -> None:
    images = open_images(tree(tmp_path))
    assert images.left_out == ()
    trees.touch(images.root, ["more/1.jpg", "2.png", "readme.txt"])
    folder = images.root.relative_to(tmp_path)
    assert open_images(tmp_path).left_out == (LeftOut(f"{folder}/", 2, "in no list"),)


def test_flowers_in_no_split_are_left_out(tmp_path: Path) -> None:
    from scipy.io import loadmat, savemat

    root = trees.flowers(tmp_path)
    ids = loadmat(root / "setid.mat")
    savemat(root / "setid.mat", {name: ids[name] for name in ("trnid", "valid")} | {"tstid": [[3]]})
    assert open_images(root).left_out == (LeftOut("jpg/", 2, "in no split of setid.mat"),)


@pytest.mark.parametrize("files", [[*TRAIN, *TEST, *classes("val", "a", "b")], ["a/1.jpg", "b/deep/1.jpg", "b/2.jpg"]])
def test_every_folder_is_listed_once(tmp_path: Path, files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    root = trees.touch(tmp_path, files)
    expected = {str(folder): 1 for folder in (root, *(path for path in root.rglob("*") if path.is_dir()))}
    listed: Counter[str] = Counter()
    scandir = os.scandir

    def counted(folder: Any) -> Any:
        listed[str(folder).rstrip("/")] += 1
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", counted)
    labelled_splits(TrainConfig(data=str(root)))
    assert listed == expected


def test_the_work_of_a_reader_is_linear_in_the_number_of_classes(tmp_path: Path) -> None:
    """Looking up the class of every image compares no name with all classes."""
    compared = 0

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    def found() -> dict[str, list[str]]:
        return {Name(f"{c:04d}"): [f"{c}/1.jpg", f"{c}/2.jpg"] for c in range(300)}

    images = image_set(tmp_path, [(found(), True), (found(), False)])
    assert images.targets.tolist() == 2 * [c for c in range(300) for _ in range(2)]
    assert compared <= 2 * 300


def test_holding_images_out_looks_at_each_image_a_few_times(tmp_path: Path) -> None:
    looked_at = 0

    class Counting(np.ndarray[Any, Any]):
        def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
            nonlocal looked_at
            plain = [np.asarray(value) for value in inputs]
            looked_at += max(value.size for value in plain)
            return getattr(ufunc, method)(*plain, **options)

    images = image_set(tmp_path, [({f"{c:04d}": [f"{c}/{i}.jpg" for i in range(3)] for c in range(300)}, True)])
    images = replace(images, targets=images.targets.view(Counting))
    assert splits._held_out(images, 0.4).sum() == 2 * 300
    assert looked_at <= 10 * len(images)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.floats(0, 0.9))
def test_the_held_out_images_are_those_of_earlier_versions(counts: list[int], fraction: float) -> None:
    """The first ``fraction`` of every class, in the order of one fixed permutation of the labelled training images."""
    found = {str(c): [f"{c}/{i}.jpg" for i in range(n)] for c, n in enumerate(counts)}
    images = image_set(Path("/data"), [(found, True), (found, False)]).with_unlabelled(["x.jpg"])
    order = np.random.default_rng(12345).permutation(sum(counts))
    expected = set()
    for c, n in enumerate(counts):
        members = [int(i) for i in order if images.targets[i] == c]
        expected |= {i for rank, i in enumerate(members) if rank / n < fraction}
    assert set(np.flatnonzero(splits._held_out(images, fraction)).tolist()) == expected


def test_training_images_are_labelled_and_not_held_out(tmp_path: Path) -> None:
    data = trees.touch(tmp_path, [*TRAIN, *TEST])
    training, held_out = training_images(TrainConfig(data=str(data), holdout=0.5))
    assert len(training) == len(held_out) == 2
    assert set(training.paths) | set(held_out.paths) == set(TRAIN)
