"""SimCLR: two views of an image agree, all other images of the batch disagree."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fgfast.config import Count, Natural, Positive, TrainConfig
from fgfast.errors import UserError
from fgfast.ids import Ids
from fgfast.methods.base import Method, build_encoder
from fgfast.models.heads import MLP
from fgfast.ops.contrast import contrastive_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fgfast.data.views import Batch, ViewSpec


@dataclass
class SimCLRConfig(TrainConfig):
    """Options of SimCLR."""

    temperature: Positive = 0.2
    """Temperature of NT-Xent."""
    hidden: Count = 512
    """Width of the projector's hidden layer."""
    projection: Count = 128
    """Width of the projection."""
    views: Literal[
        "original", "gamma", "coarse-dropout", "patch-swap", "random-jigsaw", "dcl-jigsaw", "cropped-region"
    ] = "original"
    """What an image is compared with: another crop of it, or a transform of it."""
    pair: Literal["asymmetric", "symmetric"] = "asymmetric"
    """Whether one view is the image and the other its transform, or both are transformed."""
    blocks: Natural = 0
    """Blocks a side of the jigsaws (no other view looks at it); 0 takes 4 (random-jigsaw) or 7 (dcl-jigsaw)."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the settings of the study of views."""


def transform(views: str, blocks: int = 0) -> dict[str, Any]:
    """The fields of ``Crop`` that turn an image into its transform, by the name that --views has for it.

    Lengths were given for views of 512 pixels and are shares of the side here.

    Example:
        >>> transform("random-jigsaw"), transform("dcl-jigsaw", blocks=3)["grid"]
        ({'grid': 4}, 3)
    """
    fields: dict[str, dict[str, Any]] = {
        "original": {},
        "gamma": {"gamma": (0.5, 2.5)},
        "coarse-dropout": {"holes": (5, 20), "hole_size": (10 / 512, 25 / 512)},
        "patch-swap": {"swap": 200 / 512},
        "random-jigsaw": {"grid": blocks or 4},
        "dcl-jigsaw": {"grid": blocks or 7, "reach": 1, "border": 10 / 512},
        "cropped-region": {"paste": (200 / 512, 300 / 512)},
    }
    return fields[views]


def simclr_views(config: TrainConfig) -> "ViewSpec":
    """Two alike crops: flip, colour jitter, grey 0.2, blur 0.5 (scaled by the size)."""
    from fgfast.data.views import Crop, ViewSpec

    crop = Crop(
        size=config.size, scale=(config.crop_scale, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2, blur=0.5,
        blur_sigma=(0.1, max(0.2, 2.0 * config.size / 224)),
    )  # fmt: skip
    return ViewSpec(crops=(crop, crop))


class SimCLR(Method):
    """Instance discrimination by NT-Xent over the 2B views of a batch.

    loss = mean over views i of  log sum_{k != i} exp(<z_i, z_k>/T) - <z_i, z_j>/T,   z normalised, j the other view.

    Defaults are for sets of thousands of images on small inputs (temperature, head and crops are ours); the
    ImageNet recipe has temperature 0.1, a 2048-wide head, LARS and batches of 4,096. ``--preset paper`` has those of
    the study of views below: ResNet-18 from scratch at 512 pixels, head 512-512, temperature 0.5, Adam, batches of 64,
    500 epochs; its rate was constant, because its cosine was never stepped, and is half a cosine here.

    ``--views`` other than original compare an image with a transform of it (``transform``), made anew each epoch:
    gamma on crops of both, otherwise both squashed whole; then each flipped 0.5, jitter (0.8, 0.8, 0.8, 0.2) 0.3, grey
    0.2, no blur. Lengths are shares of the view, given for 512 pixels. Differences from the release of these views: a
    transform was made once for each image and stored; its files were paired by their order in two folders; the
    DCL blocks were shuffled two by two along a row, so that one could drift to its end, and rows as wholes (here by
    the rule of DCL's paper, one place at most); random jigsaw moved every block (here all orders are alike); the
    lower patch lay within 50 pixels of the middle (here anywhere in the lower half); a region was cropped around the
    corners that a detector found and pasted off the centre (here re-created, around the mean place of the edges);
    flips and strengths that differ between its notebooks are the same for all here, and ``original`` keeps
    ours, where the release had no flip and jitter 0.4 of the time.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020; Al Breiki,
    Ridzuan and Grandhe, "Self-Supervised Learning for Fine-Grained Image Classification", 2021; Chen et al.,
    "Destruction and Construction Learning for Fine-grained Image Recognition", 2019.
    """

    name = "simclr"
    Config = SimCLRConfig
    passes_per_image = 2

    def __init__(self, config: SimCLRConfig) -> None:
        super().__init__()
        self.config = config
        try:
            self.views()
        except ValueError as error:
            raise UserError(
                f"--views {config.views} does not fit --size {config.size} and --blocks {config.blocks}: {error}"
            ) from None
        self.encoder = build_encoder(config)
        self.projector = MLP((self.encoder.dim, config.hidden, config.projection))

    @classmethod
    def paper(cls, model: str | None) -> SimCLRConfig:
        """The released settings of the study of views."""
        return SimCLRConfig(
            model=model or "resnet18", preset="paper", size=512, temperature=0.5, hidden=512, projection=512,
            crop_scale=0.08, lr=1e-3, weight_decay=1e-5, warmup=0.0, batch_size=64, epochs=500, clip=0.0, amp="off",
        )  # fmt: skip

    def views(self) -> "ViewSpec":
        """Two alike crops: flip, colour jitter, grey 0.2, blur 0.5; or an image and its transform."""
        from fgfast.data.views import Crop, ViewSpec

        c = self.config
        if c.views != "original":
            scale = (c.crop_scale, 1.0) if c.views == "gamma" else None
            plain = Crop(size=c.size, scale=scale, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.3, grayscale=0.2)
            changed = replace(plain, **transform(c.views, c.blocks))
            return ViewSpec(crops=(changed if c.pair == "symmetric" else plain, changed))
        return simclr_views(c)

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """The NT-Xent loss of the valid images."""
        z = self.projector(self.encoder(torch.cat(batch.views)))  # [2B, projection]
        return {"loss": nt_xent(z, batch, self.config.temperature, self.group)}


def nt_xent(z: Tensor, batch: "Batch", temperature: float, group: "ProcessGroup | None" = None) -> Tensor:
    """NT-Xent of stacked views [V * B, D], padded images absent, ranks joined."""
    n_views = len(batch.views)
    image = batch.index.repeat(n_views)
    part = torch.where(batch.valid, 0, -1).repeat(n_views)
    view = torch.arange(n_views, device=z.device).repeat_interleave(len(batch))
    ids = Ids(image, part, view)
    return contrastive_loss(
        z, z, query_ids=ids, key_ids=ids, temperature=temperature, reduction="mean_valid", group=group
    )
