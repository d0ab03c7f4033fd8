"""torch.compile of the encoders of a method."""

import os
import shutil
import sys

import torch

from fgfast.errors import UserError
from fgfast.info import require
from fgfast.methods.base import Method
from fgfast.models.backbone import Backbone


def check_compiler(device: torch.device) -> None:
    """Look for the compiler that torch.compile needs, because it does so itself only in the first step of training.

    Raises:
        UserError: there is none.
    """
    language, variable, names = "C++", "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    if device.type == "cuda":  # Triton compiles the launchers of its kernels
        require("triton")
        language, variable, names = "C", "CC", ["gcc", "clang"]
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(shutil.which(name) for name in names):
        raise UserError(
            f"--compile needs a {language} compiler, and {' or '.join(names)} is not found: install one, "
            f"name it in {variable}, or leave --compile out."
        )


def compile_backbones(method: Method) -> None:
    """Compile the forward pass of every encoder."""
    for module in method.modules():
        if isinstance(module, Backbone):
            module.net.forward_features = torch.compile(module.net.forward_features)
