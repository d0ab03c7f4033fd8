"""The pairwise sigmoid loss by tiles against its definition: values, gradients, strides, registration."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgfast.ops.sigmoid import sigmoid_loss
from fgfast.tensors import accumulation
from tests.examples import examples

pytestmark = pytest.mark.usefixtures("small_tiles")

BACKENDS = ("torch", "reference")


def make(
    seed: int, n: int = 11, d: int = 5, dtype: torch.dtype = torch.float64, t: float = 10.0, b: float = -10.0
) -> list[Tensor]:
    """Unit vectors of images and texts, and t and b, as SigLIP starts with."""
    g = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype) for _ in range(2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [image, text, torch.tensor(t, dtype=wide), torch.tensor(b, dtype=wide)]


def evaluate(inputs: list[Tensor], backend: str = "torch", dtype: torch.dtype | None = None) -> list[Tensor]:
    """The loss and every gradient, of the inputs as they are or in another dtype."""
    inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    loss = sigmoid_loss(*inputs, backend=backend)
    return [loss.detach(), *torch.autograd.grad(3 * loss, inputs)]


def largest_errors(inputs: list[Tensor], rounding: float = 0.0) -> list[float]:
    """Bounds of the docstring for the loss and the gradients of 3 times the loss.

    A logit is rounded by 1e-6 (t + |b|), which moves its loss by that times its derivative w and w itself by at most
    that times w; a sum is rounded relative to the magnitudes it adds up. ``rounding``: of the returned gradients.
    """
    image, text, t, b = (x.double() for x in inputs)
    logits = (t * (image @ text.T) + b).requires_grad_()
    is_pair = torch.eye(len(image), dtype=torch.bool)
    loss = F.softplus(torch.where(is_pair, -logits, logits)).sum() / max(len(image), 1)
    w = torch.autograd.grad(loss, logits)[0].abs()
    loss = loss.detach()
    largest = float(max(x.abs().max() for x in (image, text))) if len(image) else 0.0
    of_image, of_text = (float(F.pad(w.sum(k), (0, 1)).max() * t.abs()) * largest for k in (1, 0))
    relative = 1e-6 * float(1 + t.abs() + b.abs())
    sums = [of_image, of_text, float(w.sum()), float(w.sum())]
    smallest = [float(torch.finfo(x.dtype).smallest_normal) for x in inputs]
    underflow = float(torch.finfo(accumulation(inputs[0].dtype)).smallest_normal)
    bound_of_loss = 1e-6 * float(loss) + relative * float(w.sum()) + underflow
    return [bound_of_loss, *(3 * (relative + rounding) * s + tiny for s, tiny in zip(sums, smallest, strict=True))]


def assert_within(got: list[Tensor], expected: list[Tensor], bounds: list[float]) -> None:
    """Values as expected."""
    for x, y, bound in zip(got, expected, bounds, strict=True):
        assert x.shape == y.shape
        if y.numel():
            assert (x.double() - y).abs().max() <= bound


@examples(60)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0, 1, 3, 4, 5, 8, 23]),  # tiles are of 4
    st.sampled_from([1, 5, 16]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([(10.0, -10.0), (1.0, 0.0), (100.0, 3.0), (-5.0, 40.0)]),
    st.sampled_from(BACKENDS),
)
def test_loss_and_every_gradient_are_those_of_float64(
    seed: int, n: int, d: int, dtype: torch.dtype, factors: tuple[float, float], backend: str
) -> None:
    inputs = make(seed, n, d, dtype, *factors)
    expected = evaluate(inputs, "reference", torch.float64)
    got = evaluate(inputs, backend)
    assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert [g.dtype for g in got[1:]] == [x.dtype for x in inputs]
    assert_within(got, expected, largest_errors(inputs, torch.finfo(dtype).eps / 2))


def test_the_definition_is_the_formula_entry_by_entry() -> None:
    image, text, t, b = make(0, n=4)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            z = 1 if i == j else -1
            total -= torch.log(torch.sigmoid(z * (t * torch.dot(image[i], text[j]) + b)))
    torch.testing.assert_close(sigmoid_loss(image, text, t, b, backend="reference"), total / 4)


def test_a_loss_far_below_the_rounding_error_of_1_is_not_lost_in_float32() -> None:
    """Pairs at 20 and others at -20 add log(1 + e^-20) = 2e-9 each, which 1 + e^-20 would round away."""
    x = torch.eye(40)
    for backend in BACKENDS:
        loss = sigmoid_loss(x, x, torch.tensor(40.0), torch.tensor(-20.0), backend=backend)
        torch.testing.assert_close(loss.item(), 40 * 2.0611536e-09, rtol=1e-5, atol=0)


def test_strides_do_not_matter() -> None:
    image, text, t, b = make(2)
    wide = torch.randn(11, 5, 3, dtype=torch.float64)
    wide[..., 1] = text
    strided = evaluate([image, text, t, b])
    image, text = image.T.contiguous().T.requires_grad_(), wide[..., 1].requires_grad_()
    loss = sigmoid_loss(image, text, t, b, backend="torch")
    got = [loss.detach(), *torch.autograd.grad(3 * loss, [image, text])]
    for x, y in zip(got, strided, strict=False):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("which", range(4))
def test_a_single_gradient_is_the_one_of_all(which: int) -> None:
    inputs = make(3)
    expected = evaluate(inputs)[1 + which]
    inputs[which].requires_grad_()
    loss = sigmoid_loss(*inputs, backend="torch")
    torch.testing.assert_close(torch.autograd.grad(3 * loss, inputs[which])[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", range(4))
def test_nan_anywhere_makes_the_loss_nan(which: int, backend: str) -> None:
    inputs = make(4)
    inputs[which].view(-1)[-1] = torch.nan
    loss, *grads = evaluate(inputs, backend)
    assert loss.isnan()
    assert all(g.isnan().any() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_the_arithmetic(backend: str) -> None:
    inputs = make(5, dtype=torch.float32)
    expected = sigmoid_loss(*inputs, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(sigmoid_loss(*inputs, backend=backend), expected)


def test_opcheck() -> None:
    inputs = [x.requires_grad_() for x in make(6, n=6)]
    torch.library.opcheck(torch.ops.fgfast.sigmoid_loss, (*inputs, "torch", ""))
    grad = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for need_text in (True, False):
        torch.library.opcheck(torch.ops.fgfast.sigmoid_loss_backward, (grad, need_text, *inputs, "torch", ""))


def test_second_derivatives_and_transforms_are_those_of_the_definition() -> None:
    inputs = [x.requires_grad_() for x in make(7, n=5, t=2.0, b=-1.0)]

    def loss(*inputs: Tensor) -> Tensor:
        return sigmoid_loss(*inputs, backend="torch")

    assert torch.autograd.gradgradcheck(loss, inputs)
    detached = [x.detach() for x in inputs]
    got = torch.func.grad(loss, argnums=(0, 1, 2, 3))(*detached)
    for x, y in zip(got, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(x, y)


def test_kernels_are_refused_where_the_definition_is_needed() -> None:
    with pytest.raises(RuntimeError, match="SigLIPLoss with backend 'triton'"):
        torch.func.grad(lambda x: sigmoid_loss(x, *make(8)[1:], backend="triton"))(make(8)[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_fullgraph_gives_the_same_numbers(dynamic: bool) -> None:
    def loss(*inputs: Tensor) -> Tensor:
        return sigmoid_loss(*inputs, backend="torch")

    inputs = [x.requires_grad_() for x in make(9)]
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results: list[Any] = []
    for f in (loss, compiled):
        value = f(*inputs)
        results.append([value.detach(), *torch.autograd.grad(value, inputs)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
