"""Loading of weights from files: runs of fgfast, timm, and public checkpoints of DetCon, MoCo and DINO."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgfast.errors import UserError

_PREFIXES = (
    "module.encoder_q.", "module.base_encoder.", "module.online_network.encoder.", "online_network.encoder.",
    "encoder_q.", "base_encoder.", "module.backbone.", "backbone.", "module.encoder.", "encoder.net.", "encoder.",
    "module.", "net.",
)  # fmt: skip


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint file as a dictionary, read with weights_only=True.

    Raises:
        UserError: the file is missing or truncated, or holds objects other than weights.
    """
    if not path.is_file():
        raise UserError(f"The weights {path} do not exist: give a file, a run folder, 'timm' or 'none'.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch and safetensors raise various types for a broken file
        raise UserError(
            f"The weights {path} could not be read ({type(error).__name__}): check that the file is complete."
        ) from error


def encoder_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The encoder's tensors in a checkpoint of any supported format, with the names of the bare network.

    Takes the entry "teacher" (DINO), "state_dict", "model" or "method" if there is one, keeps the names with the first
    known prefix that occurs, and strips it, until none occurs.
    """
    for name in ("teacher", "state_dict", "model", "method"):
        if isinstance(checkpoint.get(name), dict):
            checkpoint = checkpoint[name]
            break
    tensors = {k: v for k, v in checkpoint.items() if isinstance(v, Tensor)}
    for prefix in _PREFIXES:
        if any(k.startswith(prefix) for k in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            return encoder_state(tensors)
    return tensors


def load_encoder(net: nn.Module, path: Path) -> None:
    """Load the encoder of a checkpoint into ``net``; heads in the file are ignored.

    Args:
        net: the bare timm network.
        path: a weights file, or a run folder, whose encoder.safetensors is read.

    Raises:
        UserError: the file cannot be read, or its tensors do not match the network.
    """
    file = path / "encoder.safetensors" if path.is_dir() else path
    state = encoder_state(read_checkpoint(file))
    needed = net.state_dict()
    wrong = [k for k in needed if k in state and state[k].shape != needed[k].shape]
    missing = [k for k in needed if k not in state]
    if wrong or missing:
        first = (wrong or missing)[0]
        difference = f"another shape of {first!r}" if wrong else f"no {first!r}"
        raise UserError(f"The weights {file} are of another network ({difference}): give its --model and --model-args.")
    net.load_state_dict({k: state[k] for k in needed})
