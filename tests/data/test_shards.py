"""Shards: what is written is what was in the set, the same however it was written, and damage to it is found."""

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fgfast.data.imageset import ImageSet
from fgfast.data.kept import restore_set, store_set
from fgfast.data.layouts import open_images
from fgfast.data.loader import make_loader
from fgfast.data.manifest import check_images
from fgfast.data.maps import map_sizes, read_map, read_maps_info
from fgfast.data.shards.write import ShardWriter
from fgfast.data.slices import Slice, read_file
from fgfast.data.views import Crop, ViewSpec
from fgfast.errors import UserError

from . import trees
from .conftest import named_images, smooth
from .loading import VARIANTS, loading, same
from .sharding import content, members, shard, tars, valid_images

SPEC = ViewSpec(crops=(Crop(size=8),))


def test_shards_hold_the_images_and_labels_of_the_set(smooth_set: ImageSet, tmp_path: Path) -> None:
    found = shard(smooth_set, tmp_path / "out")
    at = {rel: i for i, rel in enumerate(smooth_set.paths)}
    assert sorted(found.paths) == sorted(smooth_set.paths)
    assert found.paths != smooth_set.paths  # in random order: a shard has images of all classes
    assert found.classes == smooth_set.classes
    for i, rel in enumerate(found.paths):
        assert found.targets[i] == smooth_set.targets[at[rel]]
        assert read_file(found.file(i)) == Path(smooth_set.files()[at[rel]]).read_bytes()
    assert len(tars(tmp_path / "out")) > 10
    assert found.source.startswith("shards in ")


def test_annotations_and_the_split_survive(tmp_path: Path) -> None:
    images = replace(open_images(trees.cub(tmp_path / "cub")), banner=1)
    found = shard(images, tmp_path / "out")
    order = [found.paths.index(rel) for rel in images.paths]
    again = found.subset(order)
    assert again.paths == images.paths
    assert again.banner == 1
    assert again.part_names == images.part_names
    for name in ("targets", "train", "boxes", "keypoints"):
        assert np.array_equal(getattr(again, name), getattr(images, name), equal_nan=True), name
    assert {path.name for path in tars(tmp_path / "out")} >= {"train-000000.tar", "test-000000.tar"}


def test_other_programs_read_the_samples(smooth_set: ImageSet, tmp_path: Path) -> None:
    """Members that follow each other share a key; the index of DALI has the place of each."""
    found = shard(smooth_set, tmp_path / "out")
    seen = 0
    for path in tars(tmp_path / "out"):
        with tarfile.open(path) as tar:
            places = [(m.name, m.offset_data, m.size) for m in tar]
            keys = [name.partition(".")[0] for name, _, _ in places]
            first, *lines = path.with_suffix(".idx").read_text().splitlines()
            assert first == f"v1.2 {len(lines)}"
            assert len(lines) == len(set(keys)) == sum(a != b for a, b in zip(["", *keys], keys, strict=False))
            fields = [line.split(" ") for line in lines]
            listed = [(f[i + 3], int(f[i + 1]), int(f[i + 2])) for f in fields for i in range(0, len(f), 4)]
            assert listed == places
            for name, _, _ in places:
                if name.endswith(".json"):
                    facts = json.loads(tar.extractfile(name).read())
                    label = tar.extractfile(name.replace(".json", ".cls")).read()
                    image = Image.open(tar.extractfile(name.replace(".json", ".jpg")))
                    assert facts["path"] == found.paths[seen]
                    assert facts["target"] == int(label) == found.targets[seen]
                    assert facts["class"] == found.classes[int(label)]
                    assert image.size == (facts["width"], facts["height"])
                    seen += 1
    assert seen == len(smooth_set)


def test_dalis_own_reader_opens_shards(smooth_set: ImageSet, tmp_path: Path) -> None:
    dali = pytest.importorskip("nvidia.dali")
    found = shard(smooth_set, tmp_path / "out")
    files = [str(path) for path in tars(tmp_path / "out")]
    pipe = dali.pipeline.Pipeline(10, 1, None)
    with pipe:
        read = dali.fn.readers.webdataset(
            paths=files, index_paths=[f"{file[:-4]}.idx" for file in files], ext=["jpg;png", "cls"], name="reader",
            missing_component_behavior="error",
        )  # fmt: skip
        pipe.set_outputs(dali.fn.decoders.image(read[0]), read[1])
    pipe.build()
    assert pipe.epoch_size("reader") == 50
    labels = [bytes(np.array(label)) for _ in range(5) for label in pipe.run()[1]]
    assert [int(label) for label in labels] == found.targets.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_loaders_deliver_what_a_folder_gives(smooth_set: ImageSet, tmp_path: Path, variant: str) -> None:
    found = shard(smooth_set, tmp_path / "out")
    order = [smooth_set.paths.index(rel) for rel in found.paths]
    with loading(found, SPEC, 20, variant, shuffle=False) as loader:
        ours = list(loader)
    with loading(smooth_set.subset(order), SPEC, 20, variant, shuffle=False) as loader:
        theirs = list(loader)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_loader_resumes_in_the_middle_of_a_shard(smooth_set: ImageSet, tmp_path: Path, variant: str) -> None:
    found = shard(smooth_set, tmp_path / "out")
    with loading(found, SPEC, 7, variant, seed=3) as loader:
        batches = [*loader, *loader]
        assert valid_images(batches[: len(loader)]) == list(range(50))
        assert batches[0].index.tolist() != batches[len(loader)].index.tolist()
        n = len(loader)
    for at in (3, n + 2):
        with loading(found, SPEC, 7, variant, seed=3) as loader:
            loader.load_state_dict(loader.state_dict() | {"epoch": at // n, "batch": at % n})
            rest = [*loader, *(loader if at < n else [])]
        assert all(same(a, b) for a, b in zip(rest, batches[at:], strict=True))


@pytest.mark.parametrize("variant", ["dali_files", "torchvision"])
@pytest.mark.parametrize("threads", [2, 4])
def test_workers_do_not_change_the_batches(smooth_set: ImageSet, tmp_path: Path, variant: str, threads: int) -> None:
    found = shard(smooth_set, tmp_path / "out")
    with loading(found, SPEC, 7, variant) as loader:
        one = list(loader)
    backend = variant.partition("_")[0]
    loader = make_loader(found, SPEC, 7, backend=backend, memory_mb=0, threads=threads)
    many = list(loader)
    loader.close()
    assert all(same(a, b) for a, b in zip(one, many, strict=True))


def test_the_bytes_depend_on_the_set_alone(smooth_set: ImageSet, tmp_path: Path) -> None:
    shard(smooth_set, tmp_path / "one")
    shard(smooth_set, tmp_path / "two", workers=3)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    shard(smooth_set, tmp_path / "three", seed=1)
    assert content(tmp_path / "one") != content(tmp_path / "three")


@pytest.mark.parametrize("after", [0, 1, 5, 12])
def test_an_interrupted_call_leaves_whole_shards_and_goes_on(
    smooth_set: ImageSet, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(smooth_set, tmp_path / "whole")
    whole = content(tmp_path / "whole")
    out = tmp_path / "out"
    writer = ShardWriter(smooth_set, out, shard_mb=0.006)
    written: list[str] = []
    write_shard = writer._write_shard

    def stop(part):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(part.name)
        return write_shard(part)

    monkeypatch.setattr(writer, "_write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        writer.write()
    left = {name: data for name, data in content(out).items() if name != "begun-shards.json"}
    assert left.items() <= whole.items()
    assert len(left) == 3 * after
    with pytest.raises(UserError, match="not complete: run the same"):
        open_images(out)
    times = {path: path.stat().st_mtime_ns for path in tars(out)}
    shard(smooth_set, out)
    assert content(out) == whole
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())  # not written again


@pytest.mark.parametrize("lose", ["tar", "json", "idx", "cut"])
def test_lost_and_damaged_shards_are_written_again(smooth_set: ImageSet, tmp_path: Path, lose: str) -> None:
    shard(smooth_set, tmp_path / "out")
    whole = content(tmp_path / "out")
    path = tmp_path / "out" / f"train-000002.{'tar' if lose == 'cut' else lose}"
    if lose == "cut":
        path.write_bytes(path.read_bytes()[:-700])
    else:
        path.unlink()
    shard(smooth_set, tmp_path / "out")
    assert content(tmp_path / "out") == whole


def test_a_changed_set_and_other_settings_are_refused(smooth_set: ImageSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(smooth_set, out)
    before = content(out)
    for settings in ({"seed": 1}, {"shard_mb": 0.01}):
        with pytest.raises(UserError, match="holds shards of other images or settings"):
            shard(smooth_set, out, **settings)
    smooth(99).save(smooth_set.root / smooth_set.paths[3])
    with pytest.raises(UserError, match="an image has changed since"):
        shard(smooth_set, out)
    assert content(out) == before


def test_an_image_that_changes_meanwhile_ends_the_writing(smooth_set: ImageSet, tmp_path: Path) -> None:
    writer = ShardWriter(smooth_set, tmp_path / "out", shard_mb=0.006)
    smooth(99, 50, 50).save(smooth_set.root / smooth_set.paths[3])
    with pytest.raises(UserError, match=f"{smooth_set.paths[3]} has changed"):
        writer.write()
    assert not (tmp_path / "out" / "shards.json").exists()
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_a_folder_that_others_wrote_to_since_the_check_is_left_alone(smooth_set: ImageSet, tmp_path: Path) -> None:
    late = ShardWriter(smooth_set, tmp_path / "out", shard_mb=0.006, seed=1)
    shard(smooth_set, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match="holds shards of other images or settings"):
        late.write()
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("variant", VARIANTS)
def test_formats_that_dali_does_not_read_are_stored_as_png(tmp_path: Path, variant: str) -> None:
    root = tmp_path / "set"
    root.mkdir()
    for i, kind in enumerate(("bmp", "tif", "webp", "gif")):
        smooth(i).save(root / f"{i}.{kind}", lossless=True)
    smooth(7).convert("CMYK").save(root / "7.jpg", quality=95)
    images = open_images(root)
    found = shard(images, tmp_path / "out")
    assert sum(member.name.endswith(".png") for member in members(tmp_path / "out")) == 5
    assert sorted(found.paths) == sorted(images.paths)
    with loading(found, ViewSpec(whole=16), 5, variant, shuffle=False) as ours:
        order = [images.paths.index(rel) for rel in found.paths]
        with loading(images.subset(order), ViewSpec(whole=16), 5, variant, shuffle=False) as theirs:
            assert all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_orientation_survives(tmp_path: Path) -> None:
    root = tmp_path / "set"
    root.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth(0).save(root / "0.jpg", exif=exif)
    found = shard(open_images(root), tmp_path / "out")
    assert found.slices is not None
    assert found.slices.shape.tolist() == [[120, 96, 6]]
    assert check_images(found).sizes.tolist() == [[120, 96]]


def test_broken_images_are_left_out_and_named(smooth_set: ImageSet, tmp_path: Path) -> None:
    (smooth_set.root / smooth_set.paths[5]).write_bytes(b"broken")
    found = shard(smooth_set, tmp_path / "out")
    assert len(found) == 49
    table = json.loads((tmp_path / "out" / "shards.json").read_text())
    assert table["skipped"] == [[smooth_set.paths[5], "not an image"]]


def test_what_was_decoded_once_is_not_decoded_again(
    smooth_set: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = shard(smooth_set, tmp_path / "out")
    monkeypatch.setenv("FGFAST_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(Image, "open", None)
    records = check_images(found)
    assert len(records) == 50
    assert (records.sizes == (96, 120)).all()


NAMES = [
    b"caf\xe9.jpg",
    b"line\nbreak.png",
    b"tab\t'quotes\" .jpg",
    "\u2028\u00e9.tif".encode(),
    b"a.b.c.jpg",
    b"1%41.png",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_name_is_kept(tmp_path: Path, variant: str) -> None:
    images = open_images(named_images(tmp_path, NAMES))
    found = shard(images, tmp_path / "out")
    assert sorted(found.paths) == sorted(images.paths)
    assert found.classes == images.classes
    with loading(found, SPEC, 2, variant) as loader:
        assert valid_images(loader) == list(range(len(NAMES)))


def test_linked_images_are_stored(smooth_set: ImageSet, tmp_path: Path) -> None:
    (smooth_set.root / "class0" / "link.jpg").symlink_to(smooth_set.root / smooth_set.paths[30])
    (smooth_set.root / "class1" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "more").mkdir()
    smooth(60).save(tmp_path / "more" / "x.jpg")
    found = shard(open_images(smooth_set.root), tmp_path / "out")
    assert len(found) == 52
    assert {"class0/link.jpg", "class1/more/x.jpg"} <= set(found.paths)
    assert all(member.isfile() for member in members(tmp_path / "out"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_id_maps_travel_inside(coded_set: ImageSet, tmp_path: Path, variant: str) -> None:
    found = shard(coded_set, tmp_path / "out", maps=tmp_path / "maps")
    assert found.masks == tmp_path / "out"
    assert read_maps_info(found.masks) == read_maps_info(tmp_path / "maps")
    assert map_sizes(found.masks, found.paths).tolist() == [[40, 50]] * 12
    assert np.array_equal(read_map(found.masks, found.paths[0]), read_map(tmp_path / "maps", found.paths[0]))
    spec = ViewSpec(crops=(Crop(size=16),), masks=True)
    order = [coded_set.paths.index(rel) for rel in found.paths]
    with loading(found, spec, 5, variant, maps=found.masks, shuffle=False) as loader:
        ours = list(loader)
    with loading(coded_set.subset(order), spec, 5, variant, maps=tmp_path / "maps", shuffle=False) as loader:
        assert all(same(a, b) for a, b in zip(ours, loader, strict=True))


def test_a_run_on_a_folder_goes_on_with_its_shards(smooth_set: ImageSet, tmp_path: Path) -> None:
    """The images have the same paths: the file of a run finds them in either place."""
    store_set(tmp_path / "images.json", smooth_set, check_images(smooth_set))
    found = shard(smooth_set, tmp_path / "out")
    shutil.rmtree(smooth_set.root)
    kept = restore_set(tmp_path / "images.json", found)
    assert kept.images.paths == smooth_set.paths
    assert kept.missing == ()
    assert isinstance(kept.images.file(0), Slice)
    with loading(kept.images, SPEC, 10, records=kept.records) as loader:
        assert valid_images(loader) == list(range(50))


@pytest.mark.parametrize("variant", ["dali_files", "torchvision"])
def test_shards_of_shards_and_unlabelled_images_beside_them(smooth_set: ImageSet, tmp_path: Path, variant: str) -> None:
    found = shard(shard(smooth_set, tmp_path / "one"), tmp_path / "two", shard_mb=0.02)
    assert sorted(found.paths) == sorted(smooth_set.paths)
    (tmp_path / "more").mkdir()
    smooth(60).save(tmp_path / "more" / "x.jpg")
    both = found.with_folder(tmp_path / "more")
    with loading(both, SPEC, 10, variant) as loader:
        assert valid_images(loader) == list(range(51))


def test_a_tar_beside_class_folders_is_no_set_of_shards(smooth_set: ImageSet) -> None:
    (smooth_set.root / "download.tar").write_bytes(b"")
    assert open_images(smooth_set.root).classes == smooth_set.classes


def test_the_folder_may_move(smooth_set: ImageSet, tmp_path: Path) -> None:
    shard(smooth_set, tmp_path / "out")
    found = open_images(shutil.move(tmp_path / "out", tmp_path / "elsewhere"))
    assert len(check_images(found)) == 50
