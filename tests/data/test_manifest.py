"""The manifest: unusual images are converted, broken ones are found by a full decode, and results are cached."""

import errno
import json
import os
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fgfast.data import manifest
from fgfast.data.decode import TooManyPixelsError, open_image, read_image
from fgfast.data.layouts import ImageSet, open_images
from fgfast.data.loader import make_loader
from fgfast.data.manifest import check_images
from fgfast.data.maps import map_sizes, read_map
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


@pytest.mark.parametrize("name", ["n" * 300 + ".jpg", "folder/" * 700 + "a.jpg"])
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


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"version": 2, "digest": "", "files": []}', '{"version": 2, "digest": "", "files": {"a": [1]}}'],
)
def test_a_corrupt_cache_file_is_rewritten(
    smooth_set: ImageSet, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_images(smooth_set)
    (cache,) = (manifest.cache_folder() / "manifests").iterdir()
    cache.write_text(content)
    assert len(check_images(smooth_set)) == 50
    assert "cannot be read" in caplog.text


def test_a_cut_copy_is_made_again(tmp_path: Path) -> None:
    """A power failure may leave an empty file under the right name."""
    (tmp_path / "set").mkdir()
    smooth(0).save(tmp_path / "set" / "0.bmp")
    images = open_images(tmp_path / "set")
    copy = Path(check_images(images).files[0])
    whole = copy.read_bytes()
    copy.write_bytes(b"")
    check_images(images)
    assert copy.read_bytes() == whole


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


def large_png(path: Path, side: int) -> None:
    """A square black PNG of one bit per pixel: few bytes, but many pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header, rows = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), bytes((side + 7) // 8 + 1) * side
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def peak_memory() -> int:
    """The most memory that this process had since it was asked last, in bytes."""
    try:
        text = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not measure the peak of memory anew")
    return 1024 * int(text.partition("VmHWM:")[2].split()[0])


@pytest.mark.filterwarnings("error")
def test_an_image_above_the_limit_of_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """Decoding it takes 500 MB and more."""
    large_png(tmp_path / "large.png", 13_000)
    peak_memory()
    before = peak_memory()
    verdict = manifest.check_file(str(tmp_path / "large.png"))
    assert peak_memory() - before < 100e6
    assert "13000 x 13000 pixels are more than the 100,000,000 that FGFAST_MAX_PIXELS allows" in verdict.reason
    assert verdict.passing


@pytest.mark.filterwarnings("error")
def test_the_limit_of_pixels_holds_wherever_an_image_is_read(
    smooth_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images have 96 x 120 pixels; one that is above a limit is not taken for broken under a higher one."""
    smooth(3, 121, 96).save(smooth_set.root / smooth_set.paths[7])
    assert check_images(smooth_set).skipped == ()
    monkeypatch.setenv("FGFAST_MAX_PIXELS", str(96 * 120))
    for full in (True, False):
        ((rel, reason),) = check_images(smooth_set, full=full).skipped
        assert rel == smooth_set.paths[7]
        assert reason.startswith("96 x 121 pixels are more than the 11,520 that FGFAST_MAX_PIXELS allows")
    with pytest.raises(TooManyPixelsError):
        read_image(smooth_set.root / rel)
    monkeypatch.delenv("FGFAST_MAX_PIXELS")
    assert check_images(smooth_set).skipped == ()


def test_the_limit_of_pixels_may_be_above_that_of_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow refuses twice its own limit; that limit holds again afterwards, whatever fgfast read."""
    Image.new("L", (30, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with ThreadPoolExecutor(8) as pool:
        shapes = {read.shape for read in pool.map(read_image, [tmp_path / "a.png"] * 200)}
    assert shapes == {(30, 30, 3)}
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.parametrize("value", ["0", "-5", "1e8", "many"])
def test_a_limit_that_is_no_number_is_refused(
    smooth_set: ImageSet, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FGFAST_MAX_PIXELS", value)
    with pytest.raises(UserError, match=f"FGFAST_MAX_PIXELS is '{value}': give a whole number"):
        check_images(smooth_set)


def stored_verdicts() -> dict[str, list]:
    """What the manifest in the cache holds."""
    (cache,) = (manifest.cache_folder() / "manifests").iterdir()
    return json.loads(cache.read_bytes())["files"]


def test_what_may_pass_is_never_stored(smooth_set: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing file, one that cannot be opened, one above the limit, a failed read that a decoder calls its own."""
    missing, large, denied, unread, broken = smooth_set.paths[:5]
    (smooth_set.root / missing).unlink()
    smooth(3, 121, 96).save(smooth_set.root / large)
    (smooth_set.root / broken).write_bytes(b"broken")
    monkeypatch.setenv("FGFAST_MAX_PIXELS", str(96 * 120))
    fail_on(unread, OSError("decoder error -2"), monkeypatch)
    opened = open

    def failing(path: str, *args: str) -> object:
        if str(path).endswith((denied, unread)):
            code = errno.EACCES if str(path).endswith(denied) else errno.EIO
            raise OSError(code, os.strerror(code))
        return opened(path, *args)

    def failing_image(path: str) -> object:
        if path.endswith(denied):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return open_image(path)

    monkeypatch.setattr(manifest, "open", failing, raising=False)
    monkeypatch.setattr(manifest, "open_image", failing_image)
    reasons = dict(check_images(smooth_set, lenient=True).skipped)
    assert reasons.keys() == {missing, large, denied, unread, broken}
    assert (reasons[denied], reasons[unread]) == (os.strerror(errno.EACCES), os.strerror(errno.EIO))
    assert stored_verdicts().keys() & reasons.keys() == {broken}


def test_the_limit_of_pixels_holds_for_id_maps(coded_set: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = coded_set.root.parent / "maps"
    monkeypatch.setenv("FGFAST_MAX_PIXELS", str(40 * 50 - 1))
    for read in (lambda: map_sizes(maps, coded_set.paths), lambda: read_map(maps, coded_set.paths[0])):
        with pytest.raises(UserError, match=r"00.png.png: 50 x 40 pixels are more than the 1,999 that FGFAST_MAX"):
            read()
