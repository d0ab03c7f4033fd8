"""Loaders: views, boxes and id maps agree; each record comes once; resuming is exact; broken files are left out."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fgfast.data.base import Loader
from fgfast.data.layouts import ImageSet
from fgfast.data.loader import make_loader
from fgfast.data.maps import map_path, read_map
from fgfast.data.views import Batch, Crop, ViewSpec, warp_labels
from fgfast.errors import UserError

PLAIN = {"jitter_p": 0.0}
RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
VARIANTS = {"dali_kept": ("dali", 1024), "dali_files": ("dali", 0), "torchvision": ("torchvision", 0)}


@contextmanager
def loading(
    images: ImageSet, spec: ViewSpec, batch_size: int, variant: str = "dali_kept", **kwargs
) -> Iterator[Loader]:
    backend, memory_mb = VARIANTS[variant]
    pytest.importorskip("nvidia.dali" if backend == "dali" else "torchvision")
    loader = make_loader(images, spec, batch_size, backend=backend, memory_mb=memory_mb, threads=1, **kwargs)
    try:
        yield loader
    finally:
        loader.close()


def same(a: Batch, b: Batch) -> bool:
    def flat(batch: Batch) -> list[torch.Tensor]:
        values = [getattr(batch, f.name) for f in fields(batch)]
        return [t for v in values if v is not None for t in (v if isinstance(v, list) else [v])]

    return all(torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_content_lies_where_the_box_says(coded_set: ImageSet, variant: str) -> None:
    spec = ViewSpec(crops=(Crop(size=32, scale=(0.2, 1), **PLAIN), Crop(size=24, scale=(0.2, 0.5), **PLAIN)), **RAW)
    flipped = set()
    with loading(coded_set, spec, 12, variant) as loader:
        for _ in range(2):
            for batch in loader:
                for v, view in enumerate(batch.views):
                    size = view.shape[-1]
                    for i in range(len(batch)):
                        with Image.open(coded_set.root / coded_set.paths[batch.index[i]]) as image:
                            width, height = image.size
                        y0, x0, h, w, flip = batch.boxes[i, v].tolist()
                        flipped.add(flip)
                        step = (torch.arange(size) + 0.5) / size
                        rows = (y0 + step * h) * height - 0.5
                        columns = (x0 + (1 - step if flip else step) * w) * width - 0.5
                        inner = slice(2, -2)  # the filter is cut off at the border of the window
                        assert (view[i, 0, inner, inner] - columns[None, inner]).abs().max() < 1.5
                        assert (view[i, 1, inner, inner] - rows[inner, None]).abs().max() < 1.5
                        assert (view[i, 2] - 77).abs().max() < 0.6
    assert flipped == {0.0, 1.0}


@pytest.mark.parametrize("variant", VARIANTS)
def test_id_maps_follow_their_view(coded_set: ImageSet, tmp_path: Path, variant: str) -> None:
    spec = ViewSpec(crops=(Crop(size=33), Crop(size=20)), masks=True, whole=40, whole_masks=True, **RAW)
    seen = set()
    with loading(coded_set, spec, 5, variant, maps=tmp_path / "maps") as loader:
        for batch in loader:
            maps = [torch.from_numpy(read_map(tmp_path / "maps", coded_set.paths[i])).long() for i in batch.index]
            maps = torch.stack([m.masked_fill(m == 255, -1) for m in maps])
            for v, labels in enumerate(batch.labels):
                assert labels.dtype == torch.int64
                truth = warp_labels(maps, batch.boxes[:, v], labels.shape[-1])
                assert (labels != truth).float().mean() < 0.002  # rounding of a cell centre that lies on an edge
                seen |= set(labels.unique().tolist())
            assert batch.whole_labels is not None
            full = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]]).expand(len(batch), -1)
            assert torch.equal(batch.whole_labels, warp_labels(maps, full, 40))
    assert seen == set(range(-1, 20)) - {0}  # nothing between the ids was made up


MOVING = {"scale": None, "holes": (1, 6), "hole_size": (0.1, 0.3), "swap": 0.3, "grid": 4, "paste": (0.5, 0.9)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_id_maps_move_with_the_pixels(coded_set: ImageSet, tmp_path: Path, variant: str) -> None:
    """The image says where each pixel was: there lies its id; holes and the white around are absent."""
    spec = ViewSpec(crops=(Crop(size=32, **PLAIN), Crop(size=40, **MOVING, **PLAIN)), masks=True, whole=8, **RAW)
    with loading(coded_set, spec, 8, variant, maps=tmp_path / "maps") as loader:
        batches = list(loader)
    for batch in batches:
        assert batch.boxes[:, 0].isfinite().all()
        assert batch.boxes[:, 1].isnan().all()
        view, labels = batch.views[1], batch.labels[1]
        for i, record in enumerate(batch.index):
            with Image.open(coded_set.root / coded_set.paths[record]) as image:
                width, height = image.size
            column, row, blue = view[i]
            shown = (blue - 77).abs() < 1
            hole, white = view[i].amax(0) < 1, view[i].amin(0) > 254
            assert torch.equal(shown, ~(hole | white))  # holes and white cover all else, padding included
            assert (labels[i][~shown] == -1).all()
            ids = torch.from_numpy(read_map(tmp_path / "maps", coded_set.paths[record])).long()
            y, x = (row / height * 40 + 0.3).clamp(0, 39.9), (column / width * 50 + 0.3).clamp(0, 49.9)
            truth = ids[y.long(), x.long()]
            truth = truth.masked_fill(truth == 255, -1)
            assert (truth[shown] == labels[i][shown]).float().mean() > 0.85  # but for cells beside an edge of an id
    shown = torch.cat([batch.labels[1] for batch in batches])
    assert set(shown.unique().tolist()) == set(range(-1, 20)) - {0}
    assert not torch.cat([batch.valid for batch in batches]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_view_is_squashed_or_a_centred_square(coded_set: ImageSet, variant: str) -> None:
    for center in (None, 0.5):
        with loading(coded_set, ViewSpec(whole=16, center=center, **RAW), 12, variant, shuffle=False) as loader:
            (batch,) = loader
        assert batch.views == []
        assert batch.boxes.shape == (12, 0, 5)
        whole = batch.whole
        assert whole is not None
        assert whole.is_contiguous(memory_format=torch.channels_last)
        height, width = 120, 250  # record 1
        assert abs(whole[1, 0].mean() - (width - 1) / 2) < 1
        span = 0.5 * height if center else width
        rise = whole[1, 0, :, -1].mean() - whole[1, 0, :, 0].mean()
        assert abs(rise - span * 15 / 16) < 4  # filters end at the border


def test_values_are_normalised_and_views_lie_in_channels_last(smooth_set: ImageSet) -> None:
    spec = ViewSpec(crops=(Crop(size=16, scale=(1, 1), ratio=(1.2, 1.25), flip=0, **PLAIN),), whole=16)
    raw = ViewSpec(crops=spec.crops, whole=16, **RAW)
    with loading(smooth_set, spec, 50, shuffle=False) as one, loading(smooth_set, raw, 50, shuffle=False) as two:
        (a,), (b,) = one, two
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    assert torch.allclose(a.views[0], (b.views[0] / 255 - mean) / std, atol=1e-4)
    assert a.views[0].is_contiguous(memory_format=torch.channels_last)
    assert a.views[0].dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_record_comes_once_an_epoch_and_padding_is_marked(smooth_set: ImageSet, variant: str) -> None:
    orders = []
    with loading(smooth_set, ViewSpec(crops=(Crop(size=8),)), 16, variant) as loader:
        for _ in range(2):
            batches = list(loader)
            assert len(batches) == len(loader) == 4
            index, valid = torch.cat([b.index for b in batches]), torch.cat([b.valid for b in batches])
            assert all(len(b) == 16 for b in batches)
            assert sorted(index[valid].tolist()) == list(range(50))
            assert valid.sum() == 50
            assert not valid[50:].any()
            targets = torch.cat([b.target for b in batches])
            assert np.array_equal(targets.numpy(), smooth_set.targets[index.numpy()])
            orders.append(index[valid].tolist())
    assert orders[0] != orders[1]


@pytest.mark.parametrize("drop_last", [False, True])
def test_shards_partition_each_epoch(smooth_set: ImageSet, drop_last: bool) -> None:
    spec = ViewSpec(crops=(Crop(size=8),))
    for epoch in range(2):
        seen: list[int] = []
        for rank in range(3):
            with loading(smooth_set, spec, 4, rank=rank, world=3, drop_last=drop_last) as loader:
                loader.epoch = epoch
                batches = list(loader)
            assert len(batches) == len(loader) == (4 if drop_last else 5)
            seen += [int(i) for b in batches for i, ok in zip(b.index, b.valid, strict=True) if ok]
        assert len(seen) == len(set(seen)) == (48 if drop_last else 50)


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_in_an_epoch_is_bit_exact(coded_set: ImageSet, tmp_path: Path, variant: str) -> None:
    moving = Crop(size=16, gamma=(0.5, 2.5), **MOVING)
    spec = ViewSpec(
        crops=(Crop(size=16, blur=0.5, solarize=0.5, grayscale=0.2), Crop(size=9), moving), masks=True, whole=12
    )
    maps = {"maps": tmp_path / "maps"}
    with loading(coded_set, spec, 4, variant, **maps) as loader:
        run = [batch for _ in range(3) for batch in loader]
    with loading(coded_set, spec, 4, variant, **maps) as loader:
        first = list(loader)
        for step, batch in enumerate(loader):
            first.append(batch)
            if step == 0:
                state = loader.state_dict()
                break
    assert (state["epoch"], state["batch"]) == (1, 1)
    with loading(coded_set, spec, 4, variant, **maps) as loader:
        loader.load_state_dict(state)
        rest = [*loader, *loader]
        assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (3, 0)
    assert len(run) == len(first) + len(rest) == 9
    assert all(same(a, b) for a, b in zip(run, first + rest, strict=True))


def test_a_state_after_the_last_batch_belongs_to_the_next_epoch(smooth_set: ImageSet) -> None:
    with loading(smooth_set, ViewSpec(crops=(Crop(size=8),)), 25) as loader:
        states = [loader.state_dict() for _ in loader]
    assert [(s["epoch"], s["batch"]) for s in states] == [(0, 1), (1, 0)]


def test_an_epoch_that_was_given_up_starts_again(smooth_set: ImageSet) -> None:
    with loading(smooth_set, ViewSpec(crops=(Crop(size=8),)), 10) as loader:
        peek = next(iter(loader))
        assert same(peek, next(iter(loader)))
        assert len(list(loader)) == 5


def test_a_state_of_other_data_is_refused(smooth_set: ImageSet) -> None:
    with loading(smooth_set, ViewSpec(crops=(Crop(size=8),)), 10) as loader:
        state = loader.state_dict()
    with (
        loading(smooth_set.subset(range(40)), ViewSpec(crops=(Crop(size=8),)), 10) as loader,
        pytest.raises(UserError, match="resume with the same data"),
    ):
        loader.load_state_dict(state)


def test_batches_stay_valid_while_later_ones_are_made(smooth_set: ImageSet) -> None:
    with loading(smooth_set, ViewSpec(crops=(Crop(size=8),)), 10) as loader:
        batches = list(loader)
        copies = [batch.views[0].clone() for batch in batches]
        list(loader)
        assert all(torch.equal(batch.views[0], copy) for batch, copy in zip(batches, copies, strict=True))


def test_dali_and_torchvision_cut_the_same_views(smooth_set: ImageSet) -> None:
    pytest.importorskip("torchvision")
    exact = Crop(size=32, scale=(0.1, 1), jitter=(0.4, 0.4, 0.2, 0.0), blur=0.5, solarize=0.0, grayscale=0.2)
    spec = ViewSpec(crops=(exact,), whole=24, **RAW)
    batches = {}
    for variant in VARIANTS:
        with loading(smooth_set, spec, 50, variant) as loader:
            (batches[variant],) = loader
    for variant in ("dali_files", "torchvision"):
        a, b = batches["dali_kept"], batches[variant]
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.boxes, b.boxes)
        assert a.whole is not None
        assert b.whole is not None
        assert (a.whole - b.whole).abs().mean() < 1.5
        assert (a.views[0] - b.views[0]).abs().mean() < 2.5


@pytest.mark.parametrize("change", [{"gamma": (0.5, 2.5)}, {"holes": (5, 20)}, {"grid": 7, "reach": 1}, {"swap": 0.4}])
def test_dali_and_torchvision_move_the_same_pixels(smooth_set: ImageSet, change: dict) -> None:
    pytest.importorskip("torchvision")
    spec = ViewSpec(crops=(Crop(size=32, scale=None, **change, **PLAIN), Crop(size=32, **PLAIN)), **RAW)
    batches = []
    for variant in ("dali_kept", "torchvision"):
        with loading(smooth_set, spec, 25, variant) as loader:
            batches.append(next(iter(loader)))
    for a, b in zip(batches[0].views, batches[1].views, strict=True):
        assert (a - b).abs().mean() < 1.5


def test_dali_and_torchvision_agree_in_statistics(smooth_set: ImageSet) -> None:
    pytest.importorskip("torchvision")
    spec = ViewSpec(crops=(Crop(size=24, blur=0.3, solarize=0.2, grayscale=0.2),))
    stats = []
    for variant in ("dali_kept", "torchvision"):
        with loading(smooth_set, spec, 50, variant) as loader:
            views = torch.cat([batch.views[0] for _ in range(4) for batch in loader])
        stats.append(torch.cat([views.mean((0, 2, 3)), views.std((0, 2, 3))]))
    assert torch.allclose(stats[0], stats[1], atol=0.08)


@pytest.mark.parametrize("variant", ["dali_files", "torchvision"])
def test_a_file_that_breaks_later_becomes_padding(smooth_set: ImageSet, variant: str) -> None:
    spec = ViewSpec(crops=(Crop(size=8),))
    with loading(smooth_set, spec, 10, variant) as loader:
        list(loader)
        path = smooth_set.root / smooth_set.paths[13]
        path.write_bytes(path.read_bytes()[:300])
        os.unlink(smooth_set.root / smooth_set.paths[31])
        list(loader)  # may still hold batches made before
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


def test_a_pipeline_that_fails_is_built_again_without_the_file(
    smooth_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ViewSpec(crops=(Crop(size=8),))
    with loading(smooth_set, spec, 10, "dali_files") as loader:
        expected = list(loader)
    with loading(smooth_set, spec, 10, "dali_files") as loader:
        outputs, calls = loader._outputs, []

        def failing() -> object:
            calls.append(0)
            if len(calls) == 3:  # as if DALI had met a file that broke after the last look at it
                (smooth_set.root / smooth_set.paths[int(expected[2].index[4])]).write_bytes(b"")
                raise RuntimeError("Critical error in pipeline")
            return outputs()

        monkeypatch.setattr(loader, "_outputs", failing)
        got = list(loader)
        assert [rel for rel, _ in loader.skipped] == [smooth_set.paths[expected[2].index[4]]]
    assert len(got) == 5
    assert all(same(a, b) for i, (a, b) in enumerate(zip(expected, got, strict=True)) if i != 2)
    assert got[2].valid.tolist() == [i != 4 for i in range(10)]


def test_a_failure_without_a_broken_file_is_not_hidden(smooth_set: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    with loading(smooth_set, ViewSpec(crops=(Crop(size=8),)), 10, "dali_files") as loader:
        monkeypatch.setattr(loader, "_outputs", lambda: exec('raise RuntimeError("no memory")'))
        for _ in range(2):  # a second try fails as the first did instead of waiting for ever
            with pytest.raises(RuntimeError, match="every file decodes alone"):
                list(loader)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dali_kept", "dali_files"])
def test_a_program_may_end_without_closing_the_loader(smooth_set: ImageSet, variant: str) -> None:
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


def test_passes_in_file_order_repeat(smooth_set: ImageSet) -> None:
    with loading(smooth_set, ViewSpec(whole=8), 50, shuffle=False) as loader:
        (first,), (second,) = loader, loader
    assert same(first, second)
    assert first.index.tolist() == list(range(50))


def test_one_broken_image_of_many_is_skipped(smooth_set: ImageSet) -> None:
    (smooth_set.root / smooth_set.paths[5]).write_bytes(b"")
    with loading(smooth_set, ViewSpec(whole=8), 16, shuffle=False) as loader:
        index = torch.cat([b.index[b.valid] for b in loader])
        assert [rel for rel, _ in loader.skipped] == [smooth_set.paths[5]]
    assert index.tolist() == [i for i in range(50) if i != 5]


def test_a_map_folder_without_a_map_is_named(coded_set: ImageSet, tmp_path: Path) -> None:
    map_path(tmp_path / "maps", coded_set.paths[3]).unlink()
    with pytest.raises(UserError, match=f"no map for {coded_set.paths[3]}.*fgfast discover"):
        make_loader(coded_set, ViewSpec(crops=(Crop(),), masks=True), 4, maps=tmp_path / "maps")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_map_that_does_not_decode_is_named(coded_set: ImageSet, tmp_path: Path, variant: str) -> None:
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
def test_arguments_that_cannot_be_are_refused(smooth_set: ImageSet, kwargs: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make_loader(smooth_set, ViewSpec(crops=(Crop(),)), **{"batch_size": 8, **kwargs})


def test_masks_without_a_map_folder_are_refused(smooth_set: ImageSet) -> None:
    with pytest.raises(ValueError, match="give make_loader the folder"):
        make_loader(smooth_set, ViewSpec(crops=(Crop(),), masks=True), 8)


def test_photographs_arrive(photographs: ImageSet) -> None:
    some = photographs.subset(range(0, 2889, 40))
    with loading(some, ViewSpec(crops=(Crop(size=32), Crop(size=32))), 32) as loader:
        views = torch.cat([view for batch in loader for view in batch.views])
    assert loader.skipped == []
    assert views.isfinite().all()
    assert 0.5 < views.std() < 1.6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("variant", ["dali_kept", "dali_files"])
def test_the_gpu_makes_the_same_batches(coded_set: ImageSet, tmp_path: Path, variant: str) -> None:
    crops = (Crop(size=32, blur=0.5), Crop(size=20), Crop(size=32, gamma=(0.5, 2), grid=4, holes=(5, 20), **PLAIN))
    spec = ViewSpec(crops=crops, masks=True, whole=16, whole_masks=True, **RAW)
    made = []
    for device in ("cpu", "cuda"):
        with loading(coded_set, spec, 12, variant, maps=tmp_path / "maps", device=device) as loader:
            (batch,) = loader
            assert batch.views[0].device.type == batch.index.device.type == device
            made.append(batch.to("cpu", non_blocking=False))
    a, b = made
    assert torch.equal(a.boxes.nan_to_num(-1), b.boxes.nan_to_num(-1))
    for x, y in zip(a.views, b.views, strict=True):
        assert (x - y).abs().mean() < 1.5
    for x, y in zip(a.labels, b.labels, strict=True):
        assert (x != y).float().mean() < 0.002
