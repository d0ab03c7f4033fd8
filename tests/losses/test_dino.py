"""DINOLoss: values of lightly with warm-up and centre."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fgfast import losses
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
