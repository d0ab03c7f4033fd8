"""Lists that contradict themselves are refused by every reader, and their encoding and line ends do not matter."""

import codecs
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy")

from scipy.io import loadmat, savemat

from fgfast.compare.store import read_rows as compare_rows
from fgfast.compare.store import store_row
from fgfast.data.layouts import ImageSet, open_images
from fgfast.data.layouts.text import check_paths, check_unique, integer, number
from fgfast.data.maps import read_maps_info, write_maps_info
from fgfast.errors import UserError
from tests.data import trees

FIRST, SECOND, THIRD = trees.HASHES
Defect = Callable[[Path], object]


def cassava(root: Path) -> Path:
    """The set with the lists of a split."""
    names = [f"{c}/train-{c}-{i}.jpg" for c in ("cbb", "healthy") for i in range(5)]
    trees.lists(
        trees.cassava(root),
        images="".join(f"{i} {name}\n" for i, name in enumerate(names, 1)),
        train_test_split="".join(f"{i} {i % 2}\n" for i in range(1, 11)),
    )
    return root


def append(name: str, line: str) -> Defect:
    return lambda root: (root / name).write_text((root / name).read_text() + line + "\n")


def change(name: str, before: str, after: str) -> Defect:
    """Change the first occurrence of a text in a list."""

    def corrupt(root: Path) -> None:
        text = (root / name).read_text()
        assert before in text
        (root / name).write_text(text.replace(before, after, 1))

    return corrupt


def edit(name: str, action: Callable[[Any], object]) -> Defect:
    """Change what a JSON file holds."""

    def corrupt(root: Path) -> None:
        table = json.loads((root / name).read_text())
        action(table)
        (root / name).write_text(json.dumps(table))

    return corrupt


def mat(name: str, variable: str, action: Callable[[np.ndarray], np.ndarray]) -> Defect:
    """Change a variable of a MATLAB file."""

    def corrupt(root: Path) -> None:
        content = {k: v for k, v in loadmat(root / name, squeeze_me=True).items() if not k.startswith("__")}
        content[variable] = action(content[variable])
        savemat(root / name, content)

    return corrupt


def car(field: str, value: object) -> Defect:
    """Change the second annotation of Stanford Cars' training split."""

    def action(annotations: np.ndarray) -> np.ndarray:
        annotations[field][1] = value
        return annotations

    return mat("devkit/cars_train_annos.mat", "annotations", action)


def pet(line: str) -> Defect:
    return append("annotations/test.txt", line)


def put(i: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def action(values: np.ndarray) -> np.ndarray:
        values = np.atleast_1d(values).astype(float)
        values[i] = value
        return values

    return action


TRAIN, VAL = "train2018.json", "val2018.json"
VARIANTS, BOXES, CUB_BOXES = "data/images_variant_trainval.txt", "data/images_box.txt", "bounding_boxes.txt"
LABELS, SPLIT, LOCS, MARKS = "image_class_labels.txt", "train_test_split.txt", "parts/part_locs.txt", "cars_meta.mat"


@pytest.mark.parametrize(
    ("tree", "corrupt", "message"),
    [
        (trees.cub, append("images.txt", "1 002.B/z.jpg"), r"images\.txt:5: the image 1 is also in .*images\.txt:1"),
        (trees.cub, append("images.txt", "5 001.A/x2.jpg"), r"images\.txt:5: the image 001.A/x2.jpg is also in .*:2"),
        (trees.cub, append("images.txt", "5 001.A/./x2.jpg"), r"images\.txt:5: the image 001.A/x2.jpg is also in .*:2"),
        (trees.cub, append("images.txt", "1_0 002.B/z.jpg"), r"images\.txt:5: '1_0 002\.B/z\.jpg' does not parse"),
        (trees.cub, append(LABELS, "1 2"), r"labels\.txt:5: the image 1 is also in .*labels\.txt:1"),
        (trees.cub, append(LABELS, "5 2"), r"labels\.txt:5: the line names image 5, which images\.txt does not have"),
        (trees.cub, change(LABELS, "3 2", "3 2 2"), r"labels\.txt:3: '3 2 2' does not parse"),
        (trees.cub, change(LABELS, "3 2", "3 7"), r"labels\.txt:3: 002\.B/y1\.jpg has class 7, which"),
        (trees.cub, append(SPLIT, "1 0"), r"split\.txt:5: the image 1 is also in .*split\.txt:1"),
        (trees.cub, change(SPLIT, "2 0", "2 0.5"), r"split\.txt:2: the split 0\.5 must hold 0"),
        (trees.cub, change(SPLIT, "2 0", "2 True"), r"split\.txt:2: '2 True' does not parse"),
        (trees.cub, append("classes.txt", "2 003.C"), r"classes\.txt:3: the class 2 is also in .*:2"),
        (trees.cub, append("classes.txt", "3 001.A"), r"classes\.txt:3: the class 001\.A is also in .*:1"),
        (trees.cub, append(CUB_BOXES, "1 1 2 3 4"), r"boxes\.txt:5: the image 1 is also in .*boxes\.txt:1"),
        (trees.cub, change(CUB_BOXES, "2 1.5 2 3 4", "2 1.5 2 -3 4"), r"boxes\.txt:2: the box is -3 x 4 pixels"),
        (trees.cub, change(CUB_BOXES, "2 1.5 2 3 4", "2 1.5 2 0 4"), r"boxes\.txt:2: the box is 0 x 4 pixels"),
        (trees.cub, change(CUB_BOXES, "2 1.5 2 3 4", "2 inf 2 3 4"), r"boxes\.txt:2: '2 inf 2 3 4' does not parse"),
        (trees.cub, append("parts/parts.txt", "1 tail"), r"parts\.txt:3: the part 1 is also in .*:1"),
        (trees.cub, append("parts/parts.txt", "3 beak"), r"parts\.txt:3: the part beak is also in .*:1"),
        (trees.cub, append(LOCS, "2 1 5 5 1"), r"locs\.txt:9: the image and part 2 1 is also in .*locs\.txt:3"),
        (trees.cub, append(LOCS, "9 1 5 5 1"), r"locs\.txt:9: the line names image 9"),
        (trees.cub, append(LOCS, "2 3 5 5 1"), r"locs\.txt:9: parts\.txt does not have part 3"),
        (trees.cub, change(LOCS, "1 1 1.25 1 1", "1 1 1.25 1 2"), r"locs\.txt:1: visible is 2: give 0"),
        (trees.nabirds, append("images.txt", f"{FIRST} x/z.jpg"), rf"images\.txt:4: the image {FIRST} is also in .*:1"),
        (trees.nabirds, append("hierarchy.txt", "817 0"), r"hierarchy\.txt:4: the class 817 is also in .*:2"),
        (trees.nabirds, change("hierarchy.txt", "817 1", "817 1.5"), r"hierarchy\.txt:2: '817 1\.5' does not parse"),
        (
            trees.nabirds,
            lambda root: trees.lists(
                root, classes="0 Birds\n1 Ducks\n817 Oak\n860 Oak\n", hierarchy="1 0\n817 1\n860 1\n"
            ),
            r"classes\.txt, class 860: the class Ducks Oak is also in .*, class 817",
        ),
        (trees.nabirds, append(SPLIT, f"{THIRD} 1"), rf"split\.txt:4: the image {THIRD} is also in .*:3"),
        (cassava, append("images.txt", "11 cbb/train-cbb-0.jpg"), r"images\.txt:11: .*-cbb-0\.jpg is also in .*:1"),
        (cassava, append("images.txt", "1 cbb/new.jpg"), r"images\.txt:11: the image 1 is also in .*:1"),
        (cassava, append(SPLIT, "3 0"), r"split\.txt:11: the image 3 is also in .*:3"),
        (cassava, change(SPLIT, "4 0", "4 2"), r"split\.txt:4: the split 2 must hold 0"),
        (
            cassava,
            lambda root: [append("images.txt", "11 cbb/new.jpg")(root), append(SPLIT, "11 1")(root)],
            r"images\.txt:11: .*train/cbb/new\.jpg is missing",
        ),
        (trees.aircraft, append(VARIANTS, "0000001 F/A-18"), r"trainval\.txt:5: the image 0000001 is also in .*:1"),
        (trees.aircraft, append("data/variants.txt", "F/A-18"), r"variants\.txt:3: the class F/A-18 is also in .*:2"),
        (trees.aircraft, append(BOXES, "0000001 1 1 9 9"), r"box\.txt:7: the image 0000001 is also in .*:1"),
        (trees.aircraft, change(BOXES, "0000002 3 1 12 40", "0000002 3 1 2 40"), r"box\.txt:2: the box is 0 x 40 pix"),
        (trees.cars, car("class", 3), "entry 2 of .* class is 3 of 2"),
        (trees.cars, car("class", 1.5), "entry 2 .* 1.5 is not a wh"),
        (trees.cars, car("class", "x"), "entry 2 .* 'x' is not a n"),
        (trees.cars, car("bbox_x2", 2), "entry 2 .* box is 0 x 17"),
        (trees.cars, car("bbox_x2", np.nan), "entry 2 .* box is nan"),
        (
            trees.cars,
            car("fname", "00001.jpg"),
            r"entry 2 of annotations: the image cars_train/00001\.jpg is also in .*entry 1",
        ),
        (
            trees.cars,
            mat("devkit/cars_meta.mat", "class_names", lambda names: np.array([names[0], names[0]], object)),
            r"cars_meta\.mat, class 2: the class AM General .* is also in .*class 1",
        ),
        (trees.flowers, mat("setid.mat", "tstid", put(1, 6)), "entry 2 of tstid: .* 6 is also in .*entry 1 of trnid"),
        (trees.flowers, mat("setid.mat", "tstid", put(1, 7)), "entry 2 of tstid names image 7 of 6"),
        (trees.flowers, mat("setid.mat", "trnid", put(0, 1.5)), "entry 1 of trnid: 1.5 is not a whole number"),
        (trees.flowers, mat("imagelabels.mat", "labels", put(2, np.nan)), "image 3: nan is not a whole number"),
        (trees.flowers, mat("imagelabels.mat", "labels", put(2, 0)), "a class below 1"),
        (trees.flowers, mat("imagelabels.mat", "labels", put(2, 1e9)), "class 1000000000 but no image of class 4"),
        (trees.pets, pet("Abyssinian_9 1 1 1"), r"test\.txt:3: the image Abyssinian_9 is also"),
        (trees.pets, pet("Abyssinian_1 1 1 1"), r"test\.txt:3: .*1\.jpg is also in .*trainval"),
        (trees.pets, pet("Abyssinian_2 2 1 1"), r"class 2 of .*: the breed Abyssinian is also"),
        (trees.pets, pet("Abyssinian_2 0 1 1"), r"test\.txt:3: 'Abyssinian_2 0 1 1' does not"),
        (trees.pets, pet("Abyssinian_2 1 3 1"), r"test\.txt:3: 'Abyssinian_2 1 3 1' does not"),
        (trees.inaturalist, edit(TRAIN, lambda t: t["images"][1].update(id=11)), "entry 1 of images: .* 11 is also"),
        (
            trees.inaturalist,
            edit(TRAIN, lambda t: t["images"][1].update(file_name=t["images"][0]["file_name"])),
            r"entry 1 of images: the image .*000b\.jpg is also in .*entry 0",
        ),
        (
            trees.inaturalist,
            edit(VAL, lambda t: t["images"][0].update(file_name="train_val2018/Aves/4/000b.jpg")),
            r"val2018\.json, entry 0 of images: the image .* is also in .*train2018\.json, entry 0",
        ),
        (trees.inaturalist, edit(TRAIN, lambda t: t["images"][1].update(id=[3])), r"\(images\[1\]\.id: expected"),
        (trees.inaturalist, edit(TRAIN, lambda t: t["images"][1].update(file_name=None)), r"\[1\]\.file_name: exp"),
        (trees.inaturalist, edit(TRAIN, lambda t: t["categories"][1].update(id=4)), "entry 1: .* 4 is also in"),
        (trees.inaturalist, edit(VAL, lambda t: t["categories"][1].update(name="x")), "category 2 .* 'x', .*'Bufo"),
        (
            trees.inaturalist,
            lambda root: [
                edit(name, lambda t: t["categories"][1].update(t["categories"][0] | {"id": 2}))(root)
                for name in (TRAIN, VAL)
            ],
            "category 4: the category Aves Anas crecca is also in .*category 2: keep",
        ),
        (trees.inaturalist, edit(TRAIN, lambda t: t["annotations"][0].update(category_id="4")), r"\[0\]\.category_id"),
        (trees.inaturalist, edit(TRAIN, lambda t: t["annotations"][0].update(image_id=99)), "0 .* 99 is not listed"),
        (
            trees.inaturalist,
            edit(TRAIN, lambda t: t["annotations"].append({"image_id": 11, "category_id": 2})),
            "entry 3 of annotations: .*000b.jpg has another category too",
        ),
    ],
)  # fmt: skip
def test_a_contradiction_is_named(tmp_path: Path, tree: Callable[[Path], Path], corrupt: Defect, message: str) -> None:
    root = tree(tmp_path / "set")
    corrupt(root)
    with pytest.raises(UserError, match=message) as caught:
        open_images(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["../x.jpg", "a/../../x.jpg", "/etc/x.jpg", "..\\x.jpg", "\\x.jpg", "."])
@pytest.mark.parametrize(
    ("tree", "corrupt"),
    [
        (trees.cub, lambda path: change("images.txt", "001.A/x 1.jpg", path)),
        (trees.nabirds, lambda path: change("images.txt", f"0817/{FIRST.replace('-', '')}.jpg", path)),
        (cassava, lambda path: change("images.txt", "cbb/train-cbb-0.jpg", path)),
        (trees.inaturalist, lambda path: edit(TRAIN, lambda table: table["images"][0].update(file_name=path))),
    ],
)
def test_a_path_that_leaves_the_set_is_refused(
    tmp_path: Path, tree: Callable[[Path], Path], corrupt: Callable[[str], Defect], path: str
) -> None:
    root = tree(tmp_path / "set")
    corrupt(path)(root)
    with pytest.raises(UserError, match=rf"(:1|entry 0 of images): the path {re.escape(repr(path))} leaves the folder"):
        open_images(root)


@pytest.mark.parametrize(
    ("tree", "corrupt"),
    [
        (trees.aircraft, change(VARIANTS, "0000001", "../0000001")),
        (trees.pets, pet("../Bengal_1 3 1 3")),
        (trees.cars, car("fname", "../../x.jpg")),
        (trees.cars, car("fname", "/etc/x.jpg")),
    ],
)
def test_an_image_name_that_leaves_the_set_is_refused(
    tmp_path: Path, tree: Callable[[Path], Path], corrupt: Defect
) -> None:
    root = tree(tmp_path / "set")
    corrupt(root)
    with pytest.raises(UserError, match="leaves the folder of the set"):
        open_images(root)


def plain(images: ImageSet) -> list[object]:
    arrays = (images.boxes, images.keypoints)
    return [
        images.paths, images.targets.tolist(), images.classes, images.groups, images.train.tolist(), images.part_names,
        *(None if values is None else np.nan_to_num(values, nan=-1).tolist() for values in arrays),
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("tree", [cassava, trees.cub, trees.nabirds, trees.aircraft, trees.pets, trees.inaturalist])
def test_byte_order_marks_and_line_ends_do_not_matter(
    tmp_path: Path, tree: Callable[[Path], Path], encoding: str
) -> None:
    root = tree(tmp_path / "set")
    expected = plain(open_images(root))
    for path in [*root.rglob("*.txt"), *root.rglob("*.json")]:
        lines = path.read_text().splitlines()
        if path.suffix == ".txt":
            lines = [line if path.name == "variants.txt" else line.replace(" ", "\t", 1) + " \t" for line in lines]
        path.write_bytes("\r\n".join([*lines, "", "  ", ""]).encode(encoding))
    assert plain(open_images(root)) == expected


def test_byte_order_marks_of_maps_and_comparisons_do_not_matter(tmp_path: Path) -> None:
    write_maps_info(tmp_path, 3, (4, 5), "test")
    store_row(tmp_path, {"data": "birds", "method": "simclr", "seed": 0}, [])
    before = read_maps_info(tmp_path), compare_rows(tmp_path)
    for name in ("maps.json", "compare.csv"):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + (tmp_path / name).read_bytes())
    assert (read_maps_info(tmp_path), compare_rows(tmp_path)) == before


def test_utf_8_without_an_end_is_named(tmp_path: Path) -> None:
    (trees.cub(tmp_path) / "classes.txt").write_bytes(b"1 001.A\n2 002.B\xff\n")
    with pytest.raises(UserError, match=r"classes\.txt cannot be read \(.*0xff"):
        open_images(tmp_path)


def test_only_line_ends_end_a_line(tmp_path: Path) -> None:
    root = trees.cub(tmp_path)
    change("images.txt", "001.A/x2.jpg", "001.A/x\x0c\x85\u20282.jpg")(root)
    assert open_images(root).paths[1] == "001.A/x\x0c\x85\u20282.jpg"


@pytest.mark.parametrize("bbox", [None, [], [None] * 4, [1, 2, 0, 4]])
def test_an_empty_box_of_inaturalist_is_no_box(tmp_path: Path, bbox: object) -> None:
    root = trees.inaturalist(tmp_path)
    edit(TRAIN, lambda t: [t["annotations"][0].update(bbox=bbox), t["annotations"][1].update(bbox=[1, 2, 3, 4])])(root)
    boxes = open_images(root).boxes
    assert boxes is not None
    assert np.isnan(boxes[[0, 2, 3, 4]]).all()
    assert boxes[1].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "bbox",
    [[1, 2, 3], [1, 2, 3, None], [1, 2, 3, "4"], [1, 2, -3, 4], {"x": 1}, "1 2 3 4", 7, [1, 2, 3, 1e300], True, 0, ""],
)
def test_a_malformed_box_of_inaturalist_is_named(tmp_path: Path, bbox: object) -> None:
    root = trees.inaturalist(tmp_path)
    edit(VAL, lambda table: table["annotations"][1].update(bbox=bbox))(root)
    with pytest.raises(UserError, match=r"val2018\.json, entry 1 of annotations: bbox is .*: give x, y, width"):
        open_images(root)


def test_infinite_boxes_of_inaturalist_are_named(tmp_path: Path) -> None:
    root = trees.inaturalist(tmp_path)
    edit(VAL, lambda table: table["annotations"][1].update(bbox=[1, 2, float("nan"), float("inf")]))(root)
    with pytest.raises(UserError, match=r"val2018\.json cannot be read \(NaN is not a finite number\)"):
        open_images(root)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12))
def test_the_first_repeated_value_is_named_with_both_places(values: list[int]) -> None:
    repeats = [(i, values.index(v)) for i, v in enumerate(values) if v in values[:i]]
    if not repeats:
        check_unique(values, "image", str)
        return
    i, first = repeats[0]
    with pytest.raises(UserError, match=f"^{i}: the image {values[i]} is also in {first}: keep one"):
        check_unique(values, "image", str)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", ".", "", "..", "c.jpg", "/"]), min_size=1, max_size=5))
def test_accepted_paths_stay_in_the_folder_and_are_in_their_shortest_form(parts: list[str]) -> None:
    path = "/".join(parts)
    try:
        (short,) = check_paths([path], str)
    except UserError:
        assert ".." in parts or path.startswith("/") or not {*parts} - {".", "", "/"}
        return
    assert Path("/set", short) == Path("/set", path)
    assert not {"..", ".", ""} & set(short.split("/"))


@settings(max_examples=50, deadline=None)
@given(st.text(st.sampled_from("0123456789+-_.einfa\u0661x "), min_size=1, max_size=6))
def test_numbers_in_lists_are_finite_and_in_plain_digits(text: str) -> None:
    for convert in (integer, number):
        try:
            value = convert(text)
        except ValueError:
            continue
        assert np.isfinite(value)
        assert "_" not in text
        assert convert is number or re.fullmatch("[+-]?[0-9]+", text)
