"""What id maps come from: maps are used only if they are whole and of the same weights, images and options."""

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.maps import map_path, read_maps_info, save_maps
from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.parts import clusters
from fgfast.parts import discover as module
from fgfast.parts.clustering import ClusteringConfig
from fgfast.parts.clusters import Clusters
from fgfast.parts.discover import DiscoveryConfig, discover
from fgfast.parts.folder import STARTED, is_whole
from tests.conftest import TINY
from tests.examples import examples

CLUSTERING, CONFIG = ClusteringConfig(4), DiscoveryConfig(image_size=64, map_size=16, run="a test", threads=1)


def network(seed: int = 0, name: str = TINY) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(name, size=32, args={} if "vit" in name else {"output_stride": 8})


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Seven images of noise."""
    rng = np.random.default_rng(0)
    for i in range(7):
        (tmp_path / "set" / "one").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), np.uint8)).save(tmp_path / "set" / "one" / f"{i}.png")
    return open_images(tmp_path / "set")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*.png"))}


def test_whatever_changes_a_map_changes_the_digest(images: ImageSet) -> None:
    other: dict[str, Any] = {"n_parts": 5, "levels": 2, "metric": "cosine", "border": 1.0, "position": 1.0}
    assert {f.name for f in fields(ClusteringConfig)} == {*other, "first_parts"}
    how = [replace(CLUSTERING, **{name: value}) for name, value in other.items()]
    how.append(replace(CLUSTERING, border=1.0, first_parts=3))
    sizes = [CONFIG._replace(**{name: 32}) for name in ("image_size", "map_size", "seed")]  # type: ignore[arg-type]
    grey, buffer = network(), network()
    grey.grey = True
    next(buffer.net.buffers()).add_(1)
    encoder = network()
    digests = [
        Clusters(encoder, CLUSTERING, CONFIG).origin(images).digest,
        *(Clusters(encoder, c, CONFIG).origin(images).digest for c in how),
        *(Clusters(encoder, CLUSTERING, c).origin(images).digest for c in (*sizes, CONFIG._replace(network="x"))),
        *(Clusters(e, CLUSTERING, CONFIG).origin(images).digest for e in (network(1), grey, buffer)),
        Clusters(encoder, CLUSTERING, CONFIG).origin(images.subset(range(6))).digest,
        Clusters(encoder, CLUSTERING, CONFIG).origin(replace(images, banner=3)).digest,
    ]
    assert len(set(digests)) == len(digests)
    moved = replace(images, root=Path("elsewhere"))
    assert Clusters(network(), CLUSTERING, CONFIG._replace(run="b", threads=2)).origin(moved).digest == digests[0]


@examples(100)
@given(st.integers(0, 2**31))
def test_a_changed_bit_or_a_cut_is_found(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = np.random.default_rng(seed)
    folder = tmp_path_factory.mktemp("whole")
    save_maps(folder, ["a.jpg"], rng.integers(0, 5, (1, 8, 8), np.uint8))
    path = map_path(folder, "a.jpg")
    whole = path.read_bytes()
    assert is_whole(path, 8)
    assert not is_whole(path, 9)
    place, bit = int(rng.integers(len(whole))), int(rng.integers(8))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
    assert not is_whole(path, 8)
    path.write_bytes(whole[:place])
    assert not is_whole(path, 8)


def test_half_of_the_maps_of_another_network_are_refused_or_replaced(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Discovery into the unfinished folder of another network never mixes both."""
    out = tmp_path / "maps"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "close_maps", stop)
        with pytest.raises(KeyboardInterrupt):
            discover(network(1), images, out, CLUSTERING, CONFIG)
    map_path(out, images.paths[0]).unlink()
    before = content(out)
    assert len(before) == 6
    with pytest.raises(UserError, match=r"holds unfinished maps of a test.*: give another --out"):
        discover(network(0), images, out, CLUSTERING, CONFIG)
    assert content(out) == before
    alone = content(discover(network(0), images, tmp_path / "alone", CLUSTERING, CONFIG))
    assert content(discover(network(0), images, out, CLUSTERING, CONFIG, own=True)) == alone
    with pytest.raises(UserError, match=r"already holds maps of a test.*: give another --out"):
        discover(network(1), images, out, CLUSTERING, CONFIG)
    with pytest.raises(UserError, match="not of these weights, images"):
        discover(network(0), images.subset(range(6)), out, CLUSTERING, CONFIG)
    assert content(out) == alone


@pytest.mark.parametrize(("name", "group", "again"), [(TINY, 30, {1, 4, 5}), ("test_vit", 3, {0, 1, 2, 3, 4, 5})])
def test_lost_cut_and_stale_maps_are_made_again(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, group: int, again: set[int]
) -> None:
    """Those alone; of a ViT with all that they share ids with. The bytes are those of the first time."""
    monkeypatch.setattr(clusters, "GROUP", group)
    encoder = network(name=name)
    out = discover(encoder, images, tmp_path / "maps", CLUSTERING, CONFIG)
    before, old = content(out), times(out)
    paths = [map_path(out, rel) for rel in images.paths]
    names = [str(p.relative_to(out)) for p in paths]
    paths[1].unlink()
    paths[4].write_bytes(paths[4].read_bytes()[:-20])
    file = Path(images.files()[5])
    Image.fromarray(np.random.default_rng(9).integers(0, 256, (40, 48, 3), np.uint8)).save(file)
    discover(encoder, images, out, CLUSTERING, CONFIG)
    after, new = content(out), times(out)
    assert {i for i in range(7) if new[names[i]] != old[names[i]]} == again
    assert {i for i in range(7) if after[names[i]] != before[names[i]]} == ({5} if name == TINY else {3, 4, 5})
    alone = content(discover(encoder, images, tmp_path / "alone", CLUSTERING, CONFIG))
    assert after == alone
    assert not (out / STARTED).exists()
    assert read_maps_info(out) == {**read_maps_info(tmp_path / "alone")}


def test_a_lost_image_changes_no_map(images: ImageSet, tmp_path: Path) -> None:
    """The maps of a run are kept when an image vanishes, and when it comes back."""
    out = discover(network(), images, tmp_path / "maps", CLUSTERING, CONFIG, own=True)
    before, file = times(out), Path(images.files()[2])
    kept = file.rename(tmp_path / "kept.png")
    discover(network(), images, out, CLUSTERING, CONFIG, own=True)
    kept.rename(file)
    discover(network(), images, out, CLUSTERING, CONFIG, own=True)
    assert times(out) == before


def test_maps_are_made_again_although_an_image_of_their_block_is_lost(images: ImageSet, tmp_path: Path) -> None:
    out = discover(network(), images, tmp_path / "maps", CLUSTERING, CONFIG, own=True)
    before = content(out)
    Path(images.files()[2]).unlink()
    map_path(out, images.paths[3]).unlink()
    assert content(discover(network(), images, out, CLUSTERING, CONFIG, own=True)) == before


def test_leftovers_of_a_kill_are_cleared(images: ImageSet, tmp_path: Path) -> None:
    left = tmp_path / "maps" / "a" / ".1.jpg.png.1234.5678.partial"
    left.parent.mkdir(parents=True)
    left.touch()
    os.utime(left, (0, 0))
    discover(network(), images, tmp_path / "maps", CLUSTERING, CONFIG)
    assert not left.exists()


def test_a_size_that_no_file_has_is_ignored(images: ImageSet, tmp_path: Path) -> None:
    out = discover(network(), images, tmp_path / "maps", CLUSTERING, CONFIG)
    before, info = times(out), json.loads((out / "maps.json").read_text())
    (out / "maps.json").write_text(json.dumps(info | {"bytes": [2**63] * len(images)}))
    discover(network(), images, out, CLUSTERING, CONFIG)
    assert times(out) == before


@pytest.mark.parametrize("text", ["", "[]", '{"digest": 3}', '{"run": "a', "[" * 100_000])
def test_an_unreadable_record_is_refused_or_replaced(images: ImageSet, tmp_path: Path, text: str) -> None:
    out = tmp_path / "maps"
    out.mkdir()
    (out / STARTED).write_text(text)
    with pytest.raises(UserError, match="give another --out"):
        discover(network(), images, out, CLUSTERING, CONFIG)
    assert len(content(discover(network(), images, out, CLUSTERING, CONFIG, own=True))) == 7
