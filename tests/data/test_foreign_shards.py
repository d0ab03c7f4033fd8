"""Shards of other programs are indexed and read, or refused in one sentence."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fgfast.cli.main import main
from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.manifest import check_images
from fgfast.data.shards.scan import index_shards
from fgfast.data.views import Crop, ViewSpec
from fgfast.errors import UserError

from .conftest import smooth
from .loading import VARIANTS, loading
from .sharding import content, fails, flip, shard, tars, valid_images

SPEC = ViewSpec(crops=(Crop(size=8),))


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def jpeg(seed: int) -> bytes:
    stream = io.BytesIO()
    smooth(seed).save(stream, "JPEG")
    return stream.getvalue()


def foreign(root: Path) -> Path:
    """Two shards for training and one for testing, with keys that begin anew in each."""
    root.mkdir()
    for n, name in enumerate(("birds-train-000000", "birds-train-000001", "birds-val-000000")):
        members = {}
        for i in range(4):
            members |= {f"{i:04d}.jpg": jpeg(4 * n + i), f"{i:04d}.cls": str((i % 2) * 9 + 1).encode()}
            members |= {f"{i:04d}.txt": b"a bird"}
        write_tar(root / f"{name}.tar", members)
    return root


@pytest.mark.parametrize("variant", VARIANTS)
def test_shards_of_another_program_are_indexed_and_read(
    tmp_path: Path, variant: str, capsys: pytest.CaptureFixture
) -> None:
    root = foreign(tmp_path / "wds")
    with pytest.raises(UserError, match="has shards without an index: write one with fgfast shard"):
        open_images(root)
    assert main(["shard", str(root), "--index"]) == 0
    assert "2 classes (1, 10), 8 training images, 4 test images" in capsys.readouterr().out
    found = open_images(root)
    assert found.paths[0] == "birds-train-000000/0000.jpg"
    assert found.targets.tolist() == [0, 1] * 6
    assert found.train.tolist() == [True] * 8 + [False] * 4
    with loading(found, SPEC, 5, variant, shuffle=False) as loader:
        assert valid_images(loader) == list(range(12))


@pytest.mark.parametrize("damage", ["none", "shards.json"])
def test_an_index_that_was_written_with_the_shards_is_not_replaced(
    smooth_set: ImageSet, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture
) -> None:
    shard(smooth_set, tmp_path / "out")
    if damage != "none":
        (tmp_path / "out" / damage).unlink()
    before = content(tmp_path / "out")
    assert "were written with their index: restore it" in fails(capsys, "shard", tmp_path / "out", "--index")
    assert content(tmp_path / "out") == before


def test_an_image_to_convert_is_used_again_when_its_shard_is_restored(tmp_path: Path) -> None:
    (tmp_path / "wds").mkdir()
    stream = io.BytesIO()
    smooth(77).save(stream, "BMP")
    tar = tmp_path / "wds" / "a.tar"
    write_tar(tar, {f"{i}.jpg": jpeg(i) for i in range(40)} | {"b.bmp": stream.getvalue()})
    found = open_images(index_shards(tmp_path / "wds", workers=2))
    whole = tar.read_bytes()
    flip(found.file(40))
    assert [rel for rel, _ in check_images(found).skipped] == ["a/b.bmp"]
    tar.write_bytes(whole)
    assert not check_images(found).skipped


def test_the_index_equals_that_of_dalis_tool(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from wds2idx import IndexCreator

    root = index_shards(foreign(tmp_path / "wds"))
    for path in tars(root):
        with IndexCreator(str(path), str(tmp_path / "idx"), verbose=False) as creator:
            creator.create_index()
        assert path.with_suffix(".idx").read_text() == (tmp_path / "idx").read_text()


def special(kind: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo("0.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "is cut off, damaged or no tar file"),
        (lambda path: path.write_bytes(b"x" * 2000), "is cut off, damaged or no tar file"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "is cut off, damaged or no tar file"),
        (lambda path: path.write_bytes(path.read_bytes()[: 512 * 30]), "is cut off, damaged or no tar file"),
        (lambda path: write_tar(path, [("0.jpg", jpeg(0)), ("0.cls", b"1"), ("0.jpg", jpeg(1))]), "0.jpg twice"),
        (lambda path: write_tar(path, [("0.jpg", jpeg(0)), ("1.jpg", jpeg(1)), ("0.cls", b"1")]), "the key 0 twice"),
        (lambda path: write_tar(path, {"0.jpg": jpeg(0), "0.png": jpeg(1)}), "2 images with the key 0"),
        (lambda path: write_tar(path, {"0.jpg": jpeg(0), "1.cls": b"1"}), "0 images with the key 1"),
        (lambda path: write_tar(path, {"0.jpg": jpeg(0), "0.cls": b"1", "1.jpg": jpeg(1)}), "a .cls for 1 of 2 images"),
        (lambda path: write_tar(path, {"../0.jpg": jpeg(0)}), "which is outside"),
        (lambda path: write_tar(path, {"/0.jpg": jpeg(0)}), "which is outside"),
        (special(tarfile.SYMTYPE), "a link or device and no file"),
        (special(tarfile.LNKTYPE), "a link or device and no file"),
        (special(tarfile.FIFOTYPE), "a link or device and no file"),
        (special(tarfile.CHRTYPE), "a link or device and no file"),
    ],
)
def test_bad_shards_of_another_program_are_refused(
    tmp_path: Path, write: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture
) -> None:
    root = foreign(tmp_path / "wds")
    before = content(root)
    write(root / "birds-train-000001.tar")
    error = fails(capsys, "shard", root, "--index")
    assert "birds-train-000001.tar" in error
    assert message in error
    assert set(content(root)) == set(before)


def test_tars_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "wds").mkdir()
    write_tar(tmp_path / "wds" / "a.tar", {".hidden": b"", "noextension": b""})
    with pytest.raises(UserError, match="hold no image"):
        index_shards(tmp_path / "wds")


def test_images_without_a_class_are_unlabelled(tmp_path: Path) -> None:
    (tmp_path / "wds").mkdir()
    write_tar(tmp_path / "wds" / "a.tar", {f"{i}.jpg": jpeg(i) for i in range(3)})
    found = open_images(index_shards(tmp_path / "wds"))
    assert found.targets.tolist() == [-1] * 3
    assert found.train.all()


def test_broken_images_and_formats_to_convert_are_found_when_the_set_is_used(tmp_path: Path) -> None:
    (tmp_path / "wds").mkdir()
    stream = io.BytesIO()
    smooth(77).save(stream, "BMP")
    members = {f"{i}.jpg": jpeg(i) for i in range(40)} | {"a.jpg": b"broken", "b.bmp": stream.getvalue()}
    write_tar(tmp_path / "wds" / "a.tar", members)
    found = open_images(index_shards(tmp_path / "wds"))
    records = check_images(found)
    assert [rel for rel, _ in records.skipped] == ["a/a.jpg"]
    assert isinstance(records.files[-1], str)  # a converted copy
    for variant in VARIANTS:
        with loading(found, SPEC, 20, variant, records=records) as loader:
            assert valid_images(loader) == [*range(40), 41]


def test_labels_are_numbers_or_names(tmp_path: Path) -> None:
    (tmp_path / "wds").mkdir()
    names = ["wren", "jay", "wren"]
    members = {f"{i}.{k}": d for i, name in enumerate(names) for k, d in (("jpg", jpeg(i)), ("cls", name.encode()))}
    write_tar(tmp_path / "wds" / "a.tar", members)
    found = open_images(index_shards(tmp_path / "wds"))
    assert [found.classes[t] for t in found.targets] == names
    assert np.array_equal(found.targets, [1, 0, 1])
