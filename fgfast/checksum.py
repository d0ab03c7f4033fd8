"""Checksums inside the files of weights: over all bytes of a file, at a place that other programs read past.

A sealed file holds the text "fgfast sha256 DIGEST": a file of torch.save as the comment of its zip archive, a file of
safetensors as the value of :data:`KEY` in its metadata. DIGEST is the SHA-256 of the file with 64 zeros in its place.
"""

import hashlib
import re
import zipfile
from pathlib import Path
from typing import BinaryIO

KEY = "fgfast_checksum"
_NAME, _DIGITS = b"fgfast sha256 ", 64
BLANK = _NAME.decode() + "0" * _DIGITS
"""The text before the file is sealed."""
NO_CHECKSUM = "has no checksum, as earlier versions wrote none: not all damage to it would be found"
_TEXT = re.compile(_NAME + rb"[0-9a-f]{64}")
_ENTRY = re.compile(rb'"%b":"(%b)"' % (KEY.encode(), _TEXT.pattern))
_END, _END_SIZE, _MOST_COMMENT = b"PK\5\6", 22, (1 << 16) - 1  # of the record that ends a zip archive
_MOST_HEADER = 100_000_000  # bytes; safetensors reads no larger one
_CHUNK = 1 << 24


class DamagedError(Exception):
    """A file is cut, or differs from its checksum; the message says which."""


def seal_zip(path: Path) -> None:
    """Write the checksum of a zip archive that has no comment as its comment."""
    with path.open("rb+") as file:
        size = file.seek(-2, 2) + 2
        file.write(len(BLANK).to_bytes(2, "little") + BLANK.encode())
        _write_digest(file, size + len(_NAME))


def seal_safetensors(path: Path) -> None:
    """Write the checksum of a file of safetensors whose metadata have :data:`BLANK` as the value of :data:`KEY`."""
    with path.open("rb+") as file:
        place = _place_in_safetensors(file)
        if place is None:
            raise ValueError(f"{path} has no {KEY} in its metadata: save it with one.")
        _write_digest(file, place)


def verify(file: BinaryIO, *, safetensors: bool) -> bool:
    """Compare a file of torch.save, or of safetensors, with its checksum.

    Returns:
        Whether it has one.

    Raises:
        DamagedError: the file is cut or differs from its checksum.
        OSError: the file cannot be read.
    """
    place = _place_in_safetensors(file) if safetensors else _place_in_zip(file)
    if place is None:
        return False
    digest = _digest(file, place)
    file.seek(place)
    if file.read(_DIGITS) != digest:
        raise DamagedError("its content differs from its checksum")
    return True


def compare_members(file: BinaryIO) -> None:
    """Compare the members of a zip archive with the sums that any archive has of them, which torch.load does not.

    Raises:
        DamagedError: one differs, or the file is no archive.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except Exception as error:  # of various types, as any byte may be another one
        damaged = str(error) or type(error).__name__
    if damaged:
        raise DamagedError(damaged)


def _place_in_zip(file: BinaryIO) -> int | None:
    """Where the digest is; None in an archive without checksum and in a file that is no archive."""
    file.seek(0)
    if file.read(2) != _END[:2]:
        return None
    size = file.seek(0, 2)
    file.seek(max(0, size - _END_SIZE - _MOST_COMMENT))
    tail = file.read()
    record = tail[max(0, tail.rfind(_END)) :]
    comment = record[_END_SIZE:]
    if not record.startswith(_END) or len(comment) < int.from_bytes(record[20:22], "little"):
        raise DamagedError("its end is missing")
    if _TEXT.fullmatch(comment):
        return size - _DIGITS
    if comment.startswith(_NAME) or re.search(rb"[0-9a-f]{64}\Z", comment):  # no single bit changes both
        raise DamagedError("its checksum is not whole")
    return None


def _place_in_safetensors(file: BinaryIO) -> int | None:
    file.seek(0)
    header = file.read(min(int.from_bytes(file.read(8), "little"), _MOST_HEADER))
    if match := _ENTRY.search(header):
        return 8 + match.end(1) - _DIGITS
    if KEY.encode() in header or _NAME in header:  # no single bit changes both
        raise DamagedError("its checksum is not whole")
    return None


def _write_digest(file: BinaryIO, place: int) -> None:
    digest = _digest(file, place)
    file.seek(place)
    file.write(digest)


def _digest(file: BinaryIO, place: int) -> bytes:
    """The digest of a file with zeros for the digest that it has at ``place``."""
    digest = hashlib.sha256()
    file.seek(0)
    for left in range(place, 0, -_CHUNK):
        digest.update(file.read(min(left, _CHUNK)))
    digest.update(b"0" * _DIGITS)
    file.seek(place + _DIGITS)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest().encode()
