"""Images that vanish or break while a loader delivers: skipped, counted, named once, tried again, never an end."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fgfast.data import manifest
from fgfast.data.base import Loader
from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.manifest import Verdict, check_images
from fgfast.data.maps import map_path
from fgfast.data.views import Batch, Crop, Patch, ViewSpec
from fgfast.errors import UserError
from tests.data.loading import VARIANTS, loading

from .conftest import smooth

SPEC = ViewSpec(crops=(Crop(size=8),))
FROM_DISK = ["dali_files", "torchvision"]


def valid_images(batches: Iterator[Batch] | Loader | list[Batch]) -> list[int]:
    return sorted(int(i) for batch in batches for i in batch.index[batch.valid])


def without(*lost: int) -> list[int]:
    return [i for i in range(50) if i not in lost]


def settle(loader: Loader) -> None:
    """Let batches pass that were read before a change."""
    for _ in range(2):
        list(loader)


@pytest.mark.parametrize("variant", FROM_DISK)
def test_lost_images_are_skipped_counted_and_named_once(
    smooth_set: ImageSet, variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    with loading(smooth_set, SPEC, 10, variant, records=check_images(smooth_set)) as loader:
        list(loader)
        (smooth_set.root / smooth_set.paths[13]).write_bytes(b"broken")
        (smooth_set.root / smooth_set.paths[31]).unlink()
        settle(loader)
        assert valid_images(loader) == without(13, 31)
        assert sorted(rel for rel, _ in loader.lost) == [smooth_set.paths[13], smooth_set.paths[31]]
        assert loader.too_many is None
        assert set(loader.failed) == {13, 31}
        (smooth_set.root / smooth_set.paths[40]).unlink()
        settle(loader)
        batches = list(loader)  # goes on
        assert loader.too_many is not None
        assert "3 of 50 images" in loader.too_many
        assert "\n" not in loader.too_many
        assert len(batches) == 5
        assert valid_images(batches) == without(13, 31, 40)
        assert [text.count(smooth_set.paths[31]) for text in caplog.messages if "skipped" in text].count(1) == 1


def test_images_in_memory_are_used_although_the_files_are_lost(smooth_set: ImageSet) -> None:
    with loading(smooth_set, SPEC, 10, records=check_images(smooth_set)) as loader:
        list(loader)
        shutil.rmtree(smooth_set.root)
        settle(loader)
        assert valid_images(loader) == without()
        assert loader.lost == []


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("patch", [False, True])
def test_padding_goes_on_when_every_image_is_lost(
    coded_set: ImageSet, tmp_path: Path, variant: str, patch: bool
) -> None:
    """An unmounted disk: training still gets batches, until all ranks stop at the same step."""
    spec = ViewSpec(crops=(Crop(size=8),), masks=not patch, patch=Patch(32, 2) if patch else None)
    maps = {} if patch else {"maps": tmp_path / "maps"}
    with loading(coded_set, spec, 5, variant, records=check_images(coded_set), **maps) as loader:
        shutil.rmtree(coded_set.root)
        batches = list(loader)
        assert loader.too_many is not None
    assert len(batches) == 3
    assert not torch.cat([batch.valid for batch in batches]).any()
    assert all(len(batch) == 5 and batch.views[0].isfinite().all() for batch in batches)


@pytest.mark.parametrize("variant", FROM_DISK)
def test_without_records_a_loader_without_images_ends_in_one_sentence(smooth_set: ImageSet, variant: str) -> None:
    with loading(smooth_set, SPEC, 10, variant) as loader:
        shutil.rmtree(smooth_set.root)
        with pytest.raises(UserError, match="None of the 50 images can be read any longer"):
            list(loader)


@pytest.mark.parametrize("variant", FROM_DISK)
def test_what_has_passed_is_used_again_in_the_next_epoch(smooth_set: ImageSet, variant: str) -> None:
    """A missing file comes back; a broken one is final until the run resumes."""
    path, broken = (smooth_set.root / smooth_set.paths[i] for i in (31, 13))
    with loading(smooth_set, SPEC, 10, variant, records=check_images(smooth_set)) as loader:
        content, whole = path.read_bytes(), broken.read_bytes()
        path.unlink()
        broken.write_bytes(b"broken")
        assert valid_images(loader) == without(13, 31)
        path.write_bytes(content)
        broken.write_bytes(whole)
        settle(loader)
        assert valid_images(loader) == without(13)
        assert loader.recovered == [smooth_set.paths[31]]
        path.unlink()
        settle(loader)
        assert valid_images(loader) == without(13, 31)
        assert len(loader.lost) == 2  # named once
        state = loader.state_dict()
    assert state["failed"] == [13, 31]


def test_what_has_passed_is_read_into_memory(smooth_set: ImageSet) -> None:
    path = smooth_set.root / smooth_set.paths[31]
    with loading(smooth_set, SPEC, 10) as loader:
        content = path.read_bytes()
        path.unlink()
        assert valid_images(loader) == without(31)
        path.write_bytes(content)
        settle(loader)
        assert valid_images(loader) == without()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_passing_error_of_the_system_is_tried_again(
    smooth_set: ImageSet, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(smooth_set.root.resolve() / smooth_set.paths[31])
    with loading(smooth_set, SPEC, 25, "dali_files") as loader, monkeypatch.context() as patched:
        os.utime(path)  # its stamp is another: it is checked before it is read
        open_image = manifest.open_image

        def failing(file: str) -> object:
            if file == path:
                raise OSError(code, os.strerror(code))
            return open_image(file)

        patched.setattr(manifest, "open_image", failing)
        assert valid_images(loader) == without(31)
        assert loader.lost == [(smooth_set.paths[31], os.strerror(code))]
        patched.undo()
        settle(loader)
        assert valid_images(loader) == without()


@pytest.mark.parametrize("variant", ["dali_kept", "dali_files"])
def test_a_resumed_run_tries_every_lost_image_again(smooth_set: ImageSet, variant: str) -> None:
    records = check_images(smooth_set)
    with loading(smooth_set, SPEC, 10, variant, records=records) as loader:
        state = loader.state_dict() | {"failed": [13, 31]}  # 13 is repaired, 31 is not
    (smooth_set.root / smooth_set.paths[31]).write_bytes(b"broken")
    with loading(smooth_set, SPEC, 10, variant, records=records) as loader:
        loader.load_state_dict(state)
        assert loader.recovered == [smooth_set.paths[13]]
        assert [rel for rel, _ in loader.lost] == [smooth_set.paths[31]]
        assert valid_images(loader) == without(31)


def test_images_that_another_rank_has_lost_are_left_out(smooth_set: ImageSet) -> None:
    path = smooth_set.root / smooth_set.paths[31]
    with loading(smooth_set, SPEC, 10, "dali_files", records=check_images(smooth_set)) as loader:
        path.unlink()
        loader.exclude({31: "No such file"})
        assert loader.lost == [(smooth_set.paths[31], "No such file")]
        assert valid_images(loader) == without(31)
        loader.exclude(dict.fromkeys((1, 2), "Input/output error"))
        assert loader.too_many is not None


@pytest.mark.parametrize("lose", [Path.unlink, lambda copy: copy.write_bytes(copy.read_bytes()[:-20])])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_lost_or_cut_copy_in_the_cache_is_no_lost_image(
    tmp_path: Path, variant: str, lose: Callable[[Path], object]
) -> None:
    root = tmp_path / "bitmaps"
    root.mkdir()
    for i in range(4):
        smooth(i).save(root / f"{i}.bmp")
    images = open_images(root)
    with loading(images, SPEC, 2, variant) as loader:
        for copy in (manifest.cache_folder() / "converted").iterdir():
            lose(copy)
        assert valid_images(loader) == [0, 1, 2, 3]
        assert loader.lost == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_lost_image_needs_no_map(coded_set: ImageSet, tmp_path: Path, variant: str) -> None:
    """The parts of a later round are discovered without it; if it comes back, it stays left out, as it has no map."""
    records = check_images(coded_set)
    missing = Verdict(0, 0, full=True, reason="No such file or directory", passing=True)
    map_path(tmp_path / "maps", coded_set.paths[3]).unlink()
    records = replace(records, lost={3: missing})
    spec = ViewSpec(crops=(Crop(size=8),), masks=True)
    with loading(coded_set, spec, 4, variant, maps=tmp_path / "maps", records=records) as loader:
        for _ in range(2):
            batches = list(loader)
            assert valid_images(batches) == [i for i in range(12) if i != 3]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_that_is_now_smaller_than_the_patch_is_lost(smooth_set: ImageSet, variant: str) -> None:
    with loading(smooth_set, ViewSpec(patch=Patch(64, 2)), 25, variant, records=check_images(smooth_set)) as loader:
        smooth(0, 60, 120).save(smooth_set.root / smooth_set.paths[13])
        assert valid_images(loader) == without(13)
        assert loader.lost == [(smooth_set.paths[13], "60 x 120 pixels are too few for a patch of 64 x 64")]


def test_a_lenient_check_skips_what_is_missing_however_much(smooth_set: ImageSet) -> None:
    for rel in smooth_set.paths[:20]:
        (smooth_set.root / rel).unlink()
    records = check_images(smooth_set, lenient=True)
    assert len(records) == 30
    assert {reason for _, reason in records.skipped} == {os.strerror(errno.ENOENT)}
    with loading(smooth_set, ViewSpec(whole=8), 16, shuffle=False, lenient=True) as loader:
        assert valid_images(loader) == list(range(20, 50))
    with pytest.raises(UserError, match="listed but missing"):
        check_images(smooth_set)
    for rel in smooth_set.paths[20:]:
        (smooth_set.root / rel).unlink()
    with pytest.raises(UserError, match="50 of 50 images"):
        check_images(smooth_set, lenient=True)
