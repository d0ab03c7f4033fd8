"""The host side of the kernels without a GPU: no device syncs, and every launch on the device of its tensors.

FakeTensorMode gives GPU tensors without memory, here on the second device while the first is current. Reading a value
of one raises, as does mixing devices; launches are recorded, not made.
"""

import sys
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from fgfast.ids import Ids
from fgfast.kernels import assign_and_pool, perturb
from fgfast.kernels.contrast import launch as contrast
from fgfast.kernels.contrast import sigmoid
from fgfast.kernels.kmeans import launch as kmeans
from fgfast.kernels.kmeans import pyramid as kmeans_pyramid
from fgfast.kernels.kmeans import step as kmeans_step
from fgfast.kernels.part_pool import launch as part_pool
from fgfast.ops import mask
from fgfast.ops.contrast import ring
from fgfast.pixels.options import KMeansOptions

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_device.py captures graphs on it"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
]

DEVICE = torch.device("cuda", 1)


def floats(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def integers(*shape):
    return floats(*shape, dtype=torch.int64)


def call_contrast(dtype, channels, same, learn, negatives):
    query, image, bank = floats(700, channels, dtype=dtype), integers(700), floats(40, channels, dtype=dtype)
    ids, temperature = Ids(image, image, image), floats() if learn else None
    key, key_ids = (None, None) if same else (torch.empty_like(query), ids)
    given = (query, ids, key, key_ids, bank, temperature, 0.1, negatives, True, "ieee")
    loss, lse, count = contrast.forward(*given)
    contrast.backward(loss, lse, count, [True, True, True, learn], *given)


def call_sigmoid(dtype, channels):
    image, text, factors = floats(700, channels, dtype=dtype), floats(700, channels, dtype=dtype), [floats()] * 2
    sigmoid.forward(image, text, *factors, True)
    sigmoid.add_gradients(image, text, *factors, True, floats(), floats(700, channels), floats(700, channels))


def call_kmeans(dtype, metric, init, weighted, empty):
    x, weight = floats(2, 48, 400, dtype=dtype), floats(2, 400) if weighted else None
    first = floats(2, 5, 48) if init == "given" else None
    options = KMeansOptions(5, 3, init, first, 1024, 2, 1e-4, metric, empty, "ieee", True)
    kmeans.kmeans(x, weight, integers(), options)
    maps = [floats(2, 32, 20, 20, dtype=dtype), floats(2, 16, 10, 10, dtype=dtype)]
    kmeans_pyramid.kmeans(maps, (20, 20), weight, integers(), options)


def call_step(dtype, metric, weighted, clusters):
    weight = floats(2, 400) if weighted else None
    kmeans_step.kmeans_step(floats(2, 1030, 400, dtype=dtype), floats(2, clusters, 1030), weight, metric, "ieee", True)


def call_pool(dtype, mean, weighted):
    x, labels, weight = floats(2, 70, 20, 20, dtype=dtype), integers(2, 20, 20), floats(2, 20, 20) if weighted else None
    pooled, area = part_pool.pool(x, labels, 10, weight, mean)
    part_pool.pool_backward(pooled, labels, weight, area, mean, torch.empty_like(x))
    for side in (25, 200):  # one launch and two
        part_pool.pool_map(x, integers(2, side, side), 10, weight, mean)
    part_pool.labels_to_grid(labels, 5, 5, 10)
    assign_and_pool.assign_and_pool(x, floats(2, 10, 70), weight, "cosine" if mean else "euclidean")


def call_perturb(dtype, strategy):
    x = floats(16, 500, dtype=dtype)
    low, std = floats(500) > 0, floats(500)
    perturb.perturb(x, x, low, std, None, 150, "absolute", "union", strategy, 1.0, 1 << 15, 3)


WAYS = (("euclidean", False), ("cosine", True))  # metric, weighted
CALLS = [
    *((call_contrast, d, s, not s, n) for d in (128, 300) for s in (False, True) for n in ("all", "same_image")),
    *((call_sigmoid, d) for d in (128, 300)),
    *((call_kmeans, m, i, w, "farthest") for m, w in WAYS for i in ("k-means++", "random")),
    (call_kmeans, "euclidean", "given", False, "keep"),
    *((call_step, m, w, k) for m, w in WAYS for k in (10, 200)),
    *((call_pool, m, w) for m in (True, False) for w in (True, False)),
    *((call_perturb, s) for s in ("noise", "swap", "zero")),
]


class Devices:
    """The current device, and a stream of each: what Triton and PyTorch ask a driver before a launch."""

    current = 0

    def exchange(self, device):
        before, self.current = self.current, self.current if device < 0 else device
        return before

    @staticmethod
    def stream(device):
        return 100 + device


@pytest.fixture
def devices(monkeypatch) -> Iterator[Devices]:
    """Devices without a GPU; the one that was current before an operation is current after it."""
    devices = Devices()
    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, devices.exchange)
    yield devices
    assert devices.current == 0


@pytest.fixture
def launched(devices, monkeypatch) -> list[tuple[int, int]]:
    """The device and stream of each launch of a Triton kernel."""
    found = []

    def run(self, *args, grid, warmup, **options):
        def tensors(given):
            for x in given:
                if isinstance(x, tuple | list):
                    yield from tensors(x)
                elif isinstance(x, torch.Tensor):
                    yield x

        assert {x.device for x in tensors([*args, *options.values()])} == {DEVICE}, self
        assert not warmup
        found.append((devices.current, devices.stream(devices.current)))

    monkeypatch.setattr(type(perturb.perturb_kernel), "run", run)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    answers = {"processors": lambda *_: 132, "architecture": lambda *_: "sm_90", "shared_memory": lambda *_: 227}
    for name, module in list(sys.modules.items()):
        for function in answers.keys() & vars(module).keys() if name.startswith("fgfast.kernels") else ():
            monkeypatch.setattr(module, function, answers[function])
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("call", CALLS, ids=lambda c: " ".join([c[0].__name__.removeprefix("call_"), *map(str, c[1:])]))
def test_no_sync_and_every_launch_on_the_device_of_its_tensors(call, dtype, launched):
    with FakeTensorMode(), torch.no_grad():
        call[0](dtype, *call[1:])
    assert set(launched) == {(1, Devices.stream(1))}


def body(operation):
    """The function that a registered operation runs."""
    return getattr(operation, "run", None) or operation._init_fn


class OneRank:
    """A ring of one rank: the only block is that of the rank."""

    @staticmethod
    def pass_around(block, add):
        return add(block)


@pytest.mark.parametrize("same_image", [False, True])
def test_blocks_of_a_ring_on_the_device_of_its_tensors(same_image, launched, monkeypatch):
    from fgfast.kernels.contrast import blocks

    monkeypatch.setattr(ring, "_form_ring", lambda *_: (OneRank, 700, blocks))
    with FakeTensorMode(), torch.no_grad():
        x, ids = floats(700, 96), [integers(700)] * 3
        options = (None, 0.1, "same_image" if same_image else "all", True, "ieee", "mean", "triton", "")
        given = (x, *ids, x.clone(), *ids, floats(40, 96), *options)
        results = body(ring._ring_contrast)(*given)
        forward = len(launched)
        body(ring._ring_contrast_backward)(*results, [True, True, True, False], *given)
    assert len(launched) > forward > 0
    assert set(launched) == {(1, Devices.stream(1))}


def test_the_mask_sampler_on_the_device_and_stream_of_its_tensors(devices, monkeypatch):
    """The last but one argument of the compiled functions is the stream."""
    native = pytest.importorskip("fgfast._native")
    found = []
    for name in ("pivotal_mask", "mask_images"):
        monkeypatch.setattr(native, name, lambda *given: found.append((devices.current, given[-2])))

    class Stream:
        def __init__(self, device):
            self.cuda_stream = devices.stream(device.index)

    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    with FakeTensorMode(), torch.no_grad():
        images = floats(2, 3, 32, 32)
        body(mask._pivotal_mask)(floats(1, 2, 3, 16), images, 4, "topk", 0, 4, 4, "native")
        body(mask._mask_images)(images, integers(2, 16) > 0, 4, 4, "native")
    assert found == [(1, devices.stream(1))] * 2


def test_reading_a_value_raises():
    with FakeTensorMode(), pytest.raises(Exception, match="_local_scalar_dense"):
        bool(floats(3).sum() > 0)
