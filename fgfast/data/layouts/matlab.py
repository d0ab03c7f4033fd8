"""Data sets with lists in MATLAB files: Stanford Cars and Oxford Flowers 102."""

from pathlib import Path
from typing import Any

import numpy as np

from fgfast.data.imageset import ImageSet
from fgfast.data.layouts.aircraft import corner_boxes
from fgfast.errors import UserError


def read_cars(root: Path) -> ImageSet:
    """Stanford Cars: devkit/cars_{meta,train_annos}.mat, cars_test_annos_withlabels.mat, cars_train/, cars_test/.

    The labels of the test split are beside devkit/ or in it. Boxes in the files are corners, 1-based and inclusive.

    Source: Krause et al., "3D Object Representations for Fine-Grained Categorization", ICCV workshops 2013.
    """
    kit = root / "devkit"
    classes = tuple(str(name) for name in np.atleast_1d(_load(kit / "cars_meta.mat", "class_names")))
    test = kit / "cars_test_annos_withlabels.mat"
    if not test.is_file():
        test = root / test.name
    if not test.is_file():
        raise UserError(f"{test} is missing, also from devkit/ (cars_test_annos.mat has no labels): download it.")
    paths: list[str] = []
    targets, corners, train = [], [], []
    for file, folder in ((kit / "cars_train_annos.mat", "cars_train"), (test, "cars_test")):
        annotations = np.atleast_1d(_load(file, "annotations"))
        names = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
        fields = annotations.dtype.names or ()
        missing = next((n for n in (*names, "class", "fname") if n not in fields), None)
        if missing is not None:
            raise UserError(f"{file} has no field {missing!r} in its annotations: restore the file.")
        numbers = np.array(annotations["class"].tolist(), np.int64)
        wrong = np.flatnonzero((numbers < 1) | (numbers > len(classes)))
        if len(wrong):
            raise UserError(
                f"{file}: image {annotations['fname'][wrong[0]]} has class {numbers[wrong[0]]} of {len(classes)}: "
                "restore the file, or cars_meta.mat."
            )
        if not (root / folder).is_dir():
            raise UserError(f"{root / folder} is missing: unpack the images there.")
        paths += [f"{folder}/{name}" for name in annotations["fname"]]
        targets.append(numbers - 1)
        corners.append(np.array([annotations[name].tolist() for name in names], np.float64).T)
        train.append(np.full(len(annotations), folder == "cars_train"))
    return ImageSet(
        root, tuple(paths), np.concatenate(targets), classes, np.concatenate(train),
        corner_boxes(np.concatenate(corners)),
    )  # fmt: skip


def read_flowers(root: Path) -> ImageSet:
    """Oxford Flowers 102: imagelabels.mat, setid.mat (trnid, valid, tstid), jpg/image_00001.jpg, ...

    The training split is trnid and valid (1,020 each), the test split tstid (6,149); an image in none of them is left
    out. The set has no class names: they are "1" to "102".

    Source: Nilsback and Zisserman, "Automated Flower Classification over a Large Number of Classes", ICVGIP 2008.
    """
    labels = np.atleast_1d(_load(root / "imagelabels.mat", "labels")).astype(np.int64)
    file = root / "setid.mat"
    ids = {name: np.atleast_1d(_load(file, name)).astype(np.int64) for name in ("trnid", "valid", "tstid")}
    numbers = np.concatenate(list(ids.values()))
    wrong = numbers[(numbers < 1) | (numbers > len(labels))]
    if len(wrong):
        raise UserError(f"{file} names image {wrong[0]} of {len(labels)} in imagelabels.mat: restore the files.")
    if len(np.unique(numbers)) < len(numbers):
        raise UserError(f"{file} has an image in two splits: restore the file.")
    if labels.min() < 1:
        raise UserError(f"{root / 'imagelabels.mat'} has a class below 1: restore the file.")
    if not (root / "jpg").is_dir():
        raise UserError(f"{root / 'jpg'} is missing: unpack the images there.")
    classes = tuple(str(i) for i in range(1, int(labels.max()) + 1))
    train = np.arange(len(numbers)) < len(numbers) - len(ids["tstid"])
    paths = tuple(f"image_{number:05d}.jpg" for number in numbers)
    return ImageSet(root / "jpg", paths, labels[numbers - 1] - 1, classes, train)


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
