"""Versions, devices and backends, with the reason why a backend is missing."""

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from fgfast.backend import BACKENDS, missing
from fgfast.errors import UserError

_PACKAGES = ("torch", "torchvision", "triton", "timm", "nvidia-dali-cuda130", "scikit-learn", "safetensors")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """Versions of Python, fgfast and the main packages, and the names of the device and the system.

    Example:
        >>> import fgfast
        >>> versions()["fgfast"] == fgfast.__version__
        True
    """
    packages = {"python": platform.python_version(), "fgfast": _version("fgfast")} | {p: _version(p) for p in _PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"
    return packages | {"device": device, "system": f"{platform.system()} {platform.machine()}"}


def require(*modules: str, extra: str = "train") -> None:
    """Raise a UserError if a module of an extra is not installed.

    Example:
        >>> require("torch", "nosuch")
        Traceback (most recent call last):
        ...
        fgfast.errors.UserError: The package nosuch is not installed: pip install 'fgfast[train]'.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"The package {module} is not installed: pip install 'fgfast[{extra}]'.")


def info() -> dict[str, Any]:
    """Versions, devices and backends as plain values.

    Returns:
        {"versions": {package: version}, "devices": [text], "backends": {name: "ready ..." or the reason}}
    """
    devices = [f"cpu: {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append(f"cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}")
    if not torch.cuda.is_available():
        devices.append("cuda: none (no driver or no device was found)")
    backends = {name: missing(name) or "ready" for name in BACKENDS if name != "auto"}
    if backends["native"] == "ready":
        import fgfast._native as _native

        backends["native"] = "ready, for CPU and CUDA" if _native.CUDA else "ready, for the CPU (built without nvcc)"
    return {"versions": versions(), "devices": devices, "backends": backends}


def as_text(values: dict[str, Any]) -> str:
    """The values of :func:`info` as text."""
    lines = [f"{name:<20} {version}" for name, version in values["versions"].items()]
    lines += ["", *values["devices"], ""]
    lines += [
        f"backend {name:<12} {state if state.startswith('ready') else 'missing: ' + state}"
        for name, state in values["backends"].items()
    ]
    return "\n".join(lines)
