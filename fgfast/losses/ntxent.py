"""NT-Xent, the loss of SimCLR, with an optional memory bank."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fgfast.ids import Ids
from fgfast.losses.common import (
    check_temperature,
    check_vectors,
    group_of_all,
    ids_of_two_views,
    ids_over_ranks,
    renamed,
)
from fgfast.losses.memory_bank import MemoryBank
from fgfast.ops.contrast import contrastive_loss
from fgfast.tensors import accumulation, unit_vectors


class NTXentLoss(nn.Module):
    r"""Normalised temperature-scaled cross entropy of two views (SimCLR); signature and values of lightly's.

    .. math:: \ell_i = -\log \frac{e^{s_{ij}}}{\sum_{k \ne i} e^{s_{ik}}}, \quad s = \cos / T,

    averaged over the 2 B vectors, j being the other view of i. With a memory bank only the bank holds negatives, and
    only the first view is a query (MoCo).

    Args:
        temperature: T, at least 1e-8.
        memory_bank_size: 0, or (number of vectors, channels); the bank starts with random directions.
        gather_distributed: contrast with the vectors of all ranks, or enqueue them if there is a bank.

    Returns:
        A scalar, float32 (float64 for float64 vectors) where lightly's has the dtype of the vectors.

    Raises:
        ValueError: the temperature is too small, the bank's size is not a pair or its channels are not those of the
            vectors, or gathering without torch.distributed.

    Example:
        >>> import torch
        >>> from fgfast.losses import NTXentLoss
        >>> x = torch.eye(4)
        >>> round(NTXentLoss(temperature=1.0)(x, x).item(), 4)  # log(e + 6) - 1
        1.1654

    Source:
        arXiv 2002.05709; values as in lightly 1.6.
    """

    eps = 1e-8  # lowest temperature
    bank, bank_ptr = renamed("bank", "memory_bank.bank"), renamed("bank_ptr", "memory_bank.bank_ptr")

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ):
        super().__init__()
        check_temperature(temperature)
        self.temperature, self.gather_distributed = temperature, gather_distributed
        self.memory_bank = MemoryBank(memory_bank_size, gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Loss of the vectors [B, D] of two views of the same B images."""
        check_vectors(out0=out0, out1=out1)
        first, second = ids_of_two_views(len(out0), out0.device)
        bank = self.memory_bank.bank
        if len(bank):
            self.memory_bank.check_channels(out1)
            loss = contrastive_loss(
                out0, out1, query_ids=first, key_ids=second, temperature=self.temperature, negatives="same_image",
                bank=bank.to(out0, copy=True),
            )  # fmt: skip
            if out0.requires_grad:
                self.memory_bank.enqueue(unit_vectors(out1.detach(), accumulation(out1.dtype)))
            return loss
        group = group_of_all(self.gather_distributed)
        both = torch.cat([out0, out1])
        ids = ids_over_ranks(Ids(*(torch.cat(pair) for pair in zip(first, second, strict=True))), group)
        return contrastive_loss(both, both, query_ids=ids, key_ids=ids, temperature=self.temperature, group=group)
