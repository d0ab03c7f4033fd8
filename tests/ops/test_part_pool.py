"""part_pool and labels_to_grid: values, gradients, invariants, registration and bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from fgfast.ops.part_pool import labels_to_grid, part_pool
from fgfast.ops.part_pool.grid import _labels_to_grid
from fgfast.ops.part_pool.part_pool import _part_pool, _part_pool_map, part_pool_backward
from fgfast.reference import part_pool as reference
from tests.examples import examples

# (B, D, h, w, K): odd sizes, one pixel, one channel, no image, no pixel
SHAPES = [(3, 5, 7, 6, 4), (1, 1, 1, 1, 1), (2, 1, 3, 5, 9), (4, 33, 2, 1, 15), (0, 4, 3, 3, 2), (2, 4, 0, 3, 2)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def make(shape, dtype=torch.float64, seed=0, weighted=True):
    batch, channels, height, width, n_parts = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(-1, n_parts, (batch, height, width), generator=g)
    weight = torch.rand(batch, height, width, generator=g) * (torch.rand(batch, height, width, generator=g) > 0.2)
    return x, labels, weight if weighted else None


def truth(x, labels, n_parts, weight=None, reduce="mean"):
    flat = None if weight is None else weight.flatten(1)
    return reference.part_pool(x.double().flatten(2).transpose(1, 2), labels.flatten(1), n_parts, flat, reduce)


def layouts(x):
    """The same [B, D, h, w] values in the memory orders that occur: NCHW, channels last, transposed, a slice."""
    yield x.contiguous()
    yield x.contiguous(memory_format=torch.channels_last)
    yield x.transpose(2, 3).contiguous().transpose(2, 3)
    yield torch.cat([x, x], 1)[:, : x.shape[1]]


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_reference_in_every_dtype_and_layout(shape, weighted, reduce):
    for dtype, tolerance in TOLERANCE.items():
        x, labels, weight = make(shape, dtype, weighted=weighted)
        pooled, area = truth(x, labels, shape[-1], weight, reduce)
        for y in layouts(x):
            out = part_pool(y, labels, shape[-1], weight=weight, reduce=reduce)
            assert out.pooled.dtype == dtype
            assert out.area.dtype == torch.float32
            torch.testing.assert_close(out.pooled.double(), pooled, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(out.area, area)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_equals_reference_in_every_layout(shape, reduce):
    x, labels, weight = make(shape, torch.float32)
    wide = x.double().requires_grad_()
    pooled, _ = truth(wide, labels, shape[-1], weight, reduce)
    g = torch.randn_like(pooled)
    (expected,) = torch.autograd.grad(pooled, wide, g)
    for y in layouts(x):
        y.requires_grad_()
        out = part_pool(y, labels, shape[-1], weight=weight, reduce=reduce)
        (grad,) = torch.autograd.grad(out.pooled, y, g.float())
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(grad == 0, expected == 0)


# (H, W): full cells, ragged ones, smaller than the features, longer along one axis and shorter along the other, empty
@pytest.mark.parametrize("size", [(14, 18), (17, 11), (2, 3), (3, 20), (0, 4)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_id_maps_of_another_size_are_reduced_to_the_features_by_majority(shape, size):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, shape[-1], (shape[0], *size), generator=g).mT.contiguous().mT
    x, _, weight = make(shape, torch.float32)
    grid = reference.labels_to_grid(labels, tuple(x.shape[2:]), shape[-1])
    wide = x.double().requires_grad_()
    pooled, area = truth(wide, grid, shape[-1], weight)
    cotangent = torch.randn_like(pooled)
    (expected,) = torch.autograd.grad(pooled, wide, cotangent)
    for y in layouts(x):
        y.requires_grad_()
        out = part_pool(y, labels, shape[-1], weight=weight)
        torch.testing.assert_close(out.pooled.double(), pooled, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out.area, area)
        (grad,) = torch.autograd.grad(out.pooled, y, cotangent.float())
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-6)
    same = part_pool(wide, labels, shape[-1], weight=weight, backend="reference")
    assert torch.equal(same.pooled, pooled)
    assert torch.equal(same.area, area)


def test_pixels_before_channels_equals_channels_before_pixels():
    x, labels, weight = make(SHAPES[0])
    a = part_pool(x, labels, 4, weight=weight)
    b = part_pool(x.flatten(2).transpose(1, 2), labels.flatten(1), 4, weight=weight.flatten(1))
    assert torch.equal(a.pooled, b.pooled)
    assert torch.equal(a.area, b.area)


def test_tiles_give_the_result_of_a_single_one(monkeypatch):
    x, labels, weight = make((3, 5, 40, 30, 4))
    whole = part_pool(x, labels, 4, weight=weight)
    monkeypatch.setattr("fgfast.ops.part_pool.tiled.TILE_ELEMENTS", 1 << 10)
    y = x.clone().requires_grad_()
    tiled = part_pool(y, labels, 4, weight=weight)
    torch.testing.assert_close(tiled.pooled, whole.pooled)
    torch.testing.assert_close(tiled.area, whole.area)
    z = x.clone().requires_grad_()
    truth(z, labels, 4, weight)[0].square().sum().backward()
    tiled.pooled.square().sum().backward()
    torch.testing.assert_close(y.grad, z.grad)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradcheck(reduce, layout):
    x, labels, weight = make((2, 3, 3, 2, 3))
    x = x.contiguous(memory_format=layout).requires_grad_()
    for ids in (labels, labels.repeat(1, 2, 3)):
        assert torch.autograd.gradcheck(lambda x, ids=ids: part_pool(x, ids, 3, weight=weight, reduce=reduce).pooled, x)


def test_opcheck():
    x, labels, weight = make((2, 3, 3, 2, 3), torch.float32)
    for y in (x, x.contiguous(memory_format=torch.channels_last)):
        opcheck(_part_pool.op, (y.requires_grad_(), labels, 3, weight, True))
        opcheck(_part_pool.op, (y.detach(), labels, 3, None, False))
        opcheck(_part_pool_map.op, (y, labels.repeat(1, 2, 3), 3, weight, True))
        opcheck(_part_pool_map.op, (y.detach(), labels[:, :2], 3, None, False))
    grad, area = torch.randn(2, 3, 3), torch.rand(2, 3)
    for pixel_major in (False, True):
        opcheck(part_pool_backward.op, (grad, labels, weight, area, True, pixel_major))
        opcheck(part_pool_backward.op, (grad.clone().requires_grad_(), labels, None, area, False, pixel_major))
    opcheck(_labels_to_grid.op, (labels, 2, 2, 3))


def test_compile_gives_the_same_numbers():
    x, labels, weight = make((2, 5, 6, 4, 3), torch.float32)

    def run(x, labels, weight):
        small = labels_to_grid(labels, (3, 2), 3)
        coarse = part_pool(torch.nn.functional.avg_pool2d(x, 2), small, 3).pooled
        fine = part_pool(x, labels.repeat(1, 2, 2), 3).pooled
        return part_pool(x, labels, 3, weight=weight).pooled + coarse + fine

    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    eager, compiled = run(a, labels, weight), torch.compile(run, fullgraph=True, backend="aot_eager")(b, labels, weight)
    torch.testing.assert_close(eager, compiled)
    eager.square().sum().backward()
    compiled.square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


def test_autocast_leaves_float32_alone():
    x, labels, _ = make(SHAPES[0], torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = part_pool(x, labels, 4)
    assert torch.equal(out.pooled, part_pool(x, labels, 4).pooled)


@examples(30)
@given(st.integers(0, 10**6), st.sampled_from(["mean", "sum"]), st.booleans())
def test_ignored_pixels_affect_neither_result_nor_gradients(seed, reduce, pixel_major):
    x, labels, weight = make((2, 4, 5, 3, 3), torch.float32, seed)
    if pixel_major:
        x = x.contiguous(memory_format=torch.channels_last)
    ignored = (labels < 0) | (labels >= 3) | (weight == 0)
    dirty = torch.where(ignored[:, None], torch.tensor([math.nan, math.inf, -math.inf, 7.0])[:, None, None], x)
    dirty.requires_grad_()
    out, clean = (
        part_pool(dirty, labels, 3, weight=weight, reduce=reduce),
        part_pool(x, labels, 3, weight=weight, reduce=reduce),
    )
    torch.testing.assert_close(out.pooled, clean.pooled)
    assert torch.equal(out.area, clean.area)
    out.pooled.square().sum().backward()
    assert dirty.grad.isfinite().all()
    assert (dirty.grad.transpose(0, 1)[:, ignored] == 0).all()


def test_a_non_finite_pixel_affects_only_its_own_part():
    x, labels = torch.ones(1, 2, 2, 2), torch.tensor([[[0, 0], [1, 2]]])
    x[0, 1, 0, 0] = math.nan
    pooled = part_pool(x, labels, 3).pooled
    assert pooled.isnan().sum() == 1
    assert pooled[0, 0, 1].isnan()


def test_a_non_finite_gradient_affects_only_its_own_part():
    x, labels, _ = make((1, 2, 3, 3, 3), torch.float32)
    x.requires_grad_()
    g = torch.ones(1, 3, 2)
    g[0, 1] = math.nan
    part_pool(x, labels, 3).pooled.backward(g)
    assert torch.equal(x.grad[0, 0].isnan(), labels[0] == 1)


@examples(30)
@given(st.integers(0, 10**6))
def test_permutations_rename_and_scale(seed):
    x, labels, weight = make((3, 4, 5, 3, 4), torch.float64, seed)
    g = torch.Generator().manual_seed(seed)
    out = part_pool(x, labels, 4, weight=weight)
    images, names, pixels = (torch.randperm(n, generator=g) for n in (3, 4, 15))
    moved = part_pool(x[images], labels[images], 4, weight=weight[images])
    torch.testing.assert_close(moved.pooled, out.pooled[images])
    inside = (labels >= 0) & (labels < 4)
    renamed = part_pool(x, torch.where(inside, names[labels.clamp(0, 3)], labels), 4, weight=weight)
    torch.testing.assert_close(renamed.pooled[:, names], out.pooled)
    shuffled = part_pool(
        x.flatten(2)[..., pixels].transpose(1, 2), labels.flatten(1)[:, pixels], 4, weight=weight.flatten(1)[:, pixels]
    )
    torch.testing.assert_close(shuffled.pooled, out.pooled)
    scaled = part_pool(x, labels, 4, weight=weight * 3)
    torch.testing.assert_close(scaled.pooled, out.pooled)
    torch.testing.assert_close(scaled.area, out.area * 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes_of_labels_agree(dtype):
    x, labels, _ = make(SHAPES[0])
    same = torch.where(labels < 0, 255, labels) if dtype == torch.uint8 else labels  # uint8 has no -1
    assert torch.equal(part_pool(x, same.to(dtype), 4).pooled, part_pool(x, labels, 4).pooled)
    assert torch.equal(labels_to_grid(same.to(dtype), 3, 4), labels_to_grid(labels, 3, 4))
    small = x[..., :3, :3]
    assert torch.equal(part_pool(small, same.to(dtype), 4).pooled, part_pool(small, labels, 4).pooled)


@examples(60)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.integers(1, 14), st.integers(1, 14))
def test_grid_equals_reference_at_any_size(seed, height, width, rows, columns):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 3, (2, height, width), generator=g)
    assert torch.equal(labels_to_grid(labels, (rows, columns), 4), reference.labels_to_grid(labels, (rows, columns), 4))


def test_grid_equals_adaptive_average_pooling():
    labels = torch.randint(0, 5, (3, 17, 23), generator=torch.Generator().manual_seed(0))
    hot = torch.nn.functional.one_hot(labels, 5).permute(0, 3, 1, 2).double()
    pooled = torch.nn.functional.adaptive_avg_pool2d(hot, (7, 5))
    grid = labels_to_grid(labels, (7, 5), 5)
    won = pooled.gather(1, grid[:, None])[:, 0]
    torch.testing.assert_close(won, pooled.amax(1))


def test_grid_ties_absent_and_empty():
    labels = torch.tensor([[[2, 1, -1, -1], [1, 2, -1, -1]]])
    assert labels_to_grid(labels, (1, 2), 3).tolist() == [[[1, -1]]]
    assert labels_to_grid(labels[:0], (1, 2), 3).shape == (0, 1, 2)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"features": torch.ones(2, 3)}, ValueError, "features"),
        ({"features": torch.ones(1, 2, 4, dtype=torch.int64)}, TypeError, "features"),
        ({"labels": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, "labels"),
        ({"labels": torch.zeros(1, 4)}, TypeError, "labels"),
        ({"labels": torch.zeros(1, 4, dtype=torch.int64, device="meta")}, ValueError, "labels"),
        ({"n_parts": 0}, ValueError, "n_parts"),
        ({"weight": torch.ones(2, 4)}, ValueError, "weight"),
        ({"weight": -torch.ones(1, 4)}, ValueError, "weight"),
        ({"reduce": "max"}, ValueError, "reduce"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(change, error, word, backend):
    given = {"features": torch.ones(1, 4, 2), "labels": torch.zeros(1, 4, dtype=torch.int64), "n_parts": 2} | change
    with pytest.raises(error, match=word):
        part_pool(**given, backend=backend)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (
            {"labels": torch.zeros(3, 8, 8, dtype=torch.int64)},
            "expected shape .2, 4, 4. .or an id map .B, H, W. per image., got",
        ),
        (
            {"features": torch.ones(2, 16, 5)},
            "expected shape .2, 16. .or features .B, D, h, w. to pool by id maps., got",
        ),
        ({"labels": torch.zeros(2, 64, dtype=torch.int64)}, "labels: expected shape .*, got .2, 64."),
        ({"weight": torch.ones(2, 8, 8)}, "weight: expected shape .*, got .2, 8, 8."),
    ],
    ids=["images", "pixels before channels", "no rows", "weight"],
)
def test_id_maps_that_do_not_fit_are_named(change, remedy):
    labels = torch.zeros(2, 8, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=remedy):
        part_pool(**{"features": torch.ones(2, 5, 4, 4), "labels": labels, "n_parts": 2} | change)


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="cuda"):
        part_pool(torch.ones(1, 4, 2), torch.zeros(1, 4, dtype=torch.int64), 1, backend="cuda")


@pytest.mark.parametrize("size", [(0, 2), 0])
def test_bad_grid_size_is_named(size):
    with pytest.raises(ValueError, match="size"):
        labels_to_grid(torch.zeros(1, 2, 2, dtype=torch.int64), size, 2)


@pytest.mark.parametrize("wrong", [-2, 3, 255])
def test_ids_out_of_range_raise_on_the_cpu_and_are_never_pooled(wrong):
    """On the CPU an id that is not a part raises; the operation itself, as on a GPU, masks it out."""
    x, labels, _ = make((2, 3, 4, 4, 3), torch.float32)
    labels[0, 0, 0] = wrong
    for call in (lambda: part_pool(x, labels, 3), lambda: labels_to_grid(labels, (2, 2), 3)):
        with pytest.raises(ValueError, match=f"labels holds {wrong}"):
            call()
    left_out = labels.clone()
    left_out[0, 0, 0] = -1
    raw = torch.ops.fgfast.part_pool(x, labels, 3, None, True)
    torch.testing.assert_close(raw, torch.ops.fgfast.part_pool(x, left_out, 3, None, True), rtol=0, atol=0)
    grid = torch.ops.fgfast.labels_to_grid(labels, 2, 2, 3)
    assert torch.equal(grid, torch.ops.fgfast.labels_to_grid(left_out, 2, 2, 3))
