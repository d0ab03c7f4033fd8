"""Helpers of the cases: dtypes, tolerances, seeded inputs, torch.compile, and peers that may be missing."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import Answer, Judge, Unavailable, Verdict, distance
from fgfast.backend import missing

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Bound of |answer - reference| / |reference| for any size: a few roundings of the inputs.
TOLERANCES = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 5e-3, "bf16": 3e-2}


def precision(dtype: str) -> str:
    """Precision of float32 products."""
    return "tf32" if dtype == "tf32" else "ieee"


def ours(device: torch.device, native: bool = False) -> str:
    """The backend that "auto" takes: the compiled sampler for ``native``, else Triton on a GPU and PyTorch on a CPU."""
    cuda = device.type == "cuda"
    if native:
        found = missing("native") is None and (not cuda or importlib.import_module("fgfast._native").CUDA)
        return "native" if found else "torch"
    return "triton" if cuda else "torch"


def generator(device: torch.device, seed: int) -> torch.Generator:
    """Random numbers on the device."""
    return torch.Generator(device=device).manual_seed(seed)


def compiled(run: Callable[..., Any]) -> Callable[..., Any]:
    """The function under torch.compile, for the shapes of one case."""
    torch._dynamo.reset()
    return torch.compile(run, dynamic=False)


def peer(module: str, package: str) -> Any:
    """A module of a peer.

    Raises:
        Unavailable: it is not installed, or does not import here.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == module.split(".")[0]
        raise Unavailable(f"{package} " + ("is not installed" if absent else f"does not import: {error}")) from error


def judge_by(reference: Callable[[Any], Answer]) -> Callable[[Any], Judge]:
    """A judge that measures the distance from the answer of ``reference``."""

    def judge(inputs: Any) -> Judge:
        right = reference(inputs)
        return lambda answer: Verdict(distance(answer, right))

    return judge


def need_gpu(device: torch.device, package: str) -> None:
    """Raise Unavailable for a peer that runs only on a GPU."""
    if device.type != "cuda":
        raise Unavailable(f"{package} needs a GPU")


def sizes(**named: int) -> str:
    """A shape as it is written in results.csv.

    Example:
        >>> sizes(M=4, D=2)
        'M=4 D=2'
    """
    return " ".join(f"{name}={n}" for name, n in named.items())
