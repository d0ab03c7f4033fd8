"""The plan of a loader: its images and views, which of them make up each batch, and their random numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fgfast.data.decode import read_image
from fgfast.data.imageset import ImageSet
from fgfast.data.manifest import MAX_BROKEN, Records, check_images, shown_size
from fgfast.data.maps import map_sizes
from fgfast.data.order import ShardOrder
from fgfast.data.places import Places
from fgfast.data.sampling import Draw, draw_corner, draw_crop, epoch_order, generator, whole_window
from fgfast.data.slices import File
from fgfast.data.views import Patch, ViewSpec
from fgfast.errors import UserError

_REGION = 2**27  # bytes


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
        map_sizes: (H, W) of each map, int32 [N, 2], (0, 0) for a lost image without one; or None.
        rank: rank of this process.
        world: number of processes.
        endless: never raise for lost images: when more than ``MAX_BROKEN`` are, deliver black padding in their place.
        shards: the order of images that lie in shards, or None.
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
    endless: bool = False
    shards: ShardOrder | None = None

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        global_batch = self.batch_size * self.world
        return len(self.records) // global_batch if self.drop_last else -(-len(self.records) // global_batch)

    def batch_rows(self, epoch: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a batch and their validity, int64 [B] and bool [B].

        Rank r takes every world-th image of the common order; the last batch is padded with images from its start.
        """
        if self.shards is not None and self.shuffle:
            order = self.shards.of_epoch(self.seed, epoch)
        else:
            order = epoch_order(len(self.records), self.seed, epoch, self.shuffle)
        places = (np.arange(self.batch_size) + batch * self.batch_size) * self.world + self.rank
        return order[places % len(order)], places < len(order)

    def draw_crops(self, epoch: int, batch: int, rows: np.ndarray) -> list[Draw]:
        """The random numbers of a batch, one ``Draw`` per crop of the specification.

        They are drawn for the places of all ranks in the common order, so an image gets the same ones on any rank.
        """
        places = self._places(generator(self.seed, epoch, 0, batch))
        return [draw_crop(crop, self.records.sizes[rows], places) for crop in self.spec.crops]

    def draw_corners(self, epoch: int, batch: int, rows: np.ndarray) -> np.ndarray:
        """Upper left corner (y, x) of the patch of each image of a batch, int64 [B, 2].

        Raises:
            UserError: an image is smaller than the patch.
        """
        assert self.spec.patch is not None
        check_patch(self.records, self.spec.patch, rows)
        places = self._places(np.random.default_rng([self.seed, epoch, 0, batch, 1]))  # independent of the crops
        return draw_corner(self.records.sizes[rows], self.spec.patch.size, places)

    def _places(self, rng: np.random.Generator) -> Places:
        return Places(rng, self.batch_size * self.world, slice(self.rank, None, self.world))

    def whole_windows(self, rows: np.ndarray) -> np.ndarray:
        """Windows of the unaugmented view in pixels, float32 [B, 4]."""
        return whole_window(self.records.sizes[rows], self.spec.center)

    def relative_path(self, row: int) -> str:
        """The path of an image within its set."""
        return self.records.images.paths[self.records.index[row]]

    def original(self, row: int) -> File:
        """The file of an image or its slice of one, of which ``records.files`` may have a converted copy."""
        return self.records.images.file(self.records.index[row])

    def too_many(self, n_lost: int) -> bool:
        """Whether a run stops with so many lost images."""
        return n_lost > MAX_BROKEN * len(self.records)

    def fault(self, height: int, width: int) -> str:
        """Why an upright image of this size, which has changed since the check, cannot be used; "" if it can."""
        side = 0 if self.spec.patch is None else self.spec.patch.size
        shown = shown_size(self.records.images, height, width)
        return f"{height} x {width} pixels are too few for a patch of {side} x {side}" if min(shown) < side else ""

    def pixels(self, row: int) -> np.ndarray:
        """The upright image, uint8 [H, W, 3], from its file or, if that is a copy that was lost, from the original.

        Raises:
            OSError: it cannot be read or used.
        """
        file, original = self.records.files[row], self.original(row)
        try:
            pixels = read_image(file)
        except OSError:
            if file == original:
                raise
            pixels = read_image(original)
        if fault := self.fault(*pixels.shape[:2]):
            raise OSError(fault)
        return pixels

    def black_size(self) -> tuple[int, int]:
        """Height and width of a black image that is shown in place of a lost one."""
        side = 16 if self.spec.patch is None else self.spec.patch.size
        return side + self.records.images.banner, side

    def has_map(self, row: int) -> bool:
        """Whether the id map of an image is there, if the views need one."""
        return self.map_sizes is None or bool(self.map_sizes[row, 0])

    def fill(
        self, epoch: int, batch: int, failed: Collection[int], read: Callable[[np.ndarray], None]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rows of a batch and their validity, with the next usable image in place of each lost one as padding.

        Under ``endless``, lost rows are returned too once they are too many: the caller shows black images.

        Args:
            epoch: index of the epoch.
            batch: index of the batch.
            failed: the lost rows.
            read: tries to read rows and adds those that are lost to ``failed``.

        Raises:
            UserError: every image is lost.
        """
        rows, valid = self.batch_rows(epoch, batch)
        while True:
            given_up = self.endless and self.too_many(len(failed))
            if given_up:
                lost = np.array([int(row) in failed for row in rows])
                valid = valid & ~lost
                if self.map_sizes is not None:
                    rows = np.where(self.map_sizes[rows, 0] > 0, rows, self.map_sizes[:, 0].argmax())
            else:
                rows, valid = replace_failed(rows, valid, failed, len(self.records))
            read(rows)
            if given_up or not any(int(row) in failed for row in rows):
                return rows, valid & [int(row) not in failed for row in rows]


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
    records: Records | None = None,
    lenient: bool = False,
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
    endless = records is not None
    if records is None:
        records = check_images(images, full=check, threads=threads, lenient=lenient)
    else:  # a loader keeps the sizes as the files are now
        records = replace(records, sizes=records.sizes.copy(), heights=records.heights.copy())
    if spec.patch is not None:
        check_patch(records, spec.patch)
    maps = maps if spec.needs_maps else None
    sizes = None if maps is None else _map_sizes(maps, records)
    shards = _shards_of(records, world) if shuffle else None
    plan = BatchPlan(records, spec, batch_size, shuffle, drop_last, seed, maps, sizes, rank, world, endless, shards)
    if not len(plan):
        raise UserError(
            f"{len(records)} images do not fill one batch of {batch_size} on each of {world} processes: "
            "choose a smaller batch."
        )
    return plan


def _shards_of(records: Records, world: int) -> ShardOrder | None:
    """The order of images that lie in shards; None if each has a file of its own.

    Images in files of their own, which are added to a set of shards, are one more shard.

    Raises:
        UserError: there are fewer shards than ranks.
    """
    slices = records.images.slices
    if slices is None:
        return None
    which = slices.which[records.index].astype(np.int64)
    indexed = bool((slices.crc[records.index] >= 0).any())
    if not indexed:  # a few large files, of which each region counts as a shard
        which = which * 2**32 + slices.start[records.index] // _REGION
    shards = ShardOrder(which)
    if shards.n_shards < world and not indexed:
        return None
    if shards.n_shards < world:
        raise UserError(
            f"{records.images.root} has {shards.n_shards} shards to train on, fewer than the {world} ranks: write "
            "smaller ones with fgfast shard --shard-mb, or start fewer ranks."
        )
    return shards


def _map_sizes(maps: Path, records: Records) -> np.ndarray:
    """(H, W) of the id map of each image, int32 [N, 2]; (0, 0) for a lost image without one."""
    rels = [records.images.paths[i] for i in records.index]
    sizes = np.zeros((len(rels), 2), np.int32)
    rows = [row for row in range(len(rels)) if row not in records.lost]
    sizes[rows] = map_sizes(maps, [rels[row] for row in rows])
    for row in records.lost:
        with suppress(UserError):
            sizes[row] = map_sizes(maps, [rels[row]])
    return sizes


def replace_failed(
    rows: np.ndarray, valid: np.ndarray, failed: Collection[int], n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Replace each failed row by the next usable one of n and mark it as padding.

    Raises:
        UserError: all have failed.
    """
    if not failed:
        return rows, valid
    if len(failed) == n:
        raise UserError(f"None of the {n} images can be read any longer: restore the files.")
    rows, valid = rows.copy(), valid.copy()
    for i, row in enumerate(rows):
        while int(row) in failed:
            row, valid[i] = (row + 1) % n, False
        rows[i] = row
    return rows, valid
