"""InfoNCE, the loss of MoCo."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fgfast.losses.common import check_group, check_temperature, check_vectors, ids_of_two_views
from fgfast.losses.over_ranks import mean_valid
from fgfast.ops.contrast import contrastive_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def contrast_with_bank(
    query: Tensor, key: Tensor, bank: Tensor, temperature: float, group: "ProcessGroup | None" = None
) -> Tensor:
    """InfoNCE of queries [B, D] with keys [B, D] and only a bank [Q, D] of negatives, averaged over all ranks."""
    query_ids, key_ids = ids_of_two_views(len(query), query.device)
    losses = contrastive_loss(
        query, key, query_ids=query_ids, key_ids=key_ids, temperature=temperature, negatives="same_image", bank=bank,
        reduction="none",
    )  # fmt: skip
    return mean_valid(losses, torch.ones_like(losses, dtype=torch.bool), group)


class InfoNCELoss(nn.Module):
    r"""Cross entropy of a query with its key against other keys: the loss of MoCo.

    .. math:: \ell_i = -\log \frac{e^{s_{ii}}}{e^{s_{ii}} + \sum_n e^{s_{in}}}, \quad s = \cos / T,

    averaged over queries. Negatives are the keys of the other images, or, if a bank is given, only the bank.

    Args:
        temperature: at least 1e-8.
        scale: multiply the loss by 2 T, as MoCo v3 does.
        group: process group whose ranks take part, with any number of queries each: negatives are the keys of all
            ranks, and the mean is over the queries of all ranks. Each rank returns world size x local sum / all
            queries, so the averaging of DistributedDataParallel gives the gradient of one process on the joined batch.
            A bank stays the rank's own: ``MemoryBank(size, group=group)`` fills it with the keys of all ranks.

    Raises:
        TypeError: vectors are no floats of one dtype, or the group is none.
        ValueError: the temperature is too small, shapes or devices do not fit, or the group's backend cannot send
            from the device of the vectors.

    Example:
        >>> import torch
        >>> from fgfast.losses import InfoNCELoss
        >>> x = torch.eye(3)
        >>> round(InfoNCELoss(temperature=1.0)(x, x).item(), 4)  # log(e + 2) - 1
        0.5514

    Source:
        MoCo v2 (arXiv 2003.04297) with a bank, MoCo v3 (arXiv 2104.02057) with ``scale``.
    """

    def __init__(self, temperature: float = 0.1, scale: bool = False, group: "ProcessGroup | None" = None):
        super().__init__()
        check_temperature(temperature)
        check_group(group)
        self.temperature, self.scale, self.group = temperature, scale, group

    def forward(self, query: Tensor, key: Tensor, bank: Tensor | None = None) -> Tensor:
        """Loss of queries [B, D] with keys [B, D], and a bank [Q, D] of negatives instead of the other keys."""
        check_vectors(query=query, key=key)
        if bank is None:
            query_ids, key_ids = ids_of_two_views(len(query), query.device, self.group)
            loss = contrastive_loss(
                query, key, query_ids=query_ids, key_ids=key_ids, temperature=self.temperature, group=self.group
            )
        else:
            loss = contrast_with_bank(query, key, bank, self.temperature, self.group)
        return loss * (2 * self.temperature) if self.scale else loss
