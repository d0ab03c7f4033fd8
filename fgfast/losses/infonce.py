"""InfoNCE, the loss of MoCo."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fgfast.losses.common import (
    check_temperature,
    check_vectors,
    ids_of_two_views,
    ids_over_ranks,
)
from fgfast.ops.contrast import contrastive_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class InfoNCELoss(nn.Module):
    r"""Cross entropy of a query with its key against other keys: the loss of MoCo.

    .. math:: \ell_i = -\log \frac{e^{s_{ii}}}{e^{s_{ii}} + \sum_n e^{s_{in}}}, \quad s = \cos / T,

    averaged over queries. Negatives are the keys of the other images, or, if a bank is given, only the bank.

    Args:
        temperature: at least 1e-8.
        scale: multiply the loss by 2 T, as MoCo v3 does.
        group: contrast with the keys of all ranks (without a bank).

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
        self.temperature, self.scale, self.group = temperature, scale, group

    def forward(self, query: Tensor, key: Tensor, bank: Tensor | None = None) -> Tensor:
        """Loss of queries [B, D] with keys [B, D], and a bank [Q, D] of negatives instead of the other keys."""
        check_vectors(query=query, key=key)
        query_ids, key_ids = (ids_over_ranks(ids, self.group) for ids in ids_of_two_views(len(query), query.device))
        loss = contrastive_loss(
            query, key, query_ids=query_ids, key_ids=key_ids, temperature=self.temperature, bank=bank,
            negatives="all" if bank is None else "same_image", group=self.group,
        )  # fmt: skip
        return loss * (2 * self.temperature) if self.scale else loss
