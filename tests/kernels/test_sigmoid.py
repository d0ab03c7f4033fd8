"""The Triton kernels of the pairwise sigmoid loss against the definition in float64, interpreted without a GPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")

from fgfast.kernels.contrast import problem, sigmoid
from fgfast.ops.sigmoid import sigmoid_loss
from tests.examples import examples
from tests.kernels.contrast_fields import CHANNELS, WHOLE
from tests.ops.test_sigmoid import assert_within, evaluate, largest_errors, make

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cut(patch: pytest.MonkeyPatch, tile: problem.TileShape, programs: int = 1) -> None:
    """Use this tile, and split columns into at least this many programs."""
    patch.setattr(sigmoid, "tile", lambda *unused: tile)
    patch.setattr(sigmoid, "programs_wanted", lambda device: programs)


def check(inputs: list[Tensor]) -> None:
    """The kernels keep the bounds; beside them w is rounded to bfloat16 for half precision."""
    expected = evaluate(inputs, "reference", torch.float64)
    half = inputs[0].element_size() == 2
    rounding = torch.finfo(inputs[0].dtype).eps / 2 + (2**-8 if half else 0.0)
    got = [g.cpu() for g in evaluate([x.to(DEVICE) for x in inputs], "triton")]
    assert [g.dtype for g in got[1:]] == [x.dtype for x in inputs]
    assert_within(got, expected, largest_errors(inputs, rounding))


@pytest.mark.quick
@examples(12)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0, 1, 16, 33, 70]),
    st.sampled_from([1, 16, 37]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([(10.0, -10.0), (1.0, 0.0), (100.0, 3.0), (-5.0, 40.0)]),
    st.sampled_from([WHOLE, CHANNELS]),
    st.sampled_from([1, 9]),
)
def test_loss_and_every_gradient_are_those_of_the_definition(
    seed: int, n: int, d: int, dtype: torch.dtype, factors: tuple[float, float], tile: problem.TileShape, programs: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, tile, programs)
        check(make(seed, n, d, dtype, *factors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [40, 300])
def test_the_tiles_of_the_table(dtype: torch.dtype, d: int) -> None:
    check(make(1, 70, d, dtype))


def test_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, CHANNELS)
    inputs = [x.to(DEVICE) for x in make(2, 20, dtype=torch.float32)]
    expected = evaluate(inputs, "triton")
    inputs[0] = inputs[0].T.contiguous().T
    wide = torch.full((20, 5, 3), torch.nan, device=DEVICE)
    wide[..., 1] = inputs[1]
    inputs[1] = wide[..., 1]
    for x in inputs:
        x.requires_grad_()
    loss = sigmoid_loss(*inputs, backend="triton")
    for x, y in zip([loss.detach(), *torch.autograd.grad(3 * loss, inputs)], expected, strict=True):
        torch.testing.assert_close(x, y)


def test_a_loss_far_below_the_rounding_error_of_1_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs at 20 and others at -20 add log(1 + e^-20) = 2e-9 each."""
    cut(monkeypatch, WHOLE)
    x = torch.eye(40, device=DEVICE)
    loss = sigmoid_loss(x, x, torch.tensor(40.0), torch.tensor(-20.0), backend="triton")
    torch.testing.assert_close(loss.item(), 40 * 2.0611536e-09, rtol=1e-5, atol=0)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("tile", [WHOLE, CHANNELS], ids=["whole", "channels"])
def test_nan_anywhere_makes_the_loss_nan(which: int, tile: problem.TileShape, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, tile)
    inputs = make(3, 20, dtype=torch.float32)
    inputs[which].view(-1)[-1] = torch.nan
    loss, *grads = evaluate([x.to(DEVICE) for x in inputs], "triton")
    assert loss.isnan()
    assert all(g.isnan().any() for g in grads)


@pytest.mark.parametrize("tile", [WHOLE, CHANNELS], ids=["whole", "channels"])
def test_blocks_of_texts_add_up_as_over_ranks(tile: problem.TileShape, monkeypatch: pytest.MonkeyPatch) -> None:
    """The images with two blocks of texts, of which only the first holds their pairs."""
    cut(monkeypatch, tile, programs=3)
    image, text, t, b = (x.to(DEVICE) for x in make(4, 70, dtype=torch.float32))
    mine, others = text[:40], text[40:]
    image, factor = image[:40], t / 40
    logits = (t * image @ text.T + b).double().requires_grad_()
    is_pair = torch.eye(40, 70, dtype=torch.bool, device=DEVICE)
    losses = -torch.nn.functional.logsigmoid(torch.where(is_pair, logits, -logits)).sum(1)
    (w,) = torch.autograd.grad(losses.sum(), logits)
    got = sigmoid.forward(image, mine, t, b, True) + sigmoid.forward(image, others, t, b, False)
    torch.testing.assert_close(got.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    d_image, d_mine, d_others = (torch.zeros_like(x) for x in (image, mine, others))
    sigmoid.add_gradients(image, mine, t, b, True, factor, d_image, d_mine)
    sigmoid.add_gradients(image, others, t, b, False, factor, d_image, d_others)
    for x, y in ((d_image, w @ text.double()), (torch.cat([d_mine, d_others]), w.T @ image.double())):
        torch.testing.assert_close(x.double(), y * factor, rtol=1e-4, atol=1e-5)


def test_what_the_kernels_cannot_take_is_refused() -> None:
    t, b = torch.tensor(1.0), torch.tensor(0.0)
    wide, double = torch.zeros(2, 8193, device=DEVICE), torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="image_features has 8193 channels and the Triton kernels take 8192"):
        sigmoid_loss(wide, wide, t, b, backend="triton")
    with pytest.raises(TypeError, match=r"image_features has dtype torch\.float64"):
        sigmoid_loss(double, double, t, b, backend="triton")
