"""RUN/images.json: a resumed run has the images with which it began, in their order, whatever happened to the files."""

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgfast.config import TrainConfig
from fgfast.data.imageset import ImageSet
from fgfast.data.kept import FILE, Kept, restore_set, store_set
from fgfast.data.layouts import open_images
from fgfast.data.manifest import Records, check_images
from fgfast.data.names import escape_names, unescape_names
from fgfast.data.splits import labelled_splits, pretext_splits
from fgfast.data.views import Crop, ViewSpec
from fgfast.errors import UserError
from tests.data.loading import loading, same

from .conftest import smooth

SPEC = ViewSpec(crops=(Crop(size=8),))


@pytest.fixture
def file(smooth_set: ImageSet, tmp_path: Path) -> Path:
    """The file of a run that began with the 50 images."""
    store_set(tmp_path / "run" / FILE, smooth_set, check_images(smooth_set))
    return tmp_path / "run" / FILE


def test_the_set_of_a_run_is_what_it_began_with(smooth_set: ImageSet, file: Path) -> None:
    for rel in (smooth_set.paths[3], smooth_set.paths[30]):
        (smooth_set.root / rel).unlink()
    (smooth_set.root / "class0" / "000a.jpg").write_bytes((smooth_set.root / smooth_set.paths[0]).read_bytes())
    kept = restore_set(file, open_images(smooth_set.root))
    assert kept.images.paths == smooth_set.paths
    assert np.array_equal(kept.images.targets, smooth_set.targets)
    assert [rel for rel, _ in kept.missing] == [smooth_set.paths[3], smooth_set.paths[30]]
    assert kept.added == 1
    assert smooth_set.paths[3] in kept.describe()[0]
    assert "1 image" in kept.describe()[1]


def test_the_data_may_move_and_a_class_may_vanish(smooth_set: ImageSet, tmp_path: Path) -> None:
    """Classes keep the numbers of the beginning although the listing no longer has the first one."""
    few = smooth_set.subset([0, *range(25, 50)])
    store_set(tmp_path / FILE, few, check_images(few))
    moved = shutil.copytree(smooth_set.root, tmp_path / "moved")
    shutil.rmtree(moved / "class0")
    kept = restore_set(tmp_path / FILE, open_images(moved))
    assert kept.images.root == moved
    assert kept.images.classes == ("class0", "class1")
    assert np.array_equal(kept.images.targets, few.targets)
    assert [rel for rel, _ in kept.missing] == [few.paths[0]]


def test_boxes_and_groups_go_with_the_images(smooth_set: ImageSet, file: Path) -> None:
    boxes = np.arange(200, dtype=np.float32).reshape(50, 4)
    now = replace(smooth_set, boxes=boxes, groups=("g0", "g1"), banner=7).subset(range(49, 0, -1))
    kept = restore_set(file, now)
    assert kept.images.boxes is not None
    assert np.isnan(kept.images.boxes[0]).all()
    assert np.array_equal(kept.images.boxes[1:], boxes[1:])
    assert kept.images.groups == ("g0", "g1")
    assert (kept.records.sizes == (89, 120)).all()


def test_a_run_begins_in_the_form_in_which_it_is_restored(smooth_set: ImageSet, tmp_path: Path) -> None:
    (smooth_set.root / smooth_set.paths[5]).write_bytes(b"")
    begun = Kept.begin(check_images(smooth_set))
    store_set(tmp_path / FILE, begun.images, begun.records)
    smooth(1).save(smooth_set.root / smooth_set.paths[5])  # repaired, but the run did not begin with it
    restored = restore_set(tmp_path / FILE, smooth_set)
    assert restored.images.paths == begun.images.paths
    assert len(begun.images) == 49
    assert restored.records.skipped == begun.records.skipped
    assert restored.records.files == begun.records.files
    assert restored.missing == ()
    assert restored.added == 0


@pytest.mark.parametrize("variant", ["dali_kept", "dali_files"])
def test_missing_images_keep_their_place_and_the_others_their_crops(
    smooth_set: ImageSet, file: Path, variant: str
) -> None:
    with loading(smooth_set, SPEC, 10, variant) as loader:
        before = list(loader)
    (smooth_set.root / smooth_set.paths[3]).unlink()
    (smooth_set.root / smooth_set.paths[30]).write_bytes(b"broken")
    kept = restore_set(file, open_images(smooth_set.root))
    with loading(kept.images, SPEC, 10, variant, records=kept.records) as loader:
        after = list(loader)
        assert [rel for rel, _ in loader.lost] == [smooth_set.paths[3], smooth_set.paths[30]]
        assert loader.skipped == loader.lost
        assert loader.too_many is None
    n_lost = 0
    for a, b in zip(before, after, strict=True):
        stays = b.valid
        n_lost += int((~stays).sum())
        assert a.index[stays].tolist() == b.index[stays].tolist()
        assert np.array_equal(a.views[0][stays], b.views[0][stays])
    assert n_lost == 2


def test_more_than_a_twentieth_missing_is_refused(smooth_set: ImageSet, file: Path) -> None:
    for rel in smooth_set.paths[:2]:
        (smooth_set.root / rel).unlink()
    assert len(restore_set(file, smooth_set).missing) == 2
    (smooth_set.root / smooth_set.paths[2]).unlink()
    with pytest.raises(UserError, match=r"3 of the 50 images .* such as class0/000.jpg \(No such file"):
        restore_set(file, smooth_set)


def _text(change: str, content: str) -> str:
    table = json.loads(content)
    match change:
        case "cut":
            return content[:-20]
        case "image":
            table["paths"][0] = "class0/other.jpg"
        case "row":
            for name in ("paths", "targets", "heights", "widths"):
                del table[name][0]
        case "target":
            table["targets"][0] = 1
        case "type":
            table["targets"][0] = "class1"
        case "version":
            table["version"] = 99
        case "key":
            del table["paths"]
        case "list":
            return "[]"
    return json.dumps(table)


@pytest.mark.parametrize("change", ["cut", "image", "row", "target", "type", "version", "key", "list"])
def test_a_changed_file_is_refused_in_one_sentence(smooth_set: ImageSet, file: Path, change: str) -> None:
    file.write_text(_text(change, file.read_text()))
    with pytest.raises(UserError, match=r"images\.json") as caught:
        restore_set(file, smooth_set)
    assert str(caught.value).count("\n") == 0


def test_a_file_that_was_only_laid_out_anew_is_read(smooth_set: ImageSet, file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()), indent=2))
    assert restore_set(file, smooth_set).images.paths == smooth_set.paths


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=8)


@given(st.lists(st.one_of(NAMES, st.binary(min_size=1, max_size=6).map(os.fsdecode)), min_size=1, unique=True))
def test_any_name_is_stored(names: list[str]) -> None:
    assert unescape_names(json.loads(json.dumps(escape_names(names), ensure_ascii=False).encode())) == names


def test_a_name_outside_the_data_is_refused(smooth_set: ImageSet, tmp_path: Path) -> None:
    outside = replace(smooth_set, paths=("../secret.jpg", *smooth_set.paths[1:]))
    records = check_images(smooth_set)
    store_set(tmp_path / FILE, outside, records)
    with pytest.raises(UserError, match=r"names \.\./secret.jpg, which is outside the data"):
        restore_set(tmp_path / FILE, smooth_set)


def test_many_images_are_stored_in_little_time(tmp_path: Path) -> None:
    n = 100_000
    ones, paths = np.ones((n, 2), np.int32), tuple(f"class{i % 50}/image_{i:07d}.jpg" for i in range(n))
    images = ImageSet(tmp_path, paths, np.arange(n) % 50, tuple(f"class{i}" for i in range(50)), np.ones(n, bool))
    records = Records(images, np.arange(n), paths, (None,) * n, ones, ones[:, 0], ones[:, 0].astype("i1"), ())
    start = time.process_time()
    store_set(tmp_path / FILE, images, records)
    assert time.process_time() - start < 2
    assert (tmp_path / FILE).stat().st_size < 50 * n


def test_held_out_images_stay_held_out(smooth_set: ImageSet, tmp_path: Path) -> None:
    """The draw of the held-out images depends on the listing: without the file, others are drawn once one is lost."""
    run = tmp_path / "run"
    config = TrainConfig(data=str(smooth_set.root), out=str(run), holdout=0.2, resume=True)
    splits = pretext_splits(config)
    training = set(splits.pretext().paths)
    store_set(run / FILE, splits.pretext(), check_images(splits.pretext()), splits.held_out_paths())
    (run / "last.pt").touch()
    (smooth_set.root / splits.pretext().paths[0]).unlink()
    for now in (pretext_splits(config), labelled_splits(config)):
        assert now.held_out_paths() == splits.held_out_paths()
        assert training.isdisjoint(now.scored().paths)
    elsewhere = labelled_splits(replace(config, out=str(tmp_path / "none")))
    assert not training.isdisjoint(elsewhere.scored().paths)


def test_a_resumed_loader_continues_bit_for_bit(smooth_set: ImageSet, file: Path) -> None:
    with loading(smooth_set, SPEC, 10) as loader:
        batches = iter(loader)
        next(batches)
        state, rest = loader.state_dict(), list(batches)
    kept = restore_set(file, smooth_set)
    with loading(kept.images, SPEC, 10, records=kept.records) as loader:
        loader.load_state_dict(state)
        assert all(same(a, b) for a, b in zip(rest, loader, strict=True))
