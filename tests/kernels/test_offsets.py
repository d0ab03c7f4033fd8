"""Offsets of tensors beyond 2^31 elements, without their memory: the address arithmetic of the kernels, interpreted.

The host side runs with fake tensors; a launch runs its first and last program with pointers to nothing. An address
outside its tensor fails, and so does any 32-bit sum or product that overflows (Triton's own check, of its debug mode).
Loads give constants, and of a loop inside a kernel only the first and the last iteration run.
"""

import dataclasses
import inspect
import sys
from contextlib import nullcontext
from itertools import product

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
import triton.language as tl
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

from fgfast.ids import Ids
from fgfast.kernels import configs, perturb
from fgfast.kernels.contrast import forward as contrast_forward
from fgfast.kernels.contrast import gradient as contrast_gradient
from fgfast.kernels.contrast import launch as contrast
from fgfast.kernels.contrast import problem, wide
from fgfast.kernels.contrast import tiles as contrast_tiles
from fgfast.kernels.contrast import vectors as contrast_vectors
from fgfast.kernels.kmeans import (
    centroids,
    fused,
    pyramid_cells,
    pyramid_move,
    pyramid_score,
    pyramid_squares,
    pyramid_sums,
    resident,
    tiles,
)
from fgfast.kernels.kmeans import launch as kmeans
from fgfast.kernels.kmeans import pyramid as kmeans_pyramid
from fgfast.kernels.kmeans import step as kmeans_step
from fgfast.kernels.part_pool import gradient as part_pool_gradient
from fgfast.kernels.part_pool import launch as part_pool
from fgfast.kernels.part_pool import sums, votes
from fgfast.kernels.part_pool import tiles as part_pool_tiles
from fgfast.pixels.options import KMeansOptions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="Triton does not interpret where there is a GPU"),
    pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numbers that mean nothing
]
MODULES = (
    contrast_tiles, contrast_forward, contrast_gradient, contrast_vectors, centroids, fused, pyramid_cells,
    pyramid_score, pyramid_sums, pyramid_move, pyramid_squares, resident, tiles, part_pool_tiles, sums, votes,
    part_pool_gradient,
)  # fmt: skip
FAR = 2**31
ROOM = 2**46  # bytes from one storage to the next
LONGEST = kmeans_pyramid.LONGEST
PIXELS = LONGEST**2
# What a load gives that is not 0: pixels to be taken for an empty cluster, every strip complete, the last pixel.
VALUES = {"distances_ptr": 1, "needed_ptr": 1, "temperature": 1, "index_ptr": PIXELS - 1}


def ends(*bounds):
    """The first and the last number of a range."""
    every = range(*map(int, bounds))
    return every if len(every) < 3 else (every[0], every[-1])


class Memory:
    """Pointers to fake tensors, whose storages lie ROOM apart, and the interpreter's accesses to them."""

    def __init__(self):
        self.storages, self.places = [("nothing", None)], {}
        self.accesses = 0

    def argument(self, name, x):
        """What the interpreter makes of an argument of a kernel."""
        if isinstance(x, tuple | list):
            return tuple(self.argument(name, each) for each in x)
        if isinstance(x, torch.Tensor):
            storage, dtype = x.untyped_storage(), str(x.dtype).removeprefix("torch.")
            if storage._cdata not in self.places:
                self.places[storage._cdata] = len(self.storages)
                self.storages.append((name, storage))
            place = self.places[storage._cdata]
            kind = tl.pointer_type(tl.int1 if x.dtype == torch.bool else getattr(tl, dtype))
            value = np.array([place * ROOM + x.storage_offset() * x.element_size()], np.uint64)
        elif isinstance(x, int) and not isinstance(x, bool):
            kind = tl.int32 if -FAR <= x < FAR else tl.int64
            value = np.array([x], np.int32 if kind == tl.int32 else np.int64)
        elif isinstance(x, TensorDescriptor):
            sizes, strides = ([self.argument(name, n) for n in numbers] for numbers in (x.shape, x.strides[:-1]))
            return interpreter.interpreter_semantic.make_tensor_descriptor(
                self.argument(name, x.base), sizes, [*strides, tl.constexpr(1)], list(map(tl.constexpr, x.block_shape))
            )
        else:
            return interpreter._implicit_cvt(x)
        return tl.tensor(interpreter.TensorHandle(value, kind), kind)

    def access(self, pointers, mask):
        """Check the addresses that are not masked out; returns the name of their tensor."""
        lanes = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        if not lanes.size:
            return ""
        self.accesses += lanes.size
        (place,) = set((lanes // ROOM).tolist())
        assert 0 < place < len(self.storages), f"an address {lanes.min()} before the first tensor"
        name, storage = self.storages[place]
        last = (lanes % ROOM).max() + max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        assert last <= storage.nbytes(), f"{name}: {last} is beyond its {storage.nbytes()} bytes"
        return name

    def load(self, pointers, mask, other, *_, **__):
        name, kind = self.access(pointers, mask), pointers.get_element_ty()
        values = np.full(pointers.data.shape, VALUES.get(name, 0), interpreter._get_np_dtype(kind))
        values = values if other is None else np.where(mask.data, values, other.data)
        return interpreter.TensorHandle(values, kind)

    def store(self, pointers, _value, mask, *_):
        self.access(pointers, mask)

    def update(self, _op, pointers, value, mask, *_):
        self.access(pointers, mask)
        return interpreter.TensorHandle(np.zeros_like(value.data), value.dtype.scalar)


@pytest.fixture
def memory(monkeypatch):
    """Launches of kernels run the first and the last program, with pointers to nothing."""
    memory, builder = Memory(), interpreter.interpreter_builder

    def run(self, *args, grid, warmup, **options):
        function = self.rewrite()
        executor = interpreter.GridExecutor(function, self.arg_names, grid)
        given = inspect.getcallargs(function, *args, **{k: v for k, v in options.items() if k in self.arg_names})
        given = {k: v if k in executor.constexprs else memory.argument(k, v) for k, v in given.items()}
        scope = interpreter._patch_lang(function)
        sizes = (*grid, 1, 1)[:3]
        assert sizes[0] < FAR
        builder.set_grid_dim(*sizes)
        try:
            for x, y in product(ends(sizes[0]), ends(sizes[1])):
                builder.set_grid_idx(x, y, 0)
                function(**given)
        finally:
            scope.restore()

    def patch_core(language, scope, patch=interpreter._patch_lang_core):
        patch(language, scope)
        scope.set_attr(language, "range", lambda *bounds, **_: ends(*bounds))

    monkeypatch.setattr(type(perturb.perturb_kernel), "run", run)
    monkeypatch.setattr(interpreter, "_patch_lang_core", patch_core)
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True))
    hooks = {"load": "create_masked_load", "store": "create_masked_store", "update": "create_atomic_rmw"}
    for ours, theirs in hooks.items():
        monkeypatch.setattr(builder, theirs, getattr(memory, ours))
    for module in MODULES:
        monkeypatch.setattr(module, "range", ends, raising=False)
    answers = {
        "processors": lambda *_: 132, "architecture": lambda *_: "sm_90", "shared_memory": lambda *_: 227,
        "on_device_of": lambda *_: nullcontext(),
    }  # fmt: skip
    for name, module in list(sys.modules.items()):
        for function in answers.keys() & vars(module).keys() if name.startswith("fgfast.kernels") else ():
            monkeypatch.setattr(module, function, answers[function])
    with FakeTensorMode(), torch.no_grad():
        yield memory
    assert memory.accesses


def floats(*shape, dtype=torch.float32, strides=None):
    return torch.empty_strided(shape, strides or torch.empty(shape, device="meta").stride(), dtype=dtype, device="cuda")


def integers(*shape, dtype=torch.int64):
    return floats(*shape, dtype=dtype)


DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
PLACED = {  # strides of [B, D, H, W]
    "images": (FAR + 64, 64, 8, 1),
    "channels": (3 * FAR, FAR + 64, 8, 1),
    "rows": (9 * FAR, 1, FAR + 64, 64),
    "columns": (65 * FAR, 1, 8 * FAR, FAR + 64),
}
placed = pytest.mark.parametrize("strides", PLACED.values(), ids=PLACED)
ways = pytest.mark.parametrize(("metric", "n_clusters"), [("euclidean", 5), ("cosine", 200)])


@DTYPES
@placed
@ways
def test_kmeans_of_pixels_far_apart(dtype, strides, metric, n_clusters, memory):
    x = floats(2, 64, 8, 8, dtype=dtype, strides=strides)
    first = floats(2, n_clusters, 64)
    kmeans_step.kmeans_step(x, first, None, metric, "ieee", True)
    options = KMeansOptions(n_clusters, 2, "given", first, 1024, 1, 1e-4, metric, "farthest", "ieee", True)
    kmeans.kmeans(x, None, integers(), options)


@DTYPES
@ways
@pytest.mark.parametrize("channels_last", [False, True])
def test_kmeans_of_many_pixels(dtype, metric, n_clusters, channels_last, memory):
    """2^28 pixels of 16 channels."""
    x = floats(2, 16, PIXELS, dtype=dtype, strides=(PIXELS * 16, 1, 16) if channels_last else None)
    kmeans_step.kmeans_step(x, floats(2, n_clusters, 16), floats(2, PIXELS), metric, "ieee", True)


@pytest.mark.parametrize(
    ("batch", "pixels", "strides"),
    [(2, PIXELS, (256 * PIXELS, 1, 256)), (2, 400, (FAR + 64, 1, 256)), (FAR >> 13, 40, (256 * 40, 1, 256)),
     (2, 4, (5 * FAR, 1, FAR + 64))],
)  # fmt: skip
def test_kmeans_whose_tiles_stay_on_chip(batch, pixels, strides, memory, monkeypatch):
    monkeypatch.setitem(configs._forced, "kmeans_resident", configs.ROWS["kmeans_resident", "sm_90"][0])
    x = floats(batch, 256, pixels, dtype=torch.float16, strides=strides)
    first = floats(batch, 25, 256)
    assert kmeans_step.Solver(x, 25, None, "euclidean", "ieee", True).resident
    kmeans_step.kmeans_step(x, first, None, "euclidean", "ieee", True)
    if pixels == 4:
        options = KMeansOptions(25, 1, "given", first, 1024, 1, 1e-4, "euclidean", "farthest", "ieee", True)
        kmeans.kmeans(x, None, integers(), options)


@DTYPES
@ways
@pytest.mark.parametrize("channels_last", [False, True])
def test_kmeans_of_large_maps(dtype, metric, n_clusters, channels_last, memory):
    """Three maps with the longest sides, in which scores and channels take more than 2^31 numbers."""
    d = 24
    order = torch.channels_last if channels_last else torch.contiguous_format
    maps = [torch.empty(1, d, LONGEST, LONGEST, dtype=dtype, device="cuda", memory_format=order) for _ in range(3)]
    options = KMeansOptions(
        n_clusters, 2, "given", floats(1, n_clusters, 3 * d), 1024, 1, 1e-4, metric, "farthest", "ieee", True
    )
    kmeans_pyramid.kmeans(maps, (LONGEST, LONGEST), None, integers(), options)


@DTYPES
@placed
@pytest.mark.parametrize("n_parts", [10, 100])
def test_pooling_of_pixels_far_apart(dtype, strides, n_parts, memory):
    x = floats(2, 64, 8, 8, dtype=dtype, strides=strides)
    labels, weight = integers(2, 8, 8), floats(2, 8, 8)
    pooled, area = part_pool.pool(x, labels, n_parts, weight, True)
    part_pool.pool_backward(pooled, labels, weight, area, True, x)
    part_pool.pool_map(x, integers(2, 16, 16), n_parts, None, True)
    across = floats(2, 16, 16, dtype=torch.int64, strides=(16 * FAR, FAR + 64, FAR // 8))
    part_pool.labels_to_grid(across, 4, 4, n_parts)


@DTYPES
@pytest.mark.parametrize("n_parts", [10, 100])
def test_pooling_of_many_pixels(dtype, n_parts, memory):
    side = 1 << 15
    x, labels = floats(2, 16, side, side, dtype=dtype), integers(2, side, side, dtype=torch.uint8)
    pooled, area = part_pool.pool(x, labels, n_parts, None, True)
    part_pool.pool_backward(pooled, labels, None, area, True, x)
    part_pool.labels_to_grid(labels, 100, 100, n_parts)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("channels", [64, 300])
@pytest.mark.parametrize("rows", [problem.LARGEST_N, 700])
def test_contrast_of_many_vectors(same, channels, rows, memory, monkeypatch):
    """As many as the kernels take, or few far apart."""
    monkeypatch.setattr(wide, "serves", lambda *_: False)  # chunks of so many vectors are millions of launches
    contrast_both_ways(same, channels, rows, (channels, 1) if rows > 700 else (1, FAR + 64))


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("strides", [(FAR + 64, 1), (1, FAR + 64)])
def test_contrast_by_chunks_of_vectors_far_apart(same, strides, memory, monkeypatch):
    monkeypatch.setattr(wide, "FEWEST_LOGITS", 0)
    monkeypatch.setattr(wide, "_multiply_add", lambda *_: None)  # of a library; torch 2.11 has none without memory
    contrast_both_ways(same, 300, 700, strides)


def contrast_both_ways(same, channels, rows, strides):
    query, image = floats(rows, channels, dtype=torch.float16, strides=strides), integers(rows)
    ids = Ids(image, image, image)
    key, key_ids = (None, None) if same else (torch.empty_like(query), ids)
    given = (query, ids, key, key_ids, None, None, 0.1, "all", True, "ieee")
    loss, lse, count = contrast.forward(*given)
    contrast.backward(loss, lse, count, [True, True, False, False], *given)


@DTYPES
@pytest.mark.parametrize(("batch", "strides"), [(FAR, (500, 1)), (16, (FAR + 64, 1)), (16, (1, FAR + 64))])
def test_perturbation_of_rows_far_apart(dtype, batch, strides, memory, monkeypatch):
    monkeypatch.setattr(perturb, "processors", lambda *_: 1 << 27)
    x = floats(batch, 500, dtype=dtype, strides=strides)
    for strategy in ("noise", "swap", "zero"):
        perturb.perturb(x, x, None, floats(500), x, 150, "absolute", "union", strategy, 1.0, 1 << 15, 3)


def test_more_than_the_offsets_reach_is_refused():
    with FakeTensorMode():
        with pytest.raises(ValueError, match="centroids of 1024 channels"):
            kmeans_step.Solver(torch.empty(1, 1024, 9), 1 << 21, None, "euclidean", "ieee", True)
        with pytest.raises(ValueError, match="pixels and the Triton kernels take"):
            part_pool.pool(torch.empty(1, 1, 1 << 16, 1 << 16), torch.empty(1, 1 << 16, 1 << 16), 3, None, True)
