"""NT-Xent, the loss of SimCLR, with an optional memory bank."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fgfast.ids import Ids
from fgfast.losses.common import check_temperature, check_vectors, group_of_all, ids_of_two_views, ids_over_ranks
from fgfast.ops.contrast import contrastive_loss


class NTXentLoss(nn.Module):
    r"""Normalised temperature-scaled cross entropy of two views (SimCLR); signature and values of lightly's.

    .. math:: \ell_i = -\log \frac{e^{s_{ij}}}{\sum_{k \ne i} e^{s_{ik}}}, \quad s = \cos / T,

    averaged over the 2 B vectors, j being the other view of i. With a memory bank only the bank holds negatives, and
    only the first view is a query (MoCo).

    Args:
        temperature: T, at least 1e-8.
        memory_bank_size: 0, or (number of vectors, channels); the bank starts with random directions.
        gather_distributed: contrast with the vectors of all ranks.

    Raises:
        ValueError: the temperature is too small, or the bank's size is not a pair.

    Example:
        >>> import torch
        >>> from fgfast.losses import NTXentLoss
        >>> x = torch.eye(4)
        >>> round(NTXentLoss(temperature=1.0)(x, x).item(), 4)  # log(e + 6) - 1
        1.1654

    Source:
        arXiv 2002.05709; values as in lightly 1.6.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ):
        super().__init__()
        check_temperature(temperature)
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if size != (0,) and (len(size) != 2 or min(size) < 0):
            raise ValueError(f"memory_bank_size is {memory_bank_size}: give 0 or (number of vectors, channels).")
        self.temperature, self.gather_distributed = temperature, gather_distributed
        bank = F.normalize(torch.randn(size), dim=-1) if len(size) == 2 else torch.zeros(0)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64), persistent=False)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Loss of the vectors [B, D] of two views of the same B images."""
        check_vectors(out0=out0, out1=out1)
        first, second = ids_of_two_views(len(out0), out0.device)
        group = group_of_all(self.gather_distributed)
        if len(self.bank):
            bank = self.bank.to(out0.dtype, copy=True)
            if out0.requires_grad:
                self._enqueue(F.normalize(out1.detach(), dim=1))
            return contrastive_loss(
                out0,
                out1,
                query_ids=first,
                key_ids=second,
                temperature=self.temperature,
                negatives="same_image",
                bank=bank,
            )
        both = torch.cat([out0, out1])
        ids = ids_over_ranks(Ids(*(torch.cat(pair) for pair in zip(first, second, strict=True))), group)
        return contrastive_loss(both, both, query_ids=ids, key_ids=ids, temperature=self.temperature, group=group)

    @torch.no_grad()
    def _enqueue(self, batch: Tensor) -> None:
        """Overwrite the oldest vectors by the batch; vectors beyond the end of the bank are dropped."""
        if group_of_all(self.gather_distributed) is not None:
            gathered = [torch.empty_like(batch) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, batch.contiguous())
            batch = torch.cat(gathered)
        start = int(self.bank_ptr)
        n = min(len(batch), len(self.bank) - start)
        self.bank[start : start + n] = batch[:n].to(self.bank.dtype)
        self.bank_ptr[0] = start + len(batch) if start + len(batch) < len(self.bank) else 0
