"""Links in image folders: none is followed in a circle, and what is left out is said."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgfast.data.imageset import images_below
from fgfast.data.layouts import open_images
from fgfast.data.manifest import check_images
from fgfast.errors import UserError

from .conftest import smooth


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of twenty images each."""
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(20):
            smooth(i, 8, 8).save(tmp_path / "set" / name / f"{i}.png")
    return tmp_path / "set"


@pytest.mark.parametrize("target", [".", "..", "../..", "../a"])
def test_a_link_back_is_left_out_and_said(root: Path, target: str, caplog: pytest.LogCaptureFixture) -> None:
    (root / "a" / "back").symlink_to(target)
    assert len(open_images(root)) == 40
    assert [record.getMessage() for record in caplog.records].count(
        f"left out {root}/a/back: it is a link to a folder that it is in"
    ) == 1


def test_a_link_back_beside_the_classes_is_no_class(root: Path) -> None:
    (root / "c").symlink_to("..")
    assert open_images(root).classes == ("a", "b")


def test_a_link_to_another_folder_is_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    smooth(0, 8, 8).save(tmp_path / "more" / "x.png")
    (root / "a" / "more").symlink_to(tmp_path / "more")
    assert "a/more/x.png" in open_images(root).paths


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_a_walk_through_links_ends_and_finds_every_image(
    tmp_path_factory: pytest.TempPathFactory, links: list[tuple[int, int]]
) -> None:
    top = tmp_path_factory.mktemp("walk")
    folders = [top / name for name in ("", "0", "1", "0/2", "0/2/3", "1/4")]
    for folder in folders[1:]:
        folder.mkdir(parents=True)
        (folder / f"{folder.name}.png").touch()
    for i, (start, end) in enumerate(links):
        (folders[start] / f"link{i}").symlink_to(folders[end])
    found = images_below(top)
    assert {"0/0.png", "1/1.png", "0/2/2.png", "0/2/3/3.png", "1/4/4.png"} <= set(found)
    assert len(set(found)) == len(found)
    assert all(rel.count("/") <= 40 for rel in found)


@pytest.mark.parametrize("target", ["/nowhere.jpg", "broken.jpg"])
def test_a_link_to_nothing_or_itself_is_a_broken_image(root: Path, target: str) -> None:
    (root / "a" / "broken.jpg").symlink_to(target)
    records = check_images(open_images(root))
    assert [rel for rel, _ in records.skipped] == ["a/broken.jpg"]
    assert len(records) == 40


def test_many_links_to_nothing_stop(root: Path) -> None:
    for i in range(3):
        (root / "a" / f"broken{i}.jpg").symlink_to("/nowhere.jpg")
    with pytest.raises(UserError, match=r"3 of 43 images .* cannot be read, such as a/broken0\.jpg"):
        check_images(open_images(root))


@pytest.mark.parametrize("target", ["/nowhere", "class_c"])
def test_a_link_to_no_folder_is_said(root: Path, target: str, caplog: pytest.LogCaptureFixture) -> None:
    (root / "class_c").symlink_to(target)
    assert open_images(root).classes == ("a", "b")
    assert f"left out {root}/class_c: it is a link to nothing" in caplog.text


def test_a_folder_that_cannot_be_listed_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refusing(folder: Path) -> object:
        if Path(folder).name == "b":
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"set/b cannot be listed \(Permission denied\)"):
        open_images(root)
