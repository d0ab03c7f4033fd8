"""Shards of a small set, for tests."""

import os
import tarfile
from pathlib import Path

import pytest
import torch

from fgfast.cli.main import main
from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.shards.write import ShardWriter
from fgfast.data.slices import File, Slice


def shard(images: ImageSet, out: Path, shard_mb: float | None = 0.006, **options) -> ImageSet:
    """Write shards, of two or three small images each unless told otherwise, and open them."""
    return open_images(ShardWriter(images, out, shard_mb=shard_mb, **options).write())


def tars(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def members(folder: Path) -> list[tarfile.TarInfo]:
    """The members of all shards of a folder."""
    found = []
    for path in tars(folder):
        with tarfile.open(path) as tar:
            found += tar.getmembers()
    return found


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def valid_images(batches) -> list[int]:
    return sorted(torch.cat([batch.index[batch.valid] for batch in batches]).tolist())


def flip(piece: File) -> None:
    """Change a bit in the middle of a slice."""
    assert isinstance(piece, Slice)
    with open(piece.file, "rb+") as file:
        file.seek(piece.start + piece.size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def fails(capsys: pytest.CaptureFixture, *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fgfast: ")
    assert error.count("\n") == 1
    return error
