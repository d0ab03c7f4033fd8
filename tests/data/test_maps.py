"""Id maps on disk: they are read as saved, and an error names a missing or malformed file."""

import json
import os
import struct
import zlib
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fgfast.data.layouts import open_images
from fgfast.data.maps import map_path, map_sizes, read_map, read_maps_info, save_maps, write_atomically, write_maps_info
from fgfast.data.views import ViewSpec
from fgfast.errors import UserError
from tests.data import trees
from tests.data.loading import VARIANTS, loading


def test_maps_are_read_as_saved(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 256, (3, 7, 5), dtype=np.uint8)
    rels = ["a/1.jpg", "a/b/2.png", "3.jpeg"]
    save_maps(tmp_path, rels, labels)
    for rel, grid in zip(rels, labels, strict=True):
        assert np.array_equal(read_map(tmp_path, rel), grid)
    assert map_sizes(tmp_path, rels).tolist() == [[7, 5]] * 3
    assert not list(tmp_path.rglob("*.part"))


def test_a_map_on_which_the_decoder_fails_is_named(tmp_path: Path) -> None:
    save_maps(tmp_path, ["1.jpg"], np.zeros((1, 4, 4), np.uint8))
    path = map_path(tmp_path, "1.jpg")
    chunk = struct.pack(">I", 4) + b"pHYs" + bytes(4) + struct.pack(">I", zlib.crc32(b"pHYs" + bytes(4)))
    path.write_bytes(path.read_bytes()[:33] + chunk + path.read_bytes()[33:])  # Pillow raises ValueError
    with pytest.raises(UserError, match=r"1\.jpg\.png does not decode \(ValueError: Truncated pHYs chunk\)"):
        read_map(tmp_path, "1.jpg")


def test_info_is_read_as_written(tmp_path: Path) -> None:
    write_maps_info(tmp_path, 15, (64, 48), "abc")
    assert read_maps_info(tmp_path) == {"n_parts": 15, "size": [64, 48], "run": "abc"}


INFO = {"n_parts": 3, "size": [4, 5], "run": "x"}


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", '{"n_parts": 3}', '{"size": [1, 2]}', '{"n_parts": 3, "size": 5}', "[" * 100_000, "\ud800",
        *(json.dumps(INFO | {"n_parts": value}) for value in (0, 256, -1, 3.5, "3", True, None, 10**400, [3])),
        *(json.dumps(INFO | {"size": value}) for value in ([4], [4, 5, 6], [0, 5], [-4, 5], ["4", 5], {"h": 4})),
        json.dumps(INFO | {"size": [2**70, 1]}), '{"n_parts": 1e999, "size": [4, 5]}',
        json.dumps(INFO | {"run": 5}), '{"n_parts": 3, "n_parts": 4, "size": [4, 5]}',
    ],
)  # fmt: skip
def test_invalid_info_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "maps.json").write_text(content, errors="surrogatepass")
    with pytest.raises(UserError, match=r"maps\.json .*fgfast discover.*\.$"):
        read_maps_info(tmp_path)


@pytest.mark.parametrize("place", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path), lambda path: None])
def test_what_is_no_file_in_place_of_the_info_is_named(tmp_path: Path, place: Callable[[Path], object]) -> None:
    place(tmp_path / "maps.json")
    with pytest.raises(UserError, match=r"maps\.json (is missing|cannot be read).*fgfast discover"):
        read_maps_info(tmp_path)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def replace(mode: str, size: tuple[int, int] = (5, 4)) -> Callable[[Path], object]:
    return lambda path: Image.new(mode, size).save(path)


def change(edit: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(edit(path.read_bytes()))


def grow(path: Path) -> None:
    """Add rows of pixels to the header only."""
    head = path.read_bytes()
    path.write_bytes(head[:8] + chunk(b"IHDR", head[16:20] + struct.pack(">I", 6) + head[24:29]) + head[33:])


DAMAGE = {
    "an id that maps.json does not have": (
        lambda path: Image.fromarray(np.full((4, 5), 3, np.uint8)).save(path), "has id 3 of 3 in maps.json",
    ),
    "another size": (replace("L", (5, 6)), "is 6 x 5 and not 4 x 5 as in maps.json"),
    "a size that the pixels do not have": (grow, "is 6 x 5 and not 4 x 5"),
    "palette": (replace("P"), "not 8-bit grey"),
    "16 bit": (replace("I;16"), "not 8-bit grey"),
    "1 bit": (replace("1"), "not 8-bit grey"),
    "cut": (change(lambda content: content[:50]), "does not decode"),
    "without an end": (change(lambda content: content[:-12]), "does not decode"),
    "changed pixels": (change(lambda data: data[:45] + bytes([data[45] ^ 1]) + data[46:]), "does not decode"),
    "without pixels": (change(lambda data: data[:16] + b"\xff" * 4 + bytes(4) + data[24:]), "is not a PNG"),
    "empty": (change(lambda content: b""), "is not a PNG"),
    "missing": (Path.unlink, "no map for"),
    "a folder": (lambda path: [path.unlink(), path.mkdir()], "cannot be read"),
}  # fmt: skip


@pytest.fixture
def grids(tmp_path: Path) -> Path:
    """A folder of two maps of three parts."""
    grid = np.array([[0, 1, 2, 255, 0]] * 4, np.uint8)
    save_maps(tmp_path / "maps", ["a/1.png", "a/2.png"], np.stack([grid, grid]))
    write_maps_info(tmp_path / "maps", 3, (4, 5), "x")
    return tmp_path / "maps"


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_map_with_wrong_ids_or_of_another_kind_is_refused_by_name(grids: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(map_path(grids, "a/2.png"))
    assert read_map(grids, "a/1.png").shape == (4, 5)
    with pytest.raises(UserError, match=rf"a/2\.png.*{message}|{message} a/2\.png"):
        read_map(grids, "a/2.png")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["an id that maps.json does not have", "changed pixels", "another size"])
def test_no_loader_delivers_a_wrong_map(tmp_path: Path, grids: Path, variant: str, kind: str) -> None:
    trees.write_images(tmp_path / "set", ["a/1.png", "a/2.png"])
    DAMAGE[kind][0](map_path(grids, "a/2.png"))
    spec = ViewSpec(whole=8, whole_masks=True)
    with (
        pytest.raises(UserError, match=r"a/2\.png\.png "),
        loading(open_images(tmp_path / "set"), spec, 2, variant, maps=grids) as loader,
    ):
        list(loader)


@pytest.mark.parametrize("variant", ["dali_files", "torchvision"])
def test_a_map_that_changes_during_a_run_is_read_again(tmp_path: Path, grids: Path, variant: str) -> None:
    trees.write_images(tmp_path / "set", ["a/1.png", "a/2.png"])
    spec = ViewSpec(whole=8, whole_masks=True)
    with loading(open_images(tmp_path / "set"), spec, 2, variant, maps=grids) as loader:
        list(loader)
        DAMAGE["an id that maps.json does not have"][0](map_path(grids, "a/2.png"))
        with pytest.raises(UserError, match=r"a/2\.png\.png has id 3 of 3"):
            list(chain(*[loader] * 5))  # some batches were prepared before the change


def test_every_changed_bit_of_a_map_is_found_or_changes_no_id(grids: Path) -> None:
    path = map_path(grids, "a/1.png")
    content, saved = path.read_bytes(), read_map(grids, "a/1.png")
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert np.array_equal(read_map(grids, "a/1.png"), saved), bit
        except UserError:
            continue


def test_maps_of_different_sizes_are_read_if_the_info_says_so(grids: Path) -> None:
    replace("L", (7, 9))(map_path(grids, "a/2.png"))
    write_maps_info(grids, 3, (0, 0), "x")
    assert map_sizes(grids, ["a/1.png", "a/2.png"]).tolist() == [[4, 5], [9, 7]]
    with pytest.raises(UserError, match="is now 9 x 7 and was 4 x 5"):
        read_map(grids, "a/2.png", (4, 5))


def test_a_changed_info_is_read_again(grids: Path) -> None:
    read_map(grids, "a/1.png")
    write_maps_info(grids, 2, (4, 5), "x")
    with pytest.raises(UserError, match="has id 2 of 2"):
        read_map(grids, "a/1.png")


def test_wrong_arrays_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="uint8"):
        save_maps(tmp_path, ["a.jpg"], np.zeros((1, 2, 2), np.int64))
    with pytest.raises(ValueError, match="1 to 255"):
        write_maps_info(tmp_path, 256, (1, 1), "")


def test_a_missing_or_malformed_map_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        map_sizes(tmp_path / "none", ["a.jpg"])
    with pytest.raises(UserError, match=r"no map for a\.jpg: .*fgfast discover"):
        map_sizes(tmp_path, ["a.jpg"])
    Image.new("P", (4, 4)).save(map_path(tmp_path, "a.jpg"))
    with pytest.raises(UserError, match="not 8-bit grey"):
        map_sizes(tmp_path, ["a.jpg"])
    map_path(tmp_path, "a.jpg").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match="not a PNG"):
        map_sizes(tmp_path, ["a.jpg"])


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
