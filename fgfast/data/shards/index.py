"""The index of a folder of shards: shards.json for the folder, NAME.json and NAME.idx (for DALI) for each NAME.tar.

shards.json is written last and marks a folder as complete; until then begun.json says what is being written.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from fgfast.data.inside import leads_out
from fgfast.data.names import escape_names, unescape_names
from fgfast.data.slices import Slice
from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.formats import read_json

MANIFEST = "shards.json"
BEGUN = "begun-shards.json"
VERSION = 1
IDS = "ids.png"
"""The extension of an id map in a shard."""
REMEDY = "restore the folder, or write it anew with fgfast shard (shards of another program: with --index)"
_LIMIT = 2**33

Split = Literal["train", "test"]
T = TypeVar("T", "ShardIndex", "Manifest")


@dataclass
class ShardIndex:
    """The content of NAME.json: columns of one value per image. ``digest`` covers the others.

    Args:
        name: NAME.
        split: whether its images are for training.
        bytes: size of NAME.tar.
        sha256: SHA-256 of NAME.tar; "" for one that another program wrote.
        paths: relative paths of the images in the set that was sharded, escaped (``fgfast.data.names``).
        targets: classes; -1 without a label.
        start: first byte of each image in NAME.tar.
        size: bytes of each image.
        crc: CRC-32 of each image.
        shape: height, width and EXIF orientation; zeros for an image that has to be decoded first.
        boxes: (x, y, w, h) or None.
        keypoints: (x, y, visible) of each part, or None.
        ids: first byte, bytes and CRC-32 of each id map; or None.
    """

    version: int
    name: str
    split: Split
    bytes: int
    sha256: str
    paths: list[str]
    targets: list[int]
    start: list[int]
    size: list[int]
    crc: list[int]
    shape: list[tuple[int, int, int]]
    boxes: list[tuple[float, float, float, float] | None] | None = None
    keypoints: list[list[tuple[float, float, float]]] | None = None
    ids: list[tuple[int, int, int]] | None = None
    digest: str = ""


@dataclass
class Entry:
    """A shard in shards.json: the digest is that of its index."""

    name: str
    images: int
    bytes: int
    sha256: str
    digest: str


@dataclass
class Manifest:
    """The content of shards.json.

    Args:
        origin: SHA-256 of what was sharded: paths, classes, sizes and times of the files, and the settings.
        source: the same in words.
        classes, groups, part_names, banner: those of the set, see ``ImageSet``; names escaped.
        ids: whether every image has an id map.
        splits: number of images of each split.
        shards: the shards, in order.
        skipped: images that could not be read and are in no shard, with the reason.
    """

    version: int
    origin: str
    source: str
    classes: list[str]
    groups: list[str]
    part_names: list[str]
    banner: int
    ids: bool
    splits: dict[str, int]
    shards: list[Entry]
    skipped: list[tuple[str, str]] = field(default_factory=list)
    digest: str = ""


def encode(value: Any) -> bytes:
    """An index as JSON, with its digest."""
    import msgspec

    return msgspec.json.encode(replace(value, digest=digest_of_index(value))) + b"\n"


def digest_of_index(value: Any) -> str:
    """SHA-256 of an index without its digest."""
    import msgspec

    return hashlib.sha256(msgspec.json.encode(replace(value, digest=""))).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The content of shards.json.

    Raises:
        UserError: it is missing, damaged or of another version.
    """
    manifest = _checked(
        read_json(folder / MANIFEST, Manifest, remedy=REMEDY, limit=_LIMIT, strict=False), folder / MANIFEST
    )
    names = [entry.name for entry in manifest.shards]
    outside = next((name for name in names if leads_out(name) or "/" in name), None)
    if outside is not None or not names or len(set(names)) < len(names):
        raise UserError(f"{folder / MANIFEST} names no shard, one twice or one outside its folder: {REMEDY}.")
    return manifest


def read_index(folder: Path, entry: Entry) -> ShardIndex:
    """The index of a shard, which must be the one that shards.json knows.

    Raises:
        UserError: it is missing or damaged, or disagrees with shards.json or with itself.
    """
    index = read_own_index(folder, entry.name)
    if (index.digest, index.bytes, len(index.paths)) != (entry.digest, entry.bytes, entry.images):
        raise UserError(f"{folder / entry.name}.json disagrees with {MANIFEST}: {REMEDY}.")
    return index


def read_own_index(folder: Path, name: str) -> ShardIndex:
    """The index of a shard.

    Raises:
        UserError: it is missing or damaged, or disagrees with itself.
    """
    path = folder / f"{name}.json"
    index = _checked(read_json(path, ShardIndex, remedy=REMEDY, limit=_LIMIT, strict=False), path)
    n = len(index.paths)
    columns: tuple[list | None, ...] = (index.targets, index.start, index.size, index.crc, index.shape)
    columns += (index.boxes, index.keypoints, index.ids)
    places = zip(index.start, index.size, strict=False)
    sound = all(start >= 0 and size > 0 and start + size <= index.bytes < 2**62 for start, size in places)
    sound = sound and all(-1 <= crc < 2**32 for crc in index.crc) and all(-1 <= t < 2**31 for t in index.targets)
    sound = sound and all(h * w < 2**62 and min(h, w) >= 0 and 0 <= turn <= 8 for h, w, turn in index.shape)
    if index.name != name or not n or any(column is not None and len(column) != n for column in columns) or not sound:
        raise UserError(f"{path} disagrees with itself or with its name: {REMEDY}.")
    return index


def check_foreign(folder: Path) -> None:
    """Check that shards without shards.json are those of another program, whose index can be made from the tar files.

    Raises:
        UserError: ``fgfast shard DATA OUT`` has written them: their index says more than can be read from them.
    """
    for path in sorted(folder.glob("*.tar")):
        try:
            first = read_own_index(folder, path.stem).paths[0]
        except UserError:  # it is missing or damaged, and written again
            continue
        if first.startswith(escape_names([f"{path.stem}/"])[0]):  # the path that index_shards gives
            return
        raise UserError(
            f"The shards in {folder} were written with their index: restore its {MANIFEST}, or write them anew with "
            "fgfast shard."
        )


def _checked(value: T, path: Path) -> T:
    if value.version != VERSION:
        raise UserError(
            f"{path} is of version {value.version}, not {VERSION}: give the version of fgfast that wrote it."
        )
    if value.digest != digest_of_index(value):
        raise UserError(f"{path} was changed since it was written (its checksum differs): {REMEDY}.")
    return value


def write_index(folder: Path, index: ShardIndex, members: list[list[tuple[str, int, int, str]]]) -> None:
    """Write NAME.idx and NAME.json, which marks the shard as complete.

    Args:
        folder: the folder.
        index: the content of NAME.json.
        members: the (extension, first byte, bytes, name) of every member of each sample.
    """
    lines = [f"v1.2 {len(members)}"]
    for sample in members:
        lines.append(" ".join(f"{kind} {start} {size} {'_'.join(name.split())}" for kind, start, size, name in sample))
    text = ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")
    write_atomic(folder / f"{index.name}.idx", lambda p: p.write_bytes(text))
    content = encode(index)
    write_atomic(folder / f"{index.name}.json", lambda p: p.write_bytes(content), durable=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write shards.json."""
    content = encode(manifest)
    write_atomic(folder / MANIFEST, lambda p: p.write_bytes(content), durable=True)


def packed_maps(folder: Path) -> dict[str, Slice]:
    """The id maps in the shards of a folder, by the relative path of their image.

    Raises:
        UserError: the index is damaged.
    """
    found = {}
    for entry in read_manifest(folder).shards:
        index = read_index(folder, entry)
        tar = str(folder.resolve() / f"{entry.name}.tar")
        for rel, place in zip(unescape_names(index.paths), index.ids or (), strict=False):
            found[rel] = Slice(tar, *place)
    return found
