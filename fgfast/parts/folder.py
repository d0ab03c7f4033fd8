"""A folder of id maps that is being made: what its maps come from, and which of them are still to be written.

begun.json is written first and says what the maps of an incomplete folder come from; maps.json takes its place when the
last map is there. Every map that exists beside begun.json is one of those that it describes.
"""

import hashlib
import json
import logging
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fgfast.data.imageset import ImageSet
from fgfast.data.manifest import check_images
from fgfast.data.maps import map_path, read_maps_info, write_maps_info
from fgfast.data.slices import File, status
from fgfast.errors import UserError
from fgfast.files import clear_leftovers, write_atomic
from fgfast.formats import read_json
from fgfast.run import UnreadableError, read_state, save_checkpoint

log = logging.getLogger("fgfast")

STARTED = "begun.json"  # marks a folder whose maps are incomplete
CENTROIDS = "centroids.pt"  # of shared ids, beside the maps
FORMAT = 1  # one more when the same weights, images and options give other maps than before
_EARLIER = "is of an earlier version of fgfast, which did not record the images of its maps: they are not compared."
_SIGNATURE, _END = b"\x89PNG\r\n\x1a\n", b"IEND"


@dataclass(frozen=True)
class Origin:
    """What the maps of a folder come from.

    Args:
        run: the run, a hash of its weights, and settings, in words.
        n_parts: number of ids.
        side: side of a map in pixels.
        digest: SHA-256 of all that changes a map: the weights and buffers of the network, its options, those of the
            clustering, the sizes, the seed, the relative paths of the images, and :data:`FORMAT`. It does not cover the
            content of the images: of each one the number of bytes is kept beside it.
        block: number of consecutive images that are read and clustered together.
        common: whether the images of a block have common ids, so that one lost map needs all of them made again.
    """

    run: str
    n_parts: int
    side: int
    digest: str
    block: int
    common: bool

    def describes(self, record: dict[str, Any]) -> bool:
        """Whether maps.json or begun.json of a folder is of this origin; one of version 0.1 has no digest."""
        if "digest" in record:
            return bool(record["digest"] == self.digest)
        size = record.get("size") or [record.get("map_size")] * 2
        return (record.get("run"), record.get("n_parts"), size) == (self.run, self.n_parts, [self.side, self.side])


def weights_digest(net: nn.Module) -> str:
    """SHA-256 of the values of all parameters and buffers of a network, in hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def is_whole(path: Path, side: int) -> bool:
    """Whether a file is an 8-bit grey PNG of ``side`` x ``side`` in which no bit has changed since it was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    if not content.startswith(_SIGNATURE):
        return False
    kind, start = b"", len(_SIGNATURE)
    while kind != _END:
        if start + 12 > len(content):
            return False
        (length,), first = struct.unpack_from(">I", content, start), kind == b""
        kind, end = content[start + 4 : start + 8], start + 8 + length
        if content[end : end + 4] != struct.pack(">I", zlib.crc32(content[start + 4 : end])):
            return False
        if first and (kind, content[start + 8 : start + 18]) != (b"IHDR", struct.pack(">IIBB", side, side, 8, 0)):
            return False
        start = end + 4
    return start == len(content)


def open_maps(out: Path, images: ImageSet, origin: Origin, *, own: bool, again: bool = False) -> np.ndarray | None:
    """Open a folder for writing: whatever is no map of ``origin`` is removed, and begun.json is written.

    Args:
        out: the folder; created if it is missing.
        images: the images.
        origin: what the maps come from.
        own: the folder is one of a run: maps of another origin are removed instead of refused, and lost images skipped.
        again: the maps of ``origin`` are made again too, as what they depend on is lost.

    Returns:
        The images that need a map, bool [N]; None if the folder is complete.

    Raises:
        UserError: the folder holds maps of another origin.
    """
    clear_leftovers(out)
    record = _read_record(out, damaged_too=own)
    if record is not None and not origin.describes(record):
        if not own:
            state = "already holds" if "size" in record else "holds unfinished"
            raise UserError(
                f"{out} {state} maps of {record.get('run')}, not of these weights, images and settings: "
                "give another --out, or remove it."
            )
        log.warning("%s holds maps of other weights, images or settings: they are made again.", out)
        record = None
    if record is not None and again:
        log.warning("%s has lost the centroids of its shared ids: its maps are made again.", out)
        record = None
    if record is not None and "digest" not in record:
        if "size" not in record and origin.common:
            record = None  # it cut the images into other blocks
        log.warning("%s %s", out, _EARLIER)
    sizes = _bytes_of(images)
    usable = np.isin(np.arange(len(images)), check_images(images, lenient=own).index)
    needed = usable if record is None else _needed(out, images, origin, record, sizes)
    if record is not None and "size" in record and not needed.any():
        (out / STARTED).unlink(missing_ok=True)  # left by a process that was killed after its last map
        return None
    if record is not None and "size" in record:
        log.warning("%d of the %d maps of %s are lost or damaged: they are made again.", needed.sum(), len(needed), out)
    for row in np.flatnonzero(needed) if record is not None else range(len(images)):
        map_path(out, images.paths[row]).unlink(missing_ok=True)
    (out / "maps.json").unlink(missing_ok=True)
    begun = {"run": origin.run, "n_parts": origin.n_parts, "map_size": origin.side, "digest": origin.digest}
    text = json.dumps(begun | {"bytes": sizes.tolist()})
    write_atomic(out / STARTED, lambda p: p.write_text(text))
    return needed


def save_centroids(out: Path, origin: Origin, centroids: torch.Tensor) -> None:
    """Write the centroids of the shared ids of ``origin``."""
    save_checkpoint(out / CENTROIDS, {"digest": origin.digest, "centroids": centroids})


def read_centroids(out: Path, digest: str) -> torch.Tensor | None:
    """The centroids [K, D] of the shared ids of an origin; None if they are lost, damaged or of another one."""
    try:
        state = read_state(out / CENTROIDS)
    except UnreadableError:
        return None
    return state["centroids"] if state.get("digest") == digest else None


def close_maps(out: Path, origin: Origin) -> None:
    """Mark a folder as complete: maps.json takes the place of begun.json."""
    sizes = json.loads((out / STARTED).read_text())["bytes"]
    side = (origin.side, origin.side)
    write_maps_info(out, n_parts=origin.n_parts, size=side, run=origin.run, digest=origin.digest, bytes=sizes)
    (out / STARTED).unlink()


def is_complete(out: Path, images: ImageSet, origin: Origin) -> bool:
    """Whether a folder has a whole map of ``origin`` for every image that can be read."""
    record = None if (out / STARTED).exists() else _read_record(out, damaged_too=True)
    if record is None or not origin.describes(record) or _needed(out, images, origin, record, _bytes_of(images)).any():
        return False
    if "digest" not in record:
        log.warning("%s %s", out, _EARLIER)
    return True


def holds_earlier(out: Path, images: ImageSet) -> bool:
    """Whether a folder is complete, and of version 0.1, which kept no digest."""
    record = _read_record(out, damaged_too=True)
    if record is None or "size" not in record or "digest" in record:
        return False
    return all(
        is_whole(map_path(out, images.paths[row]), record["size"][0])
        for row in check_images(images, quiet=True, lenient=True).index
    )


def _read_record(out: Path, *, damaged_too: bool) -> dict[str, Any] | None:
    """The content of maps.json, else of begun.json; None without either, and with ``damaged_too`` for a damaged one."""
    remedy = f"give another --out, or remove {out}"
    try:
        if (out / "maps.json").is_file():
            return read_maps_info(out, remedy)
        if (out / STARTED).is_file():
            record = read_json(out / STARTED, dict[str, Any], remedy=remedy)
            record.pop("size", None)  # which tells the two apart
            return record
    except UserError:
        if not damaged_too:
            raise
    return None


def _needed(out: Path, images: ImageSet, origin: Origin, record: dict[str, Any], sizes: np.ndarray) -> np.ndarray:
    """The readable images without a whole map of their file: bool [N]; fills in the ``sizes`` of lost images."""
    usable = check_images(images, quiet=True, lenient=True).index
    before = record.get("bytes")
    if not isinstance(before, list) or len(before) != len(images) or not all(type(n) is int for n in before):
        before = [-1] * len(images)
    known = np.array([n if n < 2**63 else -1 for n in before], np.int64)
    changed = (known >= 0) & (sizes >= 0) & (known != sizes)
    np.copyto(sizes, known, where=sizes < 0)
    needed = np.zeros(len(images), bool)
    for row in usable:
        needed[row] = changed[row] or not is_whole(map_path(out, images.paths[row]), origin.side)
    if origin.common:
        blocks = np.arange(len(images)) // origin.block
        needed[usable] |= np.isin(blocks[usable], blocks[needed])
    return needed


def _bytes_of(images: ImageSet) -> np.ndarray:
    """The number of bytes of every file, int64 [N]; -1 for one that is not there."""

    def size(file: File) -> int:
        try:
            return status(file).size
        except (OSError, ValueError):
            return -1

    return np.array([size(file) for file in images.files()], np.int64)
