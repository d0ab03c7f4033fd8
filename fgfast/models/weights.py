"""Loading of weights into networks: of runs of fgfast, and of other libraries in any layout of ``layouts/``."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fgfast.errors import UserError
from fgfast.models.checkpoints import INDEX, STATE_DICT, describe, is_run_checkpoint, read_checkpoint
from fgfast.models.layouts import TIMM
from fgfast.models.matching import check, find, flatten, match, tensors_of

log = logging.getLogger("fgfast")

HUB_FILES = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", INDEX))
"""The weights in a folder of Hugging Face, in one file or in several."""


def weights_file(path: Path) -> Path:
    """The file of weights that a path names: itself, or the one in a folder of a run or of Hugging Face."""
    files = [path / name for name in ("encoder.safetensors", *HUB_FILES)] if path.is_dir() else [path]
    return next((file for file in files if file.is_file()), files[0])


def encoder_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The encoder's tensors in a checkpoint of a run, with the names of the bare network; none in other files.

    Where a run has averaged the weights they are the average.

    Example:
        >>> import torch
        >>> [*encoder_state({"name": "simclr", "method": {"encoder.net.conv1.weight": torch.zeros(1)}})]
        ['conv1.weight']
    """
    method = checkpoint["method"] if is_run_checkpoint(checkpoint) else {}
    start = "encoder.net."
    own = {k.removeprefix(start): v for k, v in method.items() if k.startswith(start) and isinstance(v, Tensor)}
    return own | (checkpoint.get("average", {}) if own else {})


def load_encoder(net: nn.Module, path: Path) -> None:
    """Load the encoder in a file into ``net``, whatever library wrote it; heads in the file are ignored.

    Position embeddings of another image size are resampled.

    Args:
        net: the bare timm network.
        path: a file of weights, or a folder of a run or of Hugging Face.

    Raises:
        UserError: the file cannot be read, or its tensors do not match the network.
    """
    file = weights_file(path)
    checkpoint = read_checkpoint(file)
    if not flatten(checkpoint):
        raise UserError(f"The weights {file} hold no named tensors, but {describe(checkpoint)}: {STATE_DICT}.")
    found = find(net, encoder_state(checkpoint) or checkpoint, f"The weights {file}")
    if found.resampled:
        log.warning("The weights %s: position embeddings are resampled %s.", file, found.resampled)
    net.load_state_dict(net.state_dict() | found.tensors)


def load_tensors(net: nn.Module, entries: dict[str, Any], source: str) -> None:
    """Load tensors into ``net`` if they are exactly its own, but for a classifier or another head beside it.

    As in torch, a count of batches that a BatchNorm has seen (``num_batches_tracked``) may be missing.

    Args:
        net: the bare network, or a method with all of its networks.
        entries: tensors by name; and the extra state of a method, if it has any.
        source: the subject of the error, such as "The weights FILE".

    Raises:
        UserError: a tensor is missing, left over, of another shape, not finite, sparse, or without values.
    """
    tensors = tensors_of(net)
    state = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    ways = TIMM.ways({name: name for name in tensors}) or {}
    check(net, match(net, tensors, state, TIMM, ways), source)
    own = net.state_dict()
    net.load_state_dict(own | {name: value for name, value in entries.items() if name in own})
