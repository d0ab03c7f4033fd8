"""The pivotal mask: one list of cases for every backend and device, compared with the definition and its invariants."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgfast import mask_images, pivotal_mask
from fgfast.backend import missing
from fgfast.ops.mask import STRATEGIES, _log2
from fgfast.reference.draws import philox
from tests.examples import examples

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BACKENDS = [
    pytest.param(b, marks=pytest.mark.skipif(missing(b) is not None, reason=f"{missing(b)}"))
    for b in ("native", "torch", "reference")
]
everywhere = pytest.mark.parametrize("device", DEVICES)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def spaced(layers: int, batch: int, heads: int, patches: int, seed: int = 0) -> Tensor:
    """Attention whose scores lie 2e-3 or more apart: a layer with spaced logs, the others equal in every patch."""
    g = torch.Generator().manual_seed(seed)
    rank = torch.stack([torch.randperm(patches, generator=g) for _ in range(batch)])
    one = torch.exp2(-rank * (8.0 / patches) - 1)[None, :, None].expand(1, batch, heads, patches)
    rest = torch.rand(layers - 1, batch, 1, 1, generator=g).add(0.1).expand(-1, -1, heads, patches)
    return torch.cat([one, rest])


def rough(layers: int, batch: int, heads: int, patches: int, seed: int = 0) -> Tensor:
    """Attention with zeros, denormals and equal entries."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(layers, batch, heads, patches, generator=g)
    kind = torch.randint(0, 12, x.shape, generator=g)
    return torch.where(kind == 0, 0.0, torch.where(kind == 1, 1e-41, torch.where(kind == 2, 0.25, x)))


@everywhere
@every_backend
@every_strategy
@examples(15)
@given(
    layers=st.integers(1, 4), batch=st.integers(0, 5), heads=st.integers(1, 3), side=st.integers(1, 9),
    keep=st.floats(0.05, 1.0), seed=st.integers(0, 1000),
)  # fmt: skip
def test_every_backend_keeps_the_same_k_patches(strategy, backend, device, layers, batch, heads, side, keep, seed):
    """Exactly k patches in every row, the index lists them in order, and every backend keeps the same ones."""
    x = rough(layers, batch, heads, side * side, seed).to(device)
    kept = math.floor(keep * side * side + 1e-9)
    if kept < 1:
        return
    found = pivotal_mask(x, keep=keep, strategy=strategy, seed=seed, backend=backend)
    assert found.mask.shape == (batch, side * side)
    assert found.mask.dtype == torch.bool
    assert found.mask.sum(1).eq(kept).all()
    for row, index in zip(found.mask, found.index, strict=True):
        assert torch.equal(row.nonzero()[:, 0], index)
    if backend == "native":
        plain = pivotal_mask(x.cpu(), keep=keep, strategy=strategy, seed=seed, backend="torch")
        assert torch.equal(found.mask.cpu(), plain.mask)


@everywhere
@every_backend
@every_strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_agrees_with_the_definition(strategy, backend, device, dtype):
    """Where scores are apart, float64 and float32 rank alike, whatever the dtype of attention."""
    x = spaced(3, 6, 2, 64).to(dtype).to(device)  # 64 values over 8 octaves: apart in bfloat16, too
    expected = pivotal_mask(x.cpu(), keep=0.37, strategy=strategy, seed=5, backend="reference")
    found = pivotal_mask(x, keep=0.37, strategy=strategy, seed=5, backend=backend)
    assert torch.equal(found.mask.cpu(), expected.mask)


@everywhere
@every_backend
@examples(15)
@given(layers=st.integers(1, 5), patches=st.integers(2, 300), keep=st.floats(0.3, 1.0), seed=st.integers(0, 99))
def test_invariants_of_topk(backend, device, layers, patches, keep, seed):
    """Permuted patches permute the mask; a scaled layer, or one layer transformed, changes nothing."""
    if keep * patches < 1:
        return
    x = spaced(layers, 3, 2, patches, seed).to(device)
    mask = pivotal_mask(x, keep=keep, backend=backend).mask
    order = torch.randperm(patches, generator=torch.Generator().manual_seed(seed)).to(device)
    assert torch.equal(pivotal_mask(x[..., order], keep=keep, backend=backend).mask, mask[:, order])
    scale = torch.tensor([0.37, 2.9, 1.0, 11.0, 0.01], device=device)[:layers, None, None, None]
    assert torch.equal(pivotal_mask(x * scale, keep=keep, backend=backend).mask, mask)
    one = x[:1]
    assert torch.equal(
        pivotal_mask(one.sqrt(), keep=keep, backend=backend).mask, pivotal_mask(one, keep=keep, backend=backend).mask
    )
    assert torch.equal(
        pivotal_mask(one.square(), keep=keep, backend=backend).mask, pivotal_mask(one, keep=keep, backend=backend).mask
    )


@everywhere
@every_backend
def test_ties_go_to_the_lowest(backend, device):
    """Equal attention, and equal products of zero, keep the first patches."""
    for x in (torch.full((2, 2, 3, 50), 0.02), torch.zeros(2, 2, 3, 50)):
        found = pivotal_mask(x.to(device), keep=0.3, backend=backend)
        assert found.index.tolist() == [list(range(15))] * 2
    x = torch.zeros(1, 1, 9)
    x[0, 0, [2, 5, 7]] = torch.tensor([1e-42, 0.5, 0.5])
    assert pivotal_mask(x.to(device), keep=0.34, backend=backend).index.tolist() == [[2, 5, 7]]
    assert pivotal_mask(x.to(device), keep=0.23, backend=backend).index.tolist() == [[5, 7]]


@everywhere
@every_backend
def test_block_is_the_best_window(backend, device):
    """A bright square is found; a single zero in it moves the window elsewhere."""
    x = torch.full((1, 1, 1, 8, 8), 0.01)
    x[..., 2:5, 3:6] = 0.5
    mask = pivotal_mask(x.flatten(3).to(device), keep=9 / 64, strategy="block", backend=backend).mask.view(8, 8)
    assert mask[2:5, 3:6].all()
    x[..., 3, 4] = 0
    moved = pivotal_mask(x.flatten(3).to(device), keep=9 / 64, strategy="block", backend=backend).mask.view(8, 8)
    assert not moved[3, 4]


@everywhere
@every_backend
@pytest.mark.parametrize("strategy", ["sample", "random"])
def test_seeds_reproduce_and_differ(strategy, backend, device):
    """The same seed gives the same mask; another seed, or another image, a different one."""
    x = torch.full((1, 4, 2, 196), 0.1, device=device)
    masks = [pivotal_mask(x, strategy=strategy, seed=s, backend=backend).mask for s in (1, 1, 2, (1 << 62) + 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[3])
    assert not torch.equal(masks[0][0], masks[0][1])
    torch.manual_seed(0)
    drawn = [pivotal_mask(x, strategy=strategy, backend=backend).mask for _ in range(2)]
    assert not torch.equal(*drawn)


@every_backend
def test_sampling_follows_attention(backend):
    """A single kept patch is drawn in proportion to attention: chi-square of 8 patches under the 0.1% point."""
    p = torch.tensor([0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02])
    n = 4000
    x = p.expand(1, n, 1, 8)
    counts = pivotal_mask(x, keep=1 / 8, strategy="sample", seed=7, backend=backend).mask.sum(0)
    chi = ((counts - n * p).square() / (n * p)).sum()
    assert chi < 24.32
    even = pivotal_mask(x, keep=1 / 8, strategy="random", seed=7, backend=backend).mask.sum(0)
    assert ((even - n / 8).square() / (n / 8)).sum() < 24.32


@everywhere
@every_backend
@every_strategy
def test_strides_do_not_matter(strategy, backend, device):
    """Slices, permuted and expanded dimensions give the result of a contiguous copy."""
    base = rough(6, 5, 4, 40).to(device)
    for x in (
        base[::2, 1:4, 1:3, 3:39],
        base.permute(2, 1, 0, 3)[..., :36],
        base[:, :1, :, ::1][..., 4:].expand(6, 3, 4, 36),
    ):
        a, b = (pivotal_mask(v, strategy=strategy, seed=3, backend=backend) for v in (x, x.contiguous()))
        assert torch.equal(a.mask, b.mask)
    three = base[:, :, 0, :36]
    assert torch.equal(
        pivotal_mask(three, seed=1, strategy=strategy, backend=backend).mask,
        pivotal_mask(three[:, :, None], seed=1, strategy=strategy, backend=backend).mask,
    )


def layouts(x: Tensor) -> list[Tensor]:
    """The same kind of images in several memory layouts."""
    wide = torch.randn(len(x), x.shape[1] + 2, x.shape[2], x.shape[3] + 3, dtype=torch.float64).to(x)
    return [
        x, x.to(memory_format=torch.channels_last), wide[:, 1:-1, :, 1:-2],
        wide.to(memory_format=torch.channels_last)[:, :-2, :, :-3], x.transpose(2, 3),
    ]  # fmt: skip


@everywhere
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_masked_images(backend, device, dtype):
    """Dropped patches are zero even where they held NaN, the others keep their bits, in every layout."""
    x = torch.randn(3, 3, 24, 24).to(dtype).to(device)
    x[:, :, 0, 0] = torch.nan
    attention = rough(2, 3, 2, 16).to(device)
    for images in layouts(x):
        found = pivotal_mask(attention, images=images, backend=backend)
        cells = found.mask.view(3, 1, 4, 4).repeat_interleave(6, 2).repeat_interleave(6, 3)
        expected = torch.where(cells, images, 0)
        assert found.images is not None
        torch.testing.assert_close(found.images, expected, rtol=0, atol=0, equal_nan=True)
        again = mask_images(images, found.mask, backend=backend)
        torch.testing.assert_close(again, expected, rtol=0, atol=0, equal_nan=True)
        assert again.shape == images.shape
    tall = mask_images(x, found.mask, grid=(2, 8), backend=backend)
    cells = found.mask.view(3, 1, 2, 8).repeat_interleave(12, 2).repeat_interleave(3, 3)
    torch.testing.assert_close(tall, torch.where(cells, x, 0), rtol=0, atol=0, equal_nan=True)


@everywhere
@every_backend
def test_gradients_are_masked(backend, device):
    """The gradient of the images is masked like the images, through both functions."""
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, device=device, requires_grad=True)
    mask = pivotal_mask(rough(1, 2, 1, 16), backend="reference").mask.to(device)
    assert torch.autograd.gradcheck(lambda x: mask_images(x, mask, backend=backend), images)
    attention = rough(1, 2, 1, 16).to(device)
    found = pivotal_mask(attention, images=images, backend=backend)
    (grad,) = torch.autograd.grad(found.images.sum(), images)
    assert torch.equal(grad, mask_images(torch.ones_like(images), found.mask))


@every_backend
def test_custom_ops_pass_their_checks(backend):
    """Schema, fake tensors, autograd registration and dynamic shapes."""
    attention, images = rough(2, 3, 2, 16), torch.randn(3, 3, 8, 8, requires_grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for given_ in (images, None):
        torch.library.opcheck(
            torch.ops.fgfast.pivotal_mask.default, (attention, given_, 4, "topk", 0, 4, 4, backend), test_utils=checks
        )
    mask = pivotal_mask(attention).mask
    torch.library.opcheck(torch.ops.fgfast.mask_images.default, (images, mask, 4, 4, backend), test_utils=checks)


def test_compiles_as_one_graph():
    """torch.compile(fullgraph=True) gives the same mask and images."""

    def run(attention: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        found = pivotal_mask(attention * 2, keep=0.4, images=images + 1)
        assert found.images is not None
        return found.index, mask_images(found.images, found.mask)

    given_ = rough(2, 3, 2, 16), torch.randn(3, 3, 8, 8)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*given_)
    for a, b in zip(run(*given_), compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@every_backend
def test_many_callers_at_once(backend):
    """Eight threads that work on different inputs at once get the results of one thread."""
    problems = [rough(3, 20, 3, 196, seed) for seed in range(8)]
    expected = [pivotal_mask(x, backend=backend).mask for x in problems]
    wrong = []

    def call(i: int) -> None:
        for _ in range(2 if backend == "reference" else 10):
            if not torch.equal(pivotal_mask(problems[i], backend=backend).mask, expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=call, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@every_backend
def test_the_number_of_threads_changes_nothing(backend):
    """Any number of threads gives the result of one, to concurrent callers too, and reports an error in any range."""
    x = rough(3, 70, 12, 1024)
    images = torch.randn(70, 3, 64, 64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = pivotal_mask(x, images=images, backend="torch")
        spoilt = x.clone()
        spoilt[2, 69, 11, 1023] = -1.0
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            with ThreadPoolExecutor(3) as callers:
                calls = [callers.submit(pivotal_mask, x, images=images, backend=backend) for _ in range(3)]
            for call in calls:
                for a, b in zip(call.result(), expected, strict=True):
                    assert torch.equal(a, b)
            assert torch.equal(mask_images(images, expected.mask, backend=backend), expected.images)
            with pytest.raises(ValueError, match="negative"):
                pivotal_mask(spoilt, backend=backend)
    finally:
        torch.set_num_threads(before)


@everywhere
@pytest.mark.parametrize("patches", [4096, 1000])
def test_large_problems(device, patches):
    """4,096 patches, and a batch over 65,535."""
    x = rough(2, 3, 2, patches).to(device)
    for strategy in ("topk", "sample"):
        a, b = (pivotal_mask(x, strategy=strategy, seed=2, backend=n) for n in ("auto", "torch"))
        assert torch.equal(a.mask, b.mask)
    many = rough(1, 1, 1, 9).expand(1, 70_000, 1, 9).to(device)
    assert pivotal_mask(many, keep=0.4).mask.eq(pivotal_mask(many[:, :1], keep=0.4).mask).all()


def test_logarithm():
    """Within 3 units in the last place of log2 over the full range, exact at powers of two, denormals included."""
    x = torch.cat([torch.logspace(-44, 38, 20_001), 1 + torch.linspace(-0.3, 0.42, 20_001), torch.tensor([1.0])])
    exact = x.double().log2()
    error = (_log2(x).double() - exact).abs()
    ulp = torch.exp2(exact.abs().clamp_min(2.0**-126).log2().floor() - 23)
    assert (error / ulp).max() <= 3
    powers = torch.exp2(torch.arange(-149.0, 128.0))
    assert torch.equal(_log2(powers), torch.arange(-149.0, 128.0))
    assert _log2(torch.tensor([0.0, torch.inf])).tolist() == [-torch.inf, torch.inf]


def test_philox_gives_its_published_numbers():
    """The known answer of Philox 4x32-10 for counter and key zero: 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8])
    expected = ((words >> 9).float() + 0.5) * 2.0**-23
    assert torch.equal(philox(0, 1, 4, torch.device("cpu"))[0], expected)


GOOD = rough(2, 3, 2, 16)


@every_backend
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"keep": 0}, ValueError, "keep is 0"),
        ({"keep": -0.1}, ValueError, "keep is -0.1"),
        ({"keep": 1.5}, ValueError, "keep is 1.5"),
        ({"keep": 0.01}, ValueError, "keeps none"),
        ({"keep": float("nan")}, ValueError, "keep is nan"),
        ({"strategy": "best"}, ValueError, "strategy is 'best'"),
        ({"seed": -1, "strategy": "random"}, ValueError, "seed is -1"),
        ({"seed": 1.5, "strategy": "random"}, TypeError, "seed is 1.5"),
        ({"attention": -GOOD}, ValueError, "negative"),
        ({"attention": GOOD / 0}, ValueError, "NaN"),
        ({"attention": GOOD[0, 0]}, ValueError, "attention: expected shape"),
        ({"attention": GOOD.numpy()}, TypeError, "attention is a ndarray"),
        ({"attention": GOOD.int()}, TypeError, "attention has dtype"),
        ({"attention": GOOD[..., :15], "strategy": "block"}, ValueError, "no square"),
        ({"attention": GOOD[..., :15], "images": torch.ones(3, 1, 8, 8)}, ValueError, "no square"),
        ({"images": torch.ones(3, 1, 9, 8)}, ValueError, "do not divide"),
        ({"images": torch.ones(2, 1, 8, 8)}, ValueError, "images: expected shape"),
        ({"images": torch.ones(3, 1, 8, 8, dtype=torch.uint8)}, TypeError, "images has dtype"),
        ({"images": torch.ones(3, 1, 8, 8, device="meta")}, ValueError, "images is on meta"),
    ],
)
def test_bad_input_is_named(call, error, message, backend):
    """Before anything is computed."""
    with pytest.raises(error, match=message):
        pivotal_mask(**({"attention": GOOD, "backend": backend} | call))


def test_bad_masks_are_named():
    """mask_images checks its mask and its grid."""
    images, mask = torch.ones(2, 1, 8, 8), torch.ones(2, 16, dtype=torch.bool)
    for wrong, error, message in (
        ({"mask": mask.int()}, TypeError, "mask has dtype"),
        ({"mask": mask[0]}, ValueError, "mask: expected shape"),
        ({"mask": mask[:, :15]}, ValueError, "no square"),
        ({"grid": (3, 5)}, ValueError, "grid is"),
        ({"grid": (1.6, 10)}, TypeError, "grid is 1.6"),
        ({"images": images[..., :6]}, ValueError, "do not divide"),
    ):
        with pytest.raises(error, match=message):
            mask_images(**({"images": images, "mask": mask} | wrong))


@pytest.mark.skipif(missing("native") is not None, reason=f"{missing('native')}")
def test_native_names_the_dtype_that_it_does_not_support():
    """float64 uses the torch backend; asking for "native" is an error."""
    x = GOOD.double()
    assert torch.equal(pivotal_mask(x).mask, pivotal_mask(x, backend="torch").mask)
    with pytest.raises(ValueError, match="takes no torch"):
        pivotal_mask(x, backend="native")


@everywhere
@every_backend
def test_masks_of_any_strides(backend, device):
    """A mask with gaps between its rows, whose dense copy has to outlive the call."""
    images = torch.rand(6, 3, 32, 32, device=device)
    wide = torch.rand(12, 64, device=device) < 0.5
    dense = mask_images(images, wide[::2].contiguous(), backend=backend)
    assert all(torch.equal(mask_images(images, wide[::2], backend=backend), dense) for _ in range(5))
