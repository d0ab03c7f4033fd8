"""Write the images of a set to shards, with their labels, metadata and id maps inside."""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, cast

import numpy as np

from fgfast.data.imageset import ImageSet
from fgfast.data.manifest import Records, check_images, file_stamp
from fgfast.data.maps import map_file, read_map, read_maps_info
from fgfast.data.names import escape_names
from fgfast.data.order import LANES
from fgfast.data.shards.index import (
    BEGUN,
    IDS,
    MANIFEST,
    VERSION,
    Entry,
    Manifest,
    ShardIndex,
    Split,
    digest_of_index,
    read_manifest,
    read_own_index,
    write_index,
    write_manifest,
)
from fgfast.data.slices import read_file
from fgfast.errors import UserError
from fgfast.files import clear_leftovers, digest_of, write_atomic
from fgfast.formats import read_json

DEFAULT_MB = 128.0
"""Megabytes of images in a shard; fewer if a split would have fewer shards than an epoch reads at the same time."""
_COLUMNS = ("targets", "train", "boxes", "keypoints")


@dataclass(frozen=True)
class _Shard:
    """The rows (of the records) of a shard to write, and the number of the first image, which its key is made of."""

    split: Split
    number: int
    rows: np.ndarray
    first: int

    @property
    def name(self) -> str:
        """The name of the tar file without its extension."""
        return f"{self.split}-{self.number:06d}"


class ShardWriter:
    """Writes the images of a set to tar files of about ``shard_mb``, each split to its own, in random order.

    Every image is one sample: KEY.jpg or KEY.png, KEY.cls (its class, if it has one), KEY.json (path, class, split,
    size, box, key points) and KEY.ids.png (its id map, if the set has some). Images that no loader reads directly (BMP,
    CMYK, 16-bit, ...) are stored as 8-bit PNG; those that cannot be read are left out. The same set and settings give
    the same bytes, whatever the number of workers and however often the work was interrupted: shards that are there are
    kept.

    Args:
        images: the set.
        out: the folder to write; created if it is missing.
        shard_mb: megabytes of images in a shard; None is 128, or less for at least 24 shards of each split.
        maps: folder of id maps to store with the images; None takes the ground-truth ones of the set, if it has some.
        workers: threads.
        seed: seed of the order of the images.

    Raises:
        UserError: ``out`` holds something else or shards of other images, there is no image, or more than 5% cannot be
            read. Nothing is written before :meth:`write`.
    """

    def __init__(
        self,
        images: ImageSet,
        out: Path,
        *,
        shard_mb: float | None = None,
        maps: Path | None = None,
        workers: int = 1,
        seed: int = 0,
    ) -> None:
        """Check the arguments and decode every image that was not decoded before."""
        _check(images, out, shard_mb, workers, seed)
        self.records = check_images(images, threads=workers)
        self.out, self.workers = out, workers
        self.maps = images.masks if maps is None else maps
        self.origin = _origin(self.records, self.maps, shard_mb, seed)
        self.plan = _cut(self.records, shard_mb, seed)
        self.stopped = threading.Event()
        self._check_origin()

    def write(self) -> Path:
        """Write every shard that is not there, and the index.

        Raises:
            UserError: an image or an id map changes or cannot be read any longer, or ``out`` holds shards of other
                images by now.
        """
        out, images, records = self.out, self.records.images, self.records
        self._check_origin()  # again: whoever holds the folder now may not be the first since the check
        clear_leftovers(out)
        begun = json.dumps({"origin": self.origin}).encode()
        write_atomic(out / BEGUN, lambda p: p.write_bytes(begun), durable=True)
        entries = self._write_all()
        if self.maps is not None:
            info = json.dumps(read_maps_info(self.maps)).encode()
            write_atomic(out / "maps.json", lambda p: p.write_bytes(info))
        manifest = Manifest(
            version=VERSION, origin=self.origin, source=escape_names([images.source])[0],
            classes=escape_names(images.classes), groups=escape_names(images.groups),
            part_names=escape_names(images.part_names), banner=images.banner, ids=self.maps is not None,
            splits={s: sum(e.images for e in entries if e.name.startswith(s)) for s in ("train", "test")},
            shards=entries, skipped=[(rel, reason) for rel, reason in map(escape_names, records.skipped)],
        )  # fmt: skip
        write_manifest(out, manifest)
        (out / BEGUN).unlink(missing_ok=True)
        return out

    def _check_origin(self) -> None:
        """Raise a UserError if the folder holds shards of another origin."""
        if (self.out / MANIFEST).is_file():
            found, state = read_manifest(self.out).origin, "holds"
        elif (self.out / BEGUN).is_file():
            remedy = f"remove {self.out}, or give another folder"
            found = read_json(self.out / BEGUN, dict[str, str], remedy=remedy).get("origin", "")
            state = "holds unfinished"
        else:
            return
        if found != self.origin:
            raise UserError(
                f"{self.out} {state} shards of other images or settings, or an image has changed since they were "
                "begun: give another folder, or remove it."
            )

    def _write_all(self) -> list[Entry]:
        with ThreadPoolExecutor(self.workers) as pool:
            futures = [pool.submit(self._write_one, shard) for shard in self.plan]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self.stopped.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _write_one(self, shard: _Shard) -> Entry:
        index = self._finished(shard) or self._write_shard(shard)
        return Entry(shard.name, len(shard.rows), index.bytes, index.sha256, digest_of_index(index))

    def _finished(self, shard: _Shard) -> ShardIndex | None:
        """The index of a shard that an earlier call has written; None if it is missing or damaged."""
        tar = self.out / f"{shard.name}.tar"
        if not (self.out / f"{shard.name}.json").exists():
            return None
        try:
            index = read_own_index(self.out, shard.name)
            whole = tar.stat().st_size == index.bytes and (self.out / f"{shard.name}.idx").is_file()
        except (UserError, OSError):
            return None
        return index if whole and len(index.paths) == len(shard.rows) else None

    def _write_shard(self, shard: _Shard) -> ShardIndex:
        images, of = self.records.images, self.records.index[shard.rows]
        index = ShardIndex(
            version=VERSION, name=shard.name, split=shard.split, bytes=0,
            sha256="", paths=escape_names(images.paths[i] for i in of), targets=images.targets[of].tolist(),
            start=[], size=[], crc=[], shape=[], ids=None if self.maps is None else [],
            boxes=None if images.boxes is None else [_box(images.boxes[i]) for i in of],
            keypoints=None if images.keypoints is None else images.keypoints[of].tolist(),
        )  # fmt: skip
        members: list[list[tuple[str, int, int, str]]] = []
        write_atomic(self.out / f"{shard.name}.tar", partial(self._write_tar, shard, index, members), durable=True)
        write_index(self.out, index, members)
        return index

    def _write_tar(
        self, shard: _Shard, index: ShardIndex, members: list[list[tuple[str, int, int, str]]], path: Path
    ) -> None:
        with path.open("wb") as stream:
            file = _Hashed(stream)
            tar = tarfile.TarFile(fileobj=cast(IO[bytes], file), mode="w", format=tarfile.USTAR_FORMAT)
            for n, row in enumerate(shard.rows.tolist()):
                if self.stopped.is_set():
                    raise InterruptedError("stopped")
                key, sample = f"{shard.first + n:09d}", []
                for kind, content in self._sample(index, n, row):
                    info = tarfile.TarInfo(f"{key}.{kind}")
                    info.size = len(content)
                    start = tar.offset + tarfile.BLOCKSIZE
                    tar.addfile(info, BytesIO(content))
                    sample.append((kind, start, len(content), info.name))
                    place = start, len(content), zlib.crc32(content)
                    if kind in ("jpg", "png"):
                        for column, value in zip((index.start, index.size, index.crc), place, strict=True):
                            column.append(value)
                    elif kind == IDS:
                        assert index.ids is not None
                        index.ids.append(place)
                members.append(sample)
            tar.close()
        index.bytes, index.sha256 = file.size, file.digest.hexdigest()

    def _sample(self, index: ShardIndex, n: int, row: int) -> Iterator[tuple[str, bytes]]:
        """The members of a sample: extension and content."""
        records = self.records
        images, i = records.images, int(records.index[row])
        content = self._image(row)
        height, width, turn = int(records.heights[row]), int(records.sizes[row, 1]), int(records.orientations[row])
        index.shape.append((height, width, turn))
        yield "jpg" if content.startswith(b"\xff\xd8") else "png", content
        target = int(images.targets[i])
        if target >= 0:
            yield "cls", str(target).encode()
        if self.maps is not None:
            read_map(self.maps, images.paths[i])  # a damaged one is refused
            yield IDS, read_file(map_file(self.maps, images.paths[i]))
        facts = {"path": index.paths[n], "split": index.split, "height": height, "width": width}
        if target >= 0:
            facts |= {"target": target, "class": images.classes[target]}
        facts |= {"box": None if index.boxes is None else index.boxes[n]}
        facts |= {"keypoints": None if index.keypoints is None else index.keypoints[n]}
        yield "json", json.dumps({name: value for name, value in facts.items() if value is not None}).encode()

    def _image(self, row: int) -> bytes:
        file, stamp = self.records.files[row], self.records.stamps[row]
        rel = self.records.images.paths[self.records.index[row]]
        try:
            content = read_file(file)
        except OSError as error:
            raise UserError(f"{rel} can no longer be read ({error.strerror or error}): restore it.") from error
        if stamp is None or stamp != file_stamp(file) or len(content) != stamp[0]:
            raise UserError(f"{rel} has changed while it was written: run the command again when no one writes to it.")
        return content


def _check(images: ImageSet, out: Path, shard_mb: float | None, workers: int, seed: int) -> None:
    if shard_mb is not None and not 0 < shard_mb <= 8000:
        raise UserError(f"--shard-mb is {shard_mb:g}: give a number above 0, at most 8000.")
    for name, value, least in (("--workers", workers, 1), ("--seed", seed, 0)):
        if value < least:
            raise UserError(f"{name} is {value}: give at least {least}.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give another folder.")
    if out.resolve().is_relative_to(images.root.resolve()):
        raise UserError(f"{out} lies in the data folder {images.root}: give a folder outside it.")
    files = [path for path in sorted(out.iterdir()) if not path.name.startswith(".")] if out.is_dir() else []
    if files and not any((out / name).is_file() for name in (MANIFEST, BEGUN)):
        raise UserError(f"{out} holds other files, such as {files[0].name}: give an empty or a new folder.")


def _origin(records: Records, maps: Path | None, shard_mb: float | None, seed: int) -> str:
    """SHA-256 of what the shards are made of: any other image, class or setting gives another one."""
    images = records.images.subset(records.index)
    digest = hashlib.sha256()
    for name in _COLUMNS:
        values = getattr(images, name)
        digest.update(name.encode() + (b"" if values is None else np.ascontiguousarray(values).tobytes()))
    stamps = [file_stamp(images.file(i)) for i in range(len(images))]
    words = [escape_names(images.paths), escape_names(images.classes), escape_names(images.groups), stamps]
    ids = None if maps is None else read_maps_info(maps)
    return digest_of([VERSION, digest.hexdigest(), words, images.banner, images.part_names, ids, shard_mb, seed])


def _cut(records: Records, shard_mb: float | None, seed: int) -> list[_Shard]:
    """The images of each shard: of a split in random order, cut where a shard is full."""
    bytes_of = np.array([size for size, _ in (stamp or (1, 0) for stamp in records.stamps)], np.int64)
    train = records.images.train[records.index]
    shards: list[_Shard] = []
    first = 0
    splits: tuple[tuple[Split, np.ndarray], ...] = (("train", train), ("test", ~train))
    for split, mask in splits:
        rows = np.flatnonzero(mask)
        if not len(rows):
            continue
        rows = np.random.default_rng(seed).permutation(rows)
        total = np.cumsum(bytes_of[rows])
        limit = min(DEFAULT_MB * 1e6, total[-1] / LANES) if shard_mb is None else shard_mb * 1e6
        at = (total - bytes_of[rows] / 2) // limit  # by the middle of the image
        for number, piece in enumerate(np.split(rows, np.flatnonzero(np.diff(at)) + 1)):
            shards.append(_Shard(split, number, piece, first))
            first += len(piece)
    return shards


def _box(box: np.ndarray) -> tuple[float, float, float, float] | None:
    x, y, w, h = box.tolist()
    return None if np.isnan(box).any() else (x, y, w, h)


class _Hashed:
    """A file that is written from start to end, with the SHA-256 of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        self.size += len(content)
        return self.file.write(content)

    def tell(self) -> int:
        return self.size
