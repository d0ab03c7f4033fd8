"""Write the index of WebDataset shards that another program has written, by reading every tar file once."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fgfast.data.imageset import EXTENSIONS, UNLABELLED
from fgfast.data.inside import leads_out
from fgfast.data.layouts.folders import split_of
from fgfast.data.manifest import check_file
from fgfast.data.names import escape_names
from fgfast.data.shards.index import (
    BEGUN,
    VERSION,
    Entry,
    Manifest,
    ShardIndex,
    check_foreign,
    digest_of_index,
    write_index,
    write_manifest,
)
from fgfast.data.slices import Slice
from fgfast.errors import UserError

log = logging.getLogger("fgfast")

_LABEL = "cls"


@dataclass
class _Found:
    """A shard: its index, where targets are positions in ``labels``, and the members of each sample for DALI."""

    index: ShardIndex
    members: list[list[tuple[str, int, int, str]]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)


def index_shards(folder: Path, *, workers: int = 1) -> Path:
    """Write shards.json, and NAME.json and NAME.idx for each NAME.tar of a folder.

    A sample is the consecutive members KEY.EXTENSION with the same KEY: an image (KEY.jpg, KEY.png, ...), its class in
    KEY.cls, a number or a name, and members that are not read. A shard is for testing if its name begins with a name of
    a test split (test-, val-, imagenet-val-, ...), else for training.

    Raises:
        UserError: a tar file is cut off or damaged, has links or devices, a key twice, a sample with two images or
            none, or a class for some images only; or fgfast has written the shards, with an index of its own.
    """
    tars = sorted(folder.glob("*.tar")) if folder.is_dir() else []
    if not tars:
        raise UserError(f"{folder} has no tar file: give the folder of the shards.")
    if (folder / BEGUN).exists():
        raise UserError(f"The shards in {folder} are not complete: run the same fgfast shard command again.")
    check_foreign(folder)
    with ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(_scan, tars))
    if not any(part.index.paths for part in found):
        raise UserError(f"The tar files in {folder} hold no image: give the folder of shards of images.")
    found = [part for part in found if part.index.paths]
    if others := sorted(set().union(*(part.others for part in found))):
        log.warning("members that are not read: %s", ", ".join(f".{kind}" for kind in others[:10]))
    names = sorted({label for part in found for label in part.labels}, key=lambda name: (len(name), name))
    target_of = {name: i for i, name in enumerate(names)}
    entries = []
    for part in found:
        index = part.index
        index.targets = [-1 if t < 0 else target_of[part.labels[t]] for t in index.targets]
        write_index(folder, index, part.members)
        entries.append(Entry(index.name, len(index.paths), index.bytes, index.sha256, digest_of_index(index)))
    splits = {s: sum(len(p.index.paths) for p in found if p.index.split == s) for s in ("train", "test")}
    classes = escape_names(names) or [UNLABELLED]
    write_manifest(
        folder, Manifest(VERSION, "", f"shards in {folder.name}", classes, [], [], 0, False, splits, entries)
    )
    return folder


def _scan(path: Path) -> _Found:
    name = path.stem
    split = split_of(re.split(r"[-_.]?[0-9{]", name)[0])
    index = ShardIndex(VERSION, name, "test" if split in ("val", "test") else "train", 0, "", [], [], [], [], [], [])
    found = _Found(index)
    known: dict[str, int] = {}
    seen: set[str] = set()
    if not path.is_file():
        raise UserError(f"{path} is no file: remove it.")
    with path.open("rb") as file:
        index.sha256, index.bytes = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
        key, kinds = "", set[str]()
        for member in _members(path):
            folder, _, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            if not stem or not kind or "/" in kind:
                continue  # a hidden file, or one without an extension
            now = f"{folder}/{stem}" if folder else stem
            if now != key:
                _check_sample(path, key, kinds)
                if now in seen:
                    raise UserError(f"{path} has the key {now} twice: write it again with different keys.")
                seen.add(now)
                key, kinds = now, set()
                found.members.append([])
            if kind in kinds:
                raise UserError(f"{path} has {member.name} twice: write it again with different keys.")
            kinds.add(kind)
            if leads_out(member.name):
                raise UserError(f"{path} has {member.name}, which is outside: write it again with other keys.")
            found.members[-1].append((kind, member.offset_data, member.size, member.name))
            if f".{kind.lower()}" in EXTENSIONS:
                _add_image(path, file.fileno(), found, member)
            elif kind == _LABEL:
                file.seek(member.offset_data)
                label = file.read(min(member.size, 1000)).decode("utf-8", "replace").strip()
                index.targets.append(known.setdefault(label, len(known)))
            else:
                found.others.add(kind)
        _check_sample(path, key, kinds)
    found.labels = list(known)
    if not index.targets:
        index.targets = [-1] * len(index.paths)
    if len(index.targets) != len(index.paths):
        raise UserError(
            f"{path} has a .{_LABEL} for {len(index.targets)} of {len(index.paths)} images: add the others."
        )
    return found


def _check_sample(path: Path, key: str, kinds: set[str]) -> None:
    """Raise a UserError for a sample without exactly one image."""
    n = sum(f".{kind.lower()}" in EXTENSIONS for kind in kinds)
    if kinds and n != 1:
        raise UserError(f"{path} has {n} images with the key {key}: give each image a key of its own.")


def _add_image(path: Path, descriptor: int, found: _Found, member: tarfile.TarInfo) -> None:
    index = found.index
    content = os.pread(descriptor, member.size, member.offset_data)
    piece = Slice(str(path.resolve()), member.offset_data, member.size, zlib.crc32(content))
    verdict = check_file(piece)  # a file to convert, or a broken one, is seen again when the set is used
    direct = not verdict.reason and not verdict.source
    index.paths += escape_names([f"{index.name}/{member.name}"])
    index.start.append(piece.start)
    index.size.append(piece.size)
    index.crc.append(piece.crc)
    index.shape.append((verdict.height, verdict.width, verdict.orientation) if direct else (0, 0, 0))


def _members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The files in a tar file.

    Raises:
        UserError: it is cut off or damaged, or has a member that is no file.
    """
    remedy = "write it again or remove it"
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                if member.isfile():
                    yield member
                elif not member.isdir():
                    raise UserError(f"{path} has {member.name}, a link or device and no file: {remedy}.")
            end = tar.offset
        with path.open("rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("its end is missing")
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise UserError(f"{path} is cut off, damaged or no tar file ({error}): {remedy}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {remedy}.") from error
