"""Slices of larger files, and shards that are read ahead of the batches."""

from pathlib import Path

import pytest

from fgfast.data import manifest, read_ahead
from fgfast.data.imageset import ImageSet
from fgfast.data.manifest import check_images
from fgfast.data.plan import make_plan
from fgfast.data.slices import _OPEN, OPEN_FILES, Slice, read_file
from fgfast.data.views import Crop, ViewSpec

from .loading import loading
from .sharding import shard, tars

SPEC = ViewSpec(crops=(Crop(size=8),))


def test_a_slice_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.tar"
    file.write_bytes(b"0123456789")
    assert read_file(Slice(str(file), 2, 3)) == b"234"
    assert read_file(Slice(str(file), 2, 3), last=2) == b"34"
    with pytest.raises(OSError, match="cut off") as caught:
        read_file(Slice(str(file), 8, 3))
    assert not manifest.is_passing(caught.value)
    with pytest.raises(OSError, match="damaged"):
        read_file(Slice(str(file), 2, 3, crc=7))
    with pytest.raises(FileNotFoundError):
        read_file(Slice(str(tmp_path / "b.tar"), 0, 1))
    with pytest.raises(OSError, match="not a file"):
        read_file(Slice(str(tmp_path), 0, 1))


def test_many_files_are_open_only_in_part(tmp_path: Path) -> None:
    for i in range(2 * OPEN_FILES):
        (tmp_path / f"{i}.tar").write_bytes(bytes([i]))
    for _ in range(2):
        for i in range(2 * OPEN_FILES):
            assert read_file(Slice(str(tmp_path / f"{i}.tar"), 0, 1)) == bytes([i])
    assert len(_OPEN.files) <= OPEN_FILES


@pytest.mark.parametrize("variant", ["dali_files", "torchvision"])
def test_every_shard_is_read_ahead_once_an_epoch(
    smooth_set: ImageSet, tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shard(smooth_set, tmp_path / "out")
    read: list[str] = []
    monkeypatch.setattr(read_ahead, "read_through", read.append)
    with loading(found, SPEC, 7, variant) as loader:
        list(loader)
    ours = [str(path) for path in tars(tmp_path / "out")]
    assert sorted(read[: len(ours)]) == ours  # DALI may have begun another epoch


def test_a_rank_reads_ahead_what_it_needs_and_no_more(
    smooth_set: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shard(smooth_set, tmp_path / "out", shard_mb=0.0001)  # an image in each
    read: list[str] = []
    monkeypatch.setattr(read_ahead, "read_through", read.append)
    records = check_images(found)
    plan = make_plan(
        found, SPEC, 2, shuffle=True, drop_last=False, seed=0, maps=None, rank=1, world=5, check=True, threads=1,
        records=records,
    )  # fmt: skip
    ahead = read_ahead.ReadAhead(plan)
    ahead.ask(0, 0)
    ahead.ask(0, 0)
    assert ahead._thread is not None
    ahead._files.put(None)
    ahead._thread.join()
    rows = [row for batch in range(read_ahead.BATCHES) for row in plan.batch_rows(0, batch)[0].tolist()]
    assert len(rows) == 8
    assert sorted(read) == sorted(found.file(row)[0] for row in rows)
