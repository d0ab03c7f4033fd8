"""NTXentLoss: values and gradients of lightly and pytorch-metric-learning."""

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
    theirs.memory_bank.bank = ours.bank.clone()
    for step in range(5):  # 20 is not a multiple of 8: the end of the bank is met
        for loss in (ours, theirs):
            x = randn(step, 8, 16).requires_grad_()
            loss.last = loss(x, randn(step + 50, 8, 16)).item()
        assert ours.last == pytest.approx(theirs.last, rel=1e-5)
        torch.testing.assert_close(ours.bank, theirs.memory_bank.bank.double(), rtol=1e-6, atol=1e-6)
