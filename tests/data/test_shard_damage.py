"""Damaged and missing shards are skipped, counted and named; what is no set of shards is refused in one sentence."""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest

from fgfast.cli.main import main
from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.loader import make_loader
from fgfast.data.manifest import check_images
from fgfast.data.maps import map_file
from fgfast.data.slices import _OPEN
from fgfast.data.views import Crop, ViewSpec
from fgfast.errors import UserError

from .loading import VARIANTS, loading
from .sharding import fails, flip, shard, tars, valid_images

SPEC = ViewSpec(crops=(Crop(size=8),))
FROM_DISK = ["dali_files", "torchvision"]


def images_of(found: ImageSet, shard_: Path) -> list[int]:
    return [i for i in range(len(found)) if found.file(i)[0] == str(shard_)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_image_with_one_changed_bit_is_skipped_and_named(smooth_set: ImageSet, tmp_path: Path, variant: str) -> None:
    found = shard(smooth_set, tmp_path / "out")
    with loading(found, SPEC, 10, variant, records=check_images(found)) as loader:
        flip(found.file(31))
        assert valid_images(loader) == [i for i in range(50) if i != 31]
        assert [path for path, _ in loader.lost] == [found.paths[31]]
        assert "is damaged here (the checksum differs)" in loader.lost[0][1]
        assert loader.too_many is None


@pytest.mark.parametrize("variant", FROM_DISK)
def test_a_shard_that_vanishes_is_skipped_and_used_when_it_is_back(
    smooth_set: ImageSet, tmp_path: Path, variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = shard(smooth_set, tmp_path / "out")
    gone = next(path for path in tars(tmp_path / "out") if len(images_of(found, path)) == 2)
    lost = images_of(found, gone)
    with loading(found, SPEC, 10, variant, records=check_images(found)) as loader:
        gone.rename(tmp_path / "elsewhere")
        _OPEN.forget(str(gone))  # a file that is open stays readable
        assert valid_images(loader) == [i for i in range(50) if i not in lost]
        assert sorted(path for path, _ in loader.lost) == sorted(found.paths[i] for i in lost)
        assert loader.lost[0][1] == f"{gone.name}: No such file or directory"
        assert sum(gone.name in text for text in caplog.messages) == 1
        (tmp_path / "elsewhere").rename(gone)
        list(loader)  # the batches of the next epoch that were made meanwhile
        assert valid_images(loader) == list(range(50))


@pytest.mark.parametrize("variant", FROM_DISK)
@pytest.mark.parametrize("every", [False, True])
def test_id_maps_are_lost_with_their_shard(coded_set: ImageSet, tmp_path: Path, variant: str, every: bool) -> None:
    """One of twelve images is more than 5%: batches go on, black in its place, until all ranks stop."""
    found = shard(coded_set, tmp_path / "out", shard_mb=0.0001, maps=tmp_path / "maps")
    spec = ViewSpec(crops=(Crop(size=8),), masks=True)
    with loading(found, spec, 5, variant, maps=found.masks, records=check_images(found)) as loader:
        for path in tars(tmp_path / "out")[: None if every else 1]:
            path.unlink()
            _OPEN.forget(str(path))
        batches = list(loader)
        assert loader.too_many is not None
    assert valid_images(batches) == ([] if every else list(range(1, 12)))
    assert all(batch.labels[0].shape == (5, 8, 8) for batch in batches)
    if not every:
        gone = [labels for batch in batches for labels, i in zip(batch.labels[0], batch.index, strict=True) if i == 0]
        assert all((labels == -1).all() for labels in gone)


@pytest.mark.parametrize("variant", FROM_DISK)
def test_a_damaged_id_map_of_a_sound_image_is_an_error(coded_set: ImageSet, tmp_path: Path, variant: str) -> None:
    found = shard(coded_set, tmp_path / "out", maps=tmp_path / "maps")
    spec = ViewSpec(crops=(Crop(size=8),), masks=True)
    with loading(found, spec, 6, variant, maps=found.masks, records=check_images(found)) as loader:
        list(loader)
        flip(map_file(tmp_path / "out", found.paths[7]))
        with pytest.raises(UserError, match=r"is damaged here \(the checksum differs\)"):
            list(chain(loader, loader, loader))  # batches of the next epoch may have been made before


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_shard_costs_its_images_at_the_start(smooth_set: ImageSet, tmp_path: Path, damage: str) -> None:
    found = shard(smooth_set, tmp_path / "out")
    path = next(path for path in tars(tmp_path / "out") if len(images_of(found, path)) == 2)
    first, second = images_of(found, path)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: found.file(second)[1] + 9])
    records = check_images(open_images(tmp_path / "out"))
    lost = [first, second] if damage == "missing" else [second]
    assert [rel for rel, _ in records.skipped] == [found.paths[i] for i in lost]
    assert all(path.name in reason for _, reason in records.skipped)
    assert len(records) == 50 - len(lost)


def test_too_many_lost_images_stop(smooth_set: ImageSet, tmp_path: Path) -> None:
    found = shard(smooth_set, tmp_path / "out", shard_mb=0.02)
    tars(tmp_path / "out")[0].unlink()
    with pytest.raises(UserError, match=r"of 50 images of .* cannot be read, such as .*train-000000.tar: No such file"):
        check_images(found)


def test_fewer_shards_than_ranks_are_refused(smooth_set: ImageSet, tmp_path: Path) -> None:
    found = shard(smooth_set, tmp_path / "out", shard_mb=0.06)
    n = len(tars(tmp_path / "out"))
    make_loader(found, SPEC, 2, rank=n - 1, world=n, backend="torchvision").close()
    with pytest.raises(UserError, match=f"has {n} shards to train on, fewer than the {n + 1} ranks: write smaller"):
        make_loader(found, SPEC, 2, rank=n, world=n + 1, backend="torchvision")
    make_loader(found, SPEC, 2, rank=n, world=n + 1, backend="torchvision", shuffle=False).close()  # scores


def change(name: str, **values: object) -> Callable[[Path], None]:
    def corrupt(root: Path) -> None:
        table = json.loads((root / name).read_text())
        (root / name).write_text(json.dumps(table | values))

    return corrupt


def swap(one: str, two: str) -> Callable[[Path], None]:
    def corrupt(root: Path) -> None:
        a, b = (root / one).read_bytes(), (root / two).read_bytes()
        (root / one).write_bytes(b)
        (root / two).write_bytes(a)

    return corrupt


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (
            lambda root: (root / "shards.json").unlink(),
            "were written with their index: restore its shards.json, or write",
        ),
        (lambda root: (root / "train-000001.json").unlink(), r"train-000001\.json is missing"),
        (lambda root: (root / "shards.json").write_text("{"), r"shards\.json cannot be read"),
        (change("shards.json", banner=3), r"shards\.json was changed since it was written"),
        (change("train-000001.json", bytes=3), r"train-000001\.json was changed since"),
        (change("shards.json", version=9), r"is of version 9, not 1"),
        (swap("train-000001.json", "train-000002.json"), r"train-000001\.json disagrees"),
        (lambda root: [path.unlink() for path in tars(root)], "50 of 50 images of .* cannot be read"),
        (
            lambda root: [path.write_bytes(b"x" * 9) for path in tars(root)],
            "50 of 50 images .* is cut off before its end",
        ),
    ],
)
def test_an_index_that_is_missing_or_disagrees_is_refused(
    smooth_set: ImageSet, tmp_path: Path, corrupt: Callable[[Path], object], message: str
) -> None:
    shard(smooth_set, tmp_path / "out")
    corrupt(tmp_path / "out")
    with pytest.raises(UserError, match=message) as caught:
        check_images(open_images(tmp_path / "out"))
    assert "\n" not in str(caught.value)


def test_the_index_of_another_writing_is_refused(smooth_set: ImageSet, tmp_path: Path) -> None:
    shard(smooth_set, tmp_path / "out")
    shard(smooth_set, tmp_path / "other", seed=1)
    (tmp_path / "other" / "train-000001.json").replace(tmp_path / "out" / "train-000001.json")
    with pytest.raises(UserError, match=r"train-000001\.json disagrees with shards\.json"):
        open_images(tmp_path / "out")


def test_shards_of_another_writing_are_found_at_the_start(smooth_set: ImageSet, tmp_path: Path) -> None:
    """They have the same names, and for the most part the same number of bytes."""
    found = shard(smooth_set, tmp_path / "out", shard_mb=0.02)
    shard(smooth_set, tmp_path / "other", shard_mb=0.02, seed=1)
    for path in tars(tmp_path / "other"):
        path.replace(tmp_path / "out" / path.name)
    with pytest.raises(UserError, match=r"of 50 images of .* is damaged here \(the checksum differs\)"):
        check_images(found)


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_bad_arguments_write_nothing(smooth_set: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root, out = smooth_set.root, tmp_path / "out"
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file" in fails(capsys, "shard", root, file)
    assert "holds other files, such as notes.txt" in fails(capsys, "shard", root, other)
    assert "lies in the data folder" in fails(capsys, "shard", root, root / "class0")
    assert "lies in the data folder" in fails(capsys, "shard", root, root)
    assert "does not exist" in fails(capsys, "shard", tmp_path / "none", out)
    assert "holds no images" in fails(capsys, "shard", tmp_path / "empty", out)
    assert "--shard-mb is 0" in fails(capsys, "shard", root, out, "--shard-mb", "0")
    assert "--shard-mb is nan" in fails(capsys, "shard", root, out, "--shard-mb", "nan")
    assert "--workers is 0" in fails(capsys, "shard", root, out, "--workers", "0")
    assert "--seed is -1" in fails(capsys, "shard", root, out, "--seed", "-1")
    assert "give one of the two" in fails(capsys, "shard", root)
    assert "give one of the two" in fails(capsys, "shard", root, out, "--index")
    assert "maps.json is missing" in fails(capsys, "shard", root, out, "--maps", tmp_path / "none")
    assert "has no tar file" in fails(capsys, "shard", root, "--index")
    assert not out.exists()
    assert [path.name for path in other.iterdir()] == ["notes.txt"]
    assert not list(root.rglob("*.json"))


def test_a_missing_map_ends_the_writing(coded_set: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "maps" / f"{coded_set.paths[3]}.png").unlink()
    error = fails(capsys, "shard", coded_set.root, tmp_path / "out", "--maps", tmp_path / "maps")
    assert f"has no map for {coded_set.paths[3]}" in error
    assert not (tmp_path / "out" / "shards.json").exists()


def test_the_command_writes_shards(smooth_set: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["shard", str(smooth_set.root), str(tmp_path / "out"), "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "2 classes (class0, class1), 50 training images" in said
    assert len(tars(tmp_path / "out")) == 24
    assert not list((tmp_path / "out").glob(".*"))
