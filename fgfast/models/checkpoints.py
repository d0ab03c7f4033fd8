"""Reading files of weights: torch.save and safetensors, told apart by their content; no code of a file runs."""

import argparse
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import torch
from torch import Tensor

from fgfast.checksum import NO_CHECKSUM, DamagedError, verify
from fgfast.errors import UserError
from fgfast.formats import read_json

log = logging.getLogger("fgfast")

STATE_DICT = "give a state dict, as torch.save(network.state_dict(), FILE) writes it"
INDEX = ".index.json"
"""How the name of an index of Hugging Face ends, which says in which of several files each tensor is."""
_TORCH = (b"PK\3\4", b"\x80")  # the first bytes of a zip archive and of a pickle
_MOST_HEADER = 100_000_000  # bytes; safetensors reads no larger one


class _Inert:
    """Stands in for classes that a file names beside its weights: no code of the file runs, their values are lost."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


_NUMPY_SCALAR = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.dtype", "_codecs.encode")
_ALLOWED: list[Any] = [argparse.Namespace, *((_Inert, name) for name in _NUMPY_SCALAR)]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint file as a dictionary, read with weights_only=True, whatever its suffix.

    The values of numpy scalars, and in checkpoints of Lightning those of all other classes, are lost.

    Args:
        path: the file, or the index of a checkpoint of Hugging Face in several files.

    Raises:
        UserError: the file is missing or broken, holds no dictionary, or needs code of its own to be read.
    """
    content: dict[str, Any] = {}
    for part in _parts(path):
        with part.open("rb") as file:
            try:
                sealed = verify(file, safetensors=_is_safetensors(part, file))
            except DamagedError as error:
                raise UserError(
                    f"The weights {part} are cut or damaged ({error}): copy or download them again."
                ) from None
            content |= load_dictionary(part, file)
            if not sealed and _is_of_fgfast(part, file, content):
                log.warning("%s %s", part, NO_CHECKSUM)
    return content


def inspect_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What :func:`read_checkpoint` reads, and the metadata of a file of safetensors, for their names and texts.

    Most of the file is not read: tensors are mapped into memory, and the checksum is not compared.

    Raises:
        UserError: as there.
    """
    content: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for part in _parts(path):
        with part.open("rb") as file:
            content |= load_dictionary(part, file, mapped=True)
            metadata |= _read_metadata(part, file)
    return content, metadata


class _Index(TypedDict):
    weight_map: dict[str, str]  # from names of tensors to those of files beside the index


def _parts(path: Path) -> list[Path]:
    """The files of a checkpoint: the one at ``path``, or those that an index of Hugging Face lists."""
    if not path.is_file():
        raise UserError(
            f"The weights {path} do not exist: give a file, a folder of a run or of Hugging Face, 'timm' or 'none'."
        )
    if not path.name.endswith(INDEX):
        return [path]
    remedy = "copy or download it again"
    names = [*dict.fromkeys(read_json(path, _Index, remedy=remedy)["weight_map"].values())]
    if not names or not all(name and name == Path(name).name for name in names):
        raise UserError(f"The index {path} does not name the files beside it that hold the weights: {remedy}.")
    if missing := [name for name in names if not path.with_name(name).is_file()]:
        raise UserError(
            f"The weights {path} are in {len(names)} files, and {list_names(missing)} are not there: copy or download "
            "all of them."
        )
    return [path.with_name(name) for name in names]


def _is_safetensors(path: Path, file: BinaryIO) -> bool:
    """Whether a file begins as one of safetensors does; the suffix decides for a file that begins as neither."""
    file.seek(0)
    start = file.read(9)
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _MOST_HEADER:
        return True
    return path.suffix == ".safetensors" and not start.startswith(_TORCH)


def _is_of_fgfast(path: Path, file: BinaryIO, content: dict[str, Any]) -> bool:
    return "timm_model" in _read_metadata(path, file) or is_run_checkpoint(content)


def _read_metadata(path: Path, file: BinaryIO) -> dict[str, str]:
    """The metadata of a file of safetensors, none of another."""
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


def load_dictionary(path: Path, file: BinaryIO, *, mapped: bool = False) -> dict[str, Any]:
    """The dictionary in a file that is open, as :func:`read_checkpoint` reads it, but without a look at its checksum.

    Args:
        path: the file.
        file: the same, open.
        mapped: map the tensors into memory where the format allows it, instead of reading them.

    Raises:
        UserError: as there.
    """
    safetensors = _is_safetensors(path, file)
    try:
        if safetensors:
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([*_ALLOWED, *_classes_of_lightning(file)]):
            mapped = mapped and _can_be_mapped(file)
            file.seek(0)
            content = torch.load(path if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # torch and safetensors raise various types for a broken file
        reason = _why_unreadable(file, error, safetensors=safetensors)
        raise UserError(f"The weights {path} {reason}.") from error
    if not isinstance(content, dict):
        raise UserError(f"The weights {path} hold {describe(content)}: {STATE_DICT}.")
    return content


def _can_be_mapped(file: BinaryIO) -> bool:
    """Whether a file of torch.save is an archive, not of torch before 1.6, that no one has compressed."""
    file.seek(0)
    if file.read(4) != _TORCH[0]:
        return False
    with zipfile.ZipFile(file) as archive:
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


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
