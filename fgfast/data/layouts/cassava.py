"""Cassava leaf diseases: class folders with images beside them that have no labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from fgfast.data.imageset import ImageSet, entries, images_below
from fgfast.data.layouts.folders import MASKS, class_images, image_set, left_out
from fgfast.data.layouts.text import align_rows, check_paths, check_split, integer, named, numbers, read_rows
from fgfast.errors import UserError


def read_cassava(root: Path) -> ImageSet:
    """Cassava leaf diseases (Kaggle's cassava-disease): train/CLASS/image and unlabelled extraimages/ and test/0/.

    The class folders may also be in the root. Images of extraimages/ have no label; test/ is left out, as its labels
    were never published. The labelled images are split here: by images.txt and train_test_split.txt in the root if
    they exist (the format of the authors' lists), otherwise every fourth image of each class in alphabetical order is
    for testing, the same fraction as in those lists (4,242 and 1,414), but not the same images.

    Source: Mwebaze et al., "iCassava 2019 Fine-Grained Visual Categorization Challenge", 2019.
    """
    inside = "train/" if (root / "train").is_dir() else ""
    folders = [name for name in entries(root / inside)[0] if name not in ("extraimages", "test", MASKS)]
    found = class_images(root, inside, folders)
    if not found:
        raise UserError(f"{root / inside} has extraimages/ beside it and no class folder: move images to CLASS/.")
    images = image_set(root, [(found, True)])
    if (root / "train_test_split.txt").exists():
        train = _read_split(root, images.paths, inside)
    else:
        rank_in_class = np.concatenate([np.arange(len(paths)) for _, paths in sorted(found.items())])
        train = rank_in_class % 4 != 3
    extra = images_below(root / "extraimages")
    if not extra:
        raise UserError(f"{root / 'extraimages'} holds no image: restore the images or remove the folder.")
    read = {"extraimages", MASKS, *(["train"] if inside else folders)}
    beside = [name for name in entries(root)[0] if name not in read]
    reasons = {name: "its labels were never published" if name == "test" else "no part of this set" for name in beside}
    images = replace(images, train=train, left_out=left_out(root, reasons))
    return images.with_unlabelled([f"extraimages/{rel}" for rel in extra])


def _read_split(root: Path, paths: tuple[str, ...], inside: str) -> np.ndarray:
    """The split of train_test_split.txt; images.txt has paths relative to the folder of the class folders."""
    listed = read_rows(root / "images.txt", named(integer), layout="cassava", key="image")
    names = check_paths([name for _, name in listed], listed.place)
    rows = read_rows(root / "train_test_split.txt", numbers(2, integer), layout="cassava", key="image")
    values, place = align_rows(rows, {number: i for i, (number, _) in enumerate(listed)}, "images.txt")
    split = dict(zip(names, check_split(values[:, 0], place), strict=True))
    found = [rel.removeprefix(inside) for rel in paths]
    missing = next((name for name in found if name not in split), None)
    if missing is not None:
        raise UserError(f"{root / 'images.txt'} does not list {missing}: add the line, or remove both lists.")
    on_disk = set(found)
    for i, name in enumerate(names):
        if name not in on_disk:
            raise UserError(f"{listed.place(i)}: {root / inside / name} is missing: restore it or remove the line.")
    return np.array([split[name] for name in found], bool)
