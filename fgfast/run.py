"""Files of a run folder, written so that a crash at any moment leaves the last good one in place."""

import tomllib
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
    """A checkpoint of a run, checked to be of ``method``; loaded with weights_only=True.

    Raises:
        UserError: the file is missing or broken, or belongs to another method.
    """
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}: train first, or leave out --resume.")
    state = read_checkpoint(path)
    found = state.get("name")
    if found != method:
        raise UserError(f"The checkpoint {path} is of the method {found!r}, not {method!r}: give its own run folder.")
    return state


def save_encoder(path: Path, encoder: nn.Module, model: str) -> None:
    """Write the bare network as safetensors; ``timm.create_model(model, checkpoint_path=...)`` loads it back."""
    from safetensors.torch import save

    state = {k: v.detach().cpu().contiguous() for k, v in encoder.state_dict().items()}
    content = save(state, {"format": "pt", "timm_model": model})  # its save_file hides the error of a full disk
    write_atomic(path, lambda p: p.write_bytes(content), durable=True)


def read_options(run: Path) -> tuple[str, dict[str, Any]]:
    """The method's name and the options of a run, as its config.toml has them.

    Raises:
        UserError: the folder is no run.
    """
    file = run / "config.toml"
    if not file.is_file():
        raise UserError(f"{run} is no run folder (it has no config.toml): give the --out of fgfast pretrain.")
    try:
        values = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file} does not parse ({error}): restore it or train again.") from None
    return values.pop("method", ""), values
