"""InfoNCELoss: cross entropy over keys or a bank."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast import losses
from tests.losses.peers import assert_same, randn


def test_infonce_is_cross_entropy_over_keys_or_bank() -> None:
    query, key, bank = randn(0, 6, 5), randn(1, 6, 5), randn(2, 9, 5)

    def moco3(query: Tensor, key: Tensor) -> Tensor:
        logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.2
        return F.cross_entropy(logits, torch.arange(6)) * 2 * 0.2

    def moco2(query: Tensor, key: Tensor, bank: Tensor) -> Tensor:
        q, k, n = (F.normalize(x, dim=1) for x in (query, key, bank))
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ n.T], 1) / 0.2
        return F.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))

    assert_same(losses.InfoNCELoss(0.2, scale=True), moco3, query, key)
    assert_same(losses.InfoNCELoss(0.2), moco2, query, key, bank)
