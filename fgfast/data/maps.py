"""Id maps on disk: one 8-bit grey PNG per image, 255 = absent, and maps.json with number of ids, size and origin."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np

from fgfast.data.decode import TooManyPixelsError, check_pixels, open_image
from fgfast.data.inside import leads_out
from fgfast.data.slices import File, Slice, read_file
from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.formats import read_json

ABSENT = 255
"""The grey value of a pixel that belongs to no part; -1 in a ``Batch``."""

WRITER = "`fgfast discover` (masks that came with a set: restore them; of the cache: remove them)"


class MapsInfo(TypedDict):
    """The content of maps.json; a size of [0, 0] stands for maps of different sizes.

    ``parts`` are the names of the ids; ``absent`` says what a pixel without an id is: the background (the default), or
    one whose part is not known.
    """

    n_parts: int
    size: tuple[int, int]
    run: NotRequired[str]
    parts: NotRequired[list[str]]
    absent: NotRequired[Literal["background", "unknown"]]


def map_path(maps: Path, rel: str) -> Path:
    """The file with the id map of the image ``rel`` (relative path with extension).

    Raises:
        UserError: the path leads out of the folder.

    Example:
        >>> map_path(Path("MAPS"), "birds/one.jpg").as_posix()
        'MAPS/birds/one.jpg.png'
    """
    if leads_out(rel):
        raise UserError(f"{maps} can have no map for {rel!r}, which leaves the folder: give images by paths inside it.")
    return Path(maps) / f"{rel}.png"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: a reader sees either the old content or the new.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    try:
        write_atomic(path, lambda p: p.write_bytes(content))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): free space or choose another folder.") from error


def write_maps_info(maps: Path, n_parts: int, size: tuple[int, int], run: str, **more: Any) -> None:
    """Write MAPS/maps.json. Call it last: it marks a folder as complete.

    Args:
        maps: the folder.
        n_parts: K, ids are 0..K-1; at most 255, as 255 means absent.
        size: (H, W) of every map; (0, 0) if they differ.
        run: origin of the maps: the run, a hash of its weights, and settings.
        more: further entries.
    """
    if not 1 <= n_parts <= ABSENT:
        raise ValueError(f"n_parts is {n_parts}: an 8-bit map holds 1 to 255 parts.")
    info = {"n_parts": int(n_parts), "size": [int(side) for side in size], "run": run, **more}
    write_atomically(Path(maps) / "maps.json", json.dumps(info).encode())


def read_maps_info(maps: Path, remedy: str = f"write the maps with {WRITER}") -> dict:
    """The content of MAPS/maps.json: {"n_parts": K, "size": [H, W], "run": origin of the maps}.

    Args:
        maps: the folder.
        remedy: end of the message, what to do.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = Path(maps) / "maps.json"
    info: MapsInfo = read_json(path, MapsInfo, remedy=remedy, plain=True)
    (height, width), n_parts = info["size"], info["n_parts"]
    if not 1 <= n_parts <= ABSENT or min(height, width) < 0 or (height == 0) != (width == 0):
        raise UserError(f"{path} has {n_parts} parts of size {height} x {width}: {remedy}.")
    return {"run": "", **info}


@lru_cache(16)
def _known_info(maps: Path, stamp: tuple[int, int, int]) -> dict:
    return read_maps_info(maps)


def _info_of(maps: Path) -> dict | None:
    """The content of maps.json, read once for each state of the file; None if there is none."""
    try:
        found = (Path(maps) / "maps.json").stat()
    except OSError:
        return None
    return _known_info(Path(maps), (found.st_ino, found.st_size, found.st_mtime_ns))


def save_maps(maps: Path, rels: Sequence[str], labels: np.ndarray, *, threads: int = 4) -> None:
    """Write one id map per image, each file atomically, in threads.

    Args:
        maps: the folder; created if it is missing.
        rels: B relative image paths.
        labels: uint8 [B, H, W] (an array or a CPU tensor); 255 = absent.
        threads: number of threads.

    Raises:
        UserError: the disk is full, or the folder cannot be written or has a link that leads out of it.
    """
    from PIL import Image

    grids = np.asarray(labels)
    if grids.dtype != np.uint8 or grids.ndim != 3 or len(grids) != len(rels):
        raise ValueError(f"save_maps got {grids.dtype} {grids.shape} for {len(rels)} images: give uint8 [B, H, W].")

    for folder in {map_path(maps, rel).parent for rel in rels}:
        if not folder.resolve().is_relative_to(Path(maps).resolve()):
            raise UserError(f"{folder} leads out of {maps} by a link: remove the link or give another folder.")

    def save(rel: str, grid: np.ndarray) -> None:
        stream = BytesIO()
        Image.fromarray(np.ascontiguousarray(grid)).save(stream, "PNG", compress_level=3)
        write_atomically(map_path(maps, rel), stream.getvalue())

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(save, rels, grids))


def map_sizes(maps: Path, rels: Sequence[str]) -> np.ndarray:
    """Height and width of the map of every image, read from the headers: int32 [N, 2].

    Raises:
        UserError: an image has no map, or its map is not an 8-bit grey PNG or not of the size in maps.json.
    """
    if not Path(maps).is_dir():
        raise UserError(f"The map folder {maps} does not exist: write it with {WRITER}.")
    info = _info_of(maps)
    return np.array([_size(maps, rel, _read(maps, rel, 26), info) for rel in rels], np.int32).reshape(-1, 2)


def map_file(maps: Path, rel: str) -> File:
    """The id map of an image: a file, or a slice of a shard if the folder is one of shards with id maps.

    Raises:
        UserError: the path leads out of the folder, or the index of the shards is damaged.
    """
    path = map_path(maps, rel)
    packed = _packed(maps)
    return str(path) if packed is None else packed.get(rel, str(path))


def is_packed(maps: Path) -> bool:
    """Whether the id maps of a folder are in shards."""
    return _packed(maps) is not None


def _packed(maps: Path) -> dict[str, Slice] | None:
    """The id maps in the shards of a folder, by image, read once for each state of its index; None without shards."""
    try:
        found = (Path(maps) / "shards.json").stat()
    except OSError:
        return None
    return _read_packed(Path(maps), (found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache(2)
def _read_packed(maps: Path, stamp: tuple[int, int, int]) -> dict[str, Slice]:
    from fgfast.data.shards.index import packed_maps

    return packed_maps(maps)


def read_map(maps: Path, rel: str, size: Sequence[int] | None = None) -> np.ndarray:
    """The id map of one image, uint8 [H, W].

    Args:
        maps: the folder.
        rel: relative path of the image.
        size: (H, W) that the map must have.

    Raises:
        UserError: the file is missing or damaged (a changed bit is found by the checksums of PNG), has another size or
            an id that maps.json does not have.
    """
    path, content, info = map_path(maps, rel), _read(maps, rel), _info_of(maps)
    height, width = _size(maps, rel, content[:26], info)
    if size is not None and (height, width) != tuple(size):
        raise UserError(f"{path} is now {height} x {width} and was {size[0]} x {size[1]}: keep maps during a run.")
    try:
        with open_image(BytesIO(content), ("PNG",)) as image:
            image.verify()
        with open_image(BytesIO(content), ("PNG",)) as image:
            ids = np.array(image)
    except OSError as error:
        raise UserError(f"{path} does not decode ({error}): write the maps again with {WRITER}.") from error
    n_parts = ABSENT if info is None else info["n_parts"]
    unknown = ids[(ids >= n_parts) & (ids != ABSENT)]
    if unknown.size:
        raise UserError(f"{path} has id {unknown[0]} of {n_parts} in maps.json: write the maps again with {WRITER}.")
    return ids


def _read(maps: Path, rel: str, size: int = -1) -> bytes:
    """The first ``size`` bytes of a map, or all."""
    path = map_path(maps, rel)
    file = map_file(maps, rel)
    try:
        if isinstance(file, Slice):
            return read_file(file)[: None if size < 0 else size]
        if path.exists() and not path.is_file():  # a pipe could last for ever
            raise OSError(None, "not a file")
        with open(path, "rb") as stream:
            return stream.read(size)
    except FileNotFoundError as error:
        raise UserError(f"{maps} has no map for {rel}: write the maps with {WRITER}.") from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror or error}): write the maps again with {WRITER}."
        ) from error


def _size(maps: Path, rel: str, head: bytes, info: dict | None) -> tuple[int, int]:
    """Height and width in the head of a map, after a check of its format and of what maps.json says of it."""
    path = map_path(maps, rel)
    sides = head[16:20], head[20:24]
    if len(head) < 26 or head[:8] != b"\x89PNG\r\n\x1a\n" or bytes(4) in sides:
        raise UserError(f"{path} is not a PNG: write the maps again with {WRITER}.")
    width, height, depth, colour = struct.unpack(">IIBB", head[16:26])
    if (depth, colour) != (8, 0):
        raise UserError(f"{path} is not 8-bit grey, so its ids would be misread: save it as mode L.")
    try:
        check_pixels(height, width)
    except TooManyPixelsError as error:
        raise UserError(f"{path}: {error}.") from error
    expected = [0, 0] if info is None else info["size"]
    if any(expected) and [height, width] != expected:
        sizes = f"{height} x {width} and not {expected[0]} x {expected[1]} as in maps.json"
        raise UserError(f"{path} is {sizes}: write the maps again with {WRITER}.")
    return height, width
