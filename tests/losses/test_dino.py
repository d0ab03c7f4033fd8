"""DINOLoss: values of lightly with warm-up and centre, and Sinkhorn by its definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fgfast import losses
from fgfast.losses.dino import sinkhorn
from tests.examples import examples
from tests.losses.peers import assert_same, lightly, randn


def test_dino_equals_lightly_with_warm_up_and_centre() -> None:
    options: dict[str, Any] = {"output_dim": 12, "warmup_teacher_temp": 0.03, "warmup_teacher_temp_epochs": 4}
    ours, theirs = losses.DINOLoss(**options).double(), lightly.DINOLoss(**options).double()
    teacher, student = [randn(i, 5, 12) for i in range(2)], [randn(i + 9, 5, 12) for i in range(4)]

    def at(epoch: int | None, loss: nn.Module) -> Callable[..., Tensor]:
        return lambda *x: loss(teacher, list(x), epoch=epoch)

    for epoch in (0, 1, 3, 4, 9, None):
        assert_same(at(epoch, ours), at(epoch, theirs), *student)
        torch.testing.assert_close(ours.center, theirs.center)
    assert ours(teacher, student, teacher_temp=0.5) == pytest.approx(theirs(teacher, student, teacher_temp=0.5).item())


@pytest.mark.parametrize(("n_teacher", "n_student"), [(1, 3), (3, 3), (3, 2), (2, 1)])
def test_dino_equals_lightly_for_any_numbers_of_views(n_teacher: int, n_student: int) -> None:
    ours, theirs = losses.DINOLoss(7).double(), lightly.DINOLoss(7).double()
    teacher, student = [randn(i, 4, 7) for i in range(n_teacher)], [randn(i + 9, 4, 7) for i in range(n_student)]
    assert_same(lambda *x: ours(teacher, list(x)), lambda *x: theirs(teacher, list(x)), *student)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dino_of_half_precision_is_that_of_the_same_numbers_in_float32(dtype: torch.dtype) -> None:
    """Also where x / 0.1 is no number of float16."""
    teacher, student = ([(randn(i + n, 4, 64) * 3000).to(dtype) for i in range(2)] for n in (0, 5))
    half, full = losses.DINOLoss(64), losses.DINOLoss(64)
    value = half(teacher, student)
    torch.testing.assert_close(value, full([x.float() for x in teacher], [x.float() for x in student]))
    torch.testing.assert_close(half.center, full.center)


def test_dino_of_valid_images() -> None:
    """Loss, gradient and centre are those of a batch without the others; no valid image moves nothing."""
    full, part = losses.DINOLoss(6), losses.DINOLoss(6)
    teacher, student = ([randn(i + n, 5, 6).requires_grad_() for i in range(2)] for n in (0, 5))
    valid = torch.tensor([True, False, True, True, False])
    value = full(teacher, student, valid=valid)
    expected = part([x[valid] for x in teacher], [x[valid] for x in student])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(full.center, part.center)
    grads = (torch.autograd.grad(x, student) for x in (value, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    before = full.center.clone()
    assert full(teacher, student, valid=torch.zeros_like(valid)) == 0
    assert torch.equal(full.center, before)


def plain_sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """The definition, as a joint distribution of outputs and rows with uniform marginals."""
    joint = logits.exp() / logits.exp().sum()
    n, k = joint.shape
    for _ in range(iterations):
        joint = joint / joint.sum(0, keepdim=True) / k
        joint = joint / joint.sum(1, keepdim=True) / n
    return joint * n


@examples(25)
@given(n=st.integers(1, 9), k=st.integers(1, 7), iterations=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_sinkhorn_equals_its_definition(n: int, k: int, iterations: int, seed: int) -> None:
    logits = 3 * randn(seed, n, k)
    found = sinkhorn(logits, iterations)
    torch.testing.assert_close(found, plain_sinkhorn(logits, iterations), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.sum(1), torch.ones(n, dtype=torch.float64))


def test_sinkhorn_of_large_logits_is_finite() -> None:
    """Where exp overflows and the rows of an output underflow: the same as with a constant taken off."""
    logits = randn(0, 6, 5) * 300
    found = sinkhorn(logits.float())
    assert found.isfinite().all()
    torch.testing.assert_close(found, sinkhorn(logits.float() + 2.0**14), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found.sum(1), torch.ones(6))


def test_dino_with_sinkhorn_is_the_cross_entropy_of_its_targets() -> None:
    """The rows of both teacher views are balanced together; the centre stays as it is, and padding has no effect."""
    loss = losses.DINOLoss(6, center_mode="sinkhorn", teacher_temp=0.5)
    teacher, student = [randn(i, 5, 6) for i in range(2)], [randn(i + 9, 5, 6) for i in range(3)]
    target = plain_sinkhorn(torch.cat(teacher) / 0.5, 3).view(2, 5, 6)
    log_prob = [(x / 0.1).log_softmax(1) for x in student]
    expected = -sum((target[t] * log_prob[s]).sum(1).mean() for t in range(2) for s in range(3) if t != s) / 4
    torch.testing.assert_close(loss(teacher, student), expected, rtol=1e-9, atol=0)
    assert not loss.center.any()
    padded = [[torch.cat([x, torch.full((1, 6), torch.nan)]) for x in views] for views in (teacher, student)]
    valid = torch.arange(6) < 5
    torch.testing.assert_close(loss(*padded, valid=valid), expected, rtol=1e-9, atol=0)
    assert loss(*padded, valid=torch.zeros_like(valid)) == 0


@pytest.mark.parametrize("mode", ["mean", "sinkhorn"])
def test_nan_in_padding_reaches_neither_gradient_nor_centre(mode: str) -> None:
    loss, valid = losses.DINOLoss(6, center_mode=mode), torch.tensor([True, True, False])
    student = [randn(i, 3, 6).index_fill_(0, torch.tensor(2), torch.nan).requires_grad_() for i in range(2)]
    loss([x.detach() for x in student], student, valid=valid).backward()
    for x in student:
        assert x.grad is not None
        assert x.grad[:2].abs().min() > 0
        assert not x.grad[2].any()
    assert loss.center.isfinite().all()


@pytest.mark.parametrize("number", [0, -1, 1.5, "3"])
def test_a_number_of_iterations_that_is_no_positive_one_is_an_error(number: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"sinkhorn_iterations is .*: give"):
        losses.DINOLoss(4, sinkhorn_iterations=number)
