"""Traffic of the kernels over the fewest bytes, counted in Triton's interpreter: ``python -m benchmarks.traffic``.

Shapes are small, and outputs are under a tenth of the inputs where the operation allows it. Bytes are counted by the
model of :mod:`fgfast.kernels.sanitizer`, whose :func:`~fgfast.kernels.sanitizer.checked` also fails on a stray access
or a race. The interpreter stores half-precision results as float32, and the fewest bytes are counted accordingly;
k-means, whose operands must fit on chip beside the pixels, is counted with float16 stored as on a GPU
(:func:`store_float16`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fgfast
from benchmarks.cases.common import sizes
from fgfast.kernels.sanitizer import Traffic, checked, fewest

Row = dict[str, Any]
Inputs = list[Tensor]


class Count(NamedTuple):
    """One pass of an operation: the fewest bytes, the traffic counted, and the largest ratio that is a goal."""

    op: str
    shape: str
    dtype: str
    fewest: int
    traffic: Traffic
    goal: float | None

    def row(self) -> Row:
        """As in results/traffic.csv."""
        moved = self.traffic.bytes
        return {
            "op": self.op, "shape": self.shape, "dtype": self.dtype, "launches": self.traffic.launches,
            "programs": self.traffic.programs, "fewest": self.fewest, "bytes": moved,
            "ratio": round(moved / self.fewest, 3), "goal": "" if self.goal is None else self.goal,
        }  # fmt: skip


def _count(given: Inputs, run: Callable[[], Any]) -> tuple[Any, Traffic]:
    with checked(*(x.detach() for x in given)) as traffic:
        answer = run()
    return answer, traffic


def part_pool(name: str, dtype: torch.dtype, quick: bool) -> Iterator[Count]:
    x = torch.randn(1, 128, 40, 40).to(dtype).requires_grad_()
    labels = torch.randint(-1, 8, (1, 40, 40))
    shape = sizes(B=1, D=128, N=1600, K=8)
    out, traffic = _count([x, labels], lambda: fgfast.part_pool(x, labels, 8, backend="triton"))
    yield Count("part_pool forward", shape, name, fewest(x, labels, out.pooled.float(), out.area), traffic, 1.10)
    g = torch.randn_like(out.pooled)
    (grad,), traffic = _count([], lambda: torch.autograd.grad(out.pooled, x, g))
    yield Count("part_pool backward", shape, name, fewest(grad.float(), labels, g, out.area), traffic, 1.10)
    # Eight images: a program each, as 320 are on a GPU.
    x, labels = torch.randn(8, 256, 14, 14).to(dtype), torch.randint(0, 8, (8, 56, 56), dtype=torch.uint8)
    out, traffic = _count([x, labels], lambda: fgfast.part_pool(x, labels, 8, backend="triton"))
    smallest = fewest(x, labels, out.pooled.float(), out.area, torch.empty(8, 14, 14, dtype=torch.int32))
    shape = sizes(B=8, D=256, N=196, H=56, W=56, K=8)
    yield Count("part_pool forward from a full-resolution map", shape, name, smallest, traffic, 1.10)


def labels_to_grid(name: str, dtype: torch.dtype, quick: bool) -> Iterator[Count]:
    labels = torch.randint(-1, 15, (1, 128, 128))
    grid, traffic = _count([labels], lambda: fgfast.labels_to_grid(labels, 32, 15, backend="triton"))
    yield Count("labels_to_grid", "B=1 H=128 W=128 h=32 K=15", "int64", fewest(labels, grid), traffic, 1.10)


@contextmanager
def store_float16(dtype: torch.dtype) -> Iterator[None]:
    """Let k-means compute with float16 itself, which the interpreter does rightly where no bfloat16 comes in.

    (It does where pixels have factors, and in the sums of a pyramid: there bytes are right and sums are not.)
    """
    from fgfast.kernels.kmeans import pyramid as kmeans_pyramid
    from fgfast.kernels.kmeans import step as kmeans_step

    kept = [(m, f, getattr(m, f)) for m in (kmeans_step, kmeans_pyramid) for f in ("interpreted", "output_dtype")]
    try:
        for module, name, _ in kept if dtype == torch.float16 else ():
            setattr(module, name, (lambda: False) if name == "interpreted" else lambda dtype: dtype)
        yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


def kmeans_step(name: str, dtype: torch.dtype, quick: bool) -> Iterator[Count]:
    """With the preparation of the centroids.

    Four problems are a program each, as 128 are on a GPU. One problem is split among the processors (four, where there
    is none) and pays only for partial sums and the centroids. From 768 channels on centroids and a tile of pixels
    fit the 128 KiB on chip in half precision and do not in float32.
    """
    shapes = ((4, 3136, 256, 25), (4, 784, 768, 25), (4, 784, 1024, 15))
    for b, n, d, k in ((1, 1600, 256, 8), *(() if quick else shapes)):
        x, centroids = torch.randn(b, n, d).to(dtype), torch.randn(b, k, d)
        with store_float16(dtype):
            out, traffic = _count([x, centroids], partial(fgfast.kmeans_step, x, centroids, backend="triton"))
        yield Count("kmeans_step", sizes(B=b, N=n, D=d, K=k), name, fewest(x, centroids, *out), traffic, 1.10)


def kmeans(name: str, dtype: torch.dtype, quick: bool) -> Iterator[Count]:
    """The two launches of a step on a pyramid, over the bytes of the levels: both read each level once.

    The small shape is there to be quick: its operands and scores are a fifth of its levels.
    """
    from fgfast.kernels.kmeans.pyramid import Levels, Solver

    resnet50 = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
    for levels, size, k in ((((128, 16, 16), (256, 8, 8)), 16, 8), *(() if quick else ((resnet50, 64, 15),))):
        maps = [torch.randn(1, *shape).to(dtype) for shape in levels]
        with store_float16(dtype):
            x = Levels(maps, (size, size))
            mu, ones = x.pad_channels(None), torch.ones(1, x.pixels)
            solver = Solver(x, k, None, ones, x.squares(mu), mu, "euclidean", "ieee")
            limit, going = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
            solver.move(torch.randn(1, k, x.channels), limit, going, going.clone(), "keep", begin=True)

            def step(solver: Any = solver, going: Tensor = going) -> None:
                solver.score(going)
                solver.sums(going)

            _, traffic = _count([], step)
        shape = sizes(B=1, N=x.pixels, D=x.channels, K=k, levels=len(maps))
        yield Count("kmeans pyramid step", shape, name, fewest(*maps), traffic, None if size == 16 else 2.2)


def assign_and_pool(name: str, dtype: torch.dtype, quick: bool) -> Iterator[Count]:
    x, centroids = torch.randn(1, 256, 24, 24).to(dtype), torch.randn(1, 8, 256)
    run = partial(fgfast.assign_and_pool, x, centroids, backend="triton")
    (pooled, area, labels), traffic = _count([x, centroids], run)
    smallest = fewest(x, centroids, pooled.float(), area, labels)
    yield Count("assign_and_pool", sizes(B=1, D=256, N=576, K=8), name, smallest, traffic, None)


def contrast(name: str, dtype: torch.dtype, quick: bool) -> Iterator[Count]:
    """Bound by its products: the ratio is for the record, and has no goal."""
    m, d = 128, 64
    q, k = (torch.randn(m, d).to(dtype).requires_grad_() for _ in range(2))
    row = torch.arange(m)
    ids = [fgfast.Ids(row // 4, row % 4, torch.full_like(row, view)) for view in range(2)]
    run = partial(fgfast.contrastive_loss, q, k, query_ids=ids[0], key_ids=ids[1], backend="triton")
    loss, traffic = _count([], run)
    given = fewest(q, k, *ids[0], *ids[1])
    shape = sizes(M=m, T=m, D=d)
    yield Count("contrast forward", shape, name, given + 12 * m, traffic, None)
    grads, traffic = _count([], lambda: torch.autograd.grad(loss, (q, k)))
    yield Count("contrast backward", shape, name, given + 12 * m + fewest(*(g.float() for g in grads)), traffic, None)


def perturb(name: str, dtype: torch.dtype, quick: bool) -> Iterator[Count]:
    """With both criteria and noise that is given: each row is read once, std and the flags by every program.

    At this size the 32 programs read those more often than a tenth of the rows' bytes, so the ratio has no goal.
    """
    x, w, noise = (torch.randn(64, 256).to(dtype) for _ in range(3))
    low, std = torch.rand(256) < 0.3, torch.rand(256)
    run = partial(fgfast.perturb, x, w, low_variance=low, std=std, noise=noise, backend="triton")
    out, traffic = _count([x, w, noise, low, std], run)
    smallest = fewest(x, w, noise, low, std, out.features.float(), out.mask)
    yield Count("perturb", sizes(B=64, D=256), name, smallest, traffic, None)


KERNELS = (part_pool, labels_to_grid, kmeans_step, kmeans, assign_and_pool, contrast, perturb)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KMEANS_DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


def count_all(only: str = "", quick: bool = False) -> Iterator[Count]:
    """Every count, or those of one operation; ``quick`` counts only in half precision. Needs TRITON_INTERPRET=1."""
    torch.manual_seed(0)
    for kernel in KERNELS:
        if only in ("", kernel.__name__):
            dtypes = KMEANS_DTYPES if kernel in (kmeans_step, kmeans) else DTYPES
            for name, dtype in list(dtypes.items())[: 1 if quick or kernel is labels_to_grid else None]:
                yield from kernel(name, dtype, quick)


def rows(only: str = "", quick: bool = False) -> list[Row]:
    """The rows, from a process in which Triton interprets."""
    command = [sys.executable, "-m", "benchmarks.traffic", only, "quick" if quick else ""]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"Traffic could not be counted: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


if __name__ == "__main__":
    for count in count_all(sys.argv[1] if len(sys.argv) > 1 else "", "quick" in sys.argv[2:]):
        print(json.dumps(count.row()), flush=True)
