"""The usable files of a data set: every file is decoded in full once, and the result is cached.

One broken image stops a DALI pipeline, and only a full decode finds it: the header of a JPEG that is cut off at 98% is
intact. The cache stores a verdict with the size and modification time of each file; an unchanged file costs one stat.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np

from fgfast.data.decode import (
    TooManyPixelsError,
    decode,
    max_pixels,
    open_image,
    orientation_of,
    turn,
    upright_size,
)
from fgfast.data.decode import read_image as read_image
from fgfast.data.decode import upright_rgb as upright_rgb
from fgfast.data.imageset import ImageSet
from fgfast.data.maps import write_atomically
from fgfast.data.slices import File, Slice, Slices, read_file, status
from fgfast.deprecated import forward_names
from fgfast.errors import UserError
from fgfast.files import digest_of
from fgfast.formats import read_bytes

log = logging.getLogger("fgfast")

MAX_BROKEN = 0.05
_VERSION = 2
_TRIED = 16  # shards
_DIRECT_MODES = frozenset({"RGB", "L", "RGBA", "LA", "P", "1"})


def cache_folder() -> Path:
    """FGFAST_CACHE, else fgfast/ in the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    chosen = os.environ.get("FGFAST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fgfast"


@dataclass(frozen=True)
class Verdict:
    """The result of checking one file.

    Args:
        size: size of the file in bytes.
        mtime_ns: time of its last modification; of an image in a shard the checksum of its bytes.
        full: it was decoded in full; False = only the header was read.
        height: height of the upright image, 0 if the file is broken.
        width: width of the upright image.
        orientation: EXIF orientation of the stored pixels, 1 to 8.
        source: the file to read instead (a converted copy), "" for the file itself.
        reason: why it is broken, "" if it is not.
        passing: the reason is an error of the system (no such file, no permission, a failed read) or a setting (the
            limit of pixels) that may be gone next time; it is never stored.
    """

    size: int
    mtime_ns: int
    full: bool
    height: int = 0
    width: int = 0
    orientation: int = 1
    source: str = ""
    reason: str = ""
    passing: bool = False

    def stamp(self) -> tuple[int, int] | None:
        """(bytes, modification time) of the file to read, if it was decoded in full."""
        if self.source:
            return file_stamp(self.source)
        return (self.size, self.mtime_ns) if self.full else None


@dataclass(frozen=True)
class Records:
    """The usable images of an image set.

    Args:
        images: the image set, with the broken images.
        index: indices of the usable images in it, int64 [N].
        files: the files to read, N absolute paths or slices.
        stamps: (bytes, modification time) of each file when it was decoded in full; None = it never was.
        sizes: (H, W) of the upright images without the banner, int32 [N, 2].
        heights: their H with the banner, int32 [N].
        orientations: EXIF orientation of the pixels stored in each file, 1 to 8, int8 [N].
        skipped: (relative path, reason) of each broken image.
        lost: the verdict on each of these images, by its position in 0..N-1, that was usable when a run began and is
            not now; see ``fgfast.data.kept``.
    """

    images: ImageSet
    index: np.ndarray
    files: tuple[File, ...]
    stamps: tuple[tuple[int, int] | None, ...]
    sizes: np.ndarray
    heights: np.ndarray
    orientations: np.ndarray
    skipped: tuple[tuple[str, str], ...]
    lost: Mapping[int, Verdict] = field(default_factory=dict)

    def __len__(self) -> int:
        """N."""
        return len(self.files)


def black_image(height: int, width: int) -> str:
    """The path of a black PNG in the cache.

    Raises:
        UserError: the file cannot be written.
    """
    from PIL import Image

    target = cache_folder() / "converted" / f"black-{height}x{width}.png"
    if not _is_whole(target):
        stream = BytesIO()
        Image.new("RGB", (width, height)).save(stream, "PNG")
        write_atomically(target, stream.getvalue())
    return str(target)


def convert(path: File, pixels: np.ndarray) -> str:
    """Write the pixels of an image as an 8-bit RGB PNG to the cache and return the path of that file.

    Raises:
        UserError: the file cannot be written.
    """
    found = status(path)
    where = os.path.abspath(path) if isinstance(path, str) else f"{os.path.abspath(path.file)}@{path.start}"
    key = f"{_VERSION}:{where}:{found.size}:{found.mark}"
    target = cache_folder() / "converted" / f"{hashlib.sha1(os.fsencode(key)).hexdigest()}.png"
    if not _is_whole(target):
        from PIL import Image

        stream = BytesIO()
        Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
        write_atomically(target, stream.getvalue())
    return str(target)


def check_file(path: File, *, full: bool = True) -> Verdict:
    """Decode a file as the loaders do; ``full=False`` reads only the header of a JPEG.

    Raises:
        UserError: a converted copy cannot be written.
    """
    size = mtime_ns = 0
    try:
        size, mtime_ns, regular = status(path)
        if not regular or size == 0:
            raise OSError("the file is empty" if regular else "not a file")
        with open_image(path) as image:
            direct = image.format in ("JPEG", "PNG") and image.mode in _DIRECT_MODES
            header = direct and image.format == "JPEG" and not full
            stored, orientation = (image, orientation_of(image)) if header else decode(image)
            if direct and (image.format == "JPEG" or _has_end(path)):
                height, width = upright_size(stored.size, orientation)
                return Verdict(size, mtime_ns, not header, height, width, orientation)
            pixels = turn(np.asarray(stored), orientation)
        height, width = pixels.shape[:2]
        return Verdict(size, mtime_ns, True, height, width, source=convert(path, pixels))
    except OSError as error:
        reason, passing = reason_of(error if is_passing(error) else _failure_to_read(path) or error)
        return Verdict(size, mtime_ns, full, reason=reason, passing=passing)
    except ValueError as error:  # no path at all: it holds a null byte
        return Verdict(size, mtime_ns, full, reason=str(error))


def is_passing(error: OSError) -> bool:
    """Whether an error is one of the system or of a setting, not of the content of a file."""
    return error.errno is not None or isinstance(error, TooManyPixelsError)


def reason_of(error: OSError) -> tuple[str, bool]:
    """Why a file cannot be read, and whether that may pass, see :func:`is_passing`."""
    return error.strerror or str(error) or type(error).__name__, is_passing(error)


def _failure_to_read(path: File) -> OSError | None:
    """The error of the system for a file, which a decoder may have hidden: libtiff reports a failed read as its own."""
    if isinstance(path, Slice) or not os.path.isfile(path):  # opening a pipe would wait
        return None
    try:
        with open(path, "rb") as file:
            while file.read(2**20):
                pass
    except OSError as error:
        return error
    return None


def _is_whole(copy: str | Path) -> bool:
    """Whether a PNG of the cache is there and has its end, which a power failure may have cost it."""
    try:
        return _has_end(str(copy))
    except OSError:
        return False


def _has_end(path: File) -> bool:
    """Whether a PNG has its last chunk; without it PIL decodes the file, but DALI fails."""
    return b"IEND" in read_file(path, last=12)


def check_images(
    images: ImageSet,
    *,
    full: bool = True,
    threads: int | None = None,
    quiet: bool = False,
    lenient: bool = False,
) -> Records:
    """Find the usable images, decoding only files that are new or changed since the last check.

    Args:
        images: the set.
        full: decode every file; False reads only headers.
        threads: decoding threads; None = one per CPU core.
        quiet: do not log the skipped images.
        lenient: skip missing images like broken ones, however many, for scores in the course of a run.

    Returns:
        The usable images; broken ones are named in ``skipped`` and in the log.

    Raises:
        UserError: nothing is left, or, unless ``lenient``, a file is missing or more than 5% are broken.
    """
    if not len(images):
        raise UserError(f"The image set of {images.root} is empty: choose another split or folder.")
    verdicts = check_files(images, full=full, threads=threads, lenient=lenient)
    return _records(images, verdicts, quiet=quiet, lenient=lenient)


def check_files(
    images: ImageSet, *, full: bool = True, threads: int | None = None, lenient: bool = False
) -> list[Verdict]:
    """The verdict on every image, see :func:`check_images`.

    Raises:
        UserError: a file is missing, unless ``lenient``.
    """
    root = str(images.root.resolve())
    cache = cache_folder() / "manifests" / f"{hashlib.sha1(os.fsencode(root)).hexdigest()[:20]}.json"
    known = _load(cache)
    files = images.files()
    keys = [  # the absolute path of an image outside the root
        file.removeprefix(f"{root}/") if isinstance(file, str) else rel
        for file, rel in zip(files, images.paths, strict=True)
    ]
    indexed = {} if images.slices is None else _indexed(images.slices)
    verdicts = [
        indexed.get(i) or _known_verdict(file, known.get(key), full, lenient)
        for i, (file, key) in enumerate(zip(files, keys, strict=True))
    ]
    unknown = [i for i, verdict in enumerate(verdicts) if verdict is None]
    if unknown:
        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            checked = pool.map(partial(check_file, full=full), [files[i] for i in unknown])
            for i, verdict in zip(unknown, checked, strict=True):
                verdicts[i] = known[keys[i]] = verdict
        table = {key: astuple(verdict) for key, verdict in known.items() if not verdict.passing}
        try:
            content = {"version": _VERSION, "root": root, "digest": digest_of(table), "files": table}
            write_atomically(cache, json.dumps(content).encode())
        except UserError as error:  # not fatal: the files are only checked again next time
            log.warning("the manifest is not saved: %s", error)
    return [verdict for verdict in verdicts if verdict is not None]


def _indexed(slices: Slices) -> dict[int, Verdict]:
    """The verdicts on images that were decoded when their shard was written, by position.

    Those of a shard that is gone cannot be read. Those of one with another number of bytes, or whose first image is not
    what the index says, have to be read again; the first image is read of a few shards, to find other shards at once.
    """
    found: dict[int, OSError | bool] = {}
    shards, first = np.unique(slices.which, return_index=True)
    tried = set(np.linspace(0, len(shards) - 1, _TRIED).astype(int).tolist())
    for n, (at, row) in enumerate(zip(shards.tolist(), first.tolist(), strict=True)):
        piece = slices[row]
        if piece is None or piece.crc < 0:
            continue
        try:
            found[at] = status(piece.file).size == slices.files[at][1]
            if n in tried:
                read_file(piece)
        except OSError as error:
            found[at] = error if is_passing(error) else False
    verdicts = {}
    for i in np.flatnonzero((slices.which >= 0) & (slices.crc >= 0)).tolist():
        state = found.get(int(slices.which[i]))
        size, crc = int(slices.size[i]), int(slices.crc[i])
        height, width, orientation = slices.shape[i].tolist()
        if isinstance(state, OSError):
            name = os.path.basename(slices.files[slices.which[i]][0])
            verdicts[i] = Verdict(size, crc, True, reason=f"{name}: {state.strerror}", passing=True)
        elif state and height and height * width <= max_pixels():
            verdicts[i] = Verdict(size, crc, True, height, width, orientation)
    return verdicts


def _known_verdict(path: File, verdict: Verdict | None, full: bool, lenient: bool) -> Verdict | None:
    """The verdict of an earlier check if it still holds.

    Raises:
        UserError: there is no such file, unless ``lenient``; a link to nothing is a broken image.
    """
    try:
        found = status(path)
    except (OSError, ValueError) as error:
        if not lenient and isinstance(error, FileNotFoundError) and isinstance(path, str) and not os.path.islink(path):
            raise UserError(f"The image {path} is listed but missing: restore it or take it off the list.") from error
        return None
    if verdict is None or (verdict.size, verdict.mtime_ns) != (found.size, found.mark):
        return None
    if (full and not verdict.full) or (verdict.source and not _is_whole(verdict.source)):
        return None
    if verdict.reason and isinstance(path, Slice):  # a shard that was damaged and restored has the same checksums
        return None
    if verdict.height * verdict.width > max_pixels():
        return None
    return verdict


def _records(images: ImageSet, verdicts: list[Verdict], *, quiet: bool, lenient: bool) -> Records:
    skipped = tuple((rel, v.reason) for rel, v in zip(images.paths, verdicts, strict=True) if v.reason)
    if skipped:
        named = "; ".join(f"{rel} ({reason})" for rel, reason in skipped[:10])
        more = f" and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        if len(skipped) == len(images) or (not lenient and len(skipped) > MAX_BROKEN * len(images)):
            raise UserError(
                f"{len(skipped)} of {len(images)} images of {images.root} cannot be read, such as {skipped[0][0]} "
                f"({skipped[0][1]}): restore or remove them."
            )
        if not quiet:
            log.warning("skipped %d of %d images that cannot be read: %s%s", len(skipped), len(images), named, more)
    index = np.array([i for i, v in enumerate(verdicts) if not v.reason], np.int64)
    paths = images.files()
    files = tuple(verdicts[i].source or paths[i] for i in index)
    return Records(
        images=images,
        index=index,
        files=files,
        stamps=tuple(verdicts[i].stamp() for i in index),
        sizes=np.array([shown_size(images, verdicts[i].height, verdicts[i].width) for i in index], "i4").reshape(-1, 2),
        heights=np.array([verdicts[i].height for i in index], np.int32),
        orientations=np.array([verdicts[i].orientation for i in index], np.int8),
        skipped=skipped,
    )


def shown_size(images: ImageSet, height: int, width: int) -> tuple[int, int]:
    """Height and width of the part of an upright image that views show: without the banner at the bottom."""
    return max(1, height - images.banner), width


def file_stamp(path: File) -> tuple[int, int] | None:
    """(bytes, modification time) of a file; None if there is none."""
    try:
        return status(path)[:2]
    except OSError:
        return None


def _load(cache: Path) -> dict[str, Verdict]:
    try:
        if not cache.exists():
            return {}
        table = json.loads(read_bytes(cache, limit=2**32))
        if table["version"] != _VERSION or "digest" not in table:  # of an earlier version
            return {}
        if table["digest"] != digest_of(table["files"]):
            raise ValueError("its checksum is wrong")
        known = {rel: Verdict(*fields) for rel, fields in table["files"].items()}
        copies = cache_folder() / "converted"
        return {rel: v for rel, v in known.items() if not v.source or Path(v.source).parent == copies}
    except Exception as error:  # whatever the file holds: a cache may always be thrown away
        log.warning("the manifest %s cannot be read (%s): every image is checked again", cache, error)
        return {}


__getattr__ = forward_names(__name__, __name__, {"read_picture": "read_image"})
