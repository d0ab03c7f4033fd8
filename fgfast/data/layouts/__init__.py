"""Readers of data sets in their official layouts on disk; each returns an ImageSet."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fgfast.data.imageset import EXTENSIONS, EXTRA, ImageSet, LeftOut, entries, images_below
from fgfast.data.layouts.aircraft import is_aircraft, read_aircraft
from fgfast.data.layouts.cassava import read_cassava
from fgfast.data.layouts.cub import read_cub, read_nabirds
from fgfast.data.layouts.folders import Reader, read_folder
from fgfast.data.layouts.huggingface import is_hugging_face, read_hugging_face
from fgfast.data.layouts.inaturalist import FOLDERS, is_inaturalist, read_inaturalist
from fgfast.data.layouts.matlab import read_cars, read_flowers
from fgfast.data.layouts.pets import read_pets
from fgfast.data.layouts.shards import is_shards, read_shards
from fgfast.errors import UserError

__all__ = ["EXTENSIONS", "EXTRA", "LAYOUTS", "ImageSet", "Layout", "open_images"]


@dataclass(frozen=True)
class Layout:
    """A layout of a data set on disk.

    Args:
        name: its name in messages.
        sign: files that identify it, for messages.
        fits: whether a folder has the layout.
        read: reads the folder.
        inside: folders of the set that are read only with its lists.
    """

    name: str
    sign: str
    fits: Callable[[Path], bool]
    read: Callable[[Path], ImageSet]
    inside: tuple[str, ...] = ("images",)


def _has(*names: str) -> Callable[[Path], bool]:
    return lambda root: any((root / name).exists() for name in names)


LAYOUTS = (
    Layout("shards", "shards.json", is_shards, read_shards, ()),
    Layout("cassava", "class folders and extraimages/", _has("extraimages"), read_cassava, ("train", "extraimages")),
    Layout("NABirds", "images.txt and hierarchy.txt", _has("hierarchy.txt"), read_nabirds),
    Layout("CUB-200-2011", "images.txt", _has("images.txt"), read_cub),
    Layout("FGVC-Aircraft", "images_variant_trainval.txt", is_aircraft, read_aircraft),
    Layout(
        "Stanford Cars",
        "devkit/cars_meta.mat",
        _has("devkit", "cars_train"),
        read_cars,
        ("devkit", "cars_train", "cars_test"),
    ),
    Layout(
        "Oxford-IIIT Pet",
        "annotations/trainval.txt",
        _has("annotations/trainval.txt", "annotations/trimaps"),
        read_pets,
        ("images", "annotations"),
    ),
    Layout("Oxford Flowers 102", "imagelabels.mat", _has("imagelabels.mat", "setid.mat"), read_flowers, ("jpg",)),
    Layout("iNaturalist", "train2018.json or train.json", is_inaturalist, read_inaturalist, FOLDERS),
    Layout("Hugging Face", "dataset_dict.json, state.json or Parquet files", is_hugging_face, read_hugging_face, ()),
)
"""The layouts that are identified by a file, in the order in which they are tried; image folders come last."""


def open_images(root: Path | str, *, level: str | None = None) -> ImageSet:
    """Read a data set from its folder, in the first of ``LAYOUTS`` that fits.

    If none does, it is an image folder: train/CLASS/image with val/ or test/; CLASS/image, all for training; or only
    images, one class "unlabelled". A folder that only holds one data set stands for that set.

    Args:
        root: the folder.
        level: FGVC-Aircraft's "variant" (default), "family" or "manufacturer"; no other set has levels.

    Raises:
        UserError: the folder is missing, holds no image, lacks a file, has a line that does not parse, is a part of a
            data set, or could be read in two ways.

    Example:
        >>> open_images("/nowhere")
        Traceback (most recent call last):
        fgfast.errors.UserError: The data folder /nowhere does not exist: check the path.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file: give the folder of a data set" if root.exists() else "does not exist: check the path"
        raise UserError(f"The data folder {root} {what}.")
    if level is not None:
        return _read_level(root, level)
    read = _reader_of(root)
    if read is not None:
        return read()
    above = root.resolve().parent
    part = next((layout for layout in LAYOUTS if root.resolve().name in layout.inside and layout.fits(above)), None)
    if part is not None:
        raise UserError(f"{root} is a part of the {part.name} set in {above}: give {above}.")
    known = ", ".join(f"{layout.name} ({layout.sign})" for layout in LAYOUTS)
    return read_folder(root, f"{known}, or class folders", _reader_of)


def _reader_of(root: Path) -> Reader | None:
    layout = next((layout for layout in LAYOUTS if layout.fits(root)), None)
    return None if layout is None else lambda: _described(layout.read(root), layout.name, root)


def _described(images: ImageSet, layout: str, root: Path) -> ImageSet:
    """The set with the images on disk that no list names, if it has a folder of images."""
    if not len(images):
        raise UserError(f"The lists of {root} name no image: restore them.")
    rest = images.left_out
    unlisted = set() if rest or images.root == root else set(images_below(images.root)) - set(images.paths)
    if unlisted:
        rest = (LeftOut(f"{images.root.relative_to(root)}/", len(unlisted), "in no list"),)
    return replace(images, left_out=rest, source=f"{layout} in {root}")


def _read_level(root: Path, level: str) -> ImageSet:
    folders = [root, *(root / name for name in entries(root)[0])]
    found = [folder for folder in folders if is_aircraft(folder)]
    if not found:
        raise UserError(f"{root} has no levels of classes, only FGVC-Aircraft has: leave out the level.")
    return _described(read_aircraft(found[0], level), f"FGVC-Aircraft ({level})", found[0])
