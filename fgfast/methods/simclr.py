"""SimCLR: two views of a picture agree, all other pictures of the batch disagree."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fgfast.methods.base import Method, build_encoder
from fgfast.models.heads import MLP
from fgfast.ops.contrast import contrastive_loss
from fgfast.ops.ids import Ids
from fgfast.train.config import TrainConfig

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fgfast.data.views import Batch, ViewSpec


@dataclass
class SimCLRConfig(TrainConfig):
    """Options of SimCLR."""

    temperature: float = 0.2
    """Temperature of NT-Xent."""
    hidden: int = 512
    """Width of the projector's hidden layer."""
    projection: int = 128
    """Width of the projection."""


class SimCLR(Method):
    """Instance discrimination by NT-Xent over the 2B views of a batch.

    loss = mean over views i of  log sum_{k != i} exp(<z_i, z_k>/T) - <z_i, z_j>/T,   z normalised, j the other view.

    Defaults are for sets of thousands of pictures on small inputs (temperature, head and crops are ours); the
    ImageNet recipe has temperature 0.1, a 2048-wide head, LARS and batches of 4,096.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020.
    """

    name = "simclr"
    Config = SimCLRConfig
    passes_per_image = 2

    def __init__(self, config: SimCLRConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.projector = MLP((self.encoder.dim, config.hidden, config.projection))

    def views(self) -> "ViewSpec":
        """Two alike crops: flip, colour jitter, grey 0.2, blur 0.5."""
        from fgfast.data.views import Crop, ViewSpec

        crop = Crop(
            size=self.config.size, scale=(self.config.crop_scale, 1.0), jitter=(0.4, 0.4, 0.4, 0.1),
            grayscale=0.2, blur=0.5,
            blur_sigma=(0.1, max(0.2, 2.0 * self.config.size / 224)),
        )  # fmt: skip
        return ViewSpec(crops=(crop, crop))

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """The NT-Xent loss of the valid pictures."""
        z = self.projector(self.encoder(torch.cat(batch.views)))  # [2B, projection]
        return {"loss": nt_xent(z, batch, self.config.temperature, self.group)}


def nt_xent(z: Tensor, batch: "Batch", temperature: float, group: "ProcessGroup | None" = None) -> Tensor:
    """NT-Xent of stacked views [V * B, D], padded pictures absent, ranks joined."""
    n_views = len(batch.views)
    image = batch.index.repeat(n_views)
    part = torch.where(batch.valid, 0, -1).repeat(n_views)
    view = torch.arange(n_views, device=z.device).repeat_interleave(len(batch))
    ids = Ids(image, part, view)
    return contrastive_loss(
        z, z, query_ids=ids, key_ids=ids, temperature=temperature, reduction="mean_valid", group=group
    )
