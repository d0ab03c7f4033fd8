"""NT-Xent, the loss of SimCLR, with an optional memory bank."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgfast.backend import is_automatic
from fgfast.ids import Ids
from fgfast.losses.common import (
    arange_like,
    check_temperature,
    check_vectors,
    choose_group,
    ids_over_ranks,
    renamed,
)
from fgfast.losses.infonce import contrast_with_bank
from fgfast.losses.memory_bank import MemoryBank
from fgfast.ops.contrast import contrastive_loss
from fgfast.ops.contrast.contrast import BREAK_EVEN
from fgfast.tensors import accumulation, unit_vectors, without_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class NTXentLoss(nn.Module):
    r"""Normalised temperature-scaled cross entropy of two views (SimCLR); signature and values of lightly's.

    .. math:: \ell_i = -\log \frac{e^{s_{ij}}}{\sum_{k \ne i} e^{s_{ik}}}, \quad s = \cos / T,

    averaged over the 2 B vectors, j being the other view of i. With a memory bank only the bank holds negatives, and
    only the first view is a query (MoCo).

    On a CPU up to 65,536 logits are formed and differentiated as the formula stands, unless a backend is chosen: where
    vectors are few, fewer calls are faster.

    Args:
        temperature: T, at least 1e-8.
        memory_bank_size: 0, or (number of vectors, channels); the bank starts with random directions.
        gather_distributed: contrast with the vectors of all ranks of the default process group, or enqueue them if
            there is a bank.
        group: do so with the ranks of this process group, each of which may have any number of images. Each rank
            returns world size x local sum / all vectors, so the averaging of DistributedDataParallel gives the gradient
            of one process on the joined batch.

    Returns:
        A scalar, float32 (float64 for float64 vectors) where lightly's has the dtype of the vectors.

    Raises:
        ValueError: the temperature is too small, the bank's size is not a pair or its channels are not those of the
            vectors, gathering without torch.distributed, or a group whose backend cannot send from the device of the
            vectors.
        TypeError: vectors are no floats of one dtype, or the group is none.

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
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False,
        *, group: "ProcessGroup | None" = None,
    ):  # fmt: skip
        super().__init__()
        check_temperature(temperature)
        self.temperature, self.gather_distributed, self.group = temperature, gather_distributed, group
        self.memory_bank = MemoryBank(memory_bank_size, gather_distributed, group=group)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Loss of the vectors [B, D] of two views of the same B images."""
        check_vectors(out0=out0, out1=out1)
        group = choose_group(self.gather_distributed, self.group)
        bank = self.memory_bank.bank
        if len(bank):
            self.memory_bank.check_channels(out1)
            loss = contrast_with_bank(out0, out1, bank.to(out0, copy=True), self.temperature, group)
            if out0.requires_grad:
                self.memory_bank.enqueue(unit_vectors(out1.detach(), accumulation(out1.dtype)))
            return loss
        both = torch.cat([out0, out1])
        if group is None and both.device.type == "cpu" and 0 < len(both) ** 2 <= BREAK_EVEN and is_automatic():
            return _by_formula(both, self.temperature)
        view = arange_like(len(both), both)  # each vector is a view of its own, which is as good as two views
        ids = ids_over_ranks(Ids(view % max(len(out0), 1), torch.zeros_like(view), view), group)
        return contrastive_loss(both, both, query_ids=ids, key_ids=ids, temperature=self.temperature, group=group)


def _by_formula(both: Tensor, temperature: float | Tensor) -> Tensor:
    """NT-Xent of two views [2 B, D], one after the other, with its logits in memory."""
    with without_autocast(both.device):
        unit = unit_vectors(both, accumulation(both.dtype))
        rows = len(unit)
        itself = unit.new_zeros(rows, rows).fill_diagonal_(-torch.inf)
        # One product scales and masks too: passes of their own took a quarter of the time at 256 views.
        scaled, alpha = (unit / temperature, 1.0) if isinstance(temperature, Tensor) else (unit, 1 / temperature)
        logits = torch.addmm(itself, scaled, unit.T, alpha=alpha)
        return F.cross_entropy(logits, arange_like(rows, unit).roll(rows // 2))
