"""Loaders: views, boxes and id maps agree; an epoch has each image once; resuming is exact; backends agree."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fgfast.data.layouts import ImageSet
from fgfast.data.maps import read_map
from fgfast.data.transforms import BlockShuffle, Gamma, Holes, PasteOnWhite, PatchSwap, Transform
from fgfast.data.views import Crop, ViewSpec, warp_labels
from fgfast.errors import UserError
from tests.data.loading import RAW, VARIANTS, loading, same

PLAIN = {"jitter_p": 0.0}


@pytest.mark.parametrize("variant", VARIANTS)
def test_boxes_describe_the_content_of_views(coded_set: ImageSet, variant: str) -> None:
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
                        inner = slice(2, -2)  # the filter is truncated at the border of the window
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
                assert (labels != truth).float().mean() < 0.002  # rounding where a cell centre is on an edge
                seen |= set(labels.unique().tolist())
            assert batch.whole_labels is not None
            full = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]]).expand(len(batch), -1)
            assert torch.equal(batch.whole_labels, warp_labels(maps, full, 40))
    assert seen == set(range(-1, 20)) - {0}  # no interpolated ids


MOVES = (Holes((1, 6), (0.1, 0.3)), PatchSwap(0.3), BlockShuffle(4), PasteOnWhite((0.5, 0.9)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_id_maps_move_with_the_pixels(coded_set: ImageSet, tmp_path: Path, variant: str) -> None:
    """Colours encode the original position of each pixel, and its id is the one there; -1 in holes and white."""
    moving = Crop(size=40, scale=None, transforms=MOVES, **PLAIN)
    spec = ViewSpec(crops=(Crop(size=32, **PLAIN), moving), masks=True, whole=8, **RAW)
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
            assert torch.equal(shown, ~(hole | white))  # everything else is a hole or white, also in padding
            assert (labels[i][~shown] == -1).all()
            ids = torch.from_numpy(read_map(tmp_path / "maps", coded_set.paths[record])).long()
            y, x = (row / height * 40 + 0.3).clamp(0, 39.9), (column / width * 50 + 0.3).clamp(0, 49.9)
            truth = ids[y.long(), x.long()]
            truth = truth.masked_fill(truth == 255, -1)
            assert (truth[shown] == labels[i][shown]).float().mean() > 0.85  # except beside the border of a part
    shown = torch.cat([batch.labels[1] for batch in batches])
    assert set(shown.unique().tolist()) == set(range(-1, 20)) - {0}
    assert not torch.cat([batch.valid for batch in batches]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_unaugmented_view_is_the_full_image_or_a_centred_square(coded_set: ImageSet, variant: str) -> None:
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
        assert abs(rise - span * 15 / 16) < 4  # filters are truncated at the border


def test_values_are_normalised_and_views_are_channels_last(smooth_set: ImageSet) -> None:
    spec = ViewSpec(crops=(Crop(size=16, scale=(1, 1), ratio=(1.2, 1.25), flip=0, **PLAIN),), whole=16)
    raw = ViewSpec(crops=spec.crops, whole=16, **RAW)
    with loading(smooth_set, spec, 50, shuffle=False) as one, loading(smooth_set, raw, 50, shuffle=False) as two:
        (a,), (b,) = one, two
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    assert torch.allclose(a.views[0], (b.views[0] / 255 - mean) / std, atol=1e-4)
    assert a.views[0].is_contiguous(memory_format=torch.channels_last)
    assert a.views[0].dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_epoch_has_every_image_once_and_padding_is_marked(smooth_set: ImageSet, variant: str) -> None:
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
def test_resuming_within_an_epoch_is_bit_exact(coded_set: ImageSet, tmp_path: Path, variant: str) -> None:
    moving = Crop(size=16, scale=None, transforms=(Gamma((0.5, 2.5)), *MOVES))
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


def test_another_number_of_ranks_continues_with_the_same_images_and_views(smooth_set: ImageSet) -> None:
    spec = ViewSpec(crops=(Crop(size=16, blur=0.5), Crop(size=9, transforms=(Gamma((0.5, 2.5)), *MOVES))))
    with loading(smooth_set, spec, 12) as loader:
        alone = [*loader, *loader]
    with loading(smooth_set, spec, 6, rank=1, world=2) as loader:
        next(batches := iter(loader))
        next(batches)
        state = loader.state_dict()
    for world in (2, 3):
        ranks = []
        for rank in range(world):
            with loading(smooth_set, spec, 12 // world, rank=rank, world=world) as loader:
                loader.load_state_dict(state)
                ranks.append([*loader, *loader])
        for number, expected in enumerate(alone[2:]):
            parts = [batches[number] for batches in ranks]
            for name in ("index", "valid"):
                assert torch.equal(torch.stack([getattr(p, name) for p in parts], 1).ravel(), getattr(expected, name))
            for v, view in enumerate(expected.views):
                assert torch.equal(torch.stack([part.views[v] for part in parts], 1).flatten(0, 1), view)


def test_the_state_after_the_last_batch_is_of_the_next_epoch(smooth_set: ImageSet) -> None:
    with loading(smooth_set, ViewSpec(crops=(Crop(size=8),)), 25) as loader:
        states = [loader.state_dict() for _ in loader]
    assert [(s["epoch"], s["batch"]) for s in states] == [(0, 1), (1, 0)]


def test_an_abandoned_epoch_starts_over(smooth_set: ImageSet) -> None:
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


def test_batches_stay_valid_while_later_ones_are_loaded(smooth_set: ImageSet) -> None:
    with loading(smooth_set, ViewSpec(crops=(Crop(size=8),)), 10) as loader:
        batches = list(loader)
        copies = [batch.views[0].clone() for batch in batches]
        list(loader)
        assert all(torch.equal(batch.views[0], copy) for batch, copy in zip(batches, copies, strict=True))


def test_dali_and_torchvision_crop_the_same_views(smooth_set: ImageSet) -> None:
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


@pytest.mark.parametrize("transform", [Gamma((0.5, 2.5)), Holes((5, 20)), BlockShuffle(7, reach=1), PatchSwap(0.4)])
def test_dali_and_torchvision_transform_the_same_pixels(smooth_set: ImageSet, transform: Transform) -> None:
    pytest.importorskip("torchvision")
    changed = Crop(size=32, scale=None, transforms=(transform,), **PLAIN)
    spec = ViewSpec(crops=(changed, Crop(size=32, **PLAIN)), **RAW)
    batches = []
    for variant in ("dali_kept", "torchvision"):
        with loading(smooth_set, spec, 25, variant) as loader:
            batches.append(next(iter(loader)))
    for a, b in zip(batches[0].views, batches[1].views, strict=True):
        assert (a - b).abs().mean() < 1.5


def test_dali_and_torchvision_have_the_same_statistics(smooth_set: ImageSet) -> None:
    pytest.importorskip("torchvision")
    spec = ViewSpec(crops=(Crop(size=24, blur=0.3, solarize=0.2, grayscale=0.2),))
    stats = []
    for variant in ("dali_kept", "torchvision"):
        with loading(smooth_set, spec, 50, variant) as loader:
            views = torch.cat([batch.views[0] for _ in range(4) for batch in loader])
        stats.append(torch.cat([views.mean((0, 2, 3)), views.std((0, 2, 3))]))
    assert torch.allclose(stats[0], stats[1], atol=0.08)


def test_passes_in_file_order_are_equal(smooth_set: ImageSet) -> None:
    with loading(smooth_set, ViewSpec(whole=8), 50, shuffle=False) as loader:
        (first,), (second,) = loader, loader
    assert same(first, second)
    assert first.index.tolist() == list(range(50))


def test_photographs_are_loaded(photographs: ImageSet) -> None:
    some = photographs.subset(range(0, 2889, 40))
    with loading(some, ViewSpec(crops=(Crop(size=32), Crop(size=32))), 32) as loader:
        views = torch.cat([view for batch in loader for view in batch.views])
    assert loader.skipped == []
    assert views.isfinite().all()
    assert 0.5 < views.std() < 1.6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("variant", ["dali_kept", "dali_files"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_gpu_gives_the_same_batches(coded_set: ImageSet, tmp_path: Path, variant: str, interpolation: str) -> None:
    changed = Crop(size=32, transforms=(Gamma((0.5, 2)), BlockShuffle(4), Holes((5, 20))), **PLAIN)
    spec = ViewSpec(
        crops=(Crop(size=32, blur=0.5), Crop(size=20), changed),
        masks=True,
        whole=16,
        whole_masks=True,
        **RAW,
        interpolation=interpolation,
    )
    batches = []
    for device in ("cpu", "cuda"):
        with loading(coded_set, spec, 12, variant, maps=tmp_path / "maps", device=device) as loader:
            (batch,) = loader
            assert batch.views[0].device.type == batch.index.device.type == device
            batches.append(batch.to("cpu", non_blocking=False))
    a, b = batches
    assert torch.equal(a.boxes.nan_to_num(-1), b.boxes.nan_to_num(-1))
    for x, y in zip(a.views, b.views, strict=True):
        assert (x - y).abs().mean() < 1.5
    for x, y in zip(a.labels, b.labels, strict=True):
        assert (x != y).float().mean() < 0.002
