"""The run folder of a training run: start a new one, or resume the one that is there."""

from pathlib import Path
from typing import Any

from fgfast.config import TrainConfig, read_toml, to_toml
from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.methods.base import METHODS, Method
from fgfast.methods.run_folder import read_run
from fgfast.run import load_checkpoint, save_checkpoint
from fgfast.train.distributed import Ranks, barrier

ANY_TIME = ("data", "out", "device", "threads", "loader", "log_every", "knn_every", "save_every", "resume", "compile")
"""Options that may change whenever a run is resumed."""
LENGTH = ("epochs", "passes")
"""Options that set the length of a run; a resumed run may change them too, and config.toml takes the new values."""


def open_run(method: Method, ranks: Ranks) -> dict[str, Any] | None:
    """Start the run folder ``method.config.out``, or read its last checkpoint if the run is to be resumed.

    Returns:
        The checkpoint, or None for a new run, whose folder then holds config.toml and init.pt.

    Raises:
        UserError: the folder holds another run or other files, or the run was started with other options.
    """
    config, run = method.config, Path(method.config.out)
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file: give another --out.")
    if config.resume and (run / "last.pt").is_file():
        checkpoint = load_checkpoint(run / "last.pt", method.name)
        check_options(run, config, (*ANY_TIME, *LENGTH))
        if ranks.first:
            _update_length(method, run)
        return checkpoint
    if (run / "last.pt").exists():
        raise UserError(f"{run} already holds a run: give --resume to continue it, or another --out.")
    foreign = _has_other_files(run)
    barrier(ranks)  # every rank looks before the first one writes
    if foreign:
        raise UserError(f"{run} holds other files: give another --out.")
    if ranks.first:
        _start_run(method, run)
    barrier(ranks)
    return None


def check_options(run: Path, config: TrainConfig, may_change: tuple[str, ...]) -> None:
    """Check that ``config`` has the options that the run was started with, except for those that may change.

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


def _start_run(method: Method, run: Path) -> None:
    run.mkdir(parents=True, exist_ok=True)
    for maps in run.glob("parts_*/maps.json"):
        maps.unlink()  # left by a run that saved no checkpoint, perhaps with other options: discover the parts again
    _write_config(method, run)
    save_checkpoint(run / "init.pt", {"name": method.name, "step": 0, "method": method.state_dict()})


def _update_length(method: Method, run: Path) -> None:
    before = read_toml(run / "config.toml")
    if any(before.get(option) != getattr(method.config, option) for option in LENGTH):
        _write_config(method, run)


def _write_config(method: Method, run: Path) -> None:
    write_atomic(run / "config.toml", lambda p: p.write_text(to_toml(method.config, method.name)))


def _has_other_files(run: Path) -> bool:
    """Whether a folder holds files and no config.toml of a run."""
    if not run.is_dir() or not any(run.iterdir()):
        return False
    try:
        return read_toml(run / "config.toml").get("method") not in METHODS
    except UserError:
        return True
