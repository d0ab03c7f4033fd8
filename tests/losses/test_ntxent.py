"""NTXentLoss: values and gradients of lightly and pytorch-metric-learning."""

import operator

import pytest
import torch

from fgfast import losses
from tests.losses.peers import assert_same, lightly, pml, randn


@pytest.mark.parametrize("b", [2, 24, 200])  # two rows: one negative pair; 200: tiles
def test_ntxent_equals_lightly(b: int) -> None:
    assert_same(losses.NTXentLoss(0.2), lightly.NTXentLoss(0.2), randn(0, b, 16), randn(1, b, 16))


def test_ntxent_equals_pytorch_metric_learning_where_a_label_has_two_rows() -> None:
    labels = torch.arange(12).repeat(2)
    peer = pml.NTXentLoss(temperature=0.2)
    assert_same(
        losses.NTXentLoss(0.2), lambda a, b: peer(torch.cat([a, b]), labels), randn(0, 12, 16), randn(1, 12, 16)
    )


def test_ntxent_with_a_memory_bank_equals_lightly_over_several_batches() -> None:
    ours, theirs = losses.NTXentLoss(0.2, (20, 16)).double(), lightly.NTXentLoss(0.2, (20, 16)).double()
    theirs.memory_bank.bank = ours.memory_bank.bank.clone()
    for step in range(5):  # 20 is not a multiple of 8: the end of the bank is met
        for loss in (ours, theirs):
            x = randn(step, 8, 16).requires_grad_()
            loss.last = loss(x, randn(step + 50, 8, 16)).item()
        assert ours.last == pytest.approx(theirs.last, rel=1e-5)
        torch.testing.assert_close(ours.memory_bank.bank, theirs.memory_bank.bank.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_vectors_of_other_channels_leave_the_bank_as_it_is(needs_grad: bool) -> None:
    loss = losses.NTXentLoss(memory_bank_size=(32, 8))
    before = loss.memory_bank.bank.clone()
    with pytest.raises(ValueError, match=r"8 channels and the vectors have 4: give memory_bank_size=\(32, 4\)"):
        loss(torch.ones(5, 4, requires_grad=needs_grad), torch.ones(5, 4))
    assert torch.equal(loss.memory_bank.bank, before)
    assert loss.memory_bank.bank_ptr == 0


def test_the_memory_bank_is_callable_as_lightlys() -> None:
    torch.manual_seed(0)
    ours = losses.NTXentLoss(memory_bank_size=(6, 3)).memory_bank
    torch.manual_seed(0)
    theirs = lightly.NTXentLoss(memory_bank_size=(6, 3)).memory_bank
    for step in range(4):
        x = randn(step, 4, 3).float()
        for got, expected in zip(ours(x, update=step > 0), theirs(x, update=step > 0), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("loss", "old", "new"),
    [
        (losses.NTXentLoss(memory_bank_size=(6, 3)), "bank", "memory_bank.bank"),
        (losses.NTXentLoss(memory_bank_size=(6, 3)), "bank_ptr", "memory_bank.bank_ptr"),
        (losses.DetConSLoss(), "detconb", "detconbloss"),
    ],
)
def test_an_old_attribute_warns_and_is_the_new_one(loss: torch.nn.Module, old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"use {new}"):
        value = getattr(loss, old)
    assert value is operator.attrgetter(new)(loss)


def test_a_bank_inside_vmap_is_one_clear_error() -> None:
    loss = losses.NTXentLoss(memory_bank_size=(6, 3))
    with pytest.raises(RuntimeError, match=r"inside torch\.vmap"):
        torch.vmap(loss.memory_bank.enqueue)(torch.ones(2, 4, 3))
