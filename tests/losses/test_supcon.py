"""SupConLoss: values and gradients of pytorch-metric-learning."""

import pytest
import torch

from fgfast import losses
from tests.losses.peers import assert_same, pml, randn


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 2, 0], [3, 3, 3, 3], [0, 1, 2], list(range(7)) * 60])
def test_supcon_equals_pytorch_metric_learning(labels: list[int]) -> None:
    y = torch.tensor(labels)
    ours, theirs = losses.SupConLoss(0.1), pml.SupConLoss(0.1)
    assert_same(lambda x: ours(x, y) + 0 * x.sum(), lambda x: theirs(x, y) + 0 * x.sum(), randn(0, len(y), 8))


def test_supcon_against_references_equals_pytorch_metric_learning() -> None:
    y, r = torch.tensor([0, 1, 5, 1]), torch.tensor([1, 0, 0, 2, 1])
    ours, theirs = losses.SupConLoss(), pml.SupConLoss()
    assert_same(
        lambda x, z: ours(x, y, ref_emb=z, ref_labels=r),
        lambda x, z: theirs(x, y, ref_emb=z, ref_labels=r),
        randn(0, 4, 8),
        randn(1, 5, 8),
    )
