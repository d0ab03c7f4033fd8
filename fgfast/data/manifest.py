"""The usable files of a data set: every file is decoded in full once, and the result is cached.

One broken image stops a DALI pipeline, and only a full decode finds it: the header of a JPEG that is cut off at 98% is
intact. The cache stores a verdict with the size and modification time of each file; an unchanged file costs one stat.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from fgfast.data.imageset import ImageSet
from fgfast.data.maps import write_atomically
from fgfast.deprecated import forward_names
from fgfast.errors import UserError

log = logging.getLogger("fgfast")

MAX_BROKEN = 0.05
_VERSION = 1
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
        mtime_ns: time of its last modification.
        full: it was decoded in full; False = only the header was read.
        height: height of the upright image, 0 if the file is broken.
        width: width of the upright image.
        source: the file to read instead (a converted copy), "" for the file itself.
        reason: why it is broken, "" if it is not.
    """

    size: int
    mtime_ns: int
    full: bool
    height: int = 0
    width: int = 0
    source: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Records:
    """The usable images of an image set.

    Args:
        images: the image set, with the broken images.
        index: indices of the usable images in it, int64 [N].
        files: the files to read, N absolute paths.
        stamps: (bytes, modification time) of each file when it was decoded in full; None = it never was.
        sizes: (H, W) of the upright images without the banner, int32 [N, 2].
        skipped: (relative path, reason) of each broken image.
    """

    images: ImageSet
    index: np.ndarray
    files: tuple[str, ...]
    stamps: tuple[tuple[int, int] | None, ...]
    sizes: np.ndarray
    skipped: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        """N."""
        return len(self.files)


def upright_rgb(image: object) -> np.ndarray:
    """An opened PIL image as uint8 [H, W, 3], upright; 16-bit and float values are scaled, not clipped."""
    from PIL import Image, ImageOps

    assert isinstance(image, Image.Image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I") or upright.mode == "F":
        values = np.asarray(upright).astype(np.float64)
        if upright.mode == "F":
            low, high = float(np.nanmin(values)), float(np.nanmax(values))
            low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, max(high, low + 1e-12))
            values = np.nan_to_num((values - low) / (high - low))
        else:
            values = values / max(65535.0, values.max())
        return np.repeat(np.rint(values * 255).astype(np.uint8)[:, :, None], 3, 2)
    return np.asarray(upright.convert("RGB"))


def read_image(path: str) -> np.ndarray:
    """Decode a file with PIL to uint8 [H, W, 3], upright.

    Raises:
        OSError: the file does not decode.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return upright_rgb(image)
    except (SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error


def convert(path: str) -> str:
    """Write the image as an 8-bit RGB PNG to the cache and return the path of that file.

    Raises:
        OSError: the file does not decode.
    """
    stat = os.stat(path)
    key = hashlib.sha1(f"{os.path.abspath(path)}:{stat.st_size}:{stat.st_mtime_ns}".encode()).hexdigest()
    target = cache_folder() / "converted" / f"{key}.png"
    if not target.exists():
        from PIL import Image

        stream = BytesIO()
        Image.fromarray(read_image(path)).save(stream, "PNG", compress_level=1)
        write_atomically(target, stream.getvalue())
    return str(target)


def _check_file(path: str, size: int, mtime_ns: int, full: bool) -> Verdict:
    from PIL import Image, UnidentifiedImageError

    try:
        if size == 0:
            raise OSError("the file is empty")
        with Image.open(path) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:
                width, height = height, width
            direct = image.format in ("JPEG", "PNG") and image.mode in _DIRECT_MODES
            if full:
                image.load()
        if direct and path[-4:].lower() != ".jpg":
            direct = _has_end(path)
        return Verdict(size, mtime_ns, full, height, width, "" if direct else convert(path))
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
        return Verdict(size, mtime_ns, full, reason=reason or type(error).__name__)


def _has_end(path: str) -> bool:
    """Whether a PNG has its last chunk (True for other formats); without it PIL decodes the file, but DALI fails."""
    with open(path, "rb") as file:
        if file.read(4) != b"\x89PNG":
            return True
        file.seek(-12, os.SEEK_END)
        return b"IEND" in file.read()


def check_images(images: ImageSet, *, full: bool = True, threads: int | None = None, quiet: bool = False) -> Records:
    """Find the usable images, decoding only files that are new or changed since the last check.

    Args:
        images: the set.
        full: decode every file; False reads only headers.
        threads: decoding threads; None = one per CPU core.
        quiet: do not log the skipped images.

    Returns:
        The usable images; broken ones are named in ``skipped`` and in the log.

    Raises:
        UserError: a file is missing, more than 5% are broken, or nothing is left.
    """
    if not len(images):
        raise UserError(f"The image set of {images.root} is empty: choose another split or folder.")
    root = str(images.root.resolve())
    cache = cache_folder() / "manifests" / f"{hashlib.sha1(root.encode()).hexdigest()[:20]}.json"
    known = _load(cache)
    verdicts: list[Verdict | None] = []
    unknown: list[tuple[int, str, int, int]] = []
    files = images.files()
    keys = [file.removeprefix(f"{root}/") for file in files]  # the absolute path of an image outside the root
    for i, (path, rel) in enumerate(zip(files, keys, strict=True)):
        try:
            stat = os.stat(path)
        except FileNotFoundError as error:
            raise UserError(f"The image {path} is listed but missing: restore it or take it off the list.") from error
        verdict = known.get(rel)
        fresh = verdict is not None and (verdict.size, verdict.mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        if verdict is not None and fresh and verdict.source:
            fresh = os.path.exists(verdict.source)
        if verdict is None or not fresh or (full and not verdict.full):
            unknown.append((i, path, stat.st_size, stat.st_mtime_ns))
            verdict = None
        verdicts.append(verdict)
    if unknown:
        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            for (i, *_), found in zip(
                unknown, pool.map(lambda u: _check_file(u[1], u[2], u[3], full), unknown), strict=True
            ):
                verdicts[i] = known[keys[i]] = found
        table = {rel: list(vars(verdict).values()) for rel, verdict in known.items()}
        try:
            write_atomically(cache, json.dumps({"version": _VERSION, "root": root, "files": table}).encode())
        except UserError as error:  # not fatal: the files are only checked again next time
            log.warning("the manifest is not saved: %s", error)
    return _records(images, files, [verdict for verdict in verdicts if verdict is not None], quiet)


def _records(images: ImageSet, paths: list[str], verdicts: list[Verdict], quiet: bool) -> Records:
    skipped = tuple((rel, v.reason) for rel, v in zip(images.paths, verdicts, strict=True) if v.reason)
    if skipped:
        named = "; ".join(f"{rel} ({reason})" for rel, reason in skipped[:10])
        more = f" and {len(skipped) - 10} more" if len(skipped) > 10 else ""
        if len(skipped) == len(images) or len(skipped) > MAX_BROKEN * len(images):
            raise UserError(
                f"{len(skipped)} of {len(images)} images of {images.root} do not decode, such as {skipped[0][0]} "
                f"({skipped[0][1]}): restore or remove them."
            )
        if not quiet:
            log.warning("skipped %d of %d images that do not decode: %s%s", len(skipped), len(images), named, more)
    index = np.array([i for i, v in enumerate(verdicts) if not v.reason], np.int64)
    files = tuple(verdicts[i].source or paths[i] for i in index)
    return Records(
        images=images,
        index=index,
        files=files,
        stamps=tuple(_stamp(verdicts[i]) for i in index),
        sizes=np.array([shown_size(images, verdicts[i].height, verdicts[i].width) for i in index], "i4").reshape(-1, 2),
        skipped=skipped,
    )


def shown_size(images: ImageSet, height: int, width: int) -> tuple[int, int]:
    """Height and width of the part of an upright image that views show: without the banner at the bottom."""
    return max(1, height - images.banner), width


def _stamp(verdict: Verdict) -> tuple[int, int] | None:
    if verdict.source:
        stat = os.stat(verdict.source)
        return stat.st_size, stat.st_mtime_ns
    return (verdict.size, verdict.mtime_ns) if verdict.full else None


def _load(cache: Path) -> dict[str, Verdict]:
    try:
        table = json.loads(cache.read_bytes())
        if table["version"] != _VERSION:
            return {}
        return {rel: Verdict(*fields) for rel, fields in table["files"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the manifest %s cannot be read (%s): every image is checked again", cache, error)
        return {}


__getattr__ = forward_names(__name__, __name__, {"read_picture": "read_image"})
