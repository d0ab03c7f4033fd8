"""The manifest: unusual images are converted, broken ones are found by a full decode, and results are cached."""

import errno
import os
import struct
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fgfast.data import manifest
from fgfast.data.layouts import ImageSet, open_images
from fgfast.data.loader import make_loader
from fgfast.data.manifest import check_images
from fgfast.data.views import ViewSpec
from fgfast.errors import UserError

from .conftest import smooth

RAW = ViewSpec(whole=48, mean=(0, 0, 0), std=(1 / 255, 1 / 255, 1 / 255))


def png16(pixels: np.ndarray) -> bytes:
    """A 16-bit colour PNG, which PIL cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.fixture
def odd_set(tmp_path: Path) -> ImageSet:
    """One image in every format and mode that a decoder may not support."""
    root = tmp_path / "odd"
    root.mkdir()
    image, grey = smooth(3), smooth(3).convert("L")
    image.save(root / "rgb.png")
    image.convert("CMYK").save(root / "cmyk.jpg", quality=100)
    image.convert("RGBA").save(root / "rgba.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE).save(root / "palette.png")
    (root / "rgb16.png").write_bytes(png16(np.asarray(image).astype(np.uint16) * 257))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(root / "exif.jpg", exif=exif, quality=100)
    for name in ("bmp.bmp", "gif.gif", "tiff.tif", "webp.webp"):
        image.save(root / name, **({"lossless": True} if name == "webp.webp" else {}))
    (root / "png_named.jpg").write_bytes((root / "rgb.png").read_bytes())
    (root / "no_end.png").write_bytes((root / "rgb.png").read_bytes()[:-12])
    grey.save(root / "grey.jpg", quality=100)
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(root / "grey16.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(root / "grey16.tif")
    Image.fromarray(np.asarray(grey).astype(np.float32) / 255).save(root / "float.tif")
    return open_images(root)


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_all_formats_and_modes_are_decoded_alike(odd_set: ImageSet, backend: str) -> None:
    pytest.importorskip("nvidia.dali" if backend == "dali" else "torchvision")
    loader = make_loader(odd_set, RAW, len(odd_set), shuffle=False, threads=1, backend=backend)
    batch = next(iter(loader))
    loader.close()
    assert loader.skipped == []
    assert batch.whole is not None
    whole = dict(zip(odd_set.paths, batch.whole, strict=True))
    grey = whole["rgb.png"].mul(whole["rgb.png"].new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    for name, pixels in whole.items():
        truth = grey.expand(3, -1, -1) if name.startswith(("grey", "float")) else whole["rgb.png"]
        off = 8 if name.startswith(("palette", "gif")) else 3
        assert (pixels - truth).abs().mean() < off, name


def test_sizes_are_those_of_the_upright_image(odd_set: ImageSet) -> None:
    assert (check_images(odd_set).sizes == (96, 120)).all()


def test_broken_images_are_skipped_and_named(smooth_set: ImageSet, caplog: pytest.LogCaptureFixture) -> None:
    path = smooth_set.root / smooth_set.paths[7]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.98)])
    (smooth_set.root / smooth_set.paths[9]).write_bytes(b"")
    records = check_images(smooth_set, threads=2)
    assert [rel for rel, _ in records.skipped] == [smooth_set.paths[7], smooth_set.paths[9]]
    assert "truncated" in records.skipped[0][1]
    assert "empty" in records.skipped[1][1]
    assert "skipped 2 of 50" in caplog.text
    assert smooth_set.paths[7] in caplog.text
    assert len(records) == 48
    assert set(records.index.tolist()) == set(range(50)) - {7, 9}


def test_a_header_check_misses_what_a_full_decode_finds(smooth_set: ImageSet) -> None:
    path = smooth_set.root / smooth_set.paths[7]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.98)])
    assert not check_images(smooth_set, full=False).skipped
    assert len(check_images(smooth_set).skipped) == 1  # the header's verdict is not taken for a full one


def test_too_many_broken_images_stop(smooth_set: ImageSet) -> None:
    for rel in smooth_set.paths[:3]:
        (smooth_set.root / rel).write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3 of 50 .* cannot be read, such as .*not an image"):
        check_images(smooth_set)


def test_a_listed_image_that_is_missing_is_named(smooth_set: ImageSet) -> None:
    (smooth_set.root / smooth_set.paths[4]).unlink()
    with pytest.raises(UserError, match=f"{smooth_set.paths[4]} is listed but missing"):
        check_images(smooth_set)


def test_an_empty_set_is_refused(smooth_set: ImageSet) -> None:
    with pytest.raises(UserError, match="empty"):
        check_images(smooth_set.subset([]))


ERRORS = [struct.error, KeyError, ZeroDivisionError, RuntimeError, AttributeError, zlib.error, EOFError, RecursionError]


def fail_on(rel: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Pillow raise an error when it decodes one image."""
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: raising(error) if self.filename.endswith(rel) else load(self)
    )


def raising(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("kind", ERRORS)
def test_any_error_of_a_decoder_is_a_broken_image(
    smooth_set: ImageSet, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_on(smooth_set.paths[7], kind("odd"), monkeypatch)
    ((rel, reason),) = check_images(smooth_set).skipped
    assert rel == smooth_set.paths[7]
    assert kind.__name__ in reason or "odd" in reason


def test_a_lack_of_memory_is_no_broken_image(smooth_set: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_on(smooth_set.paths[7], MemoryError(), monkeypatch)
    with pytest.raises(MemoryError):
        check_images(smooth_set)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_an_error_of_the_system_is_named_but_not_kept(
    smooth_set: ImageSet, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        fail_on(smooth_set.paths[7], OSError(code, os.strerror(code)), patched)
        assert check_images(smooth_set).skipped == ((smooth_set.paths[7], os.strerror(code)),)
    assert check_images(smooth_set).skipped == ()


@pytest.mark.parametrize("name", ["n" * 300 + ".jpg", "folder/" * 700 + "a.jpg", "null\0byte.jpg"])
def test_a_path_that_no_file_can_have_is_a_broken_image(smooth_set: ImageSet, name: str) -> None:
    listed = replace(smooth_set, paths=(name, *smooth_set.paths[1:]))
    assert [rel for rel, _ in check_images(listed).skipped] == [name]


def test_something_that_is_no_file_is_a_broken_image(smooth_set: ImageSet) -> None:
    path = smooth_set.root / smooth_set.paths[7]
    path.unlink()
    os.mkfifo(path)  # opening it would wait forever
    assert check_images(smooth_set).skipped == ((smooth_set.paths[7], "not a file"),)


def test_only_new_and_changed_files_are_decoded(smooth_set: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    first = check_images(smooth_set)
    checked: list[str] = []
    check_file = manifest.check_file
    monkeypatch.setattr(manifest, "check_file", lambda path, full: checked.append(path) or check_file(path, full=full))
    again = check_images(smooth_set)
    assert checked == []
    assert again.files == first.files
    assert np.array_equal(again.sizes, first.sizes)
    smooth(99).save(smooth_set.root / smooth_set.paths[3], quality=50)
    check_images(smooth_set)
    assert checked == [str(smooth_set.root.resolve() / smooth_set.paths[3])]


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 2, "files": []}', '{"version": 2, "files": {"a": [1]}}'])
def test_a_corrupt_cache_file_is_rewritten(
    smooth_set: ImageSet, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_images(smooth_set)
    (cache,) = (manifest.cache_folder() / "manifests").iterdir()
    cache.write_text(content)
    assert len(check_images(smooth_set)) == 50
    assert "cannot be read" in caplog.text


def test_a_cache_that_cannot_be_written_is_not_fatal(
    smooth_set: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FGFAST_CACHE", str(tmp_path / "file"))
    assert len(check_images(smooth_set)) == 50
    assert "the manifest is not saved" in caplog.text


def test_nothing_is_written_into_the_data_folder(odd_set: ImageSet) -> None:
    before = sorted(odd_set.root.rglob("*"))
    check_images(odd_set)
    assert sorted(odd_set.root.rglob("*")) == before


def test_a_cached_manifest_is_fast(tmp_path: Path) -> None:
    root = tmp_path / "many"
    root.mkdir()
    smooth(0, 16, 16).save(root / "0.jpg")
    content = (root / "0.jpg").read_bytes()
    for i in range(1, 1000):
        (root / f"{i}.jpg").write_bytes(content)
    images = open_images(root)
    check_images(images)
    start = time.perf_counter()
    check_images(images)
    assert time.perf_counter() - start < 0.5  # 2,000 images per second
