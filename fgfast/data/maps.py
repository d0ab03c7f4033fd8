"""Id maps on disk: one 8-bit grey PNG per image, 255 = absent, and maps.json with number of ids, size and origin."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fgfast.data.decode import decoding
from fgfast.errors import UserError
from fgfast.files import write_atomic

ABSENT = 255
"""The grey value of a pixel that belongs to no part; -1 in a ``Batch``."""

WRITER = "`fgfast discover` (masks that came with a set: restore them)"


def map_path(maps: Path, rel: str) -> Path:
    """The file with the id map of the image ``rel`` (relative path with extension).

    Example:
        >>> map_path(Path("MAPS"), "birds/one.jpg").as_posix()
        'MAPS/birds/one.jpg.png'
    """
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


def write_maps_info(maps: Path, n_parts: int, size: tuple[int, int], run: str) -> None:
    """Write MAPS/maps.json. Call it last: it marks a folder as complete.

    Args:
        maps: the folder.
        n_parts: K, ids are 0..K-1; at most 255, as 255 means absent.
        size: (H, W) of every map.
        run: origin of the maps: the run, a hash of its weights, and settings.
    """
    if not 1 <= n_parts <= ABSENT:
        raise ValueError(f"n_parts is {n_parts}: an 8-bit map holds 1 to 255 parts.")
    info = {"n_parts": int(n_parts), "size": [int(side) for side in size], "run": run}
    write_atomically(Path(maps) / "maps.json", json.dumps(info).encode())


def read_maps_info(maps: Path) -> dict:
    """The content of MAPS/maps.json: {"n_parts": K, "size": [H, W], "run": origin of the maps}.

    Raises:
        UserError: the file is missing or lacks one of these keys.
    """
    path = Path(maps) / "maps.json"
    try:
        info = json.loads(path.read_bytes())  # bytes may have a byte order mark
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: write the maps with {WRITER}.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): write the maps again with {WRITER}.") from error
    size = info.get("size") if isinstance(info, dict) and isinstance(info.get("n_parts"), int) else None
    if not isinstance(size, list) or len(size) != 2:
        raise UserError(f"{path} lacks n_parts or size: write the maps again with {WRITER}.")
    return info


def save_maps(maps: Path, rels: Sequence[str], labels: np.ndarray, *, threads: int = 4) -> None:
    """Write one id map per image, each file atomically, in threads.

    Args:
        maps: the folder; created if it is missing.
        rels: B relative image paths.
        labels: uint8 [B, H, W] (an array or a CPU tensor); 255 = absent.
        threads: number of threads.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    from io import BytesIO

    from PIL import Image

    grids = np.asarray(labels)
    if grids.dtype != np.uint8 or grids.ndim != 3 or len(grids) != len(rels):
        raise ValueError(f"save_maps got {grids.dtype} {grids.shape} for {len(rels)} images: give uint8 [B, H, W].")

    def save(rel: str, grid: np.ndarray) -> None:
        stream = BytesIO()
        Image.fromarray(np.ascontiguousarray(grid)).save(stream, "PNG", compress_level=3)
        write_atomically(map_path(maps, rel), stream.getvalue())

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(save, rels, grids))


def map_sizes(maps: Path, rels: Sequence[str]) -> np.ndarray:
    """Height and width of the map of every image, read from the headers: int32 [N, 2].

    Raises:
        UserError: an image has no map, or its map is not an 8-bit grey PNG.
    """
    if not Path(maps).is_dir():
        raise UserError(f"The map folder {maps} does not exist: write it with {WRITER}.")
    sizes = np.empty((len(rels), 2), np.int32)
    for i, rel in enumerate(rels):
        path = map_path(maps, rel)
        try:
            with open(path, "rb") as file:
                head = file.read(26)
        except FileNotFoundError as error:
            raise UserError(f"{maps} has no map for {rel}: write the maps with {WRITER}.") from error
        if len(head) < 26 or head[:8] != b"\x89PNG\r\n\x1a\n":
            raise UserError(f"{path} is not a PNG: write the maps again with {WRITER}.")
        width, height, depth, colour = struct.unpack(">IIBB", head[16:26])
        if (depth, colour) != (8, 0):
            raise UserError(f"{path} is not 8-bit grey, so its ids would be misread: save it as mode L.")
        sizes[i] = height, width
    return sizes


def read_map(maps: Path, rel: str) -> np.ndarray:
    """The id map of one image, uint8 [H, W].

    Raises:
        UserError: the file is missing or does not decode.
    """
    from PIL import Image

    path = map_path(maps, rel)
    try:
        with decoding(), Image.open(path) as image:
            return np.array(image)
    except FileNotFoundError as error:
        raise UserError(f"{maps} has no map for {rel}: write the maps with {WRITER}.") from error
    except OSError as error:
        raise UserError(f"{path} does not decode ({error}): write the maps again with {WRITER}.") from error
