"""The base class of the loaders: an endless, resumable schedule of batches over the usable images of a set."""

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
    """The images, views and order of a loader; plain data that can be sent to a worker process.

    A ``row`` is the position of an image in ``records``.

    Args:
        records: the usable images.
        spec: the views.
        batch_size: B.
        shuffle: a new order each epoch.
        drop_last: leave out an incomplete last batch instead of padding it.
        seed: seed of order and augmentation.
        maps: folder of id maps, or None.
        map_sizes: (H, W) of each map, int32 [N, 2], or None.
        rank: rank of this process.
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
        """Batches per epoch, the same on every rank."""
        global_batch = self.batch_size * self.world
        return len(self.records) // global_batch if self.drop_last else -(-len(self.records) // global_batch)

    def batch_rows(self, epoch: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a batch and their validity, int64 [B] and bool [B].

        Rank r takes every world-th image of the common order; the last batch is padded with images from its start.
        """
        order = epoch_order(len(self.records), self.seed, epoch, self.shuffle)
        places = (np.arange(self.batch_size) + batch * self.batch_size) * self.world + self.rank
        return order[places % len(order)], places < len(order)

    def draw_crops(self, epoch: int, batch: int, rows: np.ndarray) -> list[Draw]:
        """The random numbers of a batch, one ``Draw`` per crop of the specification."""
        rng = generator(self.seed, epoch, self.rank, batch)
        return [draw_crop(crop, self.records.sizes[rows], rng) for crop in self.spec.crops]

    def draw_corners(self, epoch: int, batch: int, rows: np.ndarray) -> np.ndarray:
        """Upper left corner (y, x) of the patch of each image of a batch, int64 [B, 2].

        Raises:
            UserError: an image is smaller than the patch.
        """
        assert self.spec.patch is not None
        check_patch(self.records, self.spec.patch, rows)
        rng = np.random.default_rng([self.seed, epoch, self.rank, batch, 1])  # independent of the crops
        return rng.integers(0, self.records.sizes[rows] - self.spec.patch.size, endpoint=True)

    def whole_windows(self, rows: np.ndarray) -> np.ndarray:
        """Windows of the unaugmented view in pixels, float32 [B, 4]."""
        return whole_window(self.records.sizes[rows], self.spec.center)

    def relative_path(self, row: int) -> str:
        """The path of an image within its set."""
        return self.records.images.paths[self.records.index[row]]


def check_patch(records: Records, patch: Patch, rows: np.ndarray | None = None) -> None:
    """Refuse images that are smaller than a patch.

    Raises:
        UserError: there are such images; the message names the first one and a size that fits.
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
        ValueError: an invalid batch size or rank, or id maps are asked for and no folder is given.
        UserError: images or maps are missing or broken, or no batch is full under ``drop_last``.
    """
    if batch_size < 1 or not 0 <= rank < world:
        raise ValueError(
            f"batch_size {batch_size}, rank {rank}, world {world}: need batch_size >= 1, 0 <= rank < world."
        )
    if spec.needs_maps and maps is None:
        raise ValueError("The views need id maps: pass their folder to make_loader as maps.")
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
    """Yields one epoch of ``Batch`` each time it is iterated.

    Epoch n is shuffled with seed + n, and every window and colour is drawn from (seed, n, rank, batch): a run that is
    resumed with ``load_state_dict`` gets exactly the same values. A new iteration before the end of an epoch restarts
    that epoch; after its end the next one begins.

    Attributes:
        backend: "dali" or "torchvision".
        epoch: index of the current or next epoch.
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
        """Batches per epoch."""
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        """One epoch, or the rest of it after ``load_state_dict``."""
        self._position, self._resume = self._resume, 0
        for batch in self._batches(self.epoch, self._position):
            self._position += 1
            yield batch
        self.epoch, self._position = self.epoch + 1, 0

    def state_dict(self) -> dict:
        """The position of the loader, for an exact resume in a loader with the same arguments."""
        epoch, batch = (self.epoch, self._position) if self._position < len(self) else (self.epoch + 1, 0)
        return {"epoch": epoch, "batch": batch, "failed": sorted(self._failed), "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: dict) -> None:
        """Restore the position that ``state_dict`` returned; the next iteration continues there.

        Raises:
            UserError: the state is of other images, another batch size or other ranks.
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
        """The batches of an epoch from index ``start`` on."""

    def _fingerprint(self) -> list:
        plan = self.plan
        return [len(plan.records), plan.batch_size, plan.seed, 0, plan.world]  # rank 0 saves the state of all ranks

    def _exclude(self, row: int, reason: str) -> None:
        """Leave out an image from now on: padding takes its place (another image, valid False)."""
        if row not in self._failed:
            self._failed.add(row)
            path = self.plan.relative_path(row)
            self.skipped.append((path, reason))
            log.warning("skipped %s, which can no longer be read: %s", path, reason)
        if len(self._failed) == len(self.plan.records):
            raise UserError(f"No image of {self.plan.records.images.root} can be read any longer: restore the files.")


def replace_failed(rows: np.ndarray, valid: np.ndarray, failed: set[int], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Replace each failed row by the next usable one and mark it as padding."""
    if not failed:
        return rows, valid
    rows, valid = rows.copy(), valid.copy()
    for i, row in enumerate(rows):
        while int(row) in failed:
            row, valid[i] = (row + 1) % n, False
        rows[i] = row
    return rows, valid


def default_threads(threads: int | None) -> int:
    """``threads`` if given, else one per core that this process may use, at most eight."""
    if threads is not None:
        return max(1, threads)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)
