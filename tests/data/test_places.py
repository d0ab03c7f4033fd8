"""The places of a step: any number of ranks gets the same images and random numbers, and every image once an epoch."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgfast.data.base import Loader
from fgfast.data.imageset import ImageSet
from fgfast.data.manifest import Records, Verdict
from fgfast.data.plan import BatchPlan
from fgfast.data.sampling import Draw, draw_crop, generator
from fgfast.data.transforms import BlockShuffle, Gamma, Holes, PasteOnWhite, PatchSwap, TrimBorder
from fgfast.data.views import Crop, Patch, ViewSpec
from fgfast.errors import UserError

EVERYTHING = (
    TrimBorder(0.1), Gamma((0.5, 2)), PatchSwap(0.3), BlockShuffle(3, reach=1), Holes((0, 5), (0.1, 0.4)),
    PasteOnWhite((0.4, 0.9)),
)  # fmt: skip
CROPS = (
    Crop(size=16, blur=0.5, grayscale=0.3), Crop(size=24, scale=None, jitter=(2, 2, 0, 0.1), transforms=EVERYTHING),
)  # fmt: skip
SPEC = ViewSpec(crops=CROPS, patch=Patch(8, 2))


def plan_of(n: int, batch_size: int, rank: int = 0, world: int = 1, sizes: np.ndarray | None = None) -> BatchPlan:
    """The plan of a rank for images that are not there."""
    if sizes is None:
        sizes = np.random.default_rng(n).integers(8, 300, (n, 2)).astype(np.int32)
    paths = tuple(f"{i}.jpg" for i in range(n))
    images = ImageSet(Path("/none"), paths, np.zeros(n, np.int64), ("a",), np.ones(n, bool))
    ones = np.ones(n, np.int8)
    records = Records(images, np.arange(n), paths, (None,) * n, sizes, sizes[:, 0], ones, ())
    return BatchPlan(records, SPEC, batch_size, True, False, 3, None, None, rank, world)


class RowLoader(Loader):
    """Delivers the valid rows of its plan; the images of ``broken`` cannot be read."""

    def __init__(self, plan: BatchPlan, broken: frozenset[int] = frozenset()) -> None:
        super().__init__(plan)
        self.broken = broken

    def _batches(self, epoch, start):
        for batch in range(start, len(self)):
            rows, valid = self.plan.fill(epoch, batch, self._failed, self._read)
            yield rows[valid].tolist()

    def _read(self, rows: np.ndarray) -> None:
        for row in self.broken & set(rows.tolist()) - self._failed.keys():
            self._exclude(row, "broken", passing=False)

    def _verdict(self, row: int) -> Verdict:
        return Verdict(0, 0, full=True, reason="broken" if row in self.broken else "")

    def close(self) -> None:
        pass


def loaders_of(n: int, step: int, world: int, broken: frozenset[int] = frozenset()) -> list[RowLoader]:
    return [RowLoader(plan_of(n, step // world, rank, world), broken) for rank in range(world)]


STEP = 840  # a number of images that 1 to 8 ranks divide


@settings(max_examples=30, deadline=None)
@given(data=st.data(), n=st.integers(1, 2000), small=st.booleans())
def test_every_image_is_seen_once_an_epoch_on_any_number_of_ranks(data: st.DataObject, n: int, small: bool) -> None:
    """Also after a stop anywhere and a restart on another number of ranks, with images that break; none is lost."""
    step = data.draw(st.sampled_from([24, 48])) if small else STEP
    worlds = [world for world in range(1, 9) if step % world == 0]
    broken = frozenset(data.draw(st.sets(st.integers(0, n - 1), max_size=n - 1)))
    first, second = (loaders_of(n, step, data.draw(st.sampled_from(worlds)), broken) for _ in range(2))
    stop = data.draw(st.integers(0, 2 * len(first[0])))
    running, done = first, 0
    for _ in range(2):
        seen: list[int] = []
        streams = [iter(loader) for loader in running]
        for _ in range(len(first[0])):
            if done == stop:
                state = first[-1].state_dict() | {"failed": sorted({row for each in first for row in each.failed})}
                for loader in second:
                    loader.load_state_dict(state)
                running, streams = second, [iter(loader) for loader in second]
            for stream in streams:
                seen += next(stream)
            done += 1
        assert all(next(stream, None) is None for stream in streams)
        assert sorted(seen) == sorted(set(range(n)) - broken)


def joined(parts: list[Draw]) -> dict[str, np.ndarray]:
    """The draws of all ranks in the order of the places."""
    names = [name for name, value in vars(parts[0]).items() if value is not None]
    stacked = {name: np.stack([getattr(part, name) for part in parts], 1) for name in names}
    return {name: value.reshape(-1, *value.shape[2:]) for name, value in stacked.items()}


@pytest.mark.parametrize(("batch_size", "world"), [(12, 1), (6, 2), (4, 3), (3, 4)])
def test_draws_agree_on_any_number_of_ranks(batch_size: int, world: int) -> None:
    """And with one rank they are those of a plain generator, as version 0.1 drew them."""
    plans = [plan_of(50, batch_size, rank, world) for rank in range(world)]
    whole = plan_of(50, 12)
    for epoch, batch in ((0, 0), (2, 3), (2, 4)):
        rows = [plan.batch_rows(epoch, batch)[0] for plan in plans]
        place_rows = whole.batch_rows(epoch, batch)[0]
        assert np.array_equal(np.stack(rows, 1).ravel(), place_rows)
        sizes, rng = whole.records.sizes[place_rows], generator(3, epoch, 0, batch)
        for c, crop in enumerate(CROPS):
            expected = joined([draw_crop(crop, sizes, rng)])
            got = joined([plan.draw_crops(epoch, batch, own)[c] for plan, own in zip(plans, rows, strict=True)])
            assert expected.keys() == got.keys()
            for name, value in expected.items():
                assert np.array_equal(value, got[name])
        corners = np.stack([plan.draw_corners(epoch, batch, own) for plan, own in zip(plans, rows, strict=True)], 1)
        assert np.array_equal(corners.reshape(12, 2), whole.draw_corners(epoch, batch, place_rows))


def test_corners_are_those_of_version_0_1() -> None:
    """That version drew them with ``Generator.integers``, for images larger than the patch."""
    plan = plan_of(200, 200, sizes=np.random.default_rng(1).integers(9, 3000, (200, 2)).astype(np.int32))
    rows = np.arange(200)
    before = np.random.default_rng([3, 1, 0, 0, 1]).integers(0, plan.records.sizes - 8, endpoint=True)
    assert np.array_equal(plan.draw_corners(1, 0, rows), before)


SIZES = st.lists(st.tuples(st.integers(8, 4000), st.integers(8, 4000)), min_size=6, max_size=6)


@given(first=SIZES, second=SIZES, place=st.integers(0, 5))
def test_no_draw_depends_on_the_sizes_of_other_images(
    first: list[tuple[int, int]], second: list[tuple[int, int]], place: int
) -> None:
    second[place] = first[place]
    one, two = (plan_of(6, 6, sizes=np.array(sizes, np.int32)) for sizes in (first, second))
    rows = np.arange(6)
    for a, b in zip(one.draw_crops(0, 0, rows), two.draw_crops(0, 0, rows), strict=True):
        for name, value in vars(a).items():
            assert value is None or np.array_equal(value[place], getattr(b, name)[place])
    assert np.array_equal(one.draw_corners(0, 0, rows)[place], two.draw_corners(0, 0, rows)[place])


def state_of(n: int = 100, **changes: object) -> dict:
    (loader,) = loaders_of(n, 32, 1)
    return loader.state_dict() | changes


def test_another_number_of_images_a_step_is_refused_with_both_numbers() -> None:
    loader = RowLoader(plan_of(100, 16, 0, 3))
    with pytest.raises(UserError, match=r"taken with 32 images a step, this run has 48 \(16 on each of 3 ranks\)"):
        loader.load_state_dict(state_of())


def test_other_images_and_another_seed_are_refused() -> None:
    loader = RowLoader(plan_of(99, 32))
    with pytest.raises(UserError, match=r"with 100 images, this run has 99.*resume with the same data"):
        loader.load_state_dict(state_of())
    fingerprint = state_of(99)["fingerprint"]
    for key, wrong in (("digest", "0"), ("seed", 4)):
        with pytest.raises(UserError, match="the same"):
            loader.load_state_dict(state_of(fingerprint={**fingerprint, key: wrong}))


@pytest.mark.parametrize(("batch_size", "world"), [(16, 2), (8, 4), (32, 1)])
def test_a_state_of_version_0_1_is_read(batch_size: int, world: int) -> None:
    loader = RowLoader(plan_of(100, batch_size, world - 1, world), frozenset({7}))
    loader.load_state_dict({"epoch": 4, "batch": 2, "failed": [7, 8], "fingerprint": [100, 16, 3, 0, 2]})
    assert loader.state_dict() == state_of(epoch=4, batch=2, failed=[7])
    assert loader.recovered == ["8.jpg"]
    with pytest.raises(UserError, match="with 64 images a step"):
        loader.load_state_dict({"epoch": 4, "batch": 2, "failed": [], "fingerprint": [100, 32, 3, 0, 2]})
