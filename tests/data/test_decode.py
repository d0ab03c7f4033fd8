"""Every path from a file to pixels agrees with read_image, whatever the file says about its orientation and where."""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fgfast.data.decode import read_image
from fgfast.data.layouts import ImageSet, open_images
from fgfast.data.manifest import check_images
from fgfast.data.views import Crop, Patch, ViewSpec

from .conftest import coded
from .loading import RAW, VARIANTS, loading

TAGS = (None, 0, *range(1, 10), 65535)
SHORT, LONG, RATIONAL = 3, 4, 5
STORED = Image.fromarray(coded(40, 80) * np.array([3, 6, 1], np.uint8))  # wider than high: a turn changes the shape


def exif(tag: int, order: str = "<", kind: int = SHORT, count: int = 1, extra: bytes = b"") -> bytes:
    """EXIF with an orientation, and perhaps further entries of its directory."""
    value = struct.pack(f"{order}HH", tag, 0) if kind == SHORT else struct.pack(f"{order}I", tag)
    entry = struct.pack(f"{order}HHI", 0x0112, kind, count) + value
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, 1 + len(extra) // 12)
    return b"Exif\0\0" + head + entry + extra + bytes(4)


def xmp(tag: int) -> bytes:
    return f'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="{tag}"/>'.encode()


def encoded(form: str, **kwargs: object) -> bytes:
    stream = io.BytesIO()
    STORED.save(stream, form, **kwargs)
    return stream.getvalue()


def jpeg(*segments: bytes) -> bytes:
    """A JPEG with APP1 segments."""
    plain = encoded("JPEG", quality=98, subsampling=0)
    return plain[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", 2 + len(s)) + s for s in segments) + plain[2:]


def png(name: bytes, data: bytes, *, last: bool) -> bytes:
    """A PNG with a further chunk, before or behind its pixels."""
    plain = encoded("PNG")
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    at = len(plain) - 12 if last else 33
    return plain[:at] + chunk + plain[at:]


def files() -> Iterator[tuple[str, bytes]]:
    """(name, content) of STORED in every format that Pillow writes, with each orientation in each place for it."""
    for tag in TAGS:
        made = exif(tag) if tag is not None else b""
        tags = {} if tag is None else {"exif": made}
        yield f"{tag}.jpg", jpeg(*[made][: tag is not None])
        yield f"{tag}.png", encoded("PNG", **tags)
        yield f"{tag}.webp", encoded("WEBP", lossless=True, **tags)
        yield f"{tag}.tif", encoded("TIFF", **({} if tag is None else {"tiffinfo": {0x0112: tag}}))
        if tag is not None:
            yield f"{tag}_big_endian.jpg", jpeg(exif(tag, ">"))
            yield f"{tag}_behind.png", png(b"eXIf", made[6:], last=True)
            yield f"{tag}_long.jpg", jpeg(exif(tag, kind=LONG))
        if tag in range(1, 9):  # libtiff writes no other
            yield f"{tag}_lzw.tif", encoded("TIFF", compression="tiff_lzw", tiffinfo={0x0112: tag})
        if tag is not None and tag < 10:
            yield f"{tag}_xmp.jpg", jpeg(b"http://ns.adobe.com/xap/1.0/\0" + xmp(tag))
            text = PngImagePlugin.PngInfo()
            text.add_itxt("XML:com.adobe.xmp", xmp(tag).decode())
            yield f"{tag}_xmp.png", encoded("PNG", pnginfo=text)
            raw = PngImagePlugin.PngInfo()
            raw.add_text("Raw profile type exif", f"\nexif\n{len(made):8}\n{made.hex()}\n", zip=True)
            yield f"{tag}_raw.png", encoded("PNG", pnginfo=raw)
            yield f"{tag}_xmp.webp", encoded("WEBP", lossless=True, xmp=xmp(tag))
            yield f"{tag}_mpo.jpg", encoded("MPO", quality=98, save_all=True, append_images=[STORED], **tags)
    for form, suffix in (("BMP", "bmp"), ("GIF", "gif"), ("PPM", "ppm"), ("JPEG2000", "jp2")):
        yield f"plain.{suffix}", encoded(form)
    unit = struct.pack("<HHII", 0x0128, RATIONAL, 1, 38)  # a unit that is no integer: Pillow cannot write it again
    yield "two_6_8.jpg", jpeg(exif(6), exif(8))
    yield "two_none_6.jpg", jpeg(b"Exif\0\0", exif(6))
    yield "two_6_xmp_8.jpg", jpeg(exif(6), b"http://ns.adobe.com/xap/1.0/\0" + xmp(8))
    yield "rational.jpg", jpeg(exif(26, kind=RATIONAL) + struct.pack("<II", 6, 1))
    yield "pair.jpg", jpeg(exif(6, count=2))
    yield "unit.jpg", jpeg(exif(6, extra=unit) + struct.pack("<II", 5, 2))
    yield "pointer.jpg", jpeg(exif(6, extra=unit))
    yield "cut.jpg", jpeg(exif(6)[:-8])
    yield "cut_early.jpg", jpeg(exif(6)[:12])
    yield "order.jpg", jpeg(b"Exif\0\0XX" + exif(6)[8:])


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    root = tmp_path_factory.mktemp("tagged") / "tagged"
    root.mkdir()
    for name, content in files():
        (root / name).write_bytes(content)
    return open_images(root)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize(
    "name", ["{}.jpg", "{}_big_endian.jpg", "{}.png", "{}_behind.png", "{}.webp", "{}.tif", "{}_lzw.tif", "{}_xmp.jpg"]
)
def test_valid_orientations_are_applied(tagged: ImageSet, name: str, tag: int) -> None:
    method = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    upright = STORED if tag == 1 else STORED.transpose(method[tag])
    pixels = read_image(tagged.root / name.format(tag))
    assert pixels.shape[:2] == (upright.height, upright.width)
    assert np.abs(pixels.astype(int) - np.asarray(upright)).mean() < 2


@pytest.mark.parametrize("full", [False, True])
def test_sizes_are_those_of_the_pixels(tagged: ImageSet, full: bool) -> None:
    records = check_images(tagged, full=full)
    assert records.skipped == ()
    shapes = [read_image(path).shape[:2] for path in tagged.files()]
    assert [tuple(size) for size in records.sizes.tolist()] == shapes
    assert {(40, 80), (80, 40)} == set(shapes)


@pytest.mark.parametrize(("variant", "check"), [*((variant, True) for variant in VARIANTS), ("dali_files", False)])
def test_every_path_shows_the_pixels_of_read_image(tagged: ImageSet, variant: str, check: bool) -> None:
    with loading(tagged, ViewSpec(whole=20, **RAW), len(tagged), variant, check=check) as loader:
        batch = next(iter(loader))
        assert loader.skipped == []
    assert batch.whole is not None
    for i, pixels in zip(batch.index, batch.whole, strict=True):
        path = tagged.files()[i]
        small = Image.fromarray(read_image(path)).resize((20, 20), Image.Resampling.BILINEAR)
        assert np.abs(pixels.permute(1, 2, 0).numpy() - np.asarray(small)).mean() < 2, path


def test_an_image_no_higher_than_its_banner_has_a_row(tagged: ImageSet) -> None:
    images = replace(tagged.subset([rel == "4.jpg" for rel in tagged.paths]), banner=60)
    with loading(images, ViewSpec(whole=8, **RAW), 1, "dali_files") as loader:
        whole = next(iter(loader)).whole
    assert whole is not None
    row = Image.fromarray(read_image(images.files()[0])[:1]).resize((8, 8), Image.Resampling.BILINEAR)
    assert np.abs(whole[0].permute(1, 2, 0).numpy() - np.asarray(row)).mean() < 3


def test_crops_and_patches_of_files_are_those_of_kept_pixels(tagged: ImageSet) -> None:
    crops = (Crop(size=16, jitter_p=0), Crop(size=12, jitter_p=0, flip=1.0))
    spec, found = ViewSpec(crops=crops, whole=16, center=0.8, patch=Patch(16, 4), **RAW), []
    for variant in ("dali_kept", "dali_files"):
        with loading(replace(tagged, banner=7), spec, len(tagged), variant) as loader:
            found.append(next(iter(loader)))
    kept, read = found
    assert (kept.boxes == read.boxes).all()
    assert (kept.patch - read.patch).abs().amax((1, 2, 3)).max() * 255 < 3
    for a, b in zip([*kept.views, kept.whole], [*read.views, read.whole], strict=True):
        assert (a - b).abs().mean((1, 2, 3)).max() < 2


@pytest.mark.parametrize("variant", ["dali_files", "torchvision"])
@pytest.mark.parametrize("content", [jpeg(exif(6)), encoded("TIFF", tiffinfo={0x0112: 6})], ids=["JPEG", "TIFF"])
def test_a_file_that_is_turned_after_the_check_is_read_upright(tmp_path: Path, variant: str, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    with loading(open_images(tmp_path), ViewSpec(whole=20, **RAW), 1, variant) as loader:
        (tmp_path / "a.jpg").write_bytes(content)
        whole = next(iter(loader)).whole
    assert whole is not None
    upright = STORED.transpose(Image.Transpose.ROTATE_270).resize((20, 20), Image.Resampling.BILINEAR)
    assert np.abs(whole[0].permute(1, 2, 0).numpy() - np.asarray(upright)).mean() < 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
        ([-np.inf, np.inf, np.nan], [0, 255, 0]),
        ([-np.inf, 10, 20, np.inf, np.nan], [0, 0, 255, 255, 0]),
        ([1e6, 1e6], [0, 0]),
        ([-3e38, 3e38], [0, 255]),
        ([0, 0.2, 1, np.nan], [0, 51, 255, 0]),
    ],
)
def test_every_float_has_a_defined_pixel(tmp_path: Path, values: list[float], expected: list[int]) -> None:
    Image.fromarray(np.array([values], np.float32)).save(tmp_path / "x.tif")
    assert read_image(tmp_path / "x.tif")[0, :, 0].tolist() == expected


@pytest.mark.filterwarnings("error")
def test_a_negative_integer_is_black(tmp_path: Path) -> None:
    Image.fromarray(np.array([[-70000, -5, 0, 65535]], np.int32)).save(tmp_path / "x.tif")
    assert read_image(tmp_path / "x.tif")[0, :, 0].tolist() == [0, 0, 0, 255]
