"""The images with which a run began, in RUN/images.json: a resumed run has the same ones, whatever happened to them.

Paths are relative, so the data may move. An image that is missing or broken keeps its place and is left out, like one
that a loader loses during training; images that were added are not used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from fgfast.data.imageset import ImageSet
from fgfast.data.inside import leads_out
from fgfast.data.manifest import MAX_BROKEN, Records, Verdict, check_files, file_stamp
from fgfast.data.names import escape_names, unescape_names
from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.formats import read_json

FILE = "images.json"
_VERSION = 1
_REMEDY = "restore it from a copy, or give another --out"
_LIMIT = 2**31


@dataclass(frozen=True)
class Kept:
    """The images with which a run began, as they are now.

    Args:
        images: exactly those images, in the order of the beginning.
        records: what a loader needs; give it to ``make_loader`` with ``images``.
        missing: (relative path, reason) of each image that cannot be read now.
        added: how many images the folder holds beyond those of the beginning; they are not used.
        held_out: relative paths of the images that are held out for scores.
    """

    images: ImageSet
    records: Records
    missing: tuple[tuple[str, str], ...] = ()
    added: int = 0
    held_out: tuple[str, ...] = ()

    @classmethod
    def begin(cls, records: Records, held_out: Sequence[str] = ()) -> Kept:
        """The images of a run that begins: the usable ones, in the form in which :func:`restore_set` gives them."""
        images = records.images.subset(records.index)
        records = replace(records, images=images, index=np.arange(len(images)))
        return cls(images, records, held_out=tuple(held_out))

    def describe(self) -> list[str]:
        """One sentence for each difference from the beginning; none if there is none."""
        lines = []
        if self.missing:
            named = "; ".join(f"{rel} ({reason})" for rel, reason in self.missing[:10])
            more = f" and {len(self.missing) - 10} more" if len(self.missing) > 10 else ""
            lines.append(
                f"{len(self.missing)} of the {len(self.images)} images with which the run began cannot be read and are "
                f"skipped: {named}{more}"
            )
        if self.added:
            images, are = ("image", "is") if self.added == 1 else ("images", "are")
            lines.append(f"{self.added} {images} with which the run did not begin {are} not used")
        return lines


@dataclass
class _Stored:
    """The content of images.json: columns of one value per image. ``digest`` covers the others."""

    version: int
    digest: str
    classes: list[str]
    paths: list[str]
    targets: list[int]
    heights: list[int]
    widths: list[int]
    skipped: list[tuple[str, str]]
    held_out: list[str]


def store_set(file: Path, images: ImageSet, records: Records, held_out: Sequence[str] = ()) -> None:
    """Write the images with which a run begins, atomically.

    Args:
        file: RUN/images.json.
        images: the training images.
        records: the usable ones, as ``check_images`` returns them.
        held_out: relative paths of the images that are held out for scores.

    Raises:
        UserError: the file cannot be written.
    """
    stored = _Stored(
        version=_VERSION,
        digest="",
        classes=escape_names(images.classes),
        paths=escape_names(images.paths[i] for i in records.index),
        targets=images.targets[records.index].tolist(),
        heights=records.heights.tolist(),
        widths=records.sizes[:, 1].tolist(),
        skipped=[(rel, reason) for rel, reason in map(escape_names, records.skipped)],
        held_out=escape_names(held_out),
    )
    content = _encode(replace(stored, digest=_digest(stored)))
    try:
        write_atomic(file, lambda p: p.write_bytes(content + b"\n"), durable=True)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): free space or choose another folder.") from error


def restore_set(file: Path, images: ImageSet, threads: int | None = None) -> Kept:
    """The images with which a run began, after a check of their files.

    Args:
        file: RUN/images.json.
        images: the training images as they are read now; the folder may have moved.
        threads: decoding threads for new and changed files; None = one per CPU core.

    Raises:
        UserError: the file is missing or damaged, or more than 5% of the images cannot be read.
    """
    stored = _read(file)
    n = len(stored.paths)
    at = {rel: i for i, rel in enumerate(images.paths)}
    found = np.array([at.get(rel, -1) for rel in stored.paths], np.int64)
    known = {*stored.paths, *(rel for rel, _ in stored.skipped)}

    def column(values: np.ndarray | None, fill: float) -> np.ndarray | None:
        if values is None:
            return None
        column = np.full((n, *values.shape[1:]), fill, values.dtype)
        column[found >= 0] = values[found[found >= 0]]
        return column

    groups = dict(zip(images.classes, images.groups, strict=True)) if images.groups else {}
    began = replace(
        images,
        paths=tuple(stored.paths),
        targets=np.array(stored.targets, np.int64),
        classes=tuple(stored.classes),
        train=np.ones(n, bool),
        boxes=column(images.boxes, np.nan),
        keypoints=column(images.keypoints, 0),
        slices=None if images.slices is None else images.slices.take(found),
        groups=tuple(groups.get(name, "") for name in stored.classes) if groups else (),
    )
    verdicts = check_files(began, threads=threads, lenient=True)
    lost = {row: verdict for row, verdict in enumerate(verdicts) if verdict.reason}
    missing = tuple((stored.paths[row], verdict.reason) for row, verdict in lost.items())
    if len(lost) > MAX_BROKEN * n:
        raise UserError(
            f"{len(lost)} of the {n} images with which {file.parent} began cannot be read, such as {missing[0][0]} "
            f"({missing[0][1]}): restore them."
        )
    records = _records(began, stored, verdicts, lost)
    added = sum(rel not in known for rel in images.paths)
    return Kept(began, records, missing, added, tuple(stored.held_out))


def held_out_paths(file: Path) -> frozenset[str]:
    """The relative paths of the images that a run holds out; none if there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    stamp = file_stamp(str(file))
    return frozenset() if stamp is None else _held_out_paths(file, stamp)


@lru_cache(maxsize=2)
def _held_out_paths(file: Path, stamp: tuple[int, int]) -> frozenset[str]:
    return frozenset(_read(file).held_out)


def _records(images: ImageSet, stored: _Stored, verdicts: list[Verdict], lost: dict[int, Verdict]) -> Records:
    heights, widths = np.array(stored.heights, np.int32), np.array(stored.widths, np.int32)
    readable = [row for row in range(len(verdicts)) if row not in lost]
    heights[readable] = [verdicts[row].height for row in readable]
    widths[readable] = [verdicts[row].width for row in readable]
    return Records(
        images=images,
        index=np.arange(len(images)),
        files=tuple(v.source or path for v, path in zip(verdicts, images.files(), strict=True)),
        stamps=tuple(None if v.reason else v.stamp() for v in verdicts),
        sizes=np.stack([np.maximum(1, heights - images.banner), widths], 1),
        heights=heights,
        orientations=np.array([v.orientation for v in verdicts], np.int8),
        skipped=tuple(stored.skipped),
        lost=lost,
    )


def _read(file: Path) -> _Stored:
    stored = read_json(file, _Stored, remedy=_REMEDY, limit=_LIMIT, strict=False)
    n = len(stored.paths)
    columns = (stored.targets, stored.heights, stored.widths)
    if stored.version != _VERSION:
        raise UserError(
            f"{file} is of version {stored.version}, not {_VERSION}: give the version of fgfast that wrote it."
        )
    if stored.digest != _digest(stored) or not n or any(len(column) != n for column in columns):
        raise UserError(f"{file} was changed since the run began (its checksum differs): {_REMEDY}.")
    for name in ("classes", "paths", "held_out"):
        setattr(stored, name, unescape_names(getattr(stored, name)))
    if outside := next(filter(leads_out, stored.paths), None):
        raise UserError(f"{file} names {outside}, which is outside the data: {_REMEDY}.")
    stored.skipped = [(rel, reason) for rel, reason in map(unescape_names, stored.skipped)]
    return stored


def _digest(stored: _Stored) -> str:
    return hashlib.sha256(_encode(replace(stored, digest=""))).hexdigest()


def _encode(stored: _Stored) -> bytes:
    import msgspec

    return msgspec.json.encode(stored)
