"""The run folder of a training run: start a new one, or resume the one that is there."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fgfast.claim import Claim, claim_folder, is_claim
from fgfast.config import TrainConfig, read_toml, to_toml
from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.info import versions
from fgfast.methods.base import METHODS, Method
from fgfast.methods.run_folder import read_run
from fgfast.run import load_checkpoint, save_checkpoint
from fgfast.train.distributed import Ranks, on_first
from fgfast.train.length import Length

ANY_TIME = ("data", "out", "device", "threads", "loader", "log_every", "knn_every", "save_every", "resume", "compile")
"""Options that may change whenever a run is resumed."""
LENGTH = ("epochs", "passes")
"""Options that set the length of a run; a resumed run may change them too."""
NEEDED = {"step", "round", "method", "optimizer", "loader", "rng"}
"""Entries of last.pt without which a run cannot be resumed."""


@dataclass(frozen=True)
class Resumed:
    """A run that is there: its last checkpoint, and its options and planned number of steps until then."""

    checkpoint: dict[str, Any]
    before: TrainConfig
    total: int

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
        return stack.enter_context(claim_folder(run))

    with ExitStack() as stack:
        yield on_first(ranks, enter)


def open_run(method: Method, ranks: Ranks, length: Length | None, images: str = "") -> Resumed | None:
    """Start the run folder ``method.config.out``, or read its last checkpoint if the run is to be resumed.

    Args:
        method: the method with its configuration.
        ranks: the ranks.
        length: length of the run with this configuration; None if it is not to be trained.
        images: one line on the images of the run, for config.toml.

    Returns:
        The run to resume, or None for a new run, whose folder then holds config.toml and init.pt.

    Raises:
        UserError: on every rank; the folder holds a run that is not to be resumed, that was started with other options
            or that is longer.
    """
    config, run = method.config, Path(method.config.out)

    def read() -> Resumed:
        checkpoint = load_checkpoint(run / "last.pt", method.name)
        if missing := NEEDED - checkpoint.keys():
            raise UserError(f"{run / 'last.pt'} has no {min(missing)!r}: give the last.pt of a run, or another --out.")
        before = check_options(run, config, (*ANY_TIME, *LENGTH))
        total = 0 if length is None else checkpoint.get("total") or length.of(before)
        return Resumed(checkpoint, before, total)

    def look_and_start() -> Resumed | None:
        if not (run / "last.pt").exists():
            _start_run(method, run, images)
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
    if not ranks.first and (run / "last.pt").exists():
        resumed = read()
    return resumed


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
        for name in (*ANY_TIME, *LENGTH)
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

    Returns:
        The options of the run.

    Raises:
        UserError: an option differs; the message names it and both values.
    """
    _, before = read_run(run)
    for name, value in vars(config).items():
        if name not in may_change and getattr(before, name, value) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{run} was started with {flag} {getattr(before, name)}, not {value}: "
                f"give the options of {run / 'config.toml'}, or another --out."
            )
    return before


def _start_run(method: Method, run: Path, images: str) -> None:
    for maps in run.glob("parts_*/maps.json"):
        maps.unlink()  # left by a run that saved no checkpoint, perhaps with other options: discover the parts again
    _write_config(method.config, method.name, run, images)
    save_checkpoint(run / "init.pt", {"name": method.name, "step": 0, "method": method.state_dict()})


def _write_config(
    config: TrainConfig, method: str, run: Path, images: str, resumed: Sequence[dict[str, Any]] = ()
) -> None:
    text = to_toml(config, method, resumed, images)
    write_atomic(run / "config.toml", lambda p: p.write_text(text, encoding="utf-8"), durable=True)


def _other_file(run: Path) -> str | None:
    """A name in a folder that holds files but none of a run: no checkpoint, no claim and no config.toml of a method."""
    files = sorted(run.iterdir()) if run.is_dir() else []
    if not files or any(is_claim(file) or file.name == "last.pt" for file in files):
        return None
    with contextlib.suppress(UserError):
        if read_toml(run / "config.toml").get("method") in METHODS:
            return None
    return files[0].name
