"""KoLeo: the nearest neighbours within a batch are pushed apart."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fgfast.losses.common import check_group
from fgfast.losses.over_ranks import count_rows, gather_rows, rank_and_world
from fgfast.tensors import accumulation, check_float, shape_error, without_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class KoLeoLoss(nn.Module):
    r"""Mean negative logarithm of the distance to the nearest neighbour; signature and values of lightly's.

    .. math:: L = -\frac{1}{B} \sum_i \log(d_i + \epsilon), \qquad d_i = \|u_i - u_{n(i)} + \epsilon\|_p,
              \qquad u = x / \max(\|x\|_2, \epsilon), \qquad n(i) = \arg\max_{j \ne i} \langle u_i, u_j \rangle

    The gradient reaches both rows of a pair.

    Args:
        p: the norm of the distance.
        eps: added to the differences and to the distance, so that equal rows give a finite loss.
        group: neighbours are searched among the rows of all ranks, whose numbers may differ (DINOv2 takes those of one
            process). Every rank returns the mean over all rows; its gradient, averaged over the ranks as
            DistributedDataParallel does, is that of one process on the joined rows. None takes this process alone.

    Returns:
        A scalar; float16 and bfloat16 are computed and returned in float32. Rows without a neighbour, such as a single
        one, do not count; lightly's compares a single row with itself.

    Raises:
        TypeError: x is no tensor of floats, or ``group`` no process group of this process.
        ValueError: x is not [B, D], or ``valid`` not [B].

    Example:
        >>> import torch
        >>> from fgfast.losses import KoLeoLoss
        >>> round(KoLeoLoss()(torch.eye(3)).item(), 4)  # -log sqrt(2)
        -0.3466

    Source:
        Sablayrolles et al., "Spreading vectors for similarity search", 2019 (arXiv 1806.03198); values as in lightly
        1.6.
    """

    def __init__(self, p: float = 2, eps: float = 1e-8, group: "ProcessGroup | None" = None) -> None:
        super().__init__()
        check_group(group)
        self.p, self.eps, self.group = p, eps, group
        self.pairwise_distance = nn.PairwiseDistance(p=p, eps=eps)

    def forward(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """The loss of rows [B, D]; with ``valid``, bool [B], that of the valid ones, which alone are neighbours."""
        check_float("x", x)
        if x.dim() != 2:
            raise shape_error("x", "[B, D]", x)
        if valid is not None and valid.shape != x.shape[:1]:
            raise shape_error("valid", f"[{len(x)}]", valid)
        kept = x.new_ones(len(x), dtype=torch.bool) if valid is None else valid
        with without_autocast(x.device):
            wide = torch.where(kept[:, None], x.to(accumulation(x.dtype)), 0)
            return self._loss(nn.functional.normalize(wide, dim=-1, eps=self.eps), kept)

    def _loss(self, unit: Tensor, kept: Tensor) -> Tensor:
        rank, world = rank_and_world(self.group)
        own = torch.arange(len(unit), device=unit.device)
        everyone, present = unit, kept
        if self.group is not None:
            lengths = count_rows(unit, self.group)
            first = sum(lengths[:rank])
            own = own + first
            others = gather_rows(unit, self.group, lengths)  # without a gradient, unlike the own rows among them
            everyone = torch.cat([others[:first], unit, others[first + len(unit) :]])
            present = gather_rows(kept, self.group, lengths)
        if len(everyone) < 2:
            return unit[:0].sum()
        nearest, found = self._neighbours(unit.detach(), everyone.detach(), own, present)
        found = found & kept
        if self.group is not None:
            nearest, found = (gather_rows(x, self.group, lengths) for x in (nearest, found))
        losses = -(self.pairwise_distance(everyone, everyone[nearest]) + self.eps).log()
        mean = torch.where(found, losses, 0).sum() / found.sum().clamp(min=1)
        # Each rank has the complete loss and the gradient of its own rows: the average over ranks divides only that.
        return world * mean - (world - 1) * mean.detach()

    @staticmethod
    def _neighbours(unit: Tensor, everyone: Tensor, own: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Position of the nearest other present row of each row, and whether there is one; ``own``: their positions."""
        similarity = torch.where(present, unit @ everyone.T, -torch.inf)
        similarity = similarity.scatter(1, own[:, None], -torch.inf)
        best, nearest = similarity.max(1)
        return nearest, best > -torch.inf
