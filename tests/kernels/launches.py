"""Launch every kernel as on a GPU, without one: Triton binds the arguments and compiles; nothing runs.

``python -m tests.kernels.launches ARCH`` prints a line of kernel names per call, and fails if a call does. Tensors are
on the CPU and filled with zeros where a kernel would write: results are meaningless. They pass for tensors of the
second device while the first is current, and a launch fails that is not on the second.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fgfast
from fgfast import Ids
from fgfast.kernels import configs

LARGEST_GRID = 65_535  # in the second direction
launched: list[str] = []


class Launcher:
    """Replaces Triton's launcher of a compiled kernel."""

    def __init__(self, source: Any, _metadata: Any) -> None:
        self.name = source.fn.__name__

    def __call__(self, x: int, y: int, z: int, stream: int, *_: Any) -> None:
        assert 0 < x < 1 << 31
        assert 0 < y <= LARGEST_GRID
        assert z == 1
        assert stream == Driver.stream_of(1), f"{self.name} is launched on the device that is current"
        launched.append(self.name)


class Driver:
    """A driver of a GPU that accepts every kernel."""

    launcher_cls = Launcher
    device = 0

    def __init__(self, arch: str) -> None:
        self.arch, self.utils = arch, self

    def get_current_device(self) -> int:
        return self.device

    @staticmethod
    def stream_of(device: int) -> int:
        return 100 + device

    get_current_stream = stream_of

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": configs.SHARED[self.arch] * 1024}

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads


@contextmanager
def on_second_device(_: Tensor) -> Iterator[None]:
    """Stands for `on_device_of`."""
    before, driver.active.device = driver.active.device, 1
    try:
        yield
    finally:
        driver.active.device = before


def pretend(arch: str) -> None:
    """Make fgfast treat CPU tensors as GPU tensors."""
    driver.set_active(Driver(arch))
    answers = {
        "check_triton": lambda *_: None, "missing": lambda *_: None, "processors": lambda *_: 132,
        "architecture": lambda *_: arch, "on_device_of": on_second_device,
    }  # fmt: skip
    for name, module in list(sys.modules.items()):
        for function in answers.keys() & vars(module).keys() if name.startswith("fgfast.") else ():
            setattr(module, function, answers[function])
    product = torch.bmm

    def bmm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:  # only implemented on GPUs
        return product(a.to(out_dtype), b.to(out_dtype))

    torch.bmm, torch.empty, torch.empty_like = bmm, torch.zeros, torch.zeros_like
    Tensor.new_empty = Tensor.new_zeros


def contrast(
    dtype: torch.dtype, channels: int, same: bool = False, bank: int = 0, learn: bool = False, rows: int = 700,
    **options: Any,
) -> None:  # fmt: skip
    """Forward and backward."""
    query = torch.randn(rows, channels).to(dtype).requires_grad_()
    image, part, view = torch.arange(rows) // 2, torch.zeros(rows, dtype=torch.int32), torch.arange(rows) % 2
    temperature = torch.tensor(0.1, requires_grad=True) if learn else 0.1
    fgfast.contrastive_loss(
        query, query if same else query.detach().clone().requires_grad_(), query_ids=Ids(image, part, view),
        key_ids=Ids(image, part, view if same else view + 1), temperature=temperature,
        bank=torch.randn(bank, channels).to(dtype).requires_grad_() if bank else None, **options,
    ).backward()  # fmt: skip


def sigmoid(dtype: torch.dtype, channels: int) -> None:
    """Forward and backward."""
    image, text = (torch.randn(700, channels).to(dtype).requires_grad_() for _ in range(2))
    scale, bias = (torch.tensor(x, requires_grad=True) for x in (10.0, -10.0))
    fgfast.SigLIPLoss()(image, text, scale, bias).backward()


def pool(features: Tensor, labels: Tensor, n_parts: int, **options: Any) -> None:
    """Forward and backward."""
    features = features.requires_grad_()
    fgfast.part_pool(features, labels, n_parts, **options).pooled.float().sum().backward()


def maps(dtype: torch.dtype, last: bool = False) -> list[Tensor]:
    """A pyramid."""
    order = torch.channels_last if last else torch.contiguous_format
    return [torch.randn(2, d, n, n).to(dtype, memory_format=order) for d, n in ((64, 16), (96, 8), (130, 4))]


HALF, FULL = torch.bfloat16, torch.float32
CALLS: dict[str, Callable[[], object]] = {
    "contrast": lambda: contrast(HALF, 128, bank=40, learn=True),
    "contrast of itself": lambda: contrast(HALF, 256, same=True),
    "contrast by channels": lambda: contrast(FULL, 300, negatives="same_image", normalize=False, precision="tf32"),
    "contrast by chunks": lambda: contrast(HALF, 300, bank=40, learn=True, rows=1500),
    "sigmoid loss": lambda: sigmoid(HALF, 128),
    "sigmoid loss by channels": lambda: sigmoid(FULL, 300),
    "kmeans": lambda: fgfast.kmeans(torch.randn(2, 48, 20, 20).to(HALF), 5, n_iter=2),
    "kmeans, cosine": lambda: fgfast.kmeans(
        torch.randn(2, 400, 48), 40, n_iter=1, metric="cosine", weight=torch.rand(2, 400), empty="keep"
    ),
    "kmeans, split problems": lambda: fgfast.kmeans(torch.randn(1, 4000, 48), 2, n_iter=1),
    "kmeans of a pyramid": lambda: fgfast.kmeans(maps(HALF), 5, size=(16, 16), n_iter=1),
    "kmeans of a pyramid, cosine": lambda: fgfast.kmeans(
        maps(FULL, last=True), 5, size=16, n_iter=1, metric="cosine", weight=torch.rand(2, 16, 16), init="random"
    ),
    "kmeans_step": lambda: fgfast.kmeans_step(torch.randn(2, 400, 768).to(HALF), torch.randn(2, 25, 768)),
    "kmeans_step, large": lambda: fgfast.kmeans_step(
        torch.randn(2, 400, 1030), torch.randn(2, 200, 1030), metric="cosine", deterministic=False
    ),
    "part_pool": lambda: pool(
        torch.randn(2, 130, 20, 20).to(HALF), torch.randint(0, 10, (2, 20, 20)), 10, weight=torch.rand(2, 20, 20)
    ),
    "part_pool, one image": lambda: pool(torch.randn(1, 16, 90, 90), torch.randint(0, 10, (1, 90, 90)), 10),
    "part_pool, id maps": lambda: pool(
        torch.randn(2, 130, 7, 7).to(HALF), torch.zeros(2, 14, 14, dtype=torch.uint8), 10, weight=torch.rand(2, 7, 7)
    ),
    "part_pool, small": lambda: pool(torch.randn(2, 136, 7, 7).to(HALF), torch.zeros(2, 7, 7, dtype=torch.int64), 10),
    "part_pool, many": lambda: pool(torch.randn(2, 400, 70), torch.randint(0, 300, (2, 400)), 300, reduce="sum"),
    "labels_to_grid": lambda: fgfast.labels_to_grid(torch.zeros(2, 40, 40, dtype=torch.uint8), (10, 10), 100),
    "assign_and_pool": lambda: fgfast.assign_and_pool(torch.randn(2, 130, 9, 9).to(HALF), torch.randn(2, 10, 130)),
    "perturb": lambda: fgfast.perturb(
        torch.randn(16, 500).to(HALF), torch.randn(16, 500).to(HALF), low_variance=torch.rand(500) < 0.5,
        std=torch.rand(500),
    ),
}  # fmt: skip


def main(arch: str) -> int:
    """Make every call."""
    pretend(arch)
    for name, call in CALLS.items():
        launched.clear()
        with fgfast.use_backend("triton"):
            call()
        print(f"{name}:", *launched, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
