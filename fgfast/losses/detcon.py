"""DetCon: contrast of regions with target regions of both views."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fgfast.ids import Ids
from fgfast.losses.common import (
    arange_like,
    check_gather,
    check_group,
    check_temperature,
    choose_group,
    ids_over_ranks,
    renamed,
)
from fgfast.ops.contrast import contrastive_loss
from fgfast.ops.contrast.checks import check_alike
from fgfast.tensors import check_integers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DetConBLoss(nn.Module):
    r"""DetCon-B: predictions of regions against target regions of both views; signature and values of lightly's.

    .. math:: L = \sum_{v \in \{0, 1\}} \frac{1}{B M} \sum_{b, m} \frac{\ell_{v b m}}{|\{m' : \text{id}_{m'} =
              \text{id}_m\}|}

    with the loss of a region as in ``contrastive_loss``: positives are the regions of the same id in the other view,
    the region itself is left out, and all others are negatives.

    Args:
        temperature: at least 1e-8.
        gather_distributed: contrast with the targets of all ranks of the default process group.
        group: contrast with those of this process group instead, of whose ranks each may have any number of images.
            Each rank returns world size x its part of the loss of all, so the averaging of DistributedDataParallel
            gives the gradient of one process on the joined batch.

    Returns:
        A scalar, float32 (float64 for float64 vectors) where lightly's has the dtype of the vectors.

    Raises:
        TypeError: masks are no integers, vectors are no floats of one dtype, or the group is none.
        ValueError: the temperature is too small, shapes do not fit, gathering without torch.distributed, or a group
            whose backend cannot send from the device of the vectors.

    Example:
        >>> import torch
        >>> from fgfast.losses import DetConBLoss
        >>> x, ids = torch.eye(3)[None], torch.arange(3)[None]  # one image, three regions
        >>> round(DetConBLoss(temperature=1.0)(x, x, x, x, ids, ids).item(), 4)  # 2 (log(e + 4) - 1)
        1.8097

    Source:
        arXiv 2103.10957; values as in lightly 1.6, except that id -1 means an absent region.
    """

    eps = 1e-8  # lowest temperature

    def __init__(
        self, temperature: float = 0.1, gather_distributed: bool = True, *, group: "ProcessGroup | None" = None
    ):
        super().__init__()
        check_temperature(temperature)
        check_gather(gather_distributed)
        check_group(group)
        self.temperature, self.gather_distributed, self.group = temperature, gather_distributed, group

    def forward(
        self,
        pred_view0: Tensor,
        pred_view1: Tensor,
        target_view0: Tensor,
        target_view1: Tensor,
        mask_view0: Tensor,
        mask_view1: Tensor,
    ) -> Tensor:
        """Loss of predictions and targets [B, M, D] with the ids of their regions [B, M]."""
        check_alike(pred_view0=pred_view0, pred_view1=pred_view1, target_view0=target_view0, target_view1=target_view1)
        check_integers("mask_view0", mask_view0)
        check_integers("mask_view1", mask_view1)
        vectors, maps = (pred_view0, pred_view1, target_view0, target_view1), (mask_view0, mask_view1)
        if any(v.ndim != 3 or v.shape != pred_view0.shape for v in vectors) or any(
            m.shape != pred_view0.shape[:2] for m in maps
        ):
            raise ValueError(
                "expected views of shape [B, M, D] and masks [B, M], got "
                f"{[list(v.shape) for v in vectors]} and {[list(m.shape) for m in maps]}."
            )
        masks = torch.stack([mask_view0, mask_view1])  # [2, B, M]
        view, image, _ = (
            i.reshape(-1) for i in torch.meshgrid(*(arange_like(n, masks) for n in masks.shape), indexing="ij")
        )
        group = choose_group(self.gather_distributed, self.group)
        ids = ids_over_ranks(Ids(image, masks.reshape(-1), view), group)
        repeats = (masks[..., :, None] == masks[..., None, :]).sum(-1)
        query = torch.cat([pred_view0, pred_view1]).flatten(0, 1)
        shared = pred_view0 is target_view0 and pred_view1 is target_view1
        key = query if shared else torch.cat([target_view0, target_view1]).flatten(0, 1)
        loss = contrastive_loss(
            query,
            key,
            query_ids=ids,
            key_ids=ids,
            temperature=self.temperature,
            weight=1 / repeats.reshape(-1),
            group=group,
        )
        return 2 * loss  # the sum of the means of two views is twice the mean over both


class DetConSLoss(nn.Module):
    """DetCon-S: DetCon-B in which the regions are their own targets; signature and values of lightly's.

    Args:
        temperature: at least 1e-8.
        gather_distributed: contrast with the regions of all ranks of the default process group.
        group: contrast with those of this process group instead, as in DetCon-B.

    Example:
        >>> import torch
        >>> from fgfast.losses import DetConSLoss
        >>> x, ids = torch.eye(3)[None], torch.arange(3)[None]
        >>> round(DetConSLoss(temperature=1.0)(x, x, ids, ids).item(), 4)
        1.8097

    Source:
        arXiv 2103.10957.
    """

    detconb = renamed("detconb", "detconbloss")

    def __init__(
        self, temperature: float = 0.1, gather_distributed: bool = True, *, group: "ProcessGroup | None" = None
    ):
        super().__init__()
        self.detconbloss = DetConBLoss(temperature, gather_distributed, group=group)

    def forward(self, view0: Tensor, view1: Tensor, mask_view0: Tensor, mask_view1: Tensor) -> Tensor:
        """Loss of the regions [B, M, D] of two views with their ids [B, M]."""
        check_alike(view0=view0, view1=view1)
        loss: Tensor = self.detconbloss(view0, view1, view0, view1, mask_view0, mask_view1)
        return loss
