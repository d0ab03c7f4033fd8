"""Files of a run folder, written atomically: a crash leaves the previous file in place."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fgfast.config import load_toml
from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.models.weights import read_checkpoint


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Save tensors and plain values for :func:`load_checkpoint`."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch reports a full disk as an error of its own zip writer
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    write_atomic(path, write, durable=True)


def load_checkpoint(path: Path, method: str) -> dict[str, Any]:
    """Load a checkpoint of a run of ``method``, with weights_only=True.

    Raises:
        UserError: the file is missing or broken, or belongs to another method.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}: train first, or leave out --resume.")
    state = read_state(path)
    name = state.get("name")
    if name != method:
        raise UserError(f"The checkpoint {path} is of the method {name!r}, not {method!r}: give a run of {method}.")
    return state


def read_state(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote to a file, loaded with weights_only=True.

    Raises:
        UserError: the file is cut or damaged, or not one of those.
    """
    if damaged := _damaged_part(path):
        raise UserError(
            f"The checkpoint {path} is cut or damaged ({damaged}): restore it from a copy, or train again in another "
            "folder."
        )
    return read_checkpoint(path)


def _damaged_part(path: Path) -> str | None:
    """What in a checkpoint differs from its checksum, which torch.load does not compare; None if nothing does."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    except Exception as error:  # of various types, as any byte may be another one
        return str(error) or type(error).__name__


def save_encoder(path: Path, encoder: nn.Module, model: str) -> None:
    """Write a timm network as safetensors; ``timm.create_model(model, checkpoint_path=...)`` loads it."""
    from safetensors.torch import save

    state = {k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    content = save(state, {"format": "pt", "timm_model": model})  # save_file would hide the error of a full disk
    write_atomic(path, lambda p: p.write_bytes(content), durable=True)


def read_options(run: Path) -> tuple[str, dict[str, Any]]:
    """The name of the method and the options of a run, as read from its config.toml.

    Raises:
        UserError: the folder is not a run folder.
    """
    file = run / "config.toml"
    if not file.is_file():
        if (run / "last.pt").exists():
            raise UserError(f"{run} holds last.pt without its config.toml: restore that file, or train again.")
        raise UserError(f"{run} is not a run folder (it has no config.toml): give the --out of fgfast pretrain.")
    try:
        values = load_toml(file)
    except ValueError as error:
        raise UserError(f"{file} does not parse ({error}): restore it or train again.") from None
    return values.pop("method", ""), values
