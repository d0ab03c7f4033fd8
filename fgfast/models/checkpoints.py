"""Reading files of weights: torch.save and safetensors, told apart by their content; no code of a file runs."""

import argparse
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fgfast.checksum import NO_CHECKSUM, DamagedError, verify
from fgfast.errors import UserError

log = logging.getLogger("fgfast")

STATE_DICT = "give a state dict, as torch.save(network.state_dict(), FILE) writes it"
_TORCH = (b"PK\3\4", b"\x80")  # the first bytes of a zip archive and of a pickle
_MOST_HEADER = 100_000_000  # bytes; safetensors reads no larger one


class _Inert:
    """Stands in for classes that a file names beside its weights: no code of the file runs, their values are lost."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_NUMPY_SCALAR = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.dtype", "_codecs.encode")
_ALLOWED: list[Any] = [argparse.Namespace, *((_Inert, name) for name in _NUMPY_SCALAR)]


def read_checkpoint(path: Path, *, quiet: bool = False) -> dict[str, Any]:
    """A checkpoint file as a dictionary, read with weights_only=True, whatever its suffix.

    The values of numpy scalars, and in checkpoints of Lightning those of all other classes, are lost.

    Args:
        path: the file.
        quiet: do not warn of a file of fgfast without a checksum.

    Raises:
        UserError: the file is missing or broken, holds no dictionary, or needs code of its own to be read.
    """
    if not path.is_file():
        raise UserError(
            f"The weights {path} do not exist: give a file, a folder of a run or of Hugging Face, 'timm' or 'none'."
        )
    with path.open("rb") as file:
        try:
            sealed = verify(file, safetensors=_is_safetensors(path, file))
        except DamagedError as error:
            raise UserError(f"The weights {path} are cut or damaged ({error}): copy or download them again.") from None
        content = load_dictionary(path, file)
        if not (sealed or quiet) and _is_of_fgfast(path, file, content):
            log.warning("%s %s", path, NO_CHECKSUM)
    return content


def _is_safetensors(path: Path, file: BinaryIO) -> bool:
    """Whether a file begins as one of safetensors does; the suffix decides for a file that begins as neither."""
    file.seek(0)
    start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MOST_HEADER:
        return True
    return path.suffix == ".safetensors" and not start.startswith(_TORCH)


def _is_of_fgfast(path: Path, file: BinaryIO, content: dict[str, Any]) -> bool:
    return "timm_model" in read_metadata(path) if _is_safetensors(path, file) else is_run_checkpoint(content)


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file that :func:`read_checkpoint` reads; none of another than safetensors."""
    with path.open("rb") as file:
        if not _is_safetensors(path, file):
            return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as opened:
        return opened.metadata() or {}


def is_run_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether the content of a file is a checkpoint of a run of fgfast.

    Example:
        >>> is_run_checkpoint({"name": "simclr", "method": {}}), is_run_checkpoint({"state_dict": {}})
        (True, False)
    """
    return {"name", "method"} <= content.keys() and isinstance(content["method"], dict)


def load_dictionary(path: Path, file: BinaryIO) -> dict[str, Any]:
    """The dictionary in a file that is open, as :func:`read_checkpoint` reads it, but without a look at its checksum.

    Raises:
        UserError: as there.
    """
    safetensors = _is_safetensors(path, file)
    try:
        if safetensors:
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([*_ALLOWED, *_classes_of_lightning(file)]):
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch and safetensors raise various types for a broken file
        reason = _why_unreadable(file, error, safetensors=safetensors)
        raise UserError(f"The weights {path} {reason}.") from error
    if not isinstance(content, dict):
        raise UserError(f"The weights {path} hold {describe(content)}: {STATE_DICT}.")
    return content


def _classes_of_lightning(file: BinaryIO) -> list[Any]:
    """A stand-in for each class that a checkpoint of Lightning names, such as those of its hyperparameters."""
    file.seek(0)
    if file.read(4) != _TORCH[0]:
        return []
    with zipfile.ZipFile(file) as archive:
        members = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if not any(b"pytorch-lightning_version" in archive.read(name) for name in members):
            return []
    file.seek(0)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    # torch fills nothing but plain dictionaries
    return [(dict if name.endswith(".AttributeDict") else _Inert, name) for name in names]


def _why_unreadable(file: BinaryIO, error: Exception, *, safetensors: bool) -> str:
    """What is wrong with a file that raised ``error``, and the remedy."""
    refused = re.search(r"GLOBAL ([\w.]*\w) (was|whose)", str(error))
    if refused:
        return f"hold more than tensors and plain values, and reading {refused[1]} could run code: {STATE_DICT}"
    if "TorchScript" in str(error):
        return f"are a TorchScript program: {STATE_DICT}"
    file.seek(0)
    start = file.read(32)
    if not start:
        return "are an empty file: copy or download it again"
    if not safetensors and not start.startswith((b"PK", _TORCH[1])):
        return f"are no file of torch.save, which would not begin with {start!r}: copy or download it again"
    return f"could not be read, as the file is cut or damaged ({type(error).__name__}): copy or download it again"


def describe(content: object) -> str:
    """What a checkpoint is, in words.

    Example:
        >>> describe([torch.zeros(2)]), describe(torch.zeros(2, 3)), describe({"epoch": 3})
        ('a list of 1 tensor', 'a tensor of shape [2, 3]', "a dictionary of 'epoch'")
    """
    if isinstance(content, Tensor):
        return f"a tensor of shape {list(content.shape)}"
    if isinstance(content, list | tuple):
        kind = "tensor" if content and all(isinstance(v, Tensor) for v in content) else "value"
        return f"a {type(content).__name__} of {len(content)} {kind}{'' if len(content) == 1 else 's'}"
    if isinstance(content, Mapping):
        return f"a dictionary of {list_names([*content])}" if content else "an empty dictionary"
    return f"one value of type {type(content).__name__}"


def list_names(names: list[Any]) -> str:
    """The first three of a list of names, and how many more there are.

    Example:
        >>> list_names(["a", "b"]), list_names([1, 2, 3, 4])
        ("'a', 'b'", '1, 2, 3 and 1 more')
    """
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
