"""KoLeoLoss against a loop over rows; lightly's values are compared in test_peers.py."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgfast.losses import KoLeoLoss
from tests.examples import examples
from tests.losses.peers import randn


def by_loop(x: Tensor) -> float:
    rows = [[v / math.hypot(*row) for v in row] for row in x.tolist()]
    nearest = [min(math.dist(a, b) for j, b in enumerate(rows) if j != i) for i, a in enumerate(rows)]
    return -sum(map(math.log, nearest)) / len(rows)


@examples(25)
@given(n=st.integers(2, 15), d=st.integers(2, 6), seed=st.integers(0, 2**31))
def test_equals_a_loop_over_rows(n: int, d: int, seed: int) -> None:
    x = randn(seed, n, d)
    assert KoLeoLoss(eps=1e-12)(x).item() == pytest.approx(by_loop(x), abs=1e-6)


def test_rows_that_are_not_valid_have_no_effect() -> None:
    """Value and gradient are those of the others, whatever stands in them."""
    x, valid = randn(0, 6, 4), torch.tensor([True, False, True, True, False, True])
    rest = x[valid].requires_grad_()
    x = torch.where(valid[:, None], x, torch.nan).requires_grad_()
    found, expected = KoLeoLoss()(x, valid=valid), KoLeoLoss()(rest)
    torch.testing.assert_close(found, expected)
    (of_all,), (of_rest,) = torch.autograd.grad(found, x), torch.autograd.grad(expected, rest)
    torch.testing.assert_close(of_all[valid], of_rest)
    assert not of_all[~valid].any()


@pytest.mark.parametrize("valid", [[True, False, False], [False] * 3])
def test_without_a_neighbour_the_loss_is_zero(valid: list[bool]) -> None:
    x = randn(0, 3, 4).requires_grad_()
    loss = KoLeoLoss()(x, valid=torch.tensor(valid))
    assert loss == 0
    assert not torch.autograd.grad(loss, x)[0].any()
    assert KoLeoLoss()(x[:0]) == 0


def test_neighbours_are_found_in_float32_under_autocast() -> None:
    """Rows that bfloat16 cannot tell apart."""
    x = torch.tensor([[1.0, 0.0], [1.0, 1e-3], [1.0, 1.2e-3], [0.0, 1.0]])
    with torch.autocast("cpu", torch.bfloat16):
        found = KoLeoLoss()(x)
    assert found == KoLeoLoss()(x)


@pytest.mark.parametrize(
    ("x", "valid", "message"),
    [
        (torch.zeros(3), None, r"x: expected shape \[B, D\], got \[3\]"),
        (torch.zeros(3, 2), torch.ones(2, dtype=torch.bool), r"valid: expected shape \[3\], got \[2\]"),
        (torch.zeros(3, 2, dtype=torch.int64), None, "x has dtype torch.int64"),
    ],
)
def test_bad_input_is_named(x: Tensor, valid: Tensor | None, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        KoLeoLoss()(x, valid=valid)
