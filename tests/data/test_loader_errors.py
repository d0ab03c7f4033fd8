"""Loaders: broken files become padding or are skipped, and errors name the file or the argument."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fgfast.data.layouts import ImageSet
from fgfast.data.loader import make_loader
from fgfast.data.maps import map_path
from fgfast.data.views import Crop, ViewSpec
from fgfast.errors import UserError
from fgfast.interrupt import STOPS
from tests.data.loading import VARIANTS, loading, same


@pytest.mark.parametrize("variant", ["dali_files", "torchvision"])
def test_a_file_that_breaks_later_becomes_padding(smooth_set: ImageSet, variant: str) -> None:
    spec = ViewSpec(crops=(Crop(size=8),))
    with loading(smooth_set, spec, 10, variant) as loader:
        list(loader)
        path = smooth_set.root / smooth_set.paths[13]
        path.write_bytes(path.read_bytes()[:300])
        os.unlink(smooth_set.root / smooth_set.paths[31])
        list(loader)  # may still have batches loaded before
        batches = list(loader)
        assert sorted(rel for rel, _ in loader.skipped) == sorted([smooth_set.paths[13], smooth_set.paths[31]])
        state = loader.state_dict()
    assert len(batches) == 5
    index, valid = torch.cat([b.index for b in batches]), torch.cat([b.valid for b in batches])
    assert set(index[valid].tolist()) == set(range(50)) - {13, 31}
    assert valid.sum() == 48
    assert state["failed"] == [13, 31]


def test_a_file_that_breaks_before_the_first_batch_is_left_out(smooth_set: ImageSet) -> None:
    with loading(smooth_set, ViewSpec(crops=(Crop(size=8),)), 10) as loader:
        (smooth_set.root / smooth_set.paths[13]).write_bytes(b"x")
        index = torch.cat([b.index[b.valid] for b in loader])
        assert [rel for rel, _ in loader.skipped] == [smooth_set.paths[13]]
    assert sorted(index.tolist()) == [i for i in range(50) if i != 13]


def test_a_failed_pipeline_is_rebuilt_without_the_broken_file(
    smooth_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ViewSpec(crops=(Crop(size=8),))
    with loading(smooth_set, spec, 10, "dali_files") as loader:
        expected = list(loader)
    with loading(smooth_set, spec, 10, "dali_files") as loader:
        take_outputs, calls = loader._take_outputs, []

        def failing() -> object:
            calls.append(0)
            if len(calls) == 3:  # as if a file had broken between the check and DALI
                (smooth_set.root / smooth_set.paths[int(expected[2].index[4])]).write_bytes(b"")
                raise RuntimeError("Critical error in pipeline")
            return take_outputs()

        monkeypatch.setattr(loader, "_take_outputs", failing)
        got = list(loader)
        assert [rel for rel, _ in loader.skipped] == [smooth_set.paths[expected[2].index[4]]]
    assert len(got) == 5
    assert all(same(a, b) for i, (a, b) in enumerate(zip(expected, got, strict=True)) if i != 2)
    assert got[2].valid.tolist() == [i != 4 for i in range(10)]


def test_a_failure_without_a_broken_file_is_raised(smooth_set: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    with loading(smooth_set, ViewSpec(crops=(Crop(size=8),)), 10, "dali_files") as loader:
        monkeypatch.setattr(loader, "_take_outputs", lambda: exec('raise RuntimeError("no memory")'))
        for _ in range(2):  # the second attempt fails like the first instead of hanging
            with pytest.raises(RuntimeError, match="whose files all decode"):
                list(loader)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dali_kept", "dali_files"])
def test_a_program_may_exit_without_closing_the_loader(smooth_set: ImageSet, variant: str) -> None:
    pytest.importorskip("nvidia.dali")
    program = f"""
from fgfast.data.layouts import open_images
from fgfast.data.loader import make_loader
from fgfast.data.views import Crop, ViewSpec
images = open_images({str(smooth_set.root)!r})
loader = make_loader(images, ViewSpec(crops=(Crop(),)), 4, memory_mb={VARIANTS[variant][1]})
batches = iter(loader)
next(batches)
raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 7


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_to_the_whole_job_ends_no_worker(smooth_set: ImageSet, number: signal.Signals) -> None:
    """The training, which gets it too, stops after a complete step; what it sends itself ends them."""
    before = set(multiprocessing.active_children())
    with loading(smooth_set, ViewSpec(crops=(Crop(size=16),)), 2, "torchvision") as loader:
        batches = iter(loader)
        next(batches)
        (worker,) = set(multiprocessing.active_children()) - before
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
        assert len(list(batches)) == len(loader) - 1
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0


def test_one_broken_image_of_many_is_skipped(smooth_set: ImageSet) -> None:
    (smooth_set.root / smooth_set.paths[5]).write_bytes(b"")
    with loading(smooth_set, ViewSpec(whole=8), 16, shuffle=False) as loader:
        index = torch.cat([b.index[b.valid] for b in loader])
        assert [rel for rel, _ in loader.skipped] == [smooth_set.paths[5]]
    assert index.tolist() == [i for i in range(50) if i != 5]


def test_an_error_names_the_missing_map(coded_set: ImageSet, tmp_path: Path) -> None:
    map_path(tmp_path / "maps", coded_set.paths[3]).unlink()
    with pytest.raises(UserError, match=f"no map for {coded_set.paths[3]}.*fgfast discover"):
        make_loader(coded_set, ViewSpec(crops=(Crop(),), masks=True), 4, maps=tmp_path / "maps")


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_error_names_a_map_that_does_not_decode(coded_set: ImageSet, tmp_path: Path, variant: str) -> None:
    path = map_path(tmp_path / "maps", coded_set.paths[3])
    path.write_bytes(path.read_bytes()[:50])
    with (
        loading(coded_set, ViewSpec(crops=(Crop(),), masks=True), 4, variant, maps=tmp_path / "maps") as loader,
        pytest.raises(UserError, match=r"03\.png\.png does not decode"),
    ):
        list(loader)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"rank": 2, "world": 2}, ValueError, "rank"),
        ({"backend": "cuda"}, ValueError, "choose one of auto, dali, torchvision"),
        ({"seed": -1}, ValueError, "seed"),
        ({"batch_size": 64, "drop_last": True}, UserError, "do not fill one batch of 64"),
    ],
)
def test_invalid_arguments_are_refused(smooth_set: ImageSet, kwargs: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make_loader(smooth_set, ViewSpec(crops=(Crop(),)), **{"batch_size": 8, **kwargs})


def test_masks_need_a_map_folder(smooth_set: ImageSet) -> None:
    with pytest.raises(ValueError, match="pass their folder to make_loader"):
        make_loader(smooth_set, ViewSpec(crops=(Crop(),), masks=True), 8)
