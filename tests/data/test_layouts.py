"""Layouts: CUB-200-2011's lists and image folders are read, and every defect has its one-sentence error."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fgfast.data.layouts import ImageSet, open_images
from fgfast.errors import UserError
from tests.data import trees


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (10, 20, 30)).save(path)


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    return trees.cub(tmp_path)


def test_cub_lists_are_read(cub: Path) -> None:
    images = open_images(cub)
    assert images.paths[0] == "001.A/x 1.jpg"
    assert images.targets.tolist() == [0, 0, 1, 1]
    assert images.classes == ("001.A", "002.B")
    assert images.part_names == ("beak", "left eye")
    assert images.boxes is not None
    assert images.boxes[2].tolist() == [1.5, 2, 3, 4]
    assert images.keypoints is not None
    assert images.keypoints[3, 1].tolist() == [4.25, 2, 1]
    assert images.masks is None
    assert images.train_set().paths == ("001.A/x 1.jpg", "002.B/y1.jpg")
    assert images.test_set().targets.tolist() == [0, 1]
    assert images.subset([3, 0]).keypoints is not None
    assert images.subset([3, 0]).paths == ("002.B/y2.jpg", "001.A/x 1.jpg")


def test_part_masks_are_found(cub: Path) -> None:
    (cub / "part_masks").mkdir()
    assert open_images(cub).masks == cub / "part_masks"


def test_boxes_and_parts_are_optional(cub: Path) -> None:
    (cub / "bounding_boxes.txt").unlink()
    for file in (cub / "parts").iterdir():
        file.unlink()
    (cub / "parts").rmdir()
    images = open_images(cub)
    assert images.boxes is None
    assert images.keypoints is None


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(text) and None


def drop(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (drop("classes.txt"), r"classes\.txt is missing"),
        (drop("train_test_split.txt"), r"train_test_split\.txt is missing"),
        (drop("parts/part_locs.txt"), r"part_locs\.txt is missing"),
        (write("image_class_labels.txt", "1 1\n2 one\n3 2\n4 2\n"), r"image_class_labels\.txt:2: '2 one'"),
        (write("bounding_boxes.txt", "1 1 2 3 4\n\n2 1 2 3\n"), r"bounding_boxes\.txt:3: "),
        (write("bounding_boxes.txt", "1 1 2 3 nan\n"), r"bounding_boxes\.txt:1: "),
        (write("images.txt", "1\n"), r"images\.txt:1: "),
        (write("images.txt", ""), "lists no image"),
        (write("images.txt", "1 a.jpg\n1 b.jpg\n"), r"images\.txt:2: the image 1 is also in .*images\.txt:1"),
        (write("image_class_labels.txt", "1 1\n2 1\n3 2\n"), "no line for image 4"),
        (write("image_class_labels.txt", "1 1\n2 1\n3 2\n4 2\n5 2\n"), "names image 5"),
        (write("image_class_labels.txt", "1 1\n2 1\n3 2\n4 7\n"), "class 7, which .* does not name"),
        (write("image_class_labels.txt", "1 1\n2 1.5\n3 2\n4 2\n"), "class 1.5, which"),
        (write("classes.txt", "1 001.A\n2 002.B\n3 003.C\n"), r"Class 003\.C .* has no image"),
        (write("train_test_split.txt", "1 1\n2 2\n3 1\n4 0\n"), "must hold 0"),
        (write("parts/part_locs.txt", "1 9 1 1 1\n"), r"part_locs\.txt:1: .*part 9"),
    ],
)
def test_a_defect_of_cub_is_named(cub: Path, corrupt: Callable[[Path], None], message: str) -> None:
    corrupt(cub)
    with pytest.raises(UserError, match=message):
        open_images(cub)


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_folder_with_splits(tmp_path: Path, held_out: str) -> None:
    for rel in (
        "train/b/1.jpg",
        "train/a/deep/2.PNG",
        f"{held_out}/a/3.jpg",
        "train/a/notes.txt",
        "train/a/.hidden.jpg",
    ):
        write_image(tmp_path / rel) if rel[-3:] != "txt" else (tmp_path / rel).write_text("")
    images = open_images(tmp_path)
    assert images.paths == ("train/a/deep/2.PNG", "train/b/1.jpg", f"{held_out}/a/3.jpg")
    assert images.targets.tolist() == [0, 1, 0]
    assert images.train.tolist() == [True, True, False]


def test_class_folders_without_splits_and_images_without_folders(tmp_path: Path) -> None:
    write_image(tmp_path / "classes" / "x" / "1.jpg")
    write_image(tmp_path / "classes" / "y" / "2.jpg")
    write_image(tmp_path / "flat" / "1.jpg")
    images: ImageSet = open_images(tmp_path / "classes")
    assert images.classes == ("x", "y")
    assert images.train.all()
    assert open_images(tmp_path / "flat").classes == ("unlabelled",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "holds no images"),
        (("train/a/1.jpg",), "neither val/ nor test/"),
        (("a/1.jpg", "b/readme.txt"), "Class folder .*b has no image"),
        (("train/a/1.jpg", "train/b/x.txt", "val/a/1.jpg"), "Class folder .*b has no image"),
        (("train/a/1.jpg", "val/z/1.jpg"), "Class z .* not in train"),
        (("train/x.jpg", "val/a/1.jpg"), "has no class folder"),
        (("1.jpg", "a/1.jpg"), "mixes images and folders"),
    ],
)
def test_a_defect_of_an_image_folder_is_named(tmp_path: Path, files: tuple[str, ...], message: str) -> None:
    for rel in files:
        if rel.endswith("txt"):
            (tmp_path / rel).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / rel).write_text("")
        else:
            write_image(tmp_path / rel)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/nowhere does not exist"):
        open_images("/nowhere")
    (tmp_path / "list.txt").touch()
    with pytest.raises(UserError, match=r"list.txt is a file: give the folder"):
        open_images(tmp_path / "list.txt")


def test_a_sample_is_random_in_the_order_of_the_set_and_the_same_again() -> None:
    images = ImageSet(Path("set"), tuple(f"{i:02}.png" for i in range(30)), np.zeros(30), ("a",), np.zeros(30, bool))
    drawn = [images.sample(10, seed).paths for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for paths in drawn:
        assert len(set(paths)) == 10
        assert list(paths) == sorted(paths) != list(images.paths[:10])
    assert images.sample(40).paths == images.paths


def test_photographs_of_birds(photographs: ImageSet) -> None:
    assert len(photographs) == 2889
    assert len(photographs.classes) == 50
    assert photographs.train.sum() == 1500
    assert photographs.keypoints is not None
    assert photographs.keypoints.shape == (2889, 15, 3)
    assert np.isclose(photographs.keypoints[:, :, 2].sum(1).mean(), 11.7, atol=0.05)
