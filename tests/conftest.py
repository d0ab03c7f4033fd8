"""Fixtures of several folders: a cache of their own, a tiny drawn set; and Triton interpreted without a GPU."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported; there is no device for its kernels

TINY = "test_resnet"  # timm's smallest residual network: 0.3 M weights


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the manifest of checked files out of the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FGFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic set of 3 classes and 36 pictures of 48 px."""
    from fgfast.data.synthetic import generate

    return Path(generate(tmp_path_factory.mktemp("drawn") / "set", classes=3, images=36, size=48, seed=0, workers=1))
