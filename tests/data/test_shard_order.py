"""Epochs over shards: every image once, on any number of ranks and workers, and from any place on."""

import pickle
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fgfast.data.order import LANES, ShardOrder
from fgfast.data.plan import BatchPlan

from .test_places import RowLoader, plan_of

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=40)  # images of each shard


def sharded(sizes: list[int], batch_size: int, rank: int = 0, world: int = 1) -> BatchPlan:
    """The plan of a rank for shards of these sizes."""
    plan = plan_of(sum(sizes), batch_size, rank, world)
    return replace(plan, shards=ShardOrder(np.repeat(np.arange(len(sizes)), sizes)))


@given(SIZES, st.integers(1, 40), st.integers(0, 99), st.integers(0, 9))
def test_an_epoch_has_every_image_once(sizes: list[int], lanes: int, seed: int, epoch: int) -> None:
    order = ShardOrder(np.repeat(np.arange(len(sizes)), sizes), lanes).of_epoch(seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(sum(sizes)))


@given(SIZES, st.integers(1, 8), st.integers(1, 5), st.integers(0, 3))
def test_ranks_share_an_epoch_without_loss_or_repetition(
    sizes: list[int], world: int, batch_size: int, epoch: int
) -> None:
    plans = [sharded(sizes, batch_size, rank, world) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1
    seen = []
    for plan in plans:
        for batch in range(len(plan)):
            rows, valid = plan.batch_rows(epoch, batch)
            seen += rows[valid].tolist()
    assert sorted(seen) == list(range(sum(sizes)))


@settings(max_examples=30)
@given(SIZES, st.integers(1, 8), st.integers(0, 4), st.integers(1, 5), st.integers(0, 2), st.data())
def test_worker_processes_share_the_batches_of_a_rank(
    sizes: list[int], world: int, workers: int, batch_size: int, epoch: int, data: st.DataObject
) -> None:
    """Each has a copy of the plan and makes every n-th batch, from a place on at which a run is resumed."""
    seen, stop = [], data.draw(st.integers(0, 3))
    for rank in range(world):
        plan = sharded(sizes, batch_size, rank, world)
        copies = [pickle.loads(pickle.dumps(plan)) for _ in range(max(1, workers))]
        for start, end in ((0, min(stop, len(plan))), (min(stop, len(plan)), len(plan))):
            for number, batch in enumerate(range(start, end)):
                rows, valid = copies[number % len(copies)].batch_rows(epoch, batch)
                seen += rows[valid].tolist()
    assert sorted(seen) == list(range(sum(sizes)))


@given(SIZES, st.sampled_from([1, 2, 3, 4, 6, 8]), st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(0, 2), st.data())
def test_a_run_resumes_anywhere_in_a_shard_on_any_number_of_ranks(
    sizes: list[int], before: int, after: int, epoch: int, data: st.DataObject
) -> None:
    """24 images a step on ``before`` ranks, then on ``after``: what is left of the epoch is what was not seen."""
    loaders = [RowLoader(sharded(sizes, 24 // before, rank, before)) for rank in range(before)]
    stop = data.draw(st.integers(0, len(loaders[0])))
    seen: list[int] = []
    state = {}
    for loader in loaders:
        loader.epoch = epoch
        for _, rows in zip(range(stop), loader, strict=False):
            seen += rows
        state = loader.state_dict()
    assert (state["epoch"], state["batch"]) == ((epoch, stop) if stop < len(loaders[0]) else (epoch + 1, 0))
    for rank in range(after):
        loader = RowLoader(sharded(sizes, 24 // after, rank, after))
        loader.load_state_dict(state)
        if stop < len(loader):
            for rows in loader:
                seen += rows
    assert sorted(seen) == list(range(sum(sizes)))


@given(st.lists(st.integers(1, 9), min_size=10, max_size=40), st.integers(0, 99))
def test_every_epoch_has_another_order_and_the_seed_repeats_it(sizes: list[int], seed: int) -> None:
    which = np.repeat(np.arange(len(sizes)), sizes)
    orders = [ShardOrder(which).of_epoch(seed, epoch).tolist() for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert ShardOrder(which).of_epoch(seed, 1).tolist() == orders[1]
    assert ShardOrder(which).of_epoch(seed + 50, 0).tolist() != orders[0]


@given(st.lists(st.integers(1, 9), min_size=30, max_size=60), st.sampled_from([1, 2, 3, 4, 6, 8]))
def test_ranks_read_shards_of_their_own(sizes: list[int], world: int) -> None:
    """Only a shard at the border of two lanes is read by two ranks."""
    which = np.repeat(np.arange(len(sizes)), sizes)
    order = ShardOrder(which).of_epoch(0, 0)
    read = sum(len(set(which[order[rank::world]])) for rank in range(world))
    assert read <= len(sizes) + LANES - 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_a_lane_reads_one_shard_after_another(sizes: list[int]) -> None:
    which = np.repeat(np.arange(len(sizes)), sizes)
    order = ShardOrder(which).of_epoch(0, 0)
    for lane in range(LANES):
        shards = which[order[lane::LANES]]
        changes = np.count_nonzero(np.diff(shards))
        assert changes <= max(0, len(set(shards.tolist())) - 1)


@settings(max_examples=20)
@given(SIZES, st.integers(1, 8), st.sets(st.integers(0, 400), max_size=3))
def test_lost_images_are_the_only_ones_that_an_epoch_lacks(sizes: list[int], world: int, lost: set[int]) -> None:
    n = sum(sizes)
    broken = frozenset(row % n for row in lost)
    if len(broken) == n:
        return
    seen = []
    for rank in range(world):
        seen += [row for rows in RowLoader(sharded(sizes, 3, rank, world), broken) for row in rows]
    assert sorted(seen) == sorted(set(range(n)) - broken)


@pytest.mark.slow
def test_ten_million_images_are_ordered_in_seconds() -> None:
    shards = ShardOrder(np.repeat(np.arange(10_000), 1000))
    start = time.process_time()
    shards.draw(0, 0)
    assert time.process_time() - start < 10
