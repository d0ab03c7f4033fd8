"""Decode an image file to upright RGB pixels: the one definition of what the pixels of a file are."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import IO, TYPE_CHECKING

import numpy as np

from fgfast.data.slices import Slice, read_file
from fgfast.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

TURNS = np.array(
    [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 1, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]], bool
)
"""By EXIF orientation: (transpose, flip rows, flip columns); stored pixels flipped, then transposed, are upright."""


MAX_PIXELS = "FGFAST_MAX_PIXELS"
"""The environment variable that limits the pixels of an image; without it the limit is 100 million."""


class TooManyPixelsError(OSError):
    """An image has more pixels than the limit; nothing of it was decoded."""


def max_pixels() -> int:
    """The largest number of pixels that an image may have.

    Raises:
        UserError: the environment variable is not a positive whole number.
    """
    text = os.environ.get(MAX_PIXELS, "").strip()
    if not text:
        return 100_000_000
    if not text.isdecimal() or len(text) > 18 or not int(text):
        raise UserError(f"{MAX_PIXELS} is {text!r}: give a whole number of pixels, such as 100000000.")
    return int(text)


@contextmanager
def open_image(
    file: str | os.PathLike[str] | Slice | IO[bytes], formats: tuple[str, ...] | None = None
) -> Iterator[Image.Image]:
    """Open an image file, a slice of one or its content, in any of some formats; nothing is decoded yet.

    Raises:
        TooManyPixelsError: it has more than :func:`max_pixels`.
        OSError: it cannot be read or does not decode, here or within the context.
    """
    from PIL import Image

    limit = max_pixels()
    if isinstance(file, Slice):
        file = BytesIO(read_file(file))
    with decoding():
        with _without_pillows_limit():
            image = Image.open(file, formats=formats)
        with image:
            check_pixels(image.height, image.width, limit)
            yield image


def check_pixels(height: int, width: int, limit: int | None = None) -> None:
    """Raise a TooManyPixelsError for the size of an image above the limit; None is :func:`max_pixels`."""
    limit = max_pixels() if limit is None else limit
    if height * width > limit:
        raise TooManyPixelsError(
            f"{width} x {height} pixels are more than the {limit:,} that {MAX_PIXELS} allows: set it higher, or make "
            "the image smaller"
        )


_lock, _opening = threading.Lock(), 0
_limit: int | None = None


def _after_fork() -> None:
    """A worker process must not wait for a lock that a thread of its parent holds, nor go on without a limit."""
    global _lock, _opening
    if _opening:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = _limit
    _lock, _opening = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def _without_pillows_limit() -> Iterator[None]:
    """Suspend the limit of Pillow, which warns from 89 million pixels on, for all threads that are opening an image."""
    from PIL import Image

    global _opening, _limit
    with _lock:
        if not _opening:
            _limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _opening += 1
    try:
        yield
    finally:
        with _lock:
            _opening -= 1
            if not _opening:
                Image.MAX_IMAGE_PIXELS = _limit


@contextmanager
def decoding() -> Iterator[None]:
    """Raise OSError for whatever Pillow raises while it reads a file; an error of the system keeps its ``errno``.

    Pillow's plugins raise any class of exception for a broken file (struct.error, KeyError, RuntimeError, ...).
    """
    from PIL import UnidentifiedImageError

    try:
        yield
    except UnidentifiedImageError as error:
        raise OSError("not an image") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation of an opened image, 1 to 8; 1 if the tag is absent, unreadable or none of these."""
    try:
        value = image.getexif().get(0x0112)
    except Exception:  # metadata that does not parse says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def decode(image: Image.Image) -> tuple[Image.Image, int]:
    """An opened PIL image in mode RGB as it is stored, and its orientation; 16-bit and float values are scaled.

    A float image with values outside 0 to 1 is scaled by its finite range; NaN and negative integers become black.
    """
    from PIL import Image

    image.load()  # before the orientation is read: tags may follow the pixels, and Pillow itself turns a TIFF here
    orientation = orientation_of(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if image.mode == "F":
            finite = values[np.isfinite(values)]
            low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
            low, high = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
            values = np.nan_to_num((values - low) / max(high - low, 1e-12), posinf=1, neginf=0)
        else:
            values = values / max(65535.0, values.max())
        image = Image.fromarray(np.rint(values.clip(0) * 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB"), orientation


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Height and width of the upright image whose stored pixels have PIL's ``size`` (width, height)."""
    return size if TURNS[orientation, 0] else size[::-1]


def turn(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels [H, W, 3] made upright."""
    transpose, flip_rows, flip_columns = TURNS[orientation]
    pixels = stored[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    return np.ascontiguousarray(pixels.transpose(1, 0, 2) if transpose else pixels)


def upright_rgb(image: Image.Image) -> np.ndarray:
    """An opened PIL image as uint8 [H, W, 3], upright; 16-bit and float values are scaled, not clipped.

    The orientation is the one that Pillow finds in EXIF, the tags of a TIFF or XMP; metadata that does not parse and
    orientations that do not exist are ignored.
    """
    stored, orientation = decode(image)
    return turn(np.asarray(stored), orientation)


def read_image(path: str | os.PathLike[str] | Slice) -> np.ndarray:
    """Decode a file with PIL to uint8 [H, W, 3], upright.

    Raises:
        OSError: the file cannot be read or does not decode; ``errno`` is None in the second case.
    """
    with open_image(path) as image:
        return upright_rgb(image)
