"""Properties of every operation with kernels: autocast, CUDA graphs, streams, strides beyond 32 bits."""

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import fgfast
from fgfast import Ids

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device was found")
FAR = 2**31


def contrast(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x, y = (v.flatten(1).detach().requires_grad_() for v in (x, y))
    image = torch.arange(len(x), device=x.device)
    one, two = (Ids(image, torch.zeros_like(image), torch.full_like(image, view)) for view in (0, 1))
    loss = fgfast.contrastive_loss(x, y, query_ids=one, key_ids=two, backend="triton")
    return loss.detach(), *torch.autograd.grad(loss, (x, y))


def part_pool(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    labels = (y[:, 0].float() * 2).round().long().clamp(-1, 3)
    pooled, area = fgfast.part_pool(x, labels, 4, backend="triton")
    return pooled.detach(), area, *torch.autograd.grad(pooled.float().square().sum(), x)


def pool_map(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    labels = (y[:, :4].reshape(len(y), 12, -1).float() * 2).round().long().clamp(-1, 3)
    pooled, area = fgfast.part_pool(x, labels, 4, backend="triton")
    return pooled.detach(), area, *torch.autograd.grad(pooled.float().square().sum(), x)


def grid(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    labels = (x[:, 0].float() * 2).round().long().clamp(-1, 3)
    return (fgfast.labels_to_grid(labels, 3, 4, backend="triton"),)


def step(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return tuple(fgfast.kmeans_step(x, y.flatten(2).mT[:, :5], backend="triton"))


def kmeans(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return tuple(fgfast.kmeans(x, 5, init=y.flatten(2).mT[:, :5], n_iter=2, backend="triton"))


def pyramid(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    start = torch.cat([x, y], 1).flatten(2).mT[:, :5]
    return tuple(fgfast.kmeans([x, y], 5, init=start, n_iter=2, size=x.shape[2:], backend="triton"))


def assign_and_pool(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().requires_grad_()
    pooled, area, labels = fgfast.assign_and_pool(x, y.flatten(2).mT[:, :5], backend="triton")
    return pooled.detach(), area, labels, *torch.autograd.grad(pooled.float().square().sum(), x)


def perturb(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return tuple(fgfast.perturb(x.flatten(1), y.flatten(1), std=y[0].flatten().abs().float(), seed=1, backend="triton"))


OPERATIONS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    f.__name__: f for f in (contrast, part_pool, pool_map, grid, step, kmeans, pyramid, assign_and_pool, perturb)
}


def inputs(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(4, 16, 6, 6, generator=g).to(DEVICE, dtype) for _ in range(2))
    return x, y


def equal(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_changes_nothing(name: str, dtype: torch.dtype) -> None:
    """Autocast around an operation does not change its accumulation."""
    x, y = inputs(0, dtype)
    plain = OPERATIONS[name](x, y)
    with torch.autocast(DEVICE, torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        equal(OPERATIONS[name](x, y), plain)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_captured_in_a_graph(name: str) -> None:
    """No operation syncs with the device: a graph holds its launches, and a replay reads the current inputs."""
    run, static = OPERATIONS[name], inputs(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*static)  # compiles, and fills the allocator
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = run(*static)
    for seed in (1, 2):
        new = inputs(seed)
        for at, value in zip(static, new, strict=True):
            at.copy_(value)
        graph.replay()
        equal(held, run(*new))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_current_device_is_kept(name: str) -> None:
    """The last device runs the operation while the first is current, and stays so; trivial with one device."""
    last = torch.cuda.device_count() - 1
    pair = inputs(0)
    wanted = OPERATIONS[name](*pair)
    with torch.cuda.device(0):
        got = OPERATIONS[name](*(v.to(f"cuda:{last}") for v in pair))
        assert torch.cuda.current_device() == 0
    assert {v.get_device() for v in got} == {last}
    equal(tuple(v.to(DEVICE) for v in got), wanted)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_streams_do_not_interfere(name: str) -> None:
    """Concurrent calls on two streams give the same results as sequential calls."""
    run, pairs = OPERATIONS[name], [inputs(seed) for seed in range(8)]
    wanted = [run(*pair) for pair in pairs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    got = []
    for i, pair in enumerate(pairs):
        with torch.cuda.stream(streams[i % 2]):
            got.append(run(*pair))
    torch.cuda.synchronize()
    for ours, theirs in zip(got, wanted, strict=True):
        equal(ours, theirs)


def far_apart(x: Tensor) -> Iterator[Tensor]:
    """The values of x [B, D, h, w] with 2^31 elements from an image to the next, and from a channel to the next."""
    batch, channels, height, width = x.shape
    for strides in ((FAR, height * width, width, 1), (height * width, FAR, width, 1)):
        shape = (2, channels, height, width) if strides[0] == FAR else (batch, 2, height, width)
        room = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
        view = torch.empty(room, dtype=x.dtype, device=x.device).as_strided(shape, strides)
        yield view.copy_(x[: shape[0], : shape[1]])


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", ["part_pool", "pool_map", "step", "kmeans", "pyramid", "assign_and_pool"])
def test_strides_beyond_32_bits(name: str) -> None:
    """Offsets into a tensor of 5 GB are right (those of the contrast: tests/kernels/test_contrast.py)."""
    x, y = inputs(0, torch.float16)
    for view in far_apart(x):
        batch, channels = view.shape[:2]
        other = y[:batch, :channels]
        near = OPERATIONS[name](view.contiguous(), other)
        for got, wanted in zip(OPERATIONS[name](view, other), near, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.gpu
@gpu
def test_scores_beyond_32_bits() -> None:
    """A map of 2^28 cells has 2^32 scores: 30 GB in all; labels and counts are those of cells that repeat."""
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("no CUDA device with 60 GB free was found")
    side = 1 << 14
    cells = torch.arange(side, device=DEVICE) // 64 % 2
    x = (cells[:, None] ^ cells)[None, None].to(torch.float16)
    first = torch.tensor([[[0.0], [1.0]]], device=DEVICE)
    result = fgfast.kmeans([x], 2, init=first, n_iter=1, size=(side, side), backend="triton")
    assert torch.equal(result.labels.view(side, side), cells[:, None] ^ cells)


@pytest.mark.gpu
@gpu
def test_an_error_of_another_library_is_not_reported() -> None:
    """CUDA keeps the last error of a failed call; the mask sampler neither reports it nor fails."""
    fgfast.pivotal_mask(torch.rand(1, 2, 2, 16, device=DEVICE), backend="native")
    for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so"):
        try:
            runtime = ctypes.CDLL(name)
        except OSError:
            continue
        assert runtime.cudaSetDevice(1 << 20) != 0  # invalid device
        fgfast.pivotal_mask(torch.rand(1, 2, 2, 16, device=DEVICE), backend="native")
        runtime.cudaGetLastError()
        return
    pytest.skip("no CUDA runtime library was found")
