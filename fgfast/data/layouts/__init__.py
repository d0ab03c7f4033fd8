"""Readers of data sets in their official layouts on disk; each returns an ImageSet."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fgfast.data.imageset import EXTENSIONS, EXTRA, ImageSet
from fgfast.data.layouts.aircraft import is_aircraft, read_aircraft
from fgfast.data.layouts.cub import read_cub, read_nabirds
from fgfast.data.layouts.folders import read_cassava, read_folder
from fgfast.data.layouts.inaturalist import is_inaturalist, read_inaturalist
from fgfast.data.layouts.matlab import read_cars, read_flowers
from fgfast.data.layouts.pets import read_pets
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
    """

    name: str
    sign: str
    fits: Callable[[Path], bool]
    read: Callable[[Path], ImageSet]


def _has(*names: str) -> Callable[[Path], bool]:
    return lambda root: any((root / name).exists() for name in names)


LAYOUTS = (
    Layout("cassava", "class folders and extraimages/", _has("extraimages"), read_cassava),
    Layout("NABirds", "images.txt and hierarchy.txt", _has("hierarchy.txt"), read_nabirds),
    Layout("CUB-200-2011", "images.txt", _has("images.txt"), read_cub),
    Layout("FGVC-Aircraft", "images_variant_trainval.txt", is_aircraft, read_aircraft),
    Layout("Stanford Cars", "devkit/cars_meta.mat", _has("devkit", "cars_train"), read_cars),
    Layout(
        "Oxford-IIIT Pet",
        "annotations/trainval.txt",
        _has("annotations/trainval.txt", "annotations/trimaps"),
        read_pets,
    ),
    Layout("Oxford Flowers 102", "imagelabels.mat", _has("imagelabels.mat", "setid.mat"), read_flowers),
    Layout("iNaturalist", "train2018.json or train.json", is_inaturalist, read_inaturalist),
)
"""The layouts that are identified by a file, in the order in which they are tried; image folders come last."""


def open_images(root: Path | str, *, level: str | None = None) -> ImageSet:
    """Read a data set from its folder, in the first of ``LAYOUTS`` that fits.

    If none does, it is an image folder: train/CLASS/image with val/ or test/; CLASS/image, all for training; or only
    images, one class "unlabelled".

    Args:
        root: the folder.
        level: FGVC-Aircraft's "variant" (default), "family" or "manufacturer"; no other set has levels.

    Raises:
        UserError: the folder is missing, holds no image, lacks a file, or has a line that does not parse.

    Example:
        >>> open_images("/nowhere")
        Traceback (most recent call last):
        fgfast.errors.UserError: The data folder /nowhere does not exist: check the path given with --data.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"The data folder {root} does not exist: check the path given with --data.")
    layout = next((layout for layout in LAYOUTS if layout.fits(root)), None)
    if level is not None:
        if layout is None or layout.read is not read_aircraft:
            raise UserError(f"{root} has no levels of classes, only FGVC-Aircraft has: leave out the level.")
        return read_aircraft(root, level)
    if layout is not None:
        return layout.read(root)
    return read_folder(root, ", ".join(f"{layout.name} ({layout.sign})" for layout in LAYOUTS) + ", or class folders")
