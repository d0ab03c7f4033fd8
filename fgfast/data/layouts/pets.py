"""Oxford-IIIT Pet."""

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np

from fgfast.data.decode import open_image
from fgfast.data.imageset import ImageSet
from fgfast.data.layouts.text import check_paths, check_unique, integer, read_rows
from fgfast.errors import UserError
from fgfast.formats import read_bytes

log = logging.getLogger("fgfast")

IDS = np.full(256, 255, np.uint8)
"""Trimap value to id: 1 (pet) is 0, 2 (background) is 1, everything else (3: not classified) is absent."""
IDS[1], IDS[2] = 0, 1
MEANING = {"parts": ["pet", "background"], "absent": "unknown"}
"""The entries of maps.json that say what these ids are."""


def read_pets(root: Path) -> ImageSet:
    """Oxford-IIIT Pet: annotations/{trainval,test}.txt ("NAME CLASS SPECIES BREED"), images/NAME.jpg, trimaps/NAME.png.

    The trimaps are the ``masks``: id 0 is the pet, 1 the background, the border is absent. They are converted once to
    the format of ``fgfast.data.maps``, in the cache folder. The boxes of the set are not read: they are of heads, for
    some images only.

    Source: Parkhi et al., "Cats and Dogs", CVPR 2012.
    """
    notes = root / "annotations"
    names: dict[int, str] = {}
    records: list[tuple[str, int, bool]] = []
    places: list[str] = []
    for split in ("trainval", "test"):
        path = notes / f"{split}.txt"
        rows = read_rows(path, _parse, layout="Oxford-IIIT Pet", key="image", comment="#")
        for i, (name, number) in enumerate(rows):
            breed = name.rsplit("_", 1)[0]
            if names.setdefault(number, breed) != breed:
                raise UserError(
                    f"{rows.place(i)}: the lists give class {number} to {names[number]} and to {breed}: correct them."
                )
            records.append((f"{name}.jpg", number, split == "trainval"))
            places.append(rows.place(i))
    order = {number: i for i, number in enumerate(sorted(names))}
    check_unique([names[number] for number in order], "breed", lambda i: f"class {list(order)[i]} of {notes}")
    paths = check_paths([rel for rel, _, _ in records], places.__getitem__)
    if not (root / "images").is_dir():
        raise UserError(f"{root / 'images'} is missing: unpack the images there.")
    trimaps = notes / "trimaps"
    return ImageSet(
        root=root / "images",
        paths=paths,
        targets=np.array([order[number] for _, number, _ in records], np.int64),
        classes=tuple(names[number] for number in order),
        train=np.array([train for _, _, train in records], bool),
        masks=_convert_trimaps(trimaps, paths) if trimaps.is_dir() else None,
    )


def _parse(line: str) -> tuple[str, int]:
    name, *ids = line.split()
    number, species, breed = map(integer, ids)
    if number < 1 or species not in (1, 2) or breed < 1:
        raise ValueError("an id out of range")
    return name, number


def _convert_trimaps(trimaps: Path, paths: tuple[str, ...]) -> Path:
    """The folder of converted trimaps, written if it is missing or of other images."""
    from fgfast.data.manifest import cache_folder
    from fgfast.data.maps import map_path, write_atomically, write_maps_info

    origin = f"trimaps of {trimaps.resolve()}, {trimaps.stat().st_mtime_ns}, {hash_of(paths)}"
    out = cache_folder() / "trimaps" / hash_of([str(trimaps.resolve())])
    if _converted(out, origin, paths):
        return out
    log.info("converting %d trimaps to %s, once", len(paths), out)

    def convert(rel: str) -> tuple[int, int]:
        from PIL import Image

        source = trimaps / f"{rel.removesuffix('.jpg')}.png"
        content = read_bytes(source, remedy="restore the trimap, or remove the folder")
        try:
            with open_image(BytesIO(content)) as image:
                if image.mode not in ("L", "P"):
                    raise OSError(f"mode {image.mode}")
                ids = IDS[np.asarray(image)]
        except OSError as error:
            raise UserError(f"{source} is not a readable trimap ({error}): restore it.") from error
        stream = BytesIO()
        Image.fromarray(ids).save(stream, "PNG", compress_level=1)
        write_atomically(map_path(out, rel), stream.getvalue())
        return ids.shape[0], ids.shape[1]

    with ThreadPoolExecutor() as pool:
        sizes = set(pool.map(convert, paths))
    write_maps_info(out, 2, sizes.pop() if len(sizes) == 1 else (0, 0), origin, **MEANING)
    return out


def _converted(out: Path, origin: str, paths: tuple[str, ...]) -> bool:
    """Whether a folder of the cache has all converted trimaps; damage is mended by converting them again."""
    from fgfast.data.maps import map_sizes, read_maps_info

    try:
        if not ({"run": origin} | MEANING).items() <= read_maps_info(out).items():
            return False
        map_sizes(out, paths)
    except UserError:
        return False
    return True


def hash_of(words: tuple[str, ...] | list[str]) -> str:
    """Sixteen hexadecimal digits of a hash of a list of strings."""
    return hashlib.sha1(os.fsencode("\n".join(words))).hexdigest()[:16]
