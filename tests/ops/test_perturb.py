"""perturb: masks equal to the reference bit for bit, changed values close to it, and invariants."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import fgfast
from fgfast import perturb
from fgfast.ops.perturb import FRACTION_BITS, IMPORTANCE, STRATEGIES, _perturb, smallest_mask
from fgfast.reference import perturb as reference
from tests.examples import examples

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@st.composite
def problems(draw, dtypes=tuple(TOLERANCE)):
    """Features, and the options of perturb: rows with zeros and equal values, one channel, one criterion or two."""
    rows, channels = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 7, 32, 45]))
    dtype = draw(st.sampled_from(dtypes))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(rows, channels, generator=g)
    x = {"plain": x, "relu": x.relu(), "ties": x.round(), "tiny": x * 1e-20, "huge": x * 1e30, "zero": x * 0}[
        draw(st.sampled_from(["plain", "relu", "ties", "tiny", "huge", "zero"]))
    ].to(dtype)
    x = x.mT.contiguous().mT if draw(st.booleans()) else x
    w = torch.randn(rows, channels, generator=g).to(dtype)
    w = w.round() if draw(st.booleans()) else w
    which = draw(st.sampled_from(["both", "gradient", "variance"]))
    options = {
        "gradient": None if which == "variance" else w,
        "low_variance": None if which == "gradient" else torch.rand(channels, generator=g) < 0.4,
        "std": torch.rand(channels, generator=g), "fraction": draw(st.sampled_from([0.0, 0.3, 0.71, 1.0])),
        "importance": draw(st.sampled_from(IMPORTANCE)), "combine": draw(st.sampled_from(["union", "intersection"])),
        "strategy": draw(st.sampled_from(STRATEGIES)), "strength": draw(st.sampled_from([0.0, 0.5, 1.0, -2.0])),
        "budget": draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), "seed": draw(st.integers(0, 2**62)),
    }  # fmt: skip
    if draw(st.booleans()):
        options["noise"] = torch.randn(rows, channels, generator=g)
    return x, options


def held(x, mask):
    """Fraction of each vector's energy that the mask holds, float64."""
    square = x.double().square()
    return torch.where(mask, square, 0).sum(1) / square.sum(1).clamp(min=1e-300)


@examples(120)
@given(problems())
def test_equals_the_reference(problem):
    x, options = problem
    expected = perturb(x, **options, backend="reference")
    out = perturb(x, **options, backend="torch")
    assert out.features.dtype == x.dtype
    assert torch.equal(out.mask, expected.mask)
    near = TOLERANCE[x.dtype]
    torch.testing.assert_close(out.features, expected.features, rtol=near, atol=near * float(x.abs().max()))


@examples(60)
@given(problems())
def test_unmasked_dimensions_keep_their_bits_and_the_budget_holds(problem):
    x, options = problem
    out = perturb(x, **options)
    assert torch.equal(out.features[~out.mask], x[~out.mask])
    assert (held(x, out.mask) <= options["budget"] + 1e-6).all()
    if options["strength"] == 0:
        assert torch.equal(out.features, x)


@examples(60)
@given(st.integers(0, 10**6), st.integers(1, 40), st.floats(0, 1), st.booleans())
def test_each_criterion_takes_its_fraction_ties_to_the_lowest_index(seed, channels, fraction, ties):
    """With the full energy budget, exactly floor(fraction x D) per vector: the smallest scores, in a stable order."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(3, channels, generator=g), torch.randn(3, channels, generator=g)
    x, w = (x.round(), w.round()) if ties else (x, w)
    mask = perturb(x, w, fraction=fraction, strategy="zero", budget=1.0).mask
    count = math.floor(fraction * channels + 1e-9)
    order = (w * x).abs().sort(dim=1, stable=True).indices[:, :count]
    assert torch.equal(mask, torch.zeros_like(mask).scatter_(1, order, True))
    assert torch.equal(smallest_mask((w * x).abs(), count), mask)


def test_union_and_intersection_join_the_criteria():
    x, w, low = torch.ones(1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([False, True, True, False])
    both = {"low_variance": low, "fraction": 0.5, "strategy": "zero", "budget": 1.0}
    assert perturb(x, w, **both).mask.tolist() == [[True, True, True, False]]
    assert perturb(x, w, **both, combine="intersection").mask.tolist() == [[False, True, False, False]]


def test_the_budget_leaves_the_largest_dimensions_unchanged():
    x = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    everything = {"low_variance": torch.ones(4, dtype=torch.bool), "strategy": "zero"}
    assert perturb(x, **everything).mask.tolist() == [[False, True, True, True], [True, True, False, False]]
    assert perturb(x, **everything, budget=0.0).mask.sum() == 0


def test_values_of_each_strategy():
    x, low = torch.tensor([[3.0, 4.0], [1.0, 2.0]]), torch.tensor([True, False])
    given = {"low_variance": low, "budget": 1.0}
    assert perturb(x, **given, strategy="zero").features.tolist() == [[0, 4], [0, 2]]
    assert perturb(x, **given, strategy="swap").features.tolist() == [[1, 4], [3, 2]]
    assert perturb(x, **given, strategy="swap", strength=0.5).features.tolist() == [[2, 4], [2, 2]]
    noisy = perturb(x, **given, std=torch.tensor([0.5, 9.0]), noise=torch.ones(2, 2)).features
    torch.testing.assert_close(noisy, torch.tensor([[3 + 5 * 0.5, 4], [1 + 5**0.5 * 0.5, 2]]))


def test_noise_depends_on_the_seed():
    x, given = torch.randn(3, 9), {"low_variance": torch.ones(9, dtype=torch.bool), "std": torch.ones(9), "budget": 1.0}
    first, again, other = (perturb(x, **given, seed=s).features for s in (2**40, 2**40, 7))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(perturb(x[:2], **given, seed=7).features, other[:2])  # each vector draws its own numbers
    torch.manual_seed(0)
    assert not torch.equal(perturb(x, **given).features, perturb(x, **given).features)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_vector_is_not_changed(bad, backend):
    x, w = torch.randn(3, 6), torch.randn(3, 6)
    x[1, 2] = bad
    out = perturb(x, w, strategy="zero", budget=1.0, fraction=0.5, backend=backend)
    assert out.mask.sum(1).tolist() == [3, 0, 3]
    torch.testing.assert_close(out.features[1], x[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_importance_that_is_not_a_number_is_the_largest(backend):
    w = torch.tensor([[math.nan, 2.0, 1.0]])
    for count, mask in ((2, [False, True, True]), (3, [True, True, True])):
        out = perturb(torch.ones(1, 3), w, fraction=count / 3, strategy="zero", budget=1.0, backend=backend)
        assert out.mask.tolist() == [mask]


def test_no_gradient_and_no_rows():
    x = torch.randn(2, 5, requires_grad=True)
    assert not perturb(x, x, strategy="zero").features.requires_grad
    assert perturb(x[:0], x[:0], strategy="swap").features.shape == (0, 5)


def test_opcheck_and_compile():
    x, w, std, low = torch.randn(3, 8), torch.randn(3, 8), torch.rand(8), torch.rand(8) < 0.5
    opcheck(_perturb.op, (x, w, low, std, None, 2, "absolute", "union", "noise", 1.0, 1 << 15, 3, "torch"))

    def run(x):
        return perturb(x * 2, w, low_variance=low, std=std, seed=3).features

    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), run(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"features": torch.ones(3)}, ValueError, "features: expected shape"),
        ({"features": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "features"),
        ({"gradient": torch.ones(2, 4)}, ValueError, "gradient"),
        ({"gradient": None}, ValueError, "Neither"),
        ({"low_variance": torch.ones(3)}, TypeError, "low_variance"),
        ({"low_variance": torch.ones(2, dtype=torch.bool)}, ValueError, "low_variance"),
        ({"std": None}, ValueError, "std is missing"),
        ({"std": torch.ones(3, device="meta")}, ValueError, "std is on meta"),
        ({"noise": torch.ones(3)}, ValueError, "noise"),
        ({"fraction": 1.1}, ValueError, "fraction"),
        ({"budget": -0.1}, ValueError, "budget"),
        ({"strength": math.nan}, ValueError, "strength"),
        ({"importance": "sum"}, ValueError, "importance"),
        ({"combine": "xor"}, ValueError, "combine"),
        ({"strategy": "drop"}, ValueError, "strategy"),
        ({"seed": -1}, ValueError, "seed"),
        ({"backend": "native"}, (ValueError, RuntimeError), "native"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(change, error, word):
    given = {"features": torch.ones(2, 3), "gradient": torch.ones(2, 3), "std": torch.ones(3)} | change
    with pytest.raises(error, match=word):
        perturb(**given)


def test_energies_are_integers_of_thirty_bits():
    cost = reference.energies(torch.tensor([1.9, -(2.0**-10), 0.0]))
    assert 2**28 <= cost[0] < 2**reference.UNITS
    assert cost[1:] == [2**8, 0]
    assert math.floor(0.5 * (1 << FRACTION_BITS)) == 2**15


def test_is_public():
    assert fgfast.perturb is perturb


def test_the_former_name_of_fraction_warns() -> None:
    """For one version lowest= still works as fraction=."""
    x, w = torch.rand(2, 6), torch.rand(2, 6)
    wanted = perturb(x, w, fraction=0.5, strategy="zero").mask
    with pytest.warns(DeprecationWarning, match="use fraction"):
        assert torch.equal(perturb(x, w, lowest=0.5, strategy="zero").mask, wanted)
