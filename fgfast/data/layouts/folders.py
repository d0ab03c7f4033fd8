"""Image folders, one per class, with or without splits; and cassava, which adds unlabelled images."""

from pathlib import Path

import numpy as np

from fgfast.data.imageset import ImageSet, entries, images_below
from fgfast.data.layouts.text import align_rows, named, numbers, read_rows
from fgfast.errors import UserError


def read_folder(root: Path, known: str = "") -> ImageSet:
    """train/CLASS/image with val/ or test/; CLASS/image, all for training; or only images, one class "unlabelled".

    Args:
        root: the folder.
        known: the known layouts, for the message if the folder has none.
    """
    folders, images = entries(root)
    masks = root / "part_masks"
    if "train" in folders:
        held_out = [name for name in ("val", "test") if name in folders]
        if not held_out:
            raise UserError(f"{root} has train/ but neither val/ nor test/: add one of them.")
        parts = [(_class_folders(root, f"{name}/"), name == "train") for name in ("train", *held_out)]
        if not parts[0][0]:
            raise UserError(f"{root / 'train'} has no class folder: move the images to train/CLASS/.")
        for found, is_train in parts:
            unknown = sorted(set(found) - set(parts[0][0]))
            if unknown and not is_train:
                raise UserError(f"Class {unknown[0]} of {root} is not in train/: add it there or remove it.")
    else:
        folders = [name for name in folders if name != masks.name]
        if folders and images:
            raise UserError(f"{root} mixes images and folders: move each image to the folder of its class.")
        if not images and not any(images_below(root / name) for name in folders):
            raise UserError(f"{root} holds no images and no list of a known layout: give the folder of {known}.")
        parts = [({"unlabelled": images} if images else _class_folders(root, "", folders), True)]
    return _image_set(root, parts, masks)


def read_cassava(root: Path) -> ImageSet:
    """Cassava leaf diseases (Kaggle's cassava-disease): train/CLASS/image and unlabelled extraimages/ and test/0/.

    The class folders may also be in the root. Images of extraimages/ have no label; test/ is left out, as its labels
    were never published. The labelled images are split here: by images.txt and train_test_split.txt in the root if
    they exist (the format of the authors' lists), otherwise every fourth image of each class in alphabetical order is
    for testing, the same fraction as in those lists (4,242 and 1,414), but not the same images.

    Source: Mwebaze et al., "iCassava 2019 Fine-Grained Visual Categorization Challenge", 2019.
    """
    inside = "train/" if (root / "train").is_dir() else ""
    folders, _ = entries(root / inside)
    found = _class_folders(root, inside, [name for name in folders if name not in ("extraimages", "test")])
    if not found:
        raise UserError(f"{root / inside} has extraimages/ beside it and no class folder: move images to CLASS/.")
    images = _image_set(root, [(found, True)], root / "part_masks")
    if (root / "train_test_split.txt").exists():
        train = _read_split(root, images.paths, inside)
    else:
        rank_in_class = np.concatenate([np.arange(len(paths)) for _, paths in sorted(found.items())])
        train = rank_in_class % 4 != 3
    extra = images_below(root / "extraimages")
    if not extra:
        raise UserError(f"{root / 'extraimages'} holds no image: restore the images or remove the folder.")
    split = ImageSet(root, images.paths, images.targets, images.classes, train, masks=images.masks)
    return split.with_unlabelled([f"extraimages/{rel}" for rel in extra])


def _read_split(root: Path, paths: tuple[str, ...], inside: str) -> np.ndarray:
    """The split of train_test_split.txt; images.txt has paths relative to the folder of the class folders."""
    listed = {name: number for number, name in read_rows(root / "images.txt", named(int), layout="cassava")}
    path = root / "train_test_split.txt"
    ids = {number: i for i, number in enumerate(listed.values())}
    split = align_rows(read_rows(path, numbers(2), layout="cassava"), path, 2, ids, "images.txt")[:, 0]
    if not np.isin(split, (0, 1)).all():
        raise UserError(f"{path} must hold 0 (test) or 1 (train): correct the values.")
    names = [rel.removeprefix(inside) for rel in paths]
    missing = next((name for name in names if name not in listed), None)
    if missing is not None:
        raise UserError(f"{root / 'images.txt'} does not list {missing}: add the line, or remove both lists.")
    return np.array([split[ids[listed[name]]] == 1 for name in names])


def _class_folders(root: Path, prefix: str, folders: list[str] | None = None) -> dict[str, list[str]]:
    folders = entries(root / prefix)[0] if folders is None else folders
    found = {name: [f"{prefix}{name}/{rel}" for rel in images_below(root / prefix / name)] for name in folders}
    for name, images in found.items():
        if not images:
            raise UserError(f"Class folder {root / prefix / name} has no image: add images or remove the folder.")
    return found


def _image_set(root: Path, parts: list[tuple[dict[str, list[str]], bool]], masks: Path) -> ImageSet:
    classes = sorted(parts[0][0])
    records = [
        (rel, classes.index(name), is_train)
        for found, is_train in parts
        for name in sorted(found)
        for rel in found[name]
    ]
    return ImageSet(
        root=root,
        paths=tuple(rel for rel, _, _ in records),
        targets=np.array([target for _, target, _ in records], np.int64),
        classes=tuple(classes),
        train=np.array([is_train for _, _, is_train in records], bool),
        masks=masks if masks.is_dir() else None,
    )
