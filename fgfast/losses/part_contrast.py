"""The part step for any training loop: pool, heads, contrast."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fgfast.ids import Ids
from fgfast.losses.common import arange_like, check_group, check_temperature, ids_over_ranks
from fgfast.losses.over_ranks import sample_images
from fgfast.ops.contrast import contrastive_loss
from fgfast.ops.contrast.checks import check_alike
from fgfast.ops.part_pool import part_pool

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PartContrastiveLoss(nn.Module):
    r"""The part step for any training loop: feature maps and id maps in, the contrast of parts out.

    Id maps are reduced to the resolution of the features by majority; features are averaged over each part; a query is
    predictor(projector(part)), a key is target_projector(target part); every part of both views is a query and a key.
    The loss is ``contrastive_loss`` with (image, part id, view), averaged over the queries that have a positive: the
    same part in the other view of its image. Absent parts are masked out.

    Args:
        n_parts: K; ids are 0..K-1, anything else is "no part".
        projector: module [N, D] -> [N, E].
        predictor: module [N, E] -> [N, E] for the queries, or None.
        target_projector: projector of the targets; None takes ``projector``.
        temperature: above 0.
        negatives: "all", "other_images" or "same_image".
        max_parts: sample that many parts per image, without replacement, among those present in either view (the same
            parts for both views); None takes all.
        group: contrast with the parts of all ranks of this process group. Each rank returns world size x local sum /
            all valid queries, so the averaging of DistributedDataParallel gives the gradient of one process on the
            joined batch.

    Attributes:
        generator: source of the numbers by which parts are sampled. With a group it is in the same state on every rank
            and the numbers are drawn for the images of all ranks, of which each rank has as many: whichever rank an
            image is on, its parts are the same. None (the default) draws those of this process by PyTorch's own.

    Example:
        >>> import torch
        >>> from fgfast.losses import PartContrastiveLoss
        >>> loss = PartContrastiveLoss(3, projector=torch.nn.Linear(8, 4))
        >>> maps = [torch.randn(2, 8, 7, 7) for _ in range(2)]
        >>> ids = [torch.randint(0, 3, (2, 56, 56)) for _ in range(2)]
        >>> bool(loss(*maps, *ids) > 0)
        True

    Source:
        PARTICLE (ICCVW 2023), DetCon (arXiv 2103.10957); the mean over valid queries instead of all is a choice.
    """

    def __init__(
        self,
        n_parts: int,
        projector: nn.Module,
        predictor: nn.Module | None = None,
        target_projector: nn.Module | None = None,
        temperature: float = 0.1,
        negatives: str = "all",
        max_parts: int | None = None,
        group: "ProcessGroup | None" = None,
    ):
        super().__init__()
        check_temperature(temperature)
        check_group(group)
        if n_parts < 1 or (max_parts is not None and max_parts < 1):
            raise ValueError(f"n_parts is {n_parts} and max_parts {max_parts}: both must be 1 or more.")
        self.n_parts, self.max_parts = n_parts, max_parts
        self.projector, self.predictor, self.target_projector = projector, predictor, target_projector
        self.temperature, self.negatives, self.group = temperature, negatives, group
        self.generator: torch.Generator | None = None

    def forward(
        self,
        features1: Tensor,
        features2: Tensor,
        labels1: Tensor,
        labels2: Tensor,
        target1: Tensor | None = None,
        target2: Tensor | None = None,
    ) -> Tensor:
        """Loss of maps [B, D, h, w] with id maps [B, H, W]; targets are a momentum encoder's maps, or the features."""
        if (target1 is None) != (target2 is None):
            raise ValueError("target1 and target2 belong together: give both or neither.")
        check_alike(features1=features1, features2=features2)
        if target1 is not None and target2 is not None:
            check_alike(target1=target1, target2=target2)
        labels = (labels1, labels2)
        if features1.shape[:2] != features2.shape[:2]:
            raise ValueError(
                f"features1 has shape {tuple(features1.shape)} and features2 has shape {tuple(features2.shape)}: "
                "give the same images and channels."
            )
        pooled, areas = self.pool(features1, features2, *labels)
        targets = None
        if target1 is not None and target2 is not None:
            with torch.no_grad():
                targets, _ = self.pool(target1, target2, *labels)
        return self.contrast(pooled, areas, targets)

    def pool(self, features1: Tensor, features2: Tensor, labels1: Tensor, labels2: Tensor) -> tuple[Tensor, Tensor]:
        """Mean features [B, 2, K, D] and areas [B, 2, K] of the parts of both views: of each image on its own."""
        given = ((features1, labels1), (features2, labels2))
        views = [part_pool(features, ids, self.n_parts) for features, ids in given]
        return torch.stack([v.pooled for v in views], 1), torch.stack([v.area for v in views], 1)

    def contrast(self, pooled: Tensor, areas: Tensor, targets: Tensor | None = None) -> Tensor:
        """Loss of pooled parts, as :meth:`pool` gives them; targets are those of a momentum encoder.

        With :func:`fgfast.cached_contrast` the encoder and ``pool`` see chunks of the batch, ``contrast`` all of it.
        """
        chosen, part = self._sample(areas.transpose(0, 1))
        query = self._rows(pooled, chosen, self.projector)
        key = query
        if targets is not None:
            with torch.no_grad():
                key = self._rows(targets, chosen, self.target_projector or self.projector)
        elif self.target_projector is not None:
            key = self._rows(pooled, chosen, self.target_projector)
        if self.predictor is not None:
            query = self.predictor(query)
        view, image, _ = torch.meshgrid(*(arange_like(n, part) for n in part.shape), indexing="ij")
        ids = ids_over_ranks(Ids(image.reshape(-1), part.reshape(-1), view.reshape(-1)), self.group)
        return contrastive_loss(
            query, key, query_ids=ids, key_ids=ids, temperature=self.temperature, negatives=self.negatives,
            reduction="mean_valid", group=self.group,
        )  # fmt: skip

    def _sample(self, areas: Tensor) -> tuple[Tensor, Tensor]:
        """Parts taken [B, S] from areas [2, B, K], and their ids [2, B, S], -1 where absent from the view."""
        n = self.n_parts if self.max_parts is None else min(self.max_parts, self.n_parts)
        score = torch.arange(self.n_parts, 0, -1, device=areas.device).expand(areas.shape[1:])
        if n < self.n_parts:
            drawn = sample_images(
                lambda images, **options: torch.rand(images, self.n_parts, **options),
                areas.shape[1], areas.device, self.group, self.generator,
            )  # fmt: skip
            score = drawn + (areas > 0).any(0)
        chosen = score.topk(n, dim=1).indices.sort(1).values
        here = areas.gather(2, chosen.expand(2, -1, -1)) > 0
        return chosen, torch.where(here, chosen, -1)

    @staticmethod
    def _rows(pooled: Tensor, chosen: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """The chosen parts of both views, one per row, through a head: [2 B S, E]."""
        index = chosen[None, :, :, None].expand(2, -1, -1, pooled.shape[-1])
        return head(pooled.transpose(0, 1).gather(2, index).flatten(0, 2))
