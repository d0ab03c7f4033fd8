"""Data sets with lists in MATLAB files: Stanford Cars and Oxford Flowers 102."""

from pathlib import Path
from typing import Any

import numpy as np

from fgfast.data.imageset import ImageSet, LeftOut
from fgfast.data.layouts.text import Place, check_boxes, check_paths, check_unique, corner_boxes
from fgfast.errors import UserError


def read_cars(root: Path) -> ImageSet:
    """Stanford Cars: devkit/cars_{meta,train_annos}.mat, cars_test_annos_withlabels.mat, cars_train/, cars_test/.

    The labels of the test split are beside devkit/ or in it. Boxes in the files are corners, 1-based and inclusive.

    Source: Krause et al., "3D Object Representations for Fine-Grained Categorization", ICCV workshops 2013.
    """
    kit = root / "devkit"
    classes = tuple(str(name) for name in _vector(kit / "cars_meta.mat", "class_names"))
    check_unique(classes, "class", lambda i: f"{kit / 'cars_meta.mat'}, class {i + 1}")
    test = kit / "cars_test_annos_withlabels.mat"
    if not test.is_file():
        test = root / test.name
    if not test.is_file():
        raise UserError(f"{test} is missing, also from devkit/ (cars_test_annos.mat has no labels): download it.")
    paths: list[str] = []
    places: list[str] = []
    targets, corners, train = [], [], []
    for file, folder in ((kit / "cars_train_annos.mat", "cars_train"), (test, "cars_test")):
        annotations = _vector(file, "annotations")
        names = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
        fields = annotations.dtype.names or ()
        missing = next((n for n in (*names, "class", "fname") if n not in fields), None)
        if missing is not None:
            raise UserError(f"{file} has no field {missing!r} in its annotations: restore the file.")
        here = [f"{file}, entry {i + 1} of annotations" for i in range(len(annotations))]
        numbers = _integers(annotations["class"], here.__getitem__)
        wrong = np.flatnonzero((numbers < 1) | (numbers > len(classes)))
        if len(wrong):
            raise UserError(
                f"{here[wrong[0]]}: the class is {numbers[wrong[0]]} of {len(classes)}: "
                "restore the file, or cars_meta.mat."
            )
        if not (root / folder).is_dir():
            raise UserError(f"{root / folder} is missing: unpack the images there.")
        paths += [f"{folder}/{name}" for name in annotations["fname"]]
        targets.append(numbers - 1)
        corners.append(np.stack([_floats(annotations[name], here.__getitem__) for name in names], 1))
        places += here
        train.append(np.full(len(annotations), folder == "cars_train"))
    return ImageSet(
        root, check_paths(paths, places.__getitem__), np.concatenate(targets), classes, np.concatenate(train),
        check_boxes(corner_boxes(np.concatenate(corners)), places.__getitem__),
    )  # fmt: skip


def read_flowers(root: Path) -> ImageSet:
    """Oxford Flowers 102: imagelabels.mat, setid.mat (trnid, valid, tstid), jpg/image_00001.jpg, ...

    The training split is trnid and valid (1,020 each), the test split tstid (6,149); an image in none of them is left
    out. The set has no class names: they are "1" to "102".

    Source: Nilsback and Zisserman, "Automated Flower Classification over a Large Number of Classes", ICVGIP 2008.
    """
    file, split_file = root / "imagelabels.mat", root / "setid.mat"
    labels = _integers(_vector(file, "labels"), lambda i: f"{file}, image {i + 1}")
    ids: list[np.ndarray] = []
    places: list[str] = []
    for name in ("trnid", "valid", "tstid"):
        values = _vector(split_file, name)
        here = [f"{split_file}, entry {i + 1} of {name}" for i in range(len(values))]
        ids.append(_integers(values, here.__getitem__))
        places += here
    numbers = np.concatenate(ids)
    wrong = np.flatnonzero((numbers < 1) | (numbers > len(labels)))
    if len(wrong):
        i = int(wrong[0])
        raise UserError(f"{places[i]} names image {numbers[i]} of {len(labels)} in {file.name}: restore the files.")
    check_unique(numbers.tolist(), "image", places.__getitem__)
    present = set(labels.tolist())
    if not present or min(present) < 1:
        raise UserError(f"{file} has no label, or a class below 1: restore the file.")
    gap = next((c for c in range(1, len(present) + 1) if c not in present), None)
    if gap is not None:
        raise UserError(f"{file} has class {max(present)} but no image of class {gap}: restore the file.")
    if not (root / "jpg").is_dir():
        raise UserError(f"{root / 'jpg'} is missing: unpack the images there.")
    left_out = len(labels) - len(numbers)
    return ImageSet(
        root / "jpg",
        tuple(f"image_{number:05d}.jpg" for number in numbers),
        labels[numbers - 1] - 1,
        tuple(str(c) for c in range(1, len(present) + 1)),
        np.arange(len(numbers)) < len(numbers) - len(ids[2]),
        left_out=((LeftOut("jpg/", left_out, "in no split of setid.mat"),) if left_out else ()),
    )


def _vector(path: Path, variable: str) -> np.ndarray:
    return np.atleast_1d(_load(path, variable)).ravel()


def _load(path: Path, variable: str) -> Any:
    """A variable of a .mat file."""
    from scipy.io import loadmat

    if not path.is_file():
        raise UserError(f"{path} is missing: the data set has this file, restore it.")
    try:
        content = loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy raises various types for a broken file
        raise UserError(f"{path} is not a readable MATLAB file ({error}): restore the file.") from error
    if variable not in content:
        raise UserError(f"{path} has no variable {variable!r}: restore the file.")
    return content[variable]


def _floats(values: Any, place: Place) -> np.ndarray:
    """The numbers of a MATLAB vector or field, float64 [N]."""
    numbers = []
    for i, value in enumerate(values.tolist()):
        if not isinstance(value, int | float):
            raise UserError(f"{place(i)}: {str(value)[:40]!r} is not a number: restore the file.")
        numbers.append(float(value))
    return np.array(numbers, np.float64)


def _integers(values: Any, place: Place) -> np.ndarray:
    """The whole numbers of a MATLAB vector or field, int64 [N]."""
    numbers = _floats(values, place)
    wrong = np.flatnonzero(~(np.abs(numbers) < 2**53) | (numbers != np.rint(numbers)))
    if len(wrong):
        raise UserError(f"{place(int(wrong[0]))}: {numbers[wrong[0]]:g} is not a whole number: restore the file.")
    return numbers.astype(np.int64)
