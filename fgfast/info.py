"""What runs here: versions, devices, backends, and why one is missing."""

import importlib.metadata
import platform
from typing import Any

import torch

import fgfast
from fgfast.backend import BACKENDS, missing

_PACKAGES = ("torch", "torchvision", "triton", "timm", "nvidia-dali-cuda130", "scikit-learn", "safetensors")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> dict[str, Any]:
    """Versions, devices and backends as plain values.

    Returns:
        {"versions": {package: version}, "devices": [text], "backends": {name: "ready" or why it is missing}}
    """
    devices = [f"cpu: {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append(f"cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}")
    if not torch.cuda.is_available():
        devices.append("cuda: none (no driver or no device was found)")
    versions = {"fgfast": fgfast.__version__, "python": platform.python_version()} | {p: _version(p) for p in _PACKAGES}
    backends = {name: missing(name) or "ready" for name in BACKENDS if name != "auto"}
    return {"versions": versions, "devices": devices, "backends": backends}


def as_text(values: dict[str, Any]) -> str:
    """:func:`info` for people."""
    lines = [f"{name:<20} {version}" for name, version in values["versions"].items()]
    lines += ["", *values["devices"], ""]
    lines += [
        f"backend {name:<12} {'ready' if state == 'ready' else 'missing: ' + state}"
        for name, state in values["backends"].items()
    ]
    return "\n".join(lines)
