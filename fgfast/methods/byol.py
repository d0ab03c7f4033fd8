"""BYOL: each view predicts the momentum projection of the other one; there are no negatives."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fgfast.config import Count, Fraction, TrainConfig
from fgfast.methods.mocov3 import byol_views
from fgfast.methods.objectives import BYOLBase, ObjectiveMethod

if TYPE_CHECKING:
    from fgfast.data.views import ViewSpec


@dataclass
class BYOLConfig(TrainConfig):
    """Options of BYOL."""

    hidden: Count = 512
    """Width of the hidden layers of projector and predictor."""
    projection: Count = 128
    """Width of the projection."""
    momentum: Fraction = 0.99
    """Start of the momentum encoder's decay, which rises to 1 as a cosine."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the authors' settings for ImageNet."""


class BYOL(ObjectiveMethod):
    """Distance of the normalised prediction from one view to the normalised momentum projection of the other.

    loss = mean_i [ 4 - 2 cos(p1_i, z2_i) - 2 cos(p2_i, z1_i) ],

    p = predictor(projector(encoder(view))), z = projector'(encoder'(view)), primed = momentum copies, which stay in
    training mode.

    Differences from the paper: the blur is in proportion to the size of the views. The defaults are for sets of
    thousands of small images: narrower heads, smaller decay, crops of at least 0.2 of the image area, AdamW.

    Source: Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", NeurIPS 2020.
    """

    name = "byol"
    adds_up = True
    Config = BYOLConfig
    config: BYOLConfig

    def __init__(self, config: BYOLConfig) -> None:
        super().__init__(config, BYOLBase)

    @classmethod
    def paper(cls, model: str | None) -> BYOLConfig:
        """The settings of 1,000 epochs on ImageNet: LARS with a learning rate of 0.2 per 256 images."""
        return BYOLConfig(
            model=model or "resnet50", preset="paper", size=224, hidden=4096, projection=256, momentum=0.996,
            optimizer="lars", lr=3.2, weight_decay=1.5e-6, warmup=0.01, batch_size=4096, epochs=1000, crop_scale=0.08,
            clip=0.0, amp="off",
        )  # fmt: skip

    def views(self) -> "ViewSpec":
        """Two crops, of which the first is always blurred and the second may be solarised."""
        return byol_views(self.config)
