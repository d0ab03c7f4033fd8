"""Id maps on disk: they are read as saved, and an error names a missing or malformed file."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fgfast.data.maps import map_path, map_sizes, read_map, read_maps_info, save_maps, write_atomically, write_maps_info
from fgfast.errors import UserError


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


@pytest.mark.parametrize("content", ["", "[]", '{"n_parts": 3}', '{"size": [1, 2]}', '{"n_parts": 3, "size": 5}'])
def test_invalid_info_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "maps.json").write_text(content)
    with pytest.raises(UserError, match=r"maps\.json .*fgfast discover"):
        read_maps_info(tmp_path)
    with pytest.raises(UserError, match="is missing"):
        read_maps_info(tmp_path / "none")


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
