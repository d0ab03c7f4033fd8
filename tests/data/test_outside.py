"""Nothing is read or written outside the folders given, whatever path a list, a cache or a caller gives."""

import json
import ntpath
import posixpath
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("scipy")

from fgfast.data import manifest
from fgfast.data.imageset import EXTRA, ImageSet
from fgfast.data.inside import leads_out
from fgfast.data.layouts import open_images
from fgfast.data.layouts.text import check_paths
from fgfast.data.loader import make_loader
from fgfast.data.manifest import check_images
from fgfast.data.maps import map_path, map_sizes, read_map, save_maps
from fgfast.data.views import ViewSpec
from fgfast.errors import UserError
from fgfast.files import digest_of
from tests.data import trees

OUTSIDE = [
    "../x.jpg",
    "a/../../x.jpg",
    "/etc/x.jpg",
    "..\\x.jpg",
    "a\\..\\..\\x.jpg",
    "\\x.jpg",
    "C:\\x.jpg",
    "C:/x.jpg",
]
OUTSIDE += ["\\\\host\\x.jpg", "a/\0.jpg", ".."]
PARTS = st.lists(st.sampled_from(["a", "b.jpg", "..", ".", "", "...", "..a", "~", "c:x"]), min_size=1, max_size=5)


@given(PARTS, st.sampled_from("/\\"))
@example(["a", "..", "..", "x"], "\\")
def test_an_accepted_path_stays_in_its_folder_on_every_system(parts: list[str], separator: str) -> None:
    rel = separator.join(parts)
    if leads_out(rel):
        assert ".." in parts or parts[0] == ""
        return
    assert posixpath.normpath(posixpath.join("/set", rel)).startswith("/set")
    if parts[0] != "c:x":  # a name elsewhere, which Windows does not allow
        assert ntpath.normpath(ntpath.join("R:\\set", rel)).startswith("R:\\set")


@pytest.mark.parametrize("rel", OUTSIDE)
def test_a_path_that_leads_out_is_refused_in_a_list(rel: str) -> None:
    with pytest.raises(UserError, match=r"list\.txt:7: the path .* leaves the folder of the set"):
        check_paths([rel], lambda i: "list.txt:7", "cars_train")


@pytest.mark.parametrize(
    ("tree", "name", "before", "after"),
    [
        (trees.cub, "images.txt", "001.A/x 1.jpg", ""),
        (trees.nabirds, "images.txt", f"0817/{trees.HASHES[0].replace('-', '')}.jpg", ""),
        (trees.aircraft, "data/images_variant_trainval.txt", "0000001", ""),
        (trees.pets, "annotations/trainval.txt", "Abyssinian_1 1 1 1", "_1 3 1 3"),
        (trees.inaturalist, "val2018.json", "train_val2018/Amphibia/2/0015.jpg", ""),
    ],
)
@pytest.mark.parametrize("rel", ["../x", "C:\\x", "/etc/x"])
def test_every_list_is_checked_and_named_with_the_line(
    tmp_path: Path, tree: Callable[[Path], Path], name: str, before: str, after: str, rel: str
) -> None:
    root = tree(tmp_path / "set")
    text = (root / name).read_text()
    assert before in text
    written = json.dumps(rel)[1:-1] if name.endswith("json") else rel
    (root / name).write_text(text.replace(before, written + after, 1))
    with pytest.raises(UserError, match=rf"{name}(:1|, entry 0 of images): the path .* leaves the folder of the set"):
        open_images(root)


def images_of(root: Path, *rels: str) -> ImageSet:
    return ImageSet(root, rels, np.zeros(len(rels), np.int64), ("a",), np.ones(len(rels), bool))


@pytest.mark.parametrize("rel", OUTSIDE)
def test_a_set_made_by_hand_reads_nothing_outside(tmp_path: Path, rel: str) -> None:
    trees.write_images(tmp_path, ["x.jpg"])
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match=r"leaves .*set: give one inside it"):
        make_loader(images_of(tmp_path / "set", rel), ViewSpec(whole=8), 1)


@pytest.mark.parametrize("rel", OUTSIDE)
def test_no_map_is_written_or_read_outside(tmp_path: Path, rel: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    maps = tmp_path / "maps"
    for action in (
        lambda: map_path(maps, rel),
        lambda: save_maps(maps, [rel], np.zeros((1, 2, 2), np.uint8)),
        lambda: read_map(maps, rel),
    ):
        with pytest.raises(UserError, match="leaves the folder"):
            action()
    assert sorted(tmp_path.rglob("*")) == before


def test_no_map_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "maps").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "maps" / "a").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=r"maps/a leads out of .*maps by a link"):
        save_maps(tmp_path / "maps", ["b/1.jpg", "a/1.jpg"], np.zeros((2, 2, 2), np.uint8))
    assert not list((tmp_path / "other").iterdir())
    assert not (tmp_path / "maps" / "b").exists()


def test_the_folder_of_maps_may_itself_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "maps").symlink_to(tmp_path / "disk")
    save_maps(tmp_path / "maps", ["a/1.jpg"], np.zeros((1, 2, 3), np.uint8))
    assert map_sizes(tmp_path / "disk", ["a/1.jpg"]).tolist() == [[2, 3]]


def test_a_list_may_name_images_below_a_link_of_the_set(tmp_path: Path) -> None:
    root = trees.cub(tmp_path / "set")
    (root / "images" / "001.A").rename(tmp_path / "disk")
    (root / "images" / "001.A").symlink_to(tmp_path / "disk")
    assert len(check_images(open_images(root))) == 4


@pytest.mark.parametrize("source", ["other.png", "cache/other.png", "cache/converted/../../other.png"])
def test_the_manifest_leads_to_no_file_outside_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setenv("FGFAST_CACHE", str(tmp_path / "cache"))
    images = images_of(trees.touch(tmp_path / "set", []), "a.png")
    trees.write_images(tmp_path, ["set/a.png", "other.png", "cache/other.png"])
    expected = check_images(images).files
    (saved,) = (manifest.cache_folder() / "manifests").iterdir()
    content = json.loads(saved.read_text())
    content["files"]["a.png"][6] = str(tmp_path / source)
    content["digest"] = digest_of(content["files"])
    saved.write_text(json.dumps(content))
    assert check_images(images).files == expected


def test_a_folder_with_the_name_of_unlabelled_images_is_refused(tmp_path: Path) -> None:
    trees.write_images(tmp_path, [f"set/{EXTRA}/1.jpg", "set/b/1.jpg", "more/1.jpg"])
    with pytest.raises(UserError, match="has a folder @unlabelled, the name of --unlabelled: rename it"):
        open_images(tmp_path / "set").with_folder(tmp_path / "more")
