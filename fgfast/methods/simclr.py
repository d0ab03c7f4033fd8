"""SimCLR: the views of an image are positives of each other, those of all other images of the batch negatives."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fgfast.config import Count, Natural, Positive, TrainConfig
from fgfast.errors import UserError
from fgfast.ids import Ids
from fgfast.methods.base import build_encoder
from fgfast.methods.chunked import ChunkedMethod, by_image, by_view
from fgfast.models.heads import MLP
from fgfast.ops.contrast import contrastive_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fgfast.data.transforms import Transform
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
    """The second view of an image: another crop of it (original), or a transform of it."""
    pair: Literal["asymmetric", "symmetric"] = "asymmetric"
    """Whether one view is the image and the other its transform (asymmetric), or both are transformed."""
    blocks: Natural = 0
    """Blocks per side, for the jigsaw views only; 0 takes 4 (random-jigsaw) or 7 (dcl-jigsaw)."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the settings released with the study of views."""


def transform(views: str, blocks: int = 0) -> "tuple[Transform, ...]":
    """``Crop.transforms`` of the transformed view, by its name in --views.

    The study gives lengths for views of 512 pixels; here they are fractions of the side.

    Example:
        >>> transform("random-jigsaw")
        (BlockShuffle(grid=4, reach=0),)
    """
    from fgfast.data.transforms import BlockShuffle, Gamma, Holes, PasteOnWhite, PatchSwap, TrimBorder

    transforms: dict[str, tuple[Transform, ...]] = {
        "original": (),
        "gamma": (Gamma((0.5, 2.5)),),
        "coarse-dropout": (Holes((5, 20), side=(10 / 512, 25 / 512)),),
        "patch-swap": (PatchSwap(200 / 512),),
        "random-jigsaw": (BlockShuffle(blocks or 4),),
        "dcl-jigsaw": (TrimBorder(10 / 512), BlockShuffle(blocks or 7, reach=1)),
        "cropped-region": (PasteOnWhite((200 / 512, 300 / 512)),),
    }
    return transforms[views]


def blur_sigma(size: int) -> tuple[float, float]:
    """Range of the deviation of the blur in pixels: (0.1, 2) for views of 224 pixels, the upper end in proportion."""
    return 0.1, max(0.2, 2.0 * size / 224)


def simclr_views(config: TrainConfig) -> "ViewSpec":
    """Two crops with the same settings: flip, colour jitter, grey 0.2, blur 0.5 (in proportion to the size)."""
    from fgfast.data.views import Crop, ViewSpec

    crop = Crop(
        size=config.size, scale=(config.crop_scale, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2, blur=0.5,
        blur_sigma=blur_sigma(config.size),
    )  # fmt: skip
    return ViewSpec(crops=(crop, crop))


class SimCLR(ChunkedMethod):
    """Instance discrimination with NT-Xent over the 2B views of a batch.

    loss = mean over views i of  log sum_{k != i} exp(<z_i, z_k>/T) - <z_i, z_j>/T,   z normalised, j the other view.

    The defaults are for sets of thousands of small images (temperature, head and crops differ from the paper); the
    ImageNet recipe has temperature 0.1, a 2048-wide head, LARS and batches of 4,096. ``--preset paper`` has the
    settings of the study of views below: ResNet-18 from scratch at 512 pixels, head 512-512, temperature 0.5, Adam,
    batches of 64, 500 epochs; its learning rate was constant, because its cosine schedule was never stepped, and is
    half a cosine here.

    All ``--views`` but original contrast an image with a transform of it (``transform``), drawn again in each epoch.
    Both views are crops for gamma, and otherwise full images resized to a square; each then has flip 0.5, jitter
    (0.8, 0.8, 0.8, 0.2) with probability 0.3, grey 0.2 and no blur. Differences from the release of these views:

    - The release transforms each image once, stores the result, and pairs files by their order in two folders.
    - DCL blocks: the release swaps neighbours along a row, by which one block can move to the end, and complete rows;
      here blocks move by at most one place, as in DCL's paper.
    - Random jigsaw: the release moves every block; here all orders are equally likely.
    - Patch swap: the release takes the lower patch within 50 pixels of the middle; here anywhere in the lower half.
    - Cropped region: the release crops around corners found by a detector and pastes off-centre; here the crop is
      around the mean position of the edges.
    - Flips and strengths, which differ between the notebooks of the release, are the same for all views here; for
      original the release had no flip, and jitter with probability 0.4.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020; Al Breiki,
    Ridzuan and Grandhe, "Self-Supervised Learning for Fine-Grained Image Classification", 2021; Chen et al.,
    "Destruction and Construction Learning for Fine-grained Image Recognition", 2019.
    """

    name = "simclr"
    Config = SimCLRConfig
    config: SimCLRConfig
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
        """The settings released with the study of views."""
        return SimCLRConfig(
            model=model or "resnet18", preset="paper", size=512, temperature=0.5, hidden=512, projection=512,
            crop_scale=0.08, lr=1e-3, weight_decay=1e-5, warmup=0.0, batch_size=64, epochs=500, clip=0.0, amp="off",
        )  # fmt: skip

    def views(self) -> "ViewSpec":
        """Two crops with the same settings, or an image and its transform."""
        from fgfast.data.views import Crop, ViewSpec

        c = self.config
        if c.views != "original":
            scale = (c.crop_scale, 1.0) if c.views == "gamma" else None
            plain = Crop(size=c.size, scale=scale, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.3, grayscale=0.2)
            changed = replace(plain, transforms=transform(c.views, c.blocks))
            return ViewSpec(crops=(changed if c.pair == "symmetric" else plain, changed))
        return simclr_views(c)

    def represent(self, batch: "Batch") -> Tensor:
        """Features [B, 2, D] of both views."""
        return by_image(self.encoder(torch.cat(batch.views)), 2)

    def compare(self, online: Tensor, targets: Any, batch: "Batch") -> dict[str, Tensor]:
        """The NT-Xent loss of the valid images."""
        z = self.projector(by_view(online))  # [2B, projection]
        return {"loss": nt_xent(z, batch, self.config.temperature, self.group)}


def nt_xent(z: Tensor, batch: "Batch", temperature: float, group: "ProcessGroup | None" = None) -> Tensor:
    """NT-Xent of V stacked views [V * B, D] over the images of all ranks; padded images are masked out."""
    n_views = len(batch.views)
    image = batch.index.repeat(n_views)
    part = torch.where(batch.valid, 0, -1).repeat(n_views)
    view = torch.arange(n_views, device=z.device).repeat_interleave(len(batch))
    ids = Ids(image, part, view)
    return contrastive_loss(
        z, z, query_ids=ids, key_ids=ids, temperature=temperature, reduction="mean_valid", group=group
    )
