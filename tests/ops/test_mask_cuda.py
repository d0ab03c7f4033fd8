"""The CUDA code of the mask sampler without a GPU: compiled for the CPU, thread by thread, it gives the CPU's masks.

tests/ops/emulated/cuda_runtime.h stands in for CUDA. It cannot test what needs a GPU (memory model, speed).
"""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fgfast import mask_images, pivotal_mask
from fgfast.backend import missing
from fgfast.ops import mask as op
from fgfast.ops.mask import STRATEGIES
from tests.ops.test_mask import rough

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.skipif(missing("native") is not None, reason=f"{missing('native')}"),
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The extension with its CUDA part, for the CPU."""
    import pybind11

    folder = tmp_path_factory.mktemp("emulated")
    source = (ROOT / "csrc/pivotal_cuda.cu").read_text()
    source, launches = re.subn(
        r"(\w+(?:<\w+>)?)<<<(.+?)>>>\((.*)\);", r"emulated::launch([&] { \1(\3); }, \2);", source
    )
    source, memories = re.subn(
        r"extern __shared__ unsigned char memory\[\];", "unsigned char* memory = emulated::memory;", source
    )
    assert (launches, memories) == (4, 1)
    (folder / "pivotal_cuda.cpp").write_text(source)
    library = folder / "_native.so"
    include = [ROOT / "tests/ops/emulated", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fPIC", "-shared", "-DFGFAST_CUDA", "-w",
         *[f"-I{path}" for path in include], ROOT / "csrc/bindings.cpp", ROOT / "csrc/pivotal_cpu.cpp",
         ROOT / "csrc/pyramid_cpu.cpp", folder / "pivotal_cuda.cpp", "-o", library],
        check=True,
    )  # fmt: skip
    spec = importlib.util.spec_from_file_location("_native", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def as_on_a_gpu(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations with backend "native" run the CUDA code."""
    import fgfast._native as native

    for name in ("pivotal_mask", "mask_images"):
        monkeypatch.setattr(native, name, getattr(emulated, name))
    monkeypatch.setattr(op, "_where", lambda _: (True, 0, 1))


def both(attention: Tensor, **options: Any) -> None:
    """Masks, indices and images of the CUDA code and of the PyTorch path are the same."""
    ours, expected = (pivotal_mask(attention, backend=name, **options) for name in ("native", "torch"))
    for a, b in zip(ours, expected, strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("layers", "batch", "heads", "patches", "keep"),
    [(3, 3, 5, 196, 0.3), (1, 2, 1, 1, 1.0), (2, 2, 3, 256, 1.0), (2, 2, 4, 289, 0.004), (2, 1, 21, 4096, 0.5)],
)
def test_masks_are_those_of_the_cpu(
    strategy: str, layers: int, batch: int, heads: int, patches: int, keep: float
) -> None:
    """Zeros, denormals and ties among them; fewer and more patches than threads."""
    both(rough(layers, batch, heads, patches, seed=patches), keep=keep, strategy=strategy, seed=5)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes_and_strides(dtype: torch.dtype) -> None:
    """Any strides are read in place."""
    x = rough(4, 3, 6, 200, seed=1).to(dtype)
    both(x[::2, :, 1::2, 4:])
    both(x[::2, :, 1::2, 3:], keep=0.6)
    both(x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), keep=0.7)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", [False, True], ids=["NCHW", "channels last"])
def test_images_are_masked_in_the_same_launch(dtype: torch.dtype, channels: int, last: bool) -> None:
    """Wide and narrow accesses, several slices per image, gaps between rows."""
    order = torch.channels_last if last else torch.contiguous_format
    x = rough(2, 2, 3, 16)
    for side in (128, 20):
        images = torch.randn(2, channels, side, side + 4).to(dtype, memory_format=order)
        both(x, images=images[..., :side])
        both(x, images=images[..., 1 : side + 1])


@pytest.mark.usefixtures("as_on_a_gpu")
def test_gradient_of_images() -> None:
    """The backward pass masks too."""
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    masked = pivotal_mask(rough(2, 2, 3, 16), images=images, backend="native")
    assert masked.images is not None
    masked.images.sum().backward()
    kept = masked.mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(2, 3, 16, 16)
    assert images.grad is not None
    assert torch.equal(images.grad, kept.float())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_an_error_from_before_is_not_reported(emulated: ModuleType) -> None:
    """CUDA keeps the last error of any call until someone asks for it."""
    assert emulated.__file__ is not None
    last = ctypes.c_int.in_dll(ctypes.CDLL(emulated.__file__), "emulated_error")
    x, images = rough(1, 2, 2, 16), torch.randn(2, 3, 16, 16)
    for run in (lambda: both(x), lambda: both(x, images=images), lambda: mask_images(images, x[0, :, 0] > 0)):
        last.value = 700
        run()
        assert last.value == 0
