"""The base class of the loaders: an endless, resumable schedule of batches over the usable images of a set."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from fgfast.data.manifest import Verdict, check_file, shown_size
from fgfast.data.plan import BatchPlan as BatchPlan
from fgfast.data.plan import check_patch as check_patch
from fgfast.data.plan import make_plan as make_plan
from fgfast.data.plan import replace_failed as replace_failed
from fgfast.data.slices import Slice
from fgfast.data.views import Batch
from fgfast.errors import UserError

log = logging.getLogger("fgfast")


@dataclass(frozen=True)
class _Failure:
    """Why an image is left out, and whether it is tried again in the next epoch."""

    reason: str
    passing: bool


class Loader(ABC):
    """Yields one epoch of ``Batch`` each time it is iterated.

    Epoch n is shuffled with seed + n, and every window and colour is drawn from (seed, n, batch) and the place in it: a
    run that is resumed with ``load_state_dict`` gets exactly the same values, on any number of ranks with the same
    number of images a step. A new iteration before the end of an epoch restarts that epoch; after its end the next one
    begins.

    An image that vanishes or breaks is left out: padding takes its place (another image, valid False). After a passing
    error, such as a failed read, it is tried again in the next epoch.

    Attributes:
        backend: "dali" or "torchvision".
        epoch: index of the current or next epoch.
        skipped: (path, reason) of every image that is left out.
        lost: those of ``skipped`` that were usable when the run began; it grows, with each image at most once.
        recovered: paths of lost images that can be read again and are used; it grows.
        too_many: a sentence once more than 5% of the images are lost on this rank (and those of ``exclude``), else
            None. Batches go on.
    """

    backend: str

    def __init__(self, plan: BatchPlan) -> None:
        """Start before the first batch of epoch 0."""
        self.plan = plan
        self.epoch = 0
        self.skipped: list[tuple[str, str]] = list(plan.records.skipped)
        self.lost: list[tuple[str, str]] = []
        self.recovered: list[str] = []
        self.too_many: str | None = None
        self._position = 0
        self._resume = 0
        self._failed: dict[int, _Failure] = {}
        self._changes = 0  # of the failed rows
        self._sorted: tuple[int, list[int]] = 0, []  # the number of changes, and the failed rows then
        self._named: set[int] = set()
        self._shards_named: set[str] = set()
        self._reading: int | None = None  # the epoch whose batches are being read
        for row, verdict in plan.records.lost.items():  # the caller has named them: Kept.describe
            self._exclude(row, verdict.reason, verdict.passing, quiet=True)

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
        """The position of the loader, for an exact resume in a loader of the same images with the same seed.

        It is the same on every rank but for "failed", the positions of the lost images, and serves any number of ranks
        with the same number of images a step.
        """
        epoch, batch = (self.epoch, self._position) if self._position < len(self) else (self.epoch + 1, 0)
        return {"epoch": epoch, "batch": batch, "failed": self._failed_rows(), "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict) -> None:
        """Restore the position that ``state_dict`` returned on any rank; the next iteration continues there.

        Images that were lost are tried again. "failed" may be the union over the ranks.

        Raises:
            UserError: the state is of other images, another number of images a step or another seed.
        """
        self._check_fingerprint(state["fingerprint"])
        self.epoch, self._resume = int(state["epoch"]), int(state["batch"])
        self._position = self._resume
        for row in map(int, state["failed"]):
            if row not in self._failed:  # else the restored set has just been checked
                self._check_again(row)

    def exclude(self, failed: Mapping[int, str]) -> None:
        """Leave out images that another rank has lost, its ``failed``; they are tried again in the next epoch."""
        for row, reason in failed.items():
            if row not in self._failed:
                self._exclude(row, reason, passing=True)

    @property
    def failed(self) -> dict[int, str]:
        """The reason of every lost image by its position among the usable ones."""
        return {row: failure.reason for row, failure in list(self._failed.items())}

    @abstractmethod
    def close(self) -> None:
        """Free threads, processes and memory."""

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch from index ``start`` on."""

    @cached_property
    def _fingerprint(self) -> dict[str, int | str]:
        plan = self.plan
        paths = (plan.records.images.paths[i] for i in plan.records.index)
        digest = hashlib.sha256("\0".join(paths).encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return {
            "images": len(plan.records), "digest": digest, "step": plan.batch_size * plan.world, "seed": plan.seed
        }  # fmt: skip

    def _check_fingerprint(self, then: dict[str, int | str] | list[int]) -> None:
        now, plan = self._fingerprint, self.plan
        if isinstance(then, list):  # of version 0.1
            images, batch_size, seed, _, world = then
            then = {"images": images, "step": batch_size * world, "seed": seed}
        if then["step"] != now["step"]:
            raise UserError(
                f"The checkpoint was taken with {then['step']} images a step, this run has {now['step']} "
                f"({plan.batch_size} on each of {plan.world} ranks): resume with a batch size that gives as many."
            )
        if then["seed"] != now["seed"]:
            raise UserError(
                f"The checkpoint was taken with seed {then['seed']}, this run has {now['seed']}: resume with the same."
            )
        if (then["images"], then.get("digest", now["digest"])) != (now["images"], now["digest"]):
            raise UserError(
                f"The checkpoint was taken with {then['images']} images, this run has {now['images']}, which are not "
                "the same: resume with the same data."
            )

    def _failed_rows(self) -> list[int]:
        changes = self._changes
        if self._sorted[0] != changes:
            self._sorted = changes, sorted(self._failed)
        return self._sorted[1]

    def _exclude(self, row: int, reason: str, passing: bool, *, quiet: bool = False) -> None:
        """Leave out an image, until the next epoch if the error is a passing one."""
        self._failed[row] = _Failure(reason, passing)
        self._changes += 1
        if row not in self._named:
            self._named.add(row)
            path = self.plan.relative_path(row)
            self.skipped.append((path, reason))
            self.lost.append((path, reason))
            file = self.plan.original(row)
            gone = file.file if isinstance(file, Slice) and passing else ""
            if not quiet and gone not in self._shards_named:
                log.warning("skipped %s, which can no longer be read: %s", path, reason)
            if gone:  # of a shard that is gone one image is named here, the others are counted
                self._shards_named.add(gone)
        n, root = len(self.plan.records), self.plan.records.images.root
        if self.too_many is None and self.plan.too_many(len(self._failed)):
            path, reason = self.lost[0]
            self.too_many = (
                f"{len(self._failed)} of {n} images of {root} can no longer be read, such as {path} ({reason}): "
                "restore them, then --resume continues the run."
            )

    def _retry(self, epoch: int) -> None:
        """Before a batch of a new epoch is read: try the images again that failed by a passing error."""
        before, self._reading = self._reading, epoch
        if before is None or epoch <= before:
            return
        for row, failure in list(self._failed.items()):
            if failure.passing and self.plan.has_map(row):
                self._check_again(row)

    def _check_again(self, row: int) -> None:
        self._check(row)
        if row in self._failed:
            return
        path = self.plan.relative_path(row)
        self.recovered.append(path)
        log.warning("%s can be read again and is used", path)

    def _check(self, row: int) -> None:
        """Use an image as it is now, or leave it out."""
        verdict = self._verdict(row)
        if verdict.reason:
            self._exclude(row, verdict.reason, verdict.passing)
        else:
            self._changes += self._failed.pop(row, None) is not None
            self._accept(row, verdict)

    def _verdict(self, row: int) -> Verdict:
        try:
            verdict = check_file(self.plan.original(row))
        except UserError as error:  # a converted copy cannot be written
            return Verdict(0, 0, full=True, reason=str(error), passing=True)
        return replace(verdict, reason=verdict.reason or self.plan.fault(verdict.height, verdict.width))

    def _accept(self, row: int, verdict: Verdict) -> None:
        """Use an image as it is now."""
        records = self.plan.records
        records.heights[row] = verdict.height
        records.sizes[row] = shown_size(records.images, verdict.height, verdict.width)


def default_threads(threads: int | None) -> int:
    """``threads`` if given, else one per core that this process may use, at most eight."""
    if threads is not None:
        return max(1, threads)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, usable)
