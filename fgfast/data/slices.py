"""What an image is read from: a file of its own, or a slice of a larger file that holds many (a shard, an Arrow file).

A slice is read with one ``pread`` at a known place: no seek, no position that threads or processes would share. Larger
files stay open, a few per process.
"""

from __future__ import annotations

import os
import stat
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

OPEN_FILES = 64
"""Larger files that a process keeps open."""


class Slice(NamedTuple):
    """``size`` bytes of a file from ``start`` on, with their CRC-32, or -1 if it is not known."""

    file: str
    start: int
    size: int
    crc: int = -1


File = str | Slice
"""A file of its own, by its path, or a slice of a larger one."""


class Status(NamedTuple):
    """What tells two states of a file apart: its bytes and a time or checksum; and whether it can hold an image."""

    size: int
    mark: int
    regular: bool


def status(file: File) -> Status:
    """Size and modification time of a file; of a slice with a checksum the checksum, as it cannot change unseen.

    Raises:
        OSError: there is no such file.
    """
    if isinstance(file, str):
        found = os.stat(file)
        return Status(found.st_size, found.st_mtime_ns, stat.S_ISREG(found.st_mode))
    if file.crc >= 0:
        return Status(file.size, file.crc, True)
    found = os.stat(file.file)
    return Status(file.size, found.st_mtime_ns, stat.S_ISREG(found.st_mode))


def read_file(file: File, last: int | None = None) -> bytes:
    """The content of a file or slice, or its last bytes.

    Raises:
        OSError: it cannot be read; ``errno`` is None if its content is not what its index says.
    """
    if isinstance(file, str):
        with open(file, "rb") as stream:
            if last is not None:
                stream.seek(-last, os.SEEK_END)
            return stream.read()
    size = file.size if last is None else min(last, file.size)
    try:
        content = _OPEN.read(file.file, file.start + file.size - size, size)
    except OSError as error:
        raise OSError(error.errno, f"{os.path.basename(file.file)}: {error.strerror}", file.file) from error
    name = os.path.basename(file.file)
    if len(content) < size:
        _OPEN.forget(file.file)
        raise OSError(f"{name} is cut off before its end")
    if last is None and file.crc >= 0 and zlib.crc32(content) != file.crc:
        _OPEN.forget(file.file)
        raise OSError(f"{name} is damaged here (the checksum differs)")
    return content


class _OpenFiles:
    """The files that this process has open for slices, the last used last.

    A file that is replaced stays readable as it was; on an error it is opened again.
    """

    def __init__(self) -> None:
        self.files: OrderedDict[str, int] = OrderedDict()
        self.lock = threading.Lock()

    def read(self, file: str, start: int, size: int) -> bytes:
        with self.lock:  # for a moment: a copy of the descriptor is read without it
            descriptor = os.dup(self._open(file))
        try:
            return _read_whole(descriptor, start, size)
        except OSError:
            self.forget(file)
            raise
        finally:
            os.close(descriptor)

    def forget(self, file: str) -> None:
        with self.lock:
            descriptor = self.files.pop(file, None)
            if descriptor is not None:
                os.close(descriptor)

    def _open(self, file: str) -> int:
        descriptor = self.files.get(file)
        if descriptor is None:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would wait
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError(None, "not a file")
            self.files[file] = descriptor
            while len(self.files) > OPEN_FILES:
                os.close(self.files.popitem(last=False)[1])
        self.files.move_to_end(file)
        return descriptor


def _read_whole(descriptor: int, start: int, size: int) -> bytes:
    content = os.pread(descriptor, size, start)
    while len(content) < size and (more := os.pread(descriptor, size - len(content), start + len(content))):
        content += more
    return content


_OPEN = _OpenFiles()


def _after_fork() -> None:
    """A worker process must not wait for a lock that a thread of its parent holds; descriptors stay open in both."""
    _OPEN.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Slices:
    """The slices of N images, as columns: a fraction of the memory of N objects.

    Args:
        files: the larger files, absolute paths, and their bytes as the index has them (-1: not known).
        which: position in ``files`` of each image, int32 [N]; -1 for an image in a file of its own.
        start: first byte, int64 [N].
        size: bytes, int64 [N].
        crc: CRC-32, int64 [N]; -1 if not known.
        shape: height, width and EXIF orientation, int64 [N, 3]; 0 for an image that was not decoded in full.
    """

    files: tuple[tuple[str, int], ...]
    which: np.ndarray
    start: np.ndarray
    size: np.ndarray
    crc: np.ndarray
    shape: np.ndarray

    def __len__(self) -> int:
        """N."""
        return len(self.which)

    def __getitem__(self, i: int) -> Slice | None:
        """The slice of image ``i``; None if it has a file of its own."""
        at = int(self.which[i])
        return None if at < 0 else Slice(self.files[at][0], int(self.start[i]), int(self.size[i]), int(self.crc[i]))

    def __iter__(self) -> Iterator[Slice | None]:
        """The N slices."""
        return map(self.__getitem__, range(len(self)))

    def take(self, rows: np.ndarray) -> Slices:
        """The slices of some images; -1 stands for an image in a file of its own."""
        rows = np.asarray(rows, np.int64)
        own = rows < 0
        rows = np.where(own, 0, rows)
        columns = {name: getattr(self, name)[rows] for name in ("start", "size", "crc", "shape")}
        return replace(self, which=np.where(own, -1, self.which[rows]).astype(np.int32), **columns)
