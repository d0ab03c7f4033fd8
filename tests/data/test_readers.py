"""Readers of the official layouts: their results, and the one-sentence error for a missing or malformed file."""

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copy

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("scipy")

from fgfast.data.layouts import LAYOUTS, ImageSet, open_images
from fgfast.data.loader import make_loader
from fgfast.data.maps import map_sizes, read_map, read_maps_info
from fgfast.data.views import ViewSpec
from fgfast.errors import UserError
from tests.data import trees


def named(images: ImageSet) -> list[tuple[str, str]]:
    return [(rel, images.classes[t] if t >= 0 else "-") for rel, t in zip(images.paths, images.targets, strict=True)]


def test_unlabelled_images_of_cassava_are_only_for_training(tmp_path: Path) -> None:
    images = open_images(trees.cassava(tmp_path))
    assert images.classes == ("cbb", "healthy")
    assert images.paths[-3:] == tuple(f"extraimages/extra-image-{i}.jpg" for i in range(3))
    assert images.targets.tolist() == [0] * 5 + [1] * 5 + [-1] * 3
    assert images.test_set().paths == ("train/cbb/train-cbb-3.jpg", "train/healthy/train-healthy-3.jpg")
    assert len(images.train_set()) == 8
    assert images.train.sum() == 11
    assert not any("test-img" in rel for rel in images.paths)


def test_cassava_uses_the_split_of_the_lists(tmp_path: Path) -> None:
    names = [f"{c}/train-{c}-{i}.jpg" for c in ("healthy", "cbb") for i in range(5)]
    trees.lists(
        trees.cassava(tmp_path),
        images="".join(f"{n} {name}\n" for n, name in enumerate(names, 1)),
        train_test_split="".join(f"{n} {int(n not in (2, 10))}\n" for n in range(1, 11)),
    )
    assert open_images(tmp_path).test_set().paths == ("train/cbb/train-cbb-4.jpg", "train/healthy/train-healthy-1.jpg")


def test_class_folders_of_cassava_may_be_in_the_root(tmp_path: Path) -> None:
    trees.cassava(tmp_path)
    for folder in (tmp_path / "train").iterdir():
        folder.rename(tmp_path / folder.name)
    (tmp_path / "train").rmdir()
    images = open_images(tmp_path)
    assert (images.classes, images.paths[0], len(images)) == (("cbb", "healthy"), "cbb/train-cbb-0.jpg", 13)


@pytest.mark.parametrize("root", ["", "data"])
def test_aircraft_lists_are_read(tmp_path: Path, root: str) -> None:
    images = open_images(trees.aircraft(tmp_path) / root)
    assert named(images)[1] == ("0000002.jpg", "F/A-18")
    assert images.train.tolist() == [True] * 4 + [False] * 2
    assert images.boxes is not None
    assert images.boxes[0].tolist() == [2, 0, 9, 40]  # corners (3, 1) and (11, 40), 1-based and inclusive
    assert images.root == tmp_path / "data" / "images"


def test_aircraft_without_trainval_reads_train_and_val(tmp_path: Path) -> None:
    trainval = open_images(trees.aircraft(tmp_path))
    (tmp_path / "data" / "images_variant_trainval.txt").unlink()
    separate = open_images(tmp_path)
    assert (separate.paths, separate.train.tolist()) == (trainval.paths, trainval.train.tolist())


def test_aircraft_has_levels(tmp_path: Path) -> None:
    assert open_images(trees.aircraft(tmp_path), level="family").classes == ("Boeing 707", "F/A-18")
    with pytest.raises(UserError, match=r"manufacturers\.txt is missing"):
        open_images(tmp_path, level="manufacturer")
    with pytest.raises(UserError, match="no level 'wing'"):
        open_images(tmp_path, level="wing")
    with pytest.raises(UserError, match="no levels"):
        open_images(trees.flowers(tmp_path / "flowers"), level="family")


@pytest.mark.parametrize("backend", ["auto", "torchvision"])
@pytest.mark.parametrize("center", [None, 0.99])
def test_no_view_shows_the_banner_of_an_aircraft(tmp_path: Path, backend: str, center: float | None) -> None:
    """Photographs are black, the 20 rows at the bottom white: every pixel of every view is black."""
    trees.aircraft(tmp_path)
    for path in (tmp_path / "data" / "images").iterdir():
        image = np.zeros((60, 64, 3), np.uint8)
        image[40:] = 255
        Image.fromarray(image).save(path.with_suffix(".png"))
        path.with_suffix(".png").rename(path)
    spec = ViewSpec(whole=16, center=center, mean=(0, 0, 0), std=(1, 1, 1))
    loader = make_loader(open_images(tmp_path), spec, 6, shuffle=False, threads=1, backend=backend)
    whole = next(iter(loader)).whole
    loader.close()
    assert whole is not None
    assert whole[:, :, :15].max() == 0
    assert whole.max() < 0.6  # resizing may blend the last row with the one below


@pytest.mark.parametrize("labels_in_devkit", [False, True])
def test_cars_annotations_are_read(tmp_path: Path, labels_in_devkit: bool) -> None:
    images = open_images(trees.cars(tmp_path, labels_in_devkit))
    assert named(images) == [
        ("cars_train/00001.jpg", "Acura RL Sedan 2012"),
        ("cars_train/00002.jpg", "AM General Hummer SUV 2000"),
        ("cars_test/00001.jpg", "AM General Hummer SUV 2000"),
    ]
    assert images.train.tolist() == [True, True, False]
    assert images.boxes is not None
    assert images.boxes.tolist() == [[0, 1, 10, 11], [2, 3, 28, 17], [4, 5, 11, 11]]


def test_flowers_splits_are_read(tmp_path: Path) -> None:
    images = open_images(trees.flowers(tmp_path))
    assert images.train_set().paths == ("image_00006.jpg", "image_00002.jpg", "image_00001.jpg")
    assert images.test_set().paths == ("image_00003.jpg", "image_00004.jpg", "image_00005.jpg")
    assert images.targets.tolist() == [2, 0, 1, 2, 0, 1]
    assert images.classes == ("1", "2", "3")


def test_pets_and_their_trimaps(tmp_path: Path) -> None:
    images = open_images(trees.pets(tmp_path / "pets"))
    assert named(images) == [
        ("Abyssinian_1.jpg", "Abyssinian"), ("great_pyrenees_2.jpg", "great_pyrenees"),
        ("great_pyrenees_1.jpg", "great_pyrenees"), ("Abyssinian_9.jpg", "Abyssinian"),
    ]  # fmt: skip
    assert images.train.tolist() == [True, True, False, False]
    assert images.masks is not None
    assert not images.masks.is_relative_to(tmp_path)
    ids = read_map(images.masks, "Abyssinian_1.jpg")
    assert (ids[:, :10] == 0).all()
    assert (ids[:, 10:12] == 255).all()
    assert (ids[:, 12:] == 1).all()
    assert read_maps_info(images.masks)["n_parts"] == 2
    assert map_sizes(images.masks, images.paths).tolist() == [[24, 32]] * 4


def test_trimaps_are_converted_once_and_again_when_they_change(tmp_path: Path) -> None:
    masks = open_images(trees.pets(tmp_path)).masks
    assert masks is not None
    before = (masks / "maps.json").stat().st_mtime_ns
    assert open_images(tmp_path).masks == masks
    assert (masks / "maps.json").stat().st_mtime_ns == before
    trimap = tmp_path / "annotations" / "trimaps" / "Abyssinian_1.png"
    trimap.unlink()
    Image.fromarray(np.ones((24, 32), np.uint8)).save(trimap)
    assert open_images(tmp_path).masks == masks
    assert (read_map(masks, "Abyssinian_1.jpg") == 0).all()


@pytest.mark.parametrize("year", ["", "2017", "2018", "2019", "2021"])
def test_inaturalist_of_every_year(tmp_path: Path, year: str) -> None:
    images = open_images(trees.inaturalist(tmp_path, year))
    assert images.classes == ("Bufo bufo", "Anas crecca")
    assert images.groups == ("Amphibia", "Aves")
    assert images.targets.tolist() == [1, 0, 1, 0, 1]
    assert images.train.tolist() == [True] * 3 + [False] * 2
    assert images.boxes is None
    assert all((tmp_path / rel).is_file() for rel in images.paths)


def test_inaturalist_boxes_and_names_are_read_from_separate_files(tmp_path: Path) -> None:
    trees.inaturalist(tmp_path, "2017")
    boxes = [
        {"image_id": 12, "bbox": [1, 2, 3, 4]},
        {"image_id": 12, "bbox": [5, 6, 7, 8]},
        {"image_id": 12, "bbox": [0, 0, 1, 1]},
    ]
    (tmp_path / "train_2017_bboxes.json").write_text(json.dumps({"annotations": boxes}))
    (tmp_path / "categories.json").write_text(json.dumps([{"id": 2, "name": "Common toad"}]))
    images = open_images(tmp_path)
    assert images.classes == ("Common toad", "Anas crecca")
    assert images.boxes is not None
    assert images.boxes[1].tolist() == [5, 6, 7, 8]
    assert np.isnan(images.boxes[[0, 2, 3, 4]]).all()


def test_inaturalist_mini_replaces_train(tmp_path: Path) -> None:
    trees.inaturalist(tmp_path, "")
    (tmp_path / "train.json").rename(tmp_path / "train_mini.json")
    assert len(open_images(tmp_path).train_set()) == 3


def test_nabirds_lists_are_read(tmp_path: Path) -> None:
    images = open_images(trees.nabirds(tmp_path))
    assert images.classes == ("Oak Titmouse", "Bald Eagle (Adult, subadult)")
    assert images.groups == ("Ducks, Geese, and Swans", "Birds")
    assert images.targets.tolist() == [0, 1, 0]
    assert images.train.tolist() == [True, True, False]
    assert images.boxes is not None
    assert images.boxes[1].tolist() == [0, 0, 5, 6]
    assert images.keypoints is not None
    assert images.part_names == ("bill", "crown")
    assert images.keypoints[0, 0].tolist() == [5, 6, 1]
    assert images.keypoints[1, 1, 2] == 0


def drop(name: str) -> Callable[[Path], None]:
    def corrupt(root: Path) -> None:
        path = root / name
        path.unlink() if path.is_file() else path.rename(root.parent / "elsewhere")

    return corrupt


def put(name: str, text: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(text) and None


def empty(name: str) -> Callable[[Path], None]:
    return lambda root: [path.unlink() for path in (root / name).iterdir()] and None


def both(*defects: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda root: [corrupt(root) for corrupt in defects] and None


@pytest.mark.parametrize(
    ("tree", "corrupt", "message"),
    [
        (trees.cassava, empty("extraimages"), "extraimages holds no image"),
        (trees.cassava, empty("train/cbb"), "Class folder .*cbb has no image"),
        (trees.cassava, put("train_test_split.txt", "1 1\n"), r"images\.txt is missing"),
        (trees.cassava, both(put("images.txt", "1 a.jpg\n"), put("train_test_split.txt", "1 1\n")), "not list cbb/"),
        (trees.cassava, both(put("images.txt", "\n"), put("train_test_split.txt", "")), r"images\.txt lists no image"),
        (trees.cassava, both(put("images.txt", "1 cbb/a.jpg\n"), put("train_test_split.txt", "1 2\n")), "must hold 0"),
        (trees.aircraft, drop("data/images_variant_test.txt"), r"images_variant_test\.txt is missing"),
        (trees.aircraft, drop("data/variants.txt"), r"variants\.txt is missing"),
        (
            trees.aircraft,
            both(drop("data/images_variant_trainval.txt"), drop("data/images_variant_val.txt")),
            r"images_variant_val\.txt is missing",
        ),
        (trees.aircraft, put("data/images_variant_test.txt", "0000005\n"), r"images_variant_test\.txt:1: '0000005'"),
        (trees.aircraft, put("data/images_variant_test.txt", "0000005 737\n"), "class '737', which variants.txt lacks"),
        (trees.aircraft, put("data/images_variant_test.txt", "0000001 F/A-18\n"), "0000001.jpg is also in .*:1"),
        (trees.aircraft, put("data/images_box.txt", "0000001 1 2 3\n"), r"images_box\.txt:1"),
        (trees.aircraft, put("data/images_box.txt", "0000001 1 2 3 4\n"), "no line for image 0000002"),
        (trees.cars, drop("cars_test_annos_withlabels.mat"), "cars_test_annos_withlabels.mat is missing"),
        (trees.cars, drop("devkit/cars_meta.mat"), "cars_meta.mat is missing"),
        (trees.cars, put("devkit/cars_train_annos.mat", "none"), "cars_train_annos.mat is not a readable MATLAB file"),
        (trees.cars, lambda r: (r / "devkit/cars_meta.mat").replace(r / "devkit/cars_train_annos.mat"), "is missing"),
        (
            trees.cars,
            lambda r: (r / "devkit/cars_test_annos.mat").replace(r / "cars_test_annos_withlabels.mat"),
            "no field 'class'",
        ),
        (trees.cars, drop("cars_test"), "cars_test is missing"),
        (trees.flowers, drop("setid.mat"), "setid.mat is missing"),
        (trees.flowers, drop("imagelabels.mat"), "imagelabels.mat is missing"),
        (trees.flowers, lambda r: (r / "imagelabels.mat").replace(r / "setid.mat"), "imagelabels.mat is missing"),
        (trees.flowers, lambda r: copy(r / "imagelabels.mat", r / "setid.mat"), "variable 'trnid'"),
        (trees.flowers, drop("jpg"), "jpg is missing"),
        (trees.pets, drop("annotations/test.txt"), r"test\.txt is missing"),
        (trees.pets, put("annotations/test.txt", "Abyssinian_9 1 1\n"), r"test\.txt:1: 'Abyssinian_9 1 1'"),
        (trees.pets, put("annotations/test.txt", "Bengal_9 1 1 1\n"), "class 1 to Abyssinian and to Bengal"),
        (trees.pets, drop("annotations/trimaps/Abyssinian_9.png"), "Abyssinian_9.png is missing"),
        (trees.pets, put("annotations/trimaps/Abyssinian_9.png", "none"), "Abyssinian_9.png is not a readable trimap"),
        (trees.inaturalist, drop("val2018.json"), r"val2018\.json is missing"),
        (trees.inaturalist, drop("train2018.json"), r"train2018\.json is missing"),
        (trees.inaturalist, put("val2018.json", '{"images": [],\n"x"}'), r"val2018\.json .* \(line 2, column 4"),
        (trees.inaturalist, put("val2018.json", '{"images": []}'), "missing required field `categories`"),
        (trees.inaturalist, put("val2018.json", '{"images": [{"id": 3}]}'), r"\(images\[0\]: .* `file_name`"),
        (trees.inaturalist, put("val2019.json", "{}"), r"several years \(2018, 2019\)"),
        (
            trees.inaturalist,
            put("val2018.json", '{"images": [{"id": 3, "file_name": "a.jpg"}], "categories": [], "annotations": []}'),
            "no annotation for a.jpg",
        ),
        (trees.nabirds, put("hierarchy.txt", "1 0\n817 1\n860 817\n"), "817, which has children"),
        (trees.nabirds, put("hierarchy.txt", "1 0\n817 1\n"), "no parent for class 860"),
        (trees.nabirds, put("hierarchy.txt", "1 0\n817\n"), r"hierarchy\.txt:2: '817'"),
        (trees.nabirds, drop("train_test_split.txt"), r"train_test_split\.txt is missing"),
        (trees.nabirds, put("train_test_split.txt", f"{trees.HASHES[0]} 1\n"), f"line for image {trees.HASHES[1]}"),
        (trees.nabirds, put("bounding_boxes.txt", "00019306 1 2 3 4\n"), "names image 00019306"),
    ],
)  # fmt: skip
def test_a_defect_is_named(
    tmp_path: Path, tree: Callable[[Path], Path], corrupt: Callable[[Path], object], message: str
) -> None:
    root = tree(tmp_path / "set")
    corrupt(root)
    with pytest.raises(UserError, match=message) as caught:
        open_images(root)
    assert "\n" not in str(caught.value)
    assert ": " in str(caught.value)  # problem: remedy


def test_a_folder_without_a_known_layout_lists_them(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("")
    with pytest.raises(UserError, match="no images and no list of a known layout") as caught:
        open_images(tmp_path)
    assert all(layout.name in str(caught.value) and layout.sign in str(caught.value) for layout in LAYOUTS)
