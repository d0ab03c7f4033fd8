"""A queue of vectors that serve as negatives."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgfast.losses.common import arange_like, check_gather, check_group, choose_group, update_buffers
from fgfast.losses.over_ranks import gather_rows
from fgfast.tensors import check_whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class MemoryBank(nn.Module):
    """The latest vectors, oldest first overwritten; arguments and attributes of lightly's MemoryBankModule.

    Args:
        size: 0 for none, or (number of vectors, channels); the bank starts with random directions.
        gather_distributed: enqueue the vectors of all ranks of the default process group.
        feature_dim_first: return the bank as [channels, number of vectors].
        group: enqueue the vectors of all ranks of this process group instead, rank by rank; ranks may have any numbers
            of them. Every rank then enqueues the same vectors; only the random directions of the start differ, unless
            all ranks begin with the same seed.

    Raises:
        TypeError: the size holds something else than whole numbers, or the group is none.
        ValueError: the size is neither 0 nor a pair of numbers from 0 up.

    Example:
        >>> import torch
        >>> from fgfast.losses.memory_bank import MemoryBank
        >>> bank = MemoryBank((4, 2))
        >>> vectors, negatives = bank(torch.ones(3, 2), update=True)
        >>> negatives.shape, bank.bank[:3].sum().item(), bank.bank_ptr.item()
        (torch.Size([2, 4]), 6.0, 3)

    Source:
        MoCo (arXiv 1911.05722); values as in lightly 1.6.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self, size: int | Sequence[int] = 0, gather_distributed: bool = False, feature_dim_first: bool = True,
        group: "ProcessGroup | None" = None,
    ):  # fmt: skip
        super().__init__()
        check_gather(gather_distributed)
        check_group(group)
        self.group = group
        given = (size,) if isinstance(size, Integral) or not isinstance(size, Iterable) else tuple(size)
        for number in given:
            check_whole("memory_bank_size", number)
        pair = tuple(int(number) for number in given)
        if pair != (0,) and (len(pair) != 2 or min(pair) < 0):
            raise ValueError(f"memory_bank_size is {size}: give 0 or (number of vectors, channels).")
        self.size, self.gather_distributed, self.feature_dim_first = pair, gather_distributed, feature_dim_first
        bank = F.normalize(torch.randn(pair), dim=-1) if len(pair) == 2 else torch.zeros(0)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64), persistent=False)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The output [B, D] unchanged, and a copy of the bank, or None without one; then enqueue if ``update``.

        ``labels`` has no effect.
        """
        if not len(self.bank):
            return output, None
        bank = self.bank.clone()
        if update:
            self.enqueue(output)
        return output, bank.T if self.feature_dim_first else bank

    def check_channels(self, vectors: Tensor) -> None:
        """Raise unless the vectors [B, D] have the channels of the bank."""
        size, channels = self.bank.shape
        if vectors.shape[1] != channels:
            raise ValueError(
                f"The memory bank has {channels} channels and the vectors have {vectors.shape[1]}: "
                f"give memory_bank_size=({size}, {vectors.shape[1]})."
            )

    def enqueue(self, batch: Tensor) -> None:
        """Overwrite the oldest vectors by the batch [B, D]; vectors beyond the end of the bank are dropped."""
        self.check_channels(batch)
        update_buffers(self._enqueue, batch)

    @torch.no_grad()
    def _enqueue(self, batch: Tensor) -> None:
        group = choose_group(self.gather_distributed, self.group)
        if group is not None:
            batch = gather_rows(batch, group)
        size, end = len(self.bank), self.bank_ptr + len(batch)
        batch = batch[:size].to(self.bank)
        slot = self.bank_ptr + arange_like(len(batch), self.bank)
        row = slot % size
        self.bank[row] = torch.where((slot < size)[:, None], batch, self.bank[row])
        self.bank_ptr.copy_(torch.where(end < size, end, 0))
