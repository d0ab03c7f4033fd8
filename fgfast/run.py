"""Files of a run folder, written atomically: a crash leaves the previous file in place."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgfast.checksum import (
    BLANK,
    KEY,
    NO_CHECKSUM,
    DamagedError,
    compare_members,
    seal_safetensors,
    seal_zip,
    verify,
)  # fmt: skip
from fgfast.data.normalise import IMAGENET, InputStats
from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.formats import read_toml
from fgfast.models.checkpoints import load_dictionary

log = logging.getLogger("fgfast")

INIT, LAST, PREVIOUS, ENCODER = "init.pt", "last.pt", "previous.pt", "encoder.safetensors"


class UnreadableError(UserError):
    """A checkpoint is missing, cut or damaged; ``reason`` is the predicate of a sentence that says so."""

    def __init__(self, message: str, reason: str = "cannot be read") -> None:
        super().__init__(message)
        self.reason = reason


def save_checkpoint(path: Path, state: dict[str, Any], before_rename: Callable[[], object] = lambda: None) -> None:
    """Save tensors and plain values for :func:`load_checkpoint`, with a checksum over all of the file.

    Args:
        path: the file.
        state: the tensors and values.
        before_rename: see :func:`~fgfast.files.write_atomic`.
    """

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch reports a full disk as an error of its own zip writer
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        seal_zip(partial)

    write_atomic(path, write, durable=True, before_rename=before_rename)


def save_encoder(
    path: Path,
    encoder: nn.Module | Mapping[str, Tensor],
    model: str,
    before_rename: Callable[[], object] = lambda: None,
    *,
    stats: InputStats = IMAGENET,
    created_with: Mapping[str, Any] | None = None,
) -> None:
    """Write a timm network as safetensors; ``timm.create_model(model, checkpoint_path=..., num_classes=0)`` loads it.

    The metadata of the file name the network ("timm_model"), its arguments for timm as JSON ("timm_args"), such as the
    size that it was built for, and its input statistics.

    Args:
        path: the file.
        encoder: the network or its state dict.
        model: timm's name of the network.
        before_rename: see :func:`~fgfast.files.write_atomic`.
        stats: how images are resized and normalised for the network.
        created_with: its arguments for timm; by default those of a network that :class:`Backbone` has built.
    """
    from safetensors.torch import save

    args = getattr(encoder, "created_with", {}) if created_with is None else created_with
    state = encoder.state_dict() if isinstance(encoder, nn.Module) else encoder
    tensors = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    texts = {"timm_model": model, "timm_args": json.dumps(dict(args), default=list), **stats.texts()}

    def write(partial: Path) -> None:
        # save_file would hide the error of a full disk
        partial.write_bytes(save(tensors, {"format": "pt", **texts, KEY: BLANK}))
        seal_safetensors(partial)

    write_atomic(path, write, durable=True, before_rename=before_rename)


def save_newest(
    run: Path,
    state: dict[str, Any],
    encoder: nn.Module | Mapping[str, Tensor],
    model: str,
    confirm: Callable[[], object] = lambda: None,
    *,
    stats: InputStats = IMAGENET,
    created_with: Mapping[str, Any] | None = None,
) -> None:
    """Save a checkpoint as last.pt and its encoder, and keep the last.pt before it, if it is whole, as previous.pt.

    No file is replaced before both new ones are complete. From then on last.pt is there at every moment, except on a
    file system without hard links.

    Args:
        run: run folder.
        state: the checkpoint, for :func:`load_newest`.
        encoder: the network to export, or its state dict.
        model: timm's name of the network.
        confirm: called before the first file is replaced; all stay as they are if it fails.
        stats: how images are resized and normalised for the network.
        created_with: its arguments for timm, see :func:`save_encoder`.
    """

    def before_rename() -> None:
        whole = _is_whole(run / LAST)  # a damaged one must not replace the previous one
        save_encoder(run / ENCODER, encoder, model, confirm, stats=stats, created_with=created_with)
        if whole:
            _keep_last(run)

    save_checkpoint(run / LAST, state, before_rename)


def _is_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if not verify(file, safetensors=False):
                compare_members(file)
    except (DamagedError, OSError):
        return False
    return True


def _keep_last(run: Path) -> None:
    last, previous = run / LAST, run / PREVIOUS
    if previous.exists() and previous.samefile(last):
        return  # linked by a process that was killed before it replaced last.pt
    try:
        write_atomic(previous, lambda partial: os.link(last, partial))
    except OSError:  # a file system without hard links
        last.replace(previous)


def load_checkpoint(path: Path, method: str) -> dict[str, Any]:
    """Load a checkpoint of a run of ``method``, with weights_only=True.

    Raises:
        UserError: the file is missing or broken, or belongs to another method.
    """
    state = read_state(path)
    name = state.get("name")
    if name != method:
        raise UserError(f"The checkpoint {path} is of the method {name!r}, not {method!r}: give a run of {method}.")
    return state


def read_state(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote to a file, loaded with weights_only=True.

    Raises:
        UnreadableError: the file is missing, cut or damaged, or not one of those.
    """
    if not path.is_file():
        raise UnreadableError(f"There is no checkpoint {path}: train first, or leave out --resume.", "is missing")
    with path.open("rb") as file:
        try:
            if not verify(file, safetensors=False):
                compare_members(file)
                log.warning("%s %s", path, NO_CHECKSUM)
            return load_dictionary(path, file)
        except DamagedError as error:
            raise UnreadableError(
                f"The checkpoint {path} is cut or damaged ({error}): restore it from a copy, or train again in another "
                "folder.",
                "is cut or damaged",
            ) from None
        except UserError as error:
            raise UnreadableError(str(error)) from error


def has_checkpoint(run: Path) -> bool:
    """Whether a folder holds the last checkpoint of a run or the previous one."""
    return (run / LAST).is_file() or (run / PREVIOUS).is_file()


def load_newest(run: Path, method: str) -> tuple[dict[str, Any], list[str]]:
    """Load the newest whole checkpoint of a run of ``method``: last.pt, or previous.pt if that is damaged or missing.

    Returns:
        The checkpoint; and, if it is the previous one, a sentence that says so.

    Raises:
        UserError: no checkpoint is there or whole, or it belongs to another method.
    """
    last, previous = run / LAST, run / PREVIOUS
    try:
        return load_checkpoint(last, method), []
    except UnreadableError as error:
        if not previous.is_file():
            raise
        wrong = error.reason
    try:
        state = load_checkpoint(previous, method)
    except UnreadableError as error:
        raise UserError(
            f"{last} {wrong} and {previous} {error.reason}: restore one from a copy, or train again in another folder."
        ) from None
    return state, [f"{last} {wrong}: {previous} of step {state.get('step')} is used."]


def read_options(run: Path) -> tuple[str, dict[str, Any]]:
    """The name of the method and the options of a run, as read from its config.toml.

    Raises:
        UserError: the folder is not a run folder.
    """
    file = run / "config.toml"
    if not file.is_file():
        for name in (LAST, PREVIOUS):
            if (run / name).exists():
                raise UserError(f"{run} holds {name} without its config.toml: restore that file, or train again.")
        raise UserError(f"{run} is not a run folder (it has no config.toml): give the --out of fgfast pretrain.")
    values = read_toml(file, remedy="restore it or train again")
    return values.pop("method", ""), values
