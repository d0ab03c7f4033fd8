"""Shards that `fgfast shard` has written or indexed."""

from pathlib import Path

import numpy as np

from fgfast.data.imageset import EXTENSIONS, ImageSet
from fgfast.data.inside import leads_out
from fgfast.data.names import unescape_names
from fgfast.data.shards.index import BEGUN, MANIFEST, REMEDY, check_foreign, read_index, read_manifest
from fgfast.data.slices import Slices
from fgfast.errors import UserError


def is_shards(root: Path) -> bool:
    """Whether a folder holds an index of shards, or is one of tar files without images or folders."""
    if (root / MANIFEST).exists() or (root / BEGUN).exists():
        return True
    files = [path for path in root.iterdir() if not path.name.startswith(".")]
    tars = any(path.suffix == ".tar" for path in files)
    return tars and not any(path.suffix.lower() in EXTENSIONS or path.is_dir() for path in files)


def read_shards(root: Path) -> ImageSet:
    """Shards with their index; the paths of the images are those in the set that was sharded.

    Neither a shard nor an image is opened. Damaged and missing shards are found like damaged and missing images: by
    ``fgfast.data.manifest``, which knows the size of a shard, and by the checksum of each image that is read.

    Raises:
        UserError: the index is missing, damaged, or disagrees with itself.
    """
    if not (root / MANIFEST).exists():
        if (root / BEGUN).exists():
            raise UserError(f"The shards in {root} are not complete: run the same fgfast shard command again.")
        check_foreign(root)
        raise UserError(f"{root} has shards without an index: write one with fgfast shard {root} --index.")
    manifest = read_manifest(root)
    parts = [read_index(root, entry) for entry in manifest.shards]
    counts = [len(part.paths) for part in parts]
    paths = tuple(unescape_names(rel for part in parts for rel in part.paths))
    if outside := next(filter(leads_out, paths), None):
        raise UserError(f"{root / MANIFEST} names {outside!r}, which is outside the set: {REMEDY}.")
    if len(set(paths)) < len(paths):
        raise UserError(f"The shards in {root} hold an image twice: {REMEDY}.")
    targets = np.array([target for part in parts for target in part.targets], np.int64)
    if targets.max() >= len(manifest.classes):
        raise UserError(
            f"{root / MANIFEST} names {len(manifest.classes)} classes and not those of its images: {REMEDY}."
        )
    folder = root.resolve()
    boxes = [box or (np.nan,) * 4 for part in parts for box in part.boxes or [None] * len(part.paths)]
    points = [row for part in parts for row in part.keypoints or []]
    n_points = {len(row) for row in points}
    if points and (len(points) != len(paths) or n_points != {len(manifest.part_names)}):
        raise UserError(
            f"{root / MANIFEST} names {len(manifest.part_names)} key points and not those of its images: {REMEDY}."
        )
    return ImageSet(
        root=root,
        paths=paths,
        targets=targets,
        classes=tuple(unescape_names(manifest.classes)),
        train=np.repeat([part.split == "train" for part in parts], counts),
        boxes=np.array(boxes, np.float32) if any(part.boxes for part in parts) else None,
        keypoints=np.array(points, np.float32) if points else None,
        part_names=tuple(unescape_names(manifest.part_names)) if points else (),
        masks=root if manifest.ids else None,
        groups=tuple(unescape_names(manifest.groups)),
        banner=manifest.banner,
        slices=Slices(
            files=tuple((f"{folder}/{entry.name}.tar", entry.bytes) for entry in manifest.shards),
            which=np.repeat(np.arange(len(parts), dtype=np.int32), counts),
            start=np.array([start for part in parts for start in part.start], np.int64),
            size=np.array([size for part in parts for size in part.size], np.int64),
            crc=np.array([crc for part in parts for crc in part.crc], np.int64),
            shape=np.array([shape for part in parts for shape in part.shape], np.int64),
        ),
    )
