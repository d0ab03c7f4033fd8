"""SimSiam: each view predicts the projection of the other one; there are no negatives and no momentum copy."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fgfast.config import Count, TrainConfig
from fgfast.methods.objectives import ObjectiveMethod, SimSiamBase
from fgfast.methods.simclr import simclr_views

if TYPE_CHECKING:
    from fgfast.data.views import ViewSpec


@dataclass
class SimSiamConfig(TrainConfig):
    """Options of SimSiam."""

    hidden: Count = 512
    """Width of the hidden layers of the projector; the predictor's is a quarter of it."""
    projection: Count = 512
    """Width of the projection."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the settings released by the authors."""


class SimSiam(ObjectiveMethod):
    """Cosine of the prediction from one view with the projection of the other, without gradient on the projection.

    loss = - mean_i [ cos(p1_i, z2_i) + cos(p2_i, z1_i) ] / 2,      z = projector(encoder(view)),  p = predictor(z).

    The projector has three layers and ends with a BatchNorm without affine parameters; the predictor has a narrow
    hidden layer. A loss near -1 in the first epochs is a sign of collapse.

    Differences from the release: the learning rate of the predictor falls like the others, whereas the release keeps
    it constant, for which it reports a small gain; norms and biases have no weight decay; the blur is in proportion to
    the size of the views. The defaults are for sets of thousands of small images: narrower heads and AdamW.

    Source: Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021.
    """

    name = "simsiam"
    adds_up = True
    Config = SimSiamConfig
    config: SimSiamConfig

    def __init__(self, config: SimSiamConfig) -> None:
        super().__init__(config, SimSiamBase)

    @classmethod
    def paper(cls, model: str | None) -> SimSiamConfig:
        """The released settings of 100 epochs on ImageNet: a learning rate of 0.05 per 256 images, batches of 512."""
        return SimSiamConfig(
            model=model or "resnet50", preset="paper", size=224, hidden=2048, projection=2048, optimizer="sgd", lr=0.1,
            weight_decay=1e-4, warmup=0.0, batch_size=512, epochs=100, crop_scale=0.2, clip=0.0, amp="off",
        )  # fmt: skip

    def views(self) -> "ViewSpec":
        """The views of MoCo v2."""
        return simclr_views(self.config)
