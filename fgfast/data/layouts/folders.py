"""Image folders: one folder per class, with or without splits."""

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from fgfast.data.imageset import UNLABELLED, ImageSet, LeftOut, entries, images_below, linked_images
from fgfast.errors import UserError

MASKS = "part_masks"
"""Name of the folder of ground-truth id maps."""
_SPLITS = {
    kind: re.compile(rf"((?:.*[-_ ])?)(?:{names})[-_ ]?(?:set|split|data|images)?[-_ ]?[0-9]*", re.IGNORECASE)
    for kind, names in {
        "train": "train|training|trn|trainval",
        "val": "val|valid|validation|dev|devel",
        "test": "test|testing|tst|eval|evaluation",
    }.items()
}
_UNLABELLED = re.compile(
    r"(un[-_ ]?labell?ed|no[-_ ]?labels?|without[-_ ]?labels?)([-_ ](data|images))?", re.IGNORECASE
)
_IMAGES = re.compile(r"(jpe?g)?(images?|imgs?)|jpe?g", re.IGNORECASE)
_LABELS = re.compile(
    r"(\w+[-_ ])?masks?|annotations?|(tri|label)maps?|segmentations?|labels?|ground[-_ ]?truth", re.IGNORECASE
)
_LIST = re.compile(
    r".*\.(csv|tsv|json|mat|xml|parquet|xlsx)|.*(train|test|val|label|split|annot).*\.txt", re.IGNORECASE
)

Reader = Callable[[], ImageSet]


def read_folder(
    root: Path, known: str = "", reader_of: Callable[[Path], Reader | None] = lambda folder: None
) -> ImageSet:
    """SPLIT/CLASS/image with a training and a test split; CLASS/image; or only images, one class "unlabelled".

    The splits have their usual names (train, training, ..., val, valid, ..., test, eval, ...) in any case, also with a
    common prefix (birds_train, birds_test). The test split is scored; the validation split only if there is no test
    split with class folders. Without splits all images are for training; there a class may be called test or dev if its
    folder holds images. Masks (masks, annotations, labels, ...) beside a folder images are no class. A folder that only
    holds one known set, or one image folder with splits, stands for that.

    Args:
        root: the folder.
        known: the known layouts, for the message if the folder has none.
        reader_of: the reader of a folder in a known layout, else None.

    Raises:
        UserError: the folder is none of these, or it could be read in two ways.
    """
    folders, images = entries(root)
    folders = [name for name in folders if name != MASKS]
    splits = _by_split(folders)
    held_out = [*splits["test"], *splits["val"]]
    if splits["train"] or (held_out and len(held_out) == len(folders)):
        return _read_splits(root, folders, images)
    found = {name: images_below(root / name) for name in folders}
    if any("/" in rel for name in held_out for rel in found[name][:1]):
        return _read_splits(root, folders, images)
    nested = _read_nested(root, found, images, reader_of)
    if nested is not None:
        return nested
    if folders and images:
        raise _mixed(root, images)
    if not images and not any(found.values()):
        raise UserError(f"{root} holds no images and no list of a known layout: give the folder of {known}.")
    return _read_images(root, images) if images else _read_classes(root, found)


def class_images(root: Path, prefix: str, folders: list[str]) -> dict[str, list[str]]:
    """The paths of the images in each class folder below ``root``/``prefix``.

    Raises:
        UserError: a class folder has no image.
    """
    found = {name: [f"{prefix}{name}/{rel}" for rel in images_below(root / prefix / name)] for name in folders}
    return _filled(root / prefix, found)


def image_set(root: Path, parts: list[tuple[dict[str, list[str]], bool]]) -> ImageSet:
    """The images of some splits: (paths by class, for training) of each; the first has every class."""
    classes = sorted(parts[0][0])
    index = {name: i for i, name in enumerate(classes)}
    paths: list[str] = []
    targets: list[int] = []
    train: list[bool] = []
    for found, is_train in parts:
        for name in sorted(found):
            paths += found[name]
            targets += [index[name]] * len(found[name])
            train += [is_train] * len(found[name])
    masks = root / MASKS
    return ImageSet(
        root, tuple(paths), np.array(targets, np.int64), tuple(classes), np.array(train, bool),
        masks=masks if masks.is_dir() else None,
    )  # fmt: skip


def left_out(root: Path, reasons: dict[str, str]) -> tuple[LeftOut, ...]:
    """The folders in ``root`` that hold images and are left out, with the reason for each."""
    counts = {name: len(images_below(root / name)) for name in reasons}
    return tuple(LeftOut(f"{name}/", counts[name], reason) for name, reason in reasons.items() if counts[name])


def split_of(name: str) -> str | None:
    """The split that a name stands for, "train", "val" or "test", with any prefix; None if it stands for none."""
    return next((kind for kind, pattern in _SPLITS.items() if pattern.fullmatch(name)), None)


def _by_split(folders: list[str]) -> dict[str, list[str]]:
    """The folders with the name of a split; a prefix counts only if a training and another split share it."""
    prefixes = {
        kind: {name: match[1].lower() for name in folders if (match := pattern.fullmatch(name))}
        for kind, pattern in _SPLITS.items()
    }
    shared = set(prefixes["train"].values()) & {*prefixes["val"].values(), *prefixes["test"].values()}
    return {kind: [name for name in names if names[name] in {"", *shared}] for kind, names in prefixes.items()}


def _read_splits(root: Path, folders: list[str], images: list[str]) -> ImageSet:
    splits = _by_split(folders)
    held_out = [*splits["test"], *splits["val"]]
    others = [name for name in folders if name not in (*splits["train"], *held_out)]
    beside = f", or rename it if it is a class like {others[0]}" if others else ""
    if not splits["train"]:
        raise UserError(f"{root} has {held_out[0]}/ but no train/: move the classes for training to train/{beside}.")
    train = splits["train"][0]
    if len(splits["train"]) > 1:
        raise UserError(f"{root} has two training splits, {train}/ and {splits['train'][1]}/: keep one of them there.")
    if not held_out:
        raise UserError(f"{root} has {train}/ but neither val/ nor test/: add one of them{beside}.")
    classes = _classes_of_split(root, train)
    if not classes:
        raise UserError(f"{root / train} has no class folder: move the images to {train}/CLASS/.")
    scored, test = _scored_split(root, splits)
    no_classes = [
        LeftOut(f"{split}/{name}/", n, _reason(root / split / name))
        for split, found in ((train, classes), (scored, test))
        for name in _no_classes(found)
        if (n := len(found.pop(name)))
    ]
    first = min(classes)
    if len(classes) == 1 and classes[first][0].count("/") > 2:
        raise UserError(
            f"{root / train} has one folder, {first}/, with folders inside: move them up to {train}/ if they are "
            f"the classes, or their images to {first}/ if not."
        )
    unknown = sorted(set(test) - set(classes))
    if unknown:
        raise UserError(f"Class {unknown[0]} of {root / scored} is not in {train}/: add it there or remove it.")
    tested, trained = ([f"{root}/{rel}" for rels in found.values() for rel in rels] for found in (test, classes))
    for one, two in linked_images(tested, trained):
        raise UserError(f"{two} and {one} are the same image: give other images for testing.")
    reasons = {name: "its images are in no class folder" for name in held_out if name != scored}
    if scored in splits["test"]:
        reasons |= dict.fromkeys(splits["val"], f"{scored}/ is scored")
    reasons |= {name: _reason(root / name) for name in others}
    rest = left_out(root, reasons)
    if not scored and not any(f"{name}/" in {part.name for part in rest} for name in held_out):
        raise UserError(f"{root / held_out[0]} holds no image: add images or remove the folder.")
    if images:
        rest += (LeftOut(f"images beside {train}/", len(images), "in no split"),)
    source = f"image folder {root} with {train}/" + (f" and {scored}/" if scored else "")
    found = image_set(root, [(classes, True), (test, False)])
    return replace(found, left_out=(*no_classes, *rest), source=source)


def _scored_split(root: Path, splits: dict[str, list[str]]) -> tuple[str, dict[str, list[str]]]:
    """The split to score and its images by class: the test split, else the validation split; "" if none has classes."""
    for kind in ("test", "val"):
        found = {name: classes for name in splits[kind] if (classes := _classes_of_split(root, name))}
        if len(found) > 1:
            one, two, *_ = found
            raise UserError(f"{root} has two splits to score, {one}/ and {two}/: keep one of them there.")
        if found:
            return found.popitem()
    return "", {}


def _classes_of_split(root: Path, split: str) -> dict[str, list[str]]:
    folders, images = entries(root / split)
    if folders and images:
        raise _mixed(root / split, images)
    if folders and (folders == [split] or all(any(_by_split([name]).values()) for name in folders)):
        raise UserError(f"{root / split} holds the split {folders[0]}/: move its class folders up to {split}/.")
    rest = {
        name: [f"{split}/{name}/{rel}" for rel in images_below(root / split / name)] for name in _no_classes(folders)
    }
    return class_images(root, f"{split}/", [name for name in folders if name not in rest]) | rest


def _no_classes(folders: Iterable[str]) -> list[str]:
    """The folders of unlabelled images, and of masks beside those of images; none if there are no other folders."""
    folders = list(folders)
    masks = any(_IMAGES.fullmatch(name) for name in folders)
    found = [name for name in folders if _UNLABELLED.fullmatch(name) or (masks and _LABELS.fullmatch(name))]
    return found if len(found) < len(folders) else []


def _read_nested(
    root: Path, found: dict[str, list[str]], images: list[str], reader_of: Callable[[Path], Reader | None]
) -> ImageSet | None:
    """The data set in a folder that only holds it; None if the folders are classes."""
    readers: dict[str, Reader] = {}
    known = set()
    for name, inside in found.items():
        if inside and "/" not in inside[0]:
            continue  # with images of its own it is a class; a set of many classes is not looked at again
        reader = reader_of(root / name)
        splits = _by_split(list({rel.partition("/")[0] for rel in inside}))
        if reader is not None:
            readers[name] = reader
            known.add(name)
        elif splits["train"] and (splits["test"] or splits["val"]):
            readers[name] = partial(read_folder, root / name)
    if not readers:
        return None
    name, *more = readers
    others = [other for other in found if other != name and found[other]]
    classes = [other for other in others if name not in known or "/" not in found[other][0]]
    if more or classes:
        raise UserError(
            f"{root / name} is a data set beside {[*more, *classes][0]}/: give {root / name}, or put the splits above "
            "the classes (train/CLASS/)."
        )
    rest = [LeftOut(f"{root / other}/", len(found[other]), f"beside {name}/") for other in others]
    if images:
        rest.append(LeftOut(f"images beside {name}/", len(images), "in no data set"))
    inner = readers[name]()
    return replace(inner, left_out=(*inner.left_out, *rest))


def _read_images(root: Path, images: list[str]) -> ImageSet:
    found = image_set(root, [({UNLABELLED: images}, True)])
    return replace(found, left_out=_unread_lists(root), source=f"image folder {root}")


def _read_classes(root: Path, found: dict[str, list[str]]) -> ImageSet:
    no_classes = _no_classes(found)
    classes = {name: images for name, images in found.items() if name not in no_classes}
    classes = _filled(root, {name: [f"{name}/{rel}" for rel in images] for name, images in classes.items()})
    lists = _unread_lists(root)
    first = min(classes)
    if len(classes) == 1 and classes[first][0].count("/") > 1:
        raise UserError(f"{root} has one folder, {first}/, with folders inside: give {root / first}.")
    if len(classes) == 1 and lists:
        raise UserError(
            f"{root} has one folder, {first}/, and {lists[0].name}, in no known layout: move the images to one folder "
            f"per class, or give {root / first} to train without labels."
        )
    rest = (LeftOut(f"{name}/", n, _reason(root / name)) for name in no_classes if (n := len(found[name])))
    return replace(image_set(root, [(classes, True)]), left_out=(*rest, *lists), source=f"image folder {root}")


def _mixed(folder: Path, images: list[str]) -> UserError:
    return UserError(
        f"{folder} mixes images and folders: move {images[0]} and the like to the folder of their class, or to another "
        "folder for --unlabelled."
    )


def _filled(folder: Path, classes: dict[str, list[str]]) -> dict[str, list[str]]:
    for name, images in classes.items():
        if not images:
            raise UserError(f"Class folder {folder / name} has no image: add images or remove the folder.")
    return classes


def _reason(folder: Path) -> str:
    """Why a folder beside the splits or the classes is left out."""
    if _UNLABELLED.fullmatch(folder.name):
        return f"no labels; --unlabelled {folder} trains on them"
    return "masks or labels of other images" if _LABELS.fullmatch(folder.name) else "no split"


def _unread_lists(root: Path) -> tuple[LeftOut, ...]:
    names = sorted(name for name in os.listdir(root) if _LIST.fullmatch(name))
    if not names:
        return ()
    shown = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
    return (LeftOut(shown, 0, "no list of a known layout"),)
