"""MoCo v2: each image is told apart from a queue of the momentum features of earlier images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fgfast.config import Count, Fraction, Positive, TrainConfig
from fgfast.methods.objectives import MoCoV2Base, ObjectiveMethod
from fgfast.methods.simclr import simclr_views
from fgfast.models.statistics import KeyQueue

if TYPE_CHECKING:
    from fgfast.data.views import ViewSpec


@dataclass
class MoCoV2Config(TrainConfig):
    """Options of MoCo v2."""

    temperature: Positive = 0.2
    """Temperature of the contrast."""
    hidden: Count = 512
    """Width of the projector's hidden layer."""
    projection: Count = 128
    """Width of the projection."""
    momentum: Fraction = 0.99
    """Decay of the momentum encoder, constant."""
    queue: Count = 512
    """Length of the queue of keys: the number of negatives."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the settings released by the authors."""


class MoCoV2(ObjectiveMethod):
    """Contrast of the query of view 1 with the momentum key of view 2 and a queue of the keys of earlier images.

    loss = mean_i [ log( exp(<q_i, k_i> / T) + sum_j exp(<q_i, n_j> / T) ) - <q_i, k_i> / T ],

    q = projector(encoder(view 1)), k = projector'(encoder'(view 2)), both normalised, primed = momentum copies, n = the
    last ``queue`` keys. The keys of a step are negatives from the next step on.

    Differences from the release: the keys are not shuffled among GPUs, so BatchNorm takes statistics of the same images
    for queries and keys (with ``--sync-bn`` those of all ranks); norms and biases have no weight decay; the blur is in
    proportion to the size of the views. The defaults are for sets of thousands of small images: shorter queue, smaller
    decay, narrower head, AdamW.

    Source: Chen, Fan, Girshick, He, "Improved Baselines with Momentum Contrastive Learning", 2020.
    """

    name = "mocov2"
    Config = MoCoV2Config
    config: MoCoV2Config

    def __init__(self, config: MoCoV2Config) -> None:
        super().__init__(config, MoCoV2Base)
        self.queue = KeyQueue(config.queue, config.projection)

    @classmethod
    def paper(cls, model: str | None) -> MoCoV2Config:
        """The released settings of 200 epochs on ImageNet."""
        return MoCoV2Config(
            model=model or "resnet50", preset="paper", size=224, hidden=2048, projection=128, queue=65_536,
            momentum=0.999, temperature=0.2, optimizer="sgd", lr=0.03, weight_decay=1e-4, warmup=0.0, batch_size=256,
            epochs=200, crop_scale=0.2, clip=0.0, amp="off",
        )  # fmt: skip

    def views(self) -> "ViewSpec":
        """Two crops with the same settings: those of SimCLR with weaker colour jitter."""
        return simclr_views(self.config)
