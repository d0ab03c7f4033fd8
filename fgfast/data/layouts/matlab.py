"""Data sets with lists in MATLAB files: Stanford Cars and Oxford Flowers 102."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from fgfast.data.imageset import ImageSet, LeftOut
from fgfast.data.layouts.text import Place, check_boxes, check_paths, check_unique, corner_boxes
from fgfast.errors import UserError
from fgfast.info import require

READER = Path(__file__).with_name("_matlab_reader.py")
MEMORY = 2 << 30
"""Bytes that the process which reads MATLAB files may use."""
SECONDS = 300.0
"""Time that it may take; a first import of SciPy from a network disk is slow."""


def read_cars(root: Path) -> ImageSet:
    """Stanford Cars: devkit/cars_{meta,train_annos}.mat, cars_test_annos_withlabels.mat, cars_train/, cars_test/.

    The labels of the test split are beside devkit/ or in it. Boxes in the files are corners, 1-based and inclusive.

    Source: Krause et al., "3D Object Representations for Fine-Grained Categorization", ICCV workshops 2013.
    """
    kit = root / "devkit"
    meta, trained = kit / "cars_meta.mat", kit / "cars_train_annos.mat"
    test = kit / "cars_test_annos_withlabels.mat"
    if not test.is_file():
        test = root / test.name
    if not test.is_file():
        raise UserError(f"{test} is missing, also from devkit/ (cars_test_annos.mat has no labels): download it.")
    named, *annotated = read_mat(
        {meta: {"class_names": list}, trained: {"annotations": dict}, test: {"annotations": dict}}
    )
    classes = tuple(_texts(named["class_names"], lambda i: f"{meta}, class {i + 1}"))
    check_unique(classes, "class", lambda i: f"{meta}, class {i + 1}")
    paths: list[str] = []
    places: list[str] = []
    targets, corners, train = [], [], []
    for file, folder, variables in zip((trained, test), ("cars_train", "cars_test"), annotated, strict=True):
        annotations = variables["annotations"]
        sides = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
        missing = next((n for n in (*sides, "class", "fname") if n not in annotations), None)
        if missing is not None:
            raise UserError(f"{file} has no field {missing!r} in its annotations: restore the file.")
        here = [f"{file}, entry {i + 1} of annotations" for i in range(len(annotations["class"]))]
        numbers = _integers(annotations["class"], here.__getitem__)
        wrong = np.flatnonzero((numbers < 1) | (numbers > len(classes)))
        if len(wrong):
            raise UserError(
                f"{here[wrong[0]]}: the class is {numbers[wrong[0]]} of {len(classes)}: "
                "restore the file, or cars_meta.mat."
            )
        if not (root / folder).is_dir():
            raise UserError(f"{root / folder} is missing: unpack the images there.")
        names = _texts(annotations["fname"], here.__getitem__)
        paths += check_paths(names, here.__getitem__, folder)
        targets.append(numbers - 1)
        corners.append(np.stack([_floats(annotations[side], here.__getitem__) for side in sides], 1))
        places += here
        train.append(np.full(len(names), folder == "cars_train"))
    return ImageSet(
        root, tuple(paths), np.concatenate(targets), classes, np.concatenate(train),
        check_boxes(corner_boxes(np.concatenate(corners)), places.__getitem__),
    )  # fmt: skip


def read_flowers(root: Path) -> ImageSet:
    """Oxford Flowers 102: imagelabels.mat, setid.mat (trnid, valid, tstid), jpg/image_00001.jpg, ...

    The training split is trnid and valid (1,020 each), the test split tstid (6,149); an image in none of them is left
    out. The set has no class names: they are "1" to "102".

    Source: Nilsback and Zisserman, "Automated Flower Classification over a Large Number of Classes", ICVGIP 2008.
    """
    file, split_file = root / "imagelabels.mat", root / "setid.mat"
    tables = read_mat({file: {"labels": list}, split_file: {"trnid": list, "valid": list, "tstid": list}})
    labels = _integers(tables[0]["labels"], lambda i: f"{file}, image {i + 1}")
    ids: list[np.ndarray] = []
    places: list[str] = []
    for name, values in tables[1].items():
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


def read_mat(files: dict[Path, dict[str, type]]) -> list[dict[str, Any]]:
    """Read variables of MATLAB files in a process of their own.

    Args:
        files: the type of each variable, by file: list for an array, dict for a structure ({field: list}).

    Raises:
        UserError: a file is missing or damaged, lacks a variable, or its reader dies or takes too long.
    """
    require("scipy")
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing: the data set has this file, restore it.")
    wanted = json.dumps([(str(path), list(kinds)) for path, kinds in files.items()])
    command = [sys.executable, "-P", str(READER), str(MEMORY), wanted]
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # each takes memory
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, env=os.environ | one_thread
        )
        output, fate = done.stdout, f"its reader ended with status {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, fate = error.stdout or b"", f"it took longer than {SECONDS:g} seconds"
    lines = output.splitlines()
    tables = []
    for i, (path, kinds) in enumerate(files.items()):
        table = _parse(lines[i], fate) if i < len(lines) else fate
        if isinstance(table, str):
            raise UserError(f"{path} is not a readable MATLAB file ({table}): restore the file.")
        for name, kind in kinds.items():
            if not isinstance(table.get(name), kind):
                what = "no variable" if name not in table else "a structure" if kind is list else "no structure"
                raise UserError(f"{path} has {what} {name!r}: restore the file.")
        tables.append(table)
    return tables


def _parse(line: bytes, fate: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # a line that the end of the process cut
        return fate


def _texts(values: list[Any], place: Place) -> list[str]:
    """The strings of a MATLAB array or field."""
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise UserError(f"{place(i)}: {_shown(value)!r} is not text: restore the file.")
    return values


def _floats(values: list[Any], place: Place) -> np.ndarray:
    """The numbers of a MATLAB array or field, float64 [N]."""
    numbers = []
    for i, value in enumerate(values):
        if not isinstance(value, int | float):
            raise UserError(f"{place(i)}: {_shown(value)!r} is not a number: restore the file.")
        numbers.append(float(value))
    return np.array(numbers, np.float64)


def _integers(values: list[Any], place: Place) -> np.ndarray:
    """The whole numbers of a MATLAB array or field, int64 [N]."""
    numbers = _floats(values, place)
    wrong = np.flatnonzero(~(np.abs(numbers) < 2**53) | (numbers != np.rint(numbers)))
    if len(wrong):
        raise UserError(f"{place(int(wrong[0]))}: {numbers[wrong[0]]:g} is not a whole number: restore the file.")
    return numbers.astype(np.int64)


def _shown(value: Any) -> str:
    return str(value[0] if isinstance(value, list) else value)[:40]
