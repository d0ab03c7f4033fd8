"""The Triton kernel of perturb: exactly the mask of the reference, in the interpreter or on a GPU."""

import os

import pytest
import torch
from hypothesis import given

pytest.importorskip("triton")

from fgfast import perturb
from fgfast.ops.perturb import MAX_CHANNELS
from tests.examples import examples
from tests.ops.test_perturb import TOLERANCE, problems

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts traffic in the interpreter")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_device(options):
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@examples(20)
@given(problems(DTYPES))
def test_equals_the_reference(problem):
    x, options = problem
    expected = perturb(x, **options, backend="reference")
    out = perturb(x.to(DEVICE), **on_device(options), backend="triton")
    assert torch.equal(out.mask.cpu(), expected.mask)
    assert torch.equal(out.features[~out.mask].cpu(), x[~expected.mask])
    near = TOLERANCE[x.dtype]
    torch.testing.assert_close(out.features.cpu(), expected.features, rtol=near, atol=near * float(x.abs().max()))


def test_more_rows_than_programs(monkeypatch):
    """A program loops over several rows; the last row swaps with the first."""
    from fgfast.kernels import perturb as kernels

    monkeypatch.setattr(kernels, "processors", lambda device: 1)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)
    x, w = torch.randn(5, 33), torch.randn(5, 33)
    expected = perturb(x, w, strategy="swap", backend="reference")
    out = perturb(x.to(DEVICE), w.to(DEVICE), strategy="swap", backend="triton")
    assert torch.equal(out.mask.cpu(), expected.mask)
    torch.testing.assert_close(out.features.cpu(), expected.features)


def test_a_row_that_is_not_finite_is_unchanged():
    x, w = torch.randn(2, 6, device=DEVICE), torch.randn(2, 6, device=DEVICE)
    x[0, 1], w[1, 0] = float("nan"), float("nan")
    out = perturb(x, w, fraction=0.5, strategy="zero", budget=1.0, backend="triton")
    assert torch.equal(out.mask, perturb(x, w, fraction=0.5, strategy="zero", budget=1.0, backend="torch").mask)
    assert out.mask.sum(1).tolist() == [0, 3]
    torch.testing.assert_close(out.features[0], x[0], rtol=0, atol=0, equal_nan=True)


def test_unsupported_input_is_named_in_the_error():
    x = torch.ones(1, MAX_CHANNELS + 1, device=DEVICE)
    with pytest.raises(ValueError, match="channels, over the"):
        perturb(x, x, strategy="zero", backend="triton")
    with pytest.raises(TypeError, match="float64"):
        perturb(x[:, :2].double(), x[:, :2], strategy="zero", backend="triton")
    assert perturb(x, x, strategy="zero").mask.shape == x.shape  # auto takes another backend


@interpreted
@pytest.mark.parametrize(("strategy", "reads"), [("noise", 2), ("swap", 3)])
def test_features_are_read_once(strategy, reads, monkeypatch):
    """Features (swap: of two rows) and gradient in, result and mask out; std and low_variance once per program."""
    from fgfast.kernels import perturb as kernels
    from fgfast.kernels.sanitizer import checked, fewest

    monkeypatch.setattr(kernels, "PROGRAMS", 1)  # eight rows each
    x, w, std, low = torch.randn(32, 128), torch.randn(32, 128), torch.rand(128), torch.rand(128) < 0.3
    with checked(x, w, std, low) as traffic:
        out = perturb(x, w, low_variance=low, std=std, strategy=strategy, seed=0, backend="triton")
    assert traffic.launches == 1
    assert traffic.bytes <= 1.10 * (fewest(std, low, *out) + reads * fewest(x))
