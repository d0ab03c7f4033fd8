"""Loading of weights from files: runs of fgfast, timm, and public checkpoints of DetCon, MoCo and DINO."""

import argparse
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from fgfast.checksum import NO_CHECKSUM, DamagedError, verify
from fgfast.errors import UserError

log = logging.getLogger("fgfast")

_PREFIXES = (
    "module.encoder_q.", "module.base_encoder.", "module.online_network.encoder.", "online_network.encoder.",
    "encoder_q.", "base_encoder.", "module.backbone.", "backbone.", "module.encoder.", "encoder.net.", "encoder.",
    "module.", "net.",
)  # fmt: skip
# Parameters beside the modules without which the tokens of a network would be others
_TOKENS = re.compile(
    r"(abs(olute)?_)?pos(ition(al)?)?_emb\w*|(cls|class|dist|reg(ister)?|storage|global)_(tokens?|embeddings?)"
)
_COUNTS = ("total_ops", "total_params")  # written by profilers into every module
_STATE_DICT = "give a state dict, as torch.save(network.state_dict(), FILE) writes it"


class _Inert:
    """Stands in for numpy's scalars, such as the best accuracy that many checkpoints hold: no code of the file runs."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_NUMPY_SCALAR = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.dtype", "_codecs.encode")
_ALLOWED: list[Any] = [argparse.Namespace, *((_Inert, name) for name in _NUMPY_SCALAR)]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint file as a dictionary, read with weights_only=True; numpy scalars in it lose their values.

    Raises:
        UserError: the file is missing or broken, holds no dictionary, or needs code of its own to be read.
    """
    if not path.is_file():
        raise UserError(f"The weights {path} do not exist: give a file, a run folder, 'timm' or 'none'.")
    with path.open("rb") as file:
        try:
            sealed = verify(file, safetensors=path.suffix == ".safetensors")
        except DamagedError as error:
            raise UserError(f"The weights {path} are cut or damaged ({error}): copy or download them again.") from None
        content = load_dictionary(path, file)
    if not sealed and _is_of_fgfast(path, content):
        log.warning("%s %s", path, NO_CHECKSUM)
    return content


def _is_of_fgfast(path: Path, content: dict[str, Any]) -> bool:
    if path.suffix != ".safetensors":
        return {"name", "method"} <= content.keys()
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return "timm_model" in (file.metadata() or {})


def load_dictionary(path: Path, file: BinaryIO) -> dict[str, Any]:
    """The dictionary in a file that is open, as :func:`read_checkpoint` reads it, but without a look at its checksum.

    Raises:
        UserError: as there.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        file.seek(0)
        with torch.serialization.safe_globals(_ALLOWED):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch and safetensors raise various types for a broken file
        raise UserError(f"The weights {path} {_why_unreadable(path, error)}.") from error
    if not isinstance(content, dict):
        raise UserError(f"The weights {path} hold {_describe(content)}: {_STATE_DICT}.")
    return content


def _why_unreadable(path: Path, error: Exception) -> str:
    """What is wrong with a file that raised ``error``, and the remedy."""
    refused = re.search(r"GLOBAL ([\w.]*\w) (was|whose)", str(error))
    if refused:
        return f"hold more than tensors and plain values, and reading {refused[1]} could run code: {_STATE_DICT}"
    if "TorchScript" in str(error):
        return f"are a TorchScript program: {_STATE_DICT}"
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        return "are an empty file: copy or download it again"
    if path.suffix != ".safetensors" and not start.startswith((b"PK", b"\x80")):
        return f"are no file of torch.save, which would not begin with {start!r}: copy or download it again"
    return f"could not be read, as the file is cut or damaged ({type(error).__name__}): copy or download it again"


def _describe(content: object) -> str:
    """What a checkpoint is, in words.

    Example:
        >>> _describe([torch.zeros(2)]), _describe(torch.zeros(2, 3)), _describe({"epoch": 3})
        ('a list of 1 tensor', 'a tensor of shape [2, 3]', "a dictionary of 'epoch'")
    """
    if isinstance(content, Tensor):
        return f"a tensor of shape {list(content.shape)}"
    if isinstance(content, list | tuple):
        kind = "tensor" if content and all(isinstance(v, Tensor) for v in content) else "value"
        return f"a {type(content).__name__} of {len(content)} {kind}{'' if len(content) == 1 else 's'}"
    if isinstance(content, Mapping):
        return f"a dictionary of {_names([*content])}" if content else "an empty dictionary"
    return f"one value of type {type(content).__name__}"


def _names(names: list[Any]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def encoder_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The encoder's tensors in a checkpoint of any supported format, with the names of the bare network.

    Takes the entry "teacher" (DINO), "state_dict", "model" or "method" if there is one, keeps the names with the first
    known prefix that occurs, and strips it, until none occurs.
    """
    for name in ("teacher", "state_dict", "model", "method"):
        if isinstance(checkpoint.get(name), dict):
            checkpoint = checkpoint[name]
            break
    tensors = {k: v for k, v in checkpoint.items() if isinstance(k, str) and isinstance(v, Tensor)}
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
    checkpoint = read_checkpoint(file)
    state = encoder_state(checkpoint)
    if not state:
        raise UserError(f"The weights {file} hold no named tensors, but {_describe(checkpoint)}: {_STATE_DICT}.")
    load_tensors(net, state, f"The weights {file}")


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
    own = net.state_dict()
    needed, state = ({k: v for k, v in d.items() if isinstance(v, Tensor)} for d in (own, entries))
    unusable = [k for k in needed if k in state and _is_unusable(state[k])]
    if unusable:
        raise UserError(
            f"{source} are sparse, quantised or without values in {_names(unusable)}: give them as dense tensors."
        )
    missing = [k for k in needed if k not in state and not k.endswith("num_batches_tracked")]
    shapes = [
        f"{k!r} {list(state[k].shape)} instead of {list(v.shape)}"
        for k, v in needed.items()
        if k in state and state[k].shape != v.shape
    ]
    found = sum(k in state for k in needed)
    left = _left_over(net, state) if found else list(state)
    if missing or shapes or left:
        parts = [f"{_names(missing)} missing"] if missing else []
        parts += [f"{_names(left)} left over"] if left else []
        parts += [f"{len(shapes)} of another shape, such as {shapes[0]}"] if shapes else []
        raise UserError(
            f"{source} are of another network (the file has {len(state)} tensors, {found} of the {len(needed)} of "
            f"{_network(net)}: {'; '.join(parts)}): {_remedy(net, state, missing + left)}."
        )
    infinite = [k for k in needed if k in state and not state[k].float().isfinite().all()]
    if infinite:
        raise UserError(
            f"{source} are not finite in {_names(infinite)}: "
            "the training that wrote them has diverged, give an earlier checkpoint."
        )
    net.load_state_dict(own | {k: v for k, v in entries.items() if k in own})


def _is_unusable(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta


def _left_over(net: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Names of tensors that the network would need to be the same: in one of its modules, or for its tokens."""
    config = getattr(net, "pretrained_cfg", {})
    heads = config.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((heads,) if isinstance(heads, str) else heads))
    known = {*net.state_dict(), *(name for name, _ in net.named_buffers())}  # some buffers are made, not loaded
    modules = {name.partition(".")[0] for name in net.state_dict()}
    return [
        k for k in state
        if k not in known and not k.startswith(heads) and k.rpartition(".")[2] not in _COUNTS
        and (k.partition(".")[0] in modules if "." in k else _TOKENS.fullmatch(k))
    ]  # fmt: skip


def _network(net: nn.Module) -> str:
    return str(getattr(net, "pretrained_cfg", {}).get("architecture") or type(net).__name__)


def _remedy(net: nn.Module, state: dict[str, Tensor], wrong_names: list[str]) -> str:
    embedding, patch = state.get("pos_embed"), getattr(getattr(net, "patch_embed", None), "patch_size", None)
    if not wrong_names and embedding is not None and embedding.ndim == 3 and patch is not None:
        prefix = getattr(net, "num_prefix_tokens", 0) * (not getattr(net, "no_embed_class", False))
        side = math.isqrt(max(0, embedding.shape[1] - prefix))
        if side * side == embedding.shape[1] - prefix:
            return f"give --size {side * patch[0]}"
    return "give its --model and --model-args"
