"""The run folder of a training run: start a new one, or resume the one that is there."""

import contextlib
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgfast.claim import Claim, claim_folder, is_claim
from fgfast.config import TrainConfig, flag, read_toml
from fgfast.config_text import to_toml
from fgfast.errors import UserError
from fgfast.files import clear_leftovers, is_leftover, write_atomic
from fgfast.info import versions
from fgfast.methods.base import METHODS, Method
from fgfast.methods.run_folder import complete_as, read_run
from fgfast.ranks import Ranks, on_first
from fgfast.run import INIT, has_checkpoint, load_newest, save_checkpoint
from fgfast.train.length import Length

if TYPE_CHECKING:
    from fgfast.data.imageset import ImageSet
    from fgfast.data.kept import Kept

ANY_TIME = (
    "data", "out", "device", "threads", "loader", "log", "log_every", "knn_every", "save_every", "resume", "compile",
    "rank_timeout", "micro_batch", "micro_bn", "accumulate", "grad_checkpoint",
    "shard",
)  # fmt: skip
"""Options that may change whenever a run is resumed."""
SPLIT = ("batch_size",)
"""Options that may change with the number of ranks, as long as a step has the same number of images."""
LENGTH = ("epochs", "passes")
"""Options that set the length of a run; a resumed run may change them too."""
IMAGES = "images.json"
"""File of the images with which a run began."""
NEEDED = {"step", "round", "method", "optimizer", "loader", "rng"}
"""Entries of last.pt without which a run cannot be resumed."""


@dataclass(frozen=True)
class Resumed:
    """A run that is there.

    Args:
        checkpoint: its last checkpoint.
        before: its options until then.
        total: its planned number of steps until then.
        notes: what is to be said about the files that were read.
    """

    checkpoint: dict[str, Any]
    before: TrainConfig
    total: int
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.checkpoint["step"])

    def describe_schedule(self, config: TrainConfig, total: int) -> list[str]:
        """One sentence on how the schedule changes if it now ends at step ``total``; none if it does not."""
        if total == self.total:
            return []
        then, now = self.before.learning_rate(max(0, self.step - 1), self.total), config.learning_rate(self.step, total)
        return [
            f"the learning rate goes from {then:.1e} to {now:.1e} at step {self.step}, "
            f"since the schedule now ends at step {total}, not {self.total}"
        ]


@contextmanager
def claim_run(run: Path, ranks: Ranks) -> Iterator[Claim | None]:
    """Hold the run folder; the first rank holds it for all, and the others get None.

    Raises:
        UserError: on every rank, if another process holds the folder or it cannot be one of a run.
    """

    def enter() -> Claim:
        if run.exists() and not run.is_dir():
            raise UserError(f"{run} is a file: give another --out.")
        if other := _other_file(run):
            raise UserError(f"{run} holds other files, such as {other}: give another --out.")
        claim = stack.enter_context(claim_folder(run))
        clear_leftovers(run)
        return claim

    with ExitStack() as stack:
        yield on_first(ranks, enter)


def run_images(config: TrainConfig, listed: "ImageSet", held_out: Sequence[str] = ()) -> "Kept":
    """The images of a run: those that can be read, or, if it is resumed, those with which it began.

    Args:
        config: the options.
        listed: the training images as they are read now.
        held_out: relative paths of the images that are held out.

    Raises:
        UserError: too many images cannot be read, or RUN/images.json is damaged.
    """
    from fgfast.data.kept import Kept, restore_set
    from fgfast.data.manifest import check_images

    file = Path(config.out) / IMAGES
    if config.resume and file.exists() and has_checkpoint(file.parent):
        return restore_set(file, listed, config.threads)
    return Kept.begin(check_images(listed, threads=config.threads, quiet=True), held_out)


def list_digest(images: "ImageSet") -> str:
    """A digest of the list of images."""
    paths = "\0".join(images.paths).encode(errors="surrogateescape")
    return hashlib.sha256(paths + images.targets.tobytes()).hexdigest()[:16]


def open_run(
    method: Method, ranks: Ranks, length: Length | None, description: str = "", images: "Kept | None" = None
) -> Resumed | None:
    """Start the run folder ``method.config.out``, or read its last checkpoint if the run is to be resumed.

    Args:
        method: the method with its configuration.
        ranks: the ranks.
        length: length of the run with this configuration; None if it is not to be trained.
        description: one line on the images of the run, for config.toml.
        images: its images.

    Returns:
        The run to resume, or None for a new run, whose folder then holds config.toml, images.json and init.pt.

    Raises:
        UserError: on every rank; the folder holds a run that is not to be resumed, that was started with other options
            or that is longer.
    """
    config, run = method.config, Path(method.config.out)

    def read() -> Resumed:
        checkpoint, notes = load_newest(run, method.name)
        if missing := NEEDED - checkpoint.keys():
            raise UserError(f"{run / 'last.pt'} has no {min(missing)!r}: give the last.pt of a run, or another --out.")
        before = check_options(run, config, (*ANY_TIME, *LENGTH, *SPLIT))
        _check_batch(run, checkpoint, before, config, ranks)
        total = 0 if length is None else checkpoint.get("total") or length.of(before)
        return Resumed(checkpoint, before, total, (*notes, *([] if images is None else images.describe())))

    def look_and_start() -> Resumed | None:
        if not has_checkpoint(run):
            _start_run(method, run, description, images)
            return None
        if not config.resume:
            raise UserError(f"{run} already holds a run: give --resume to continue it, or another --out.")
        resumed = read()
        if length is not None and length.total < resumed.step:
            given, least = f"--epochs {config.epochs}", f"at least {math.ceil(resumed.step / length.per_epoch)}"
            if config.passes:
                given, least = f"--passes {config.passes}", "more"
            raise UserError(
                f"{run} has done {resumed.step} steps and {given} gives {length.total}: give {least}, or another --out."
            )
        return resumed

    resumed = on_first(ranks, look_and_start)
    if not ranks.first and has_checkpoint(run):
        resumed = read()
    return resumed


def _check_batch(run: Path, checkpoint: dict[str, Any], before: TrainConfig, config: TrainConfig, ranks: Ranks) -> None:
    """Refuse another number of images a step.

    Raises:
        UserError: it differs.
    """
    size, now = int(checkpoint.get("images_per_step", before.batch_size)), config.batch_size * ranks.world
    if size != now:
        raise UserError(
            f"{run} was started with {size} images a step, and --batch-size {config.batch_size} x {ranks.world} "
            f"ranks gives {now}: give a batch size and a number of ranks whose product is {size}."
        )


def record_resumption(method: Method, resumed: Resumed, images: str = "") -> None:
    """Write the options, versions and images that now hold to config.toml, and those that held until now as a record.

    Args:
        method: the method with its configuration.
        resumed: the run.
        images: one line on its images.
    """
    config, before, run = method.config, resumed.before, Path(method.config.out)
    environment = read_toml(run / "config.toml").get("environment")
    environment = environment if isinstance(environment, dict) else {}  # it may be edited by hand
    earlier = environment.pop("resumed", None)
    earlier = [table for table in earlier if isinstance(table, dict)] if isinstance(earlier, list) else []
    changed: dict[str, Any] = {
        name: getattr(before, name)
        for name in (*ANY_TIME, *LENGTH, *SPLIT)
        if name != "resume" and getattr(before, name) != getattr(config, name)
    }
    if versions_before := {name: v for name, v in environment.items() if versions().get(name) != v}:
        changed["environment"] = versions_before
    entry = {"step": resumed.step, "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    if changed:
        entry["before"] = changed
    _write_config(replace(config, resume=before.resume), method.name, run, images, [*earlier, entry])


def check_options(run: Path, config: TrainConfig, may_change: tuple[str, ...]) -> TrainConfig:
    """Check that ``config`` has the options that the run was started with, except for those that may change.

    What it leaves to auto is as in the run.

    Returns:
        The options of the run.

    Raises:
        UserError: an option differs; the message names it and both values.
    """
    _, before = read_run(run)
    for name, value in vars(complete_as(before, config)).items():
        if name not in may_change and getattr(before, name, value) != value:
            raise UserError(
                f"{run} was started with {flag(name)} {getattr(before, name)}, not {value}: "
                f"give the options of {run / 'config.toml'}, or another --out."
            )
    return before


def _start_run(method: Method, run: Path, description: str, images: "Kept | None") -> None:
    _write_config(method.config, method.name, run, description)
    if images is not None:
        from fgfast.data.kept import store_set

        store_set(run / IMAGES, images.images, images.records, images.held_out)
    state = {"name": method.name, "step": 0, "method": method.state_dict(), "input": method.encoder.stats.texts()}
    save_checkpoint(run / INIT, state)


def _write_config(
    config: TrainConfig, method: str, run: Path, images: str, resumed: Sequence[dict[str, Any]] = ()
) -> None:
    text = to_toml(config, method, resumed, images)
    write_atomic(run / "config.toml", lambda p: p.write_text(text, encoding="utf-8"), durable=True)


def _other_file(run: Path) -> str | None:
    """A name in a folder that holds files but none of a run: no checkpoint, no claim and no config.toml of a method."""
    files = sorted(file for file in run.iterdir() if not is_leftover(file)) if run.is_dir() else []
    if not files or has_checkpoint(run) or any(map(is_claim, files)):
        return None
    with contextlib.suppress(UserError):
        if str(read_toml(run / "config.toml").get("method")) in METHODS:
            return None
    return files[0].name
