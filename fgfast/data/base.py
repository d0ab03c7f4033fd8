"""What every loader is: an endless, resumable schedule of batches over the usable records of an image set."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fgfast.data.imageset import ImageSet
from fgfast.data.manifest import Records, check_images
from fgfast.data.maps import map_sizes
from fgfast.data.sampling import Draw, draw_crop, epoch_order, generator, whole_window
from fgfast.data.views import Batch, Patch, ViewSpec
from fgfast.errors import UserError

log = logging.getLogger("fgfast")


@dataclass(frozen=True)
class BatchPlan:
    """Where a loader's pixels come from and how they are dealt out; plain data, so that a worker process can have it.

    Args:
        records: the usable images.
        spec: the views.
        batch_size: B.
        shuffle: a new order each epoch.
        drop_last: leave an incomplete last batch out instead of padding it.
        seed: of order and augmentation.
        maps: folder of id maps, or None.
        map_sizes: (H, W) of each map, int32 [N, 2], or None.
        rank: number of this process.
        world: number of processes.
    """

    records: Records
    spec: ViewSpec
    batch_size: int
    shuffle: bool
    drop_last: bool
    seed: int
    maps: Path | None
    map_sizes: np.ndarray | None
    rank: int
    world: int

    def __len__(self) -> int:
        """Batches an epoch, the same on every rank."""
        each = self.batch_size * self.world
        return len(self.records) // each if self.drop_last else -(-len(self.records) // each)

    def rows(self, epoch: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers within ``records`` of one batch and their validity, int64 [B] and bool [B].

        Rank r takes every world-th place of the common order; what is missing at the end repeats the start as padding.
        """
        order = epoch_order(len(self.records), self.seed, epoch, self.shuffle)
        places = (np.arange(self.batch_size) + batch * self.batch_size) * self.world + self.rank
        return order[places % len(order)], places < len(order)

    def draws(self, epoch: int, batch: int, rows: np.ndarray) -> list[Draw]:
        """The crops of one batch, one ``Draw`` a view."""
        rng = generator(self.seed, epoch, self.rank, batch)
        return [draw_crop(crop, self.records.sizes[rows], rng) for crop in self.spec.crops]

    def corners(self, epoch: int, batch: int, rows: np.ndarray) -> np.ndarray:
        """Upper left corner (y, x) of the patch of each image of one batch, int64 [B, 2].

        Raises:
            UserError: an image is smaller than the patch.
        """
        assert self.spec.patch is not None
        check_patch(self.records, self.spec.patch, rows)
        rng = np.random.default_rng([self.seed, epoch, self.rank, batch, 1])  # apart from what the crops draw
        return rng.integers(0, self.records.sizes[rows] - self.spec.patch.size, endpoint=True)

    def whole(self, rows: np.ndarray) -> np.ndarray:
        """Window of the unaugmented view in pixels, float32 [B, 4]."""
        return whole_window(self.records.sizes[rows], self.spec.center)

    def rel(self, row: int) -> str:
        """The path of a record within its image set."""
        return self.records.images.paths[self.records.index[row]]


def check_patch(records: Records, patch: Patch, rows: np.ndarray | None = None) -> None:
    """Refuse images that are smaller than a patch.

    Raises:
        UserError: the first of them, its size and the remedy.
    """
    rows = np.arange(len(records)) if rows is None else rows
    small = rows[records.sizes[rows].min(1) < patch.size]
    if len(small):
        height, width = records.sizes[small[0]]
        largest = int(records.sizes[small].min()) // patch.reduce * patch.reduce
        raise UserError(
            f"{records.images.paths[records.index[small[0]]]} is {width} x {height} pixels, smaller than a patch of "
            f"{patch.size} x {patch.size} (as are {len(small)} of {len(rows)} images): give --size {largest} or "
            "less, or remove small images."
        )


def make_plan(
    images: ImageSet,
    spec: ViewSpec,
    batch_size: int,
    *,
    shuffle: bool,
    drop_last: bool,
    seed: int,
    maps: Path | None,
    rank: int,
    world: int,
    check: bool,
    threads: int | None,
) -> BatchPlan:
    """Check the files and the arguments of a loader.

    Raises:
        ValueError: sizes or ranks that cannot be.
        UserError: images or maps are missing or broken, or no batch is full under ``drop_last``.
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(
            f"batch_size {batch_size}, rank {rank}, world {world}: need batch_size >= 1, 0 <= rank < world."
        )
    if spec.needs_maps and maps is None:
        raise ValueError("The views ask for id maps: give make_loader the folder in maps.")
    records = check_images(images, full=check, threads=threads)
    if spec.patch is not None:
        check_patch(records, spec.patch)
    sizes = None
    if spec.needs_maps and maps is not None:
        sizes = map_sizes(maps, [images.paths[i] for i in records.index])
    plan = BatchPlan(
        records, spec, batch_size, shuffle, drop_last, seed, maps if spec.needs_maps else None, sizes, rank, world
    )
    if not len(plan):
        raise UserError(
            f"{len(records)} images do not fill one batch of {batch_size} on each of {world} processes: "
            "choose a smaller batch."
        )
    return plan


class Loader(ABC):
    """Deals out one epoch of ``Batch`` each time it is iterated.

    Epoch n is shuffled with seed + n, and every window and colour is drawn from (seed, n, rank, batch), so a run that
    is resumed with ``load_state_dict`` sees the very same values. A new iteration before the end of an epoch starts
    that epoch again; the end of an epoch moves on to the next.

    Attributes:
        backend: "dali" or "torchvision".
        epoch: number of the epoch that is running or comes next.
        skipped: (path, reason) of every image that is left out.
    """

    backend: str

    def __init__(self, plan: BatchPlan) -> None:
        """Start before the first batch of epoch 0."""
        self.plan = plan
        self.epoch = 0
        self.skipped: list[tuple[str, str]] = list(plan.records.skipped)
        self._position = 0
        self._resume = 0
        self._failed: set[int] = set()

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        """One epoch, or the rest of the one that ``load_state_dict`` has set."""
        self._position, self._resume = self._resume, 0
        for batch in self._batches(self.epoch, self._position):
            self._position += 1
            yield batch
        self.epoch, self._position = self.epoch + 1, 0

    def state_dict(self) -> dict:
        """Where the loader stands: enough for an exact resume in a loader made with the same arguments."""
        epoch, batch = (self.epoch, self._position) if self._position < len(self) else (self.epoch + 1, 0)
        return {"epoch": epoch, "batch": batch, "failed": sorted(self._failed), "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: dict) -> None:
        """Go to where ``state`` was taken; the next iteration continues there.

        Raises:
            UserError: the state belongs to other images, another batch size or other ranks.
        """
        if state["fingerprint"] != self._fingerprint():
            raise UserError(
                f"The checkpoint was taken with (images, batch, seed, rank, world) = {state['fingerprint']}, this "
                f"run has {self._fingerprint()}: resume with the same data and settings."
            )
        self.epoch, self._resume, self._failed = int(state["epoch"]), int(state["batch"]), set(state["failed"])
        self._position = self._resume

    @abstractmethod
    def close(self) -> None:
        """Free threads, processes and memory."""

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch from number ``start`` on."""

    def _fingerprint(self) -> list:
        plan = self.plan
        return [len(plan.records), plan.batch_size, plan.seed, plan.rank, plan.world]

    def _fail(self, row: int, reason: str) -> None:
        """Leave an image out from now on: its place is padding (another image, valid False)."""
        if row not in self._failed:
            self._failed.add(row)
            self.skipped.append((self.plan.rel(row), reason))
            log.warning("skipped %s, which no longer decodes: %s", self.plan.rel(row), reason)
        if len(self._failed) == len(self.plan.records):
            raise UserError(f"No image of {self.plan.records.images.root} decodes any longer: restore the files.")


def replace_failed(rows: np.ndarray, valid: np.ndarray, failed: set[int], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Put the next usable record in the place of each failed one and mark the place as padding."""
    if not failed:
        return rows, valid
    rows, valid = rows.copy(), valid.copy()
    for i, row in enumerate(rows):
        while int(row) in failed:
            row, valid[i] = (row + 1) % n, False
        rows[i] = row
    return rows, valid


def default_threads(threads: int | None) -> int:
    """The number asked for, else one a core that this process may use, at most eight."""
    if threads is not None:
        return max(1, threads)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)
