"""The choice of the implementation that runs an operation, its scope, and why a backend is unavailable."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

KERNELS = ("assign_and_pool", "contrast", "kmeans", "kmeans_step", "labels_to_grid", "part_pool", "perturb")
"""Operations that have Triton kernels."""

BACKENDS = ("auto", "reference", "torch", "triton", "native")

OLDEST = (8, 0)  # compute capability of the oldest NVIDIA GPU that the kernels serve

_chosen = os.environ.get("FGFAST_BACKEND") or "auto"


def missing(backend: str) -> str | None:
    """The reason why ``backend`` cannot run in this process, as a clause without a full stop, or None if it can.

    Example:
        >>> missing("torch") is None
        True
    """
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        if not torch.cuda.is_available():
            return "no CUDA or ROCm device was found and TRITON_INTERPRET is not 1"
        if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST:
            return (
                f"the device has compute capability {'.'.join(map(str, torch.cuda.get_device_capability()))}, under 8.0"
            )
    if backend == "native" and importlib.util.find_spec("fgfast._native") is None:
        return "the compiled extension fgfast._native is not part of this installation"
    return None


# torch.compile treats the result as a constant; torch.compiler.assume_constant_result does this after a slow import.
vars(missing)["_dynamo_marked_constant"] = True


def _check_available(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}: choose one of {', '.join(BACKENDS)}.")
    reason = missing(name)
    if reason is not None:
        raise RuntimeError(f"Backend {name!r} cannot run because {reason}: choose 'auto' or 'torch'.")
    return name


def is_automatic() -> bool:
    """Whether neither :func:`use_backend` nor FGFAST_BACKEND has chosen a backend."""
    return _chosen == "auto"


def check_chosen() -> None:
    """Raise ValueError or RuntimeError if the backend that FGFAST_BACKEND names does not exist or cannot run."""
    _check_available(_chosen, "FGFAST_BACKEND")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operations inside the block with one backend.

    The choice holds for the whole process, applies to the operations that have the backend, and leaves the others on
    "auto". The environment variable FGFAST_BACKEND makes the same choice. A per-call ``backend=`` has precedence and
    is strict. An operation remembers the backend of its forward pass for its backward pass.

    Args:
        name: "auto", "reference", "torch", "triton" or "native".

    Raises:
        ValueError: the name is none of these.
        RuntimeError: the backend cannot run in this process; the message names what is missing.

    Example:
        >>> import torch, fgfast
        >>> with fgfast.use_backend("reference"):
        ...     pool = fgfast.part_pool(torch.ones(1, 4, 2), torch.zeros(1, 4, dtype=torch.int64), 1)
        >>> pool.area.item()
        4.0
    """
    global _chosen
    before, _chosen = _chosen, _check_available(name, "The backend")
    try:
        yield
    finally:
        _chosen = before


def preference(op: str, x: torch.Tensor, plain: tuple[str, ...] = ("torch", "reference")) -> tuple[str, ...]:
    """The backends that ``op`` has for ``x``, the one that "auto" takes first: the kernel on a GPU that can run it.

    Example:
        >>> preference("part_pool", torch.ones(1))[0]
        'torch'
    """
    if op not in KERNELS:
        return plain
    fits = x.device.type == "cuda" and x.dtype != torch.float64 and missing("triton") is None
    return ("triton", *plain) if fits else (*plain, "triton")


def check_triton(name: str, x: torch.Tensor) -> None:
    """Raise unless the Triton kernels can take ``x``: float16, bfloat16 or float32, on a GPU or interpreted.

    Raises:
        TypeError: the dtype.
        RuntimeError: the device.
    """
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise TypeError(f"{name} has dtype {x.dtype}, which the Triton kernels do not take: choose backend 'torch'.")
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(f"{name} is on {x.device} and the Triton kernels run on a GPU: move it or choose 'torch'.")


def resolve(op: str, requested: str | None, available: tuple[str, ...]) -> str:
    """The backend that runs ``op``: the strict per-call request, else the chosen one where the operation has it.

    Args:
        op: name of the operation, for the message.
        requested: the per-call ``backend=``; None means "not asked for".
        available: backends that the operation has, the one that "auto" takes first.

    Raises:
        ValueError: the operation has no such backend.
        RuntimeError: the backend cannot run in this process.
    """
    if requested is not None and requested != "auto":
        if requested in BACKENDS and requested not in available:
            _check_available(requested, "backend")
            raise ValueError(f"{op} has no backend {requested!r}: choose one of {', '.join(available)}.")
        return _check_available(requested, "backend")
    if requested is None and _chosen != "auto":
        _check_available(_chosen, "FGFAST_BACKEND")
        if _chosen in available:
            return _chosen
    return available[0]
