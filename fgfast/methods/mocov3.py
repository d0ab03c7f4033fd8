"""MoCo v3: each view is contrasted with the momentum features of the other view of its image and of other images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fgfast.config import Count, Fraction, Positive, TrainConfig
from fgfast.ids import Ids
from fgfast.methods.base import Progress, build_encoder
from fgfast.methods.chunked import ChunkedMethod, by_image, by_view
from fgfast.methods.simclr import blur_sigma
from fgfast.models.heads import MLP, cosine_momentum, momentum_copy, update_momentum
from fgfast.ops.contrast import contrastive_loss

if TYPE_CHECKING:
    from fgfast.data.views import Batch, ViewSpec


@dataclass
class MoCoV3Config(TrainConfig):
    """Options of MoCo v3."""

    temperature: Positive = 0.2
    """Temperature of the contrast."""
    hidden: Count = 512
    """Width of the hidden layers of projector and predictor."""
    projection: Count = 128
    """Width of the projection."""
    dropout: Fraction = 0.0
    """Dropout after the hidden layers of the heads."""
    momentum: Fraction = 0.99
    """Start of the momentum encoder's decay, which rises to 1 as a cosine."""
    freeze_patch_embed: bool = True
    """Do not train the patch embedding of a ViT, which makes its training more stable."""


def byol_views(config: TrainConfig, grayscale: float = 0.2) -> "ViewSpec":
    """The BYOL pair of crops: flip, colour jitter, grey 0.2, blur 1.0 and 0.1, solarise 0 and 0.2."""
    from fgfast.data.views import Crop, ViewSpec

    size, scale = config.size, (config.crop_scale, 1.0)
    common: dict[str, Any] = {"size": size, "scale": scale, "grayscale": grayscale, "blur_sigma": blur_sigma(size)}
    return ViewSpec(crops=(Crop(blur=1.0, **common), Crop(blur=0.1, solarize=0.2, **common)))


class MoCoV3(ChunkedMethod):
    """Contrast of online queries with momentum keys of the batch, symmetric in the views, without a queue.

    C(q, k) = 2 T x mean_i [ log sum_j exp(<q_i, k_j> / T) - <q_i, k_i> / T ],   loss = C(q1, k2) + C(q2, k1),

    q = predictor(projector(encoder(view))), k = projector'(encoder'(view)), both normalised, primed = momentum copies,
    which stay in training mode. Different defaults here: heads of 512 and 128, crops of at least 0.2 of the image area,
    blur in proportion to the size of the views.

    Source: Chen, Xie, He, "An Empirical Study of Training Self-Supervised Vision Transformers", ICCV 2021.
    """

    name = "mocov3"
    Config = MoCoV3Config
    passes_per_image: float = 4
    config: MoCoV3Config

    def __init__(self, config: MoCoV3Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        embedding = self.encoder.patch_embedding
        if embedding is not None and config.freeze_patch_embed:
            embedding.requires_grad_(False)
        dim, hidden, out = self.encoder.dim, config.hidden, config.projection
        deep = (dim, hidden, hidden, out) if embedding is not None else (dim, hidden, out)
        options: dict[str, Any] = {"bias": False, "dropout": config.dropout, "last_norm": True}
        self.projector = MLP(deep, **options)
        self.predictor = MLP((out, hidden, out), **options)
        self.target = momentum_copy(self.encoder)
        self.target_projector = momentum_copy(self.projector)

    def views(self) -> "ViewSpec":
        """The pair of BYOL."""
        return byol_views(self.config)

    def represent(self, batch: "Batch") -> Tensor:
        """Features [B, 2, D] of both views."""
        return by_image(self.encoder(torch.cat(batch.views)), 2)

    def represent_targets(self, batch: "Batch") -> Tensor:
        """Momentum features [B, 2, D] of both views."""
        return by_image(self.target(torch.cat(batch.views)), 2)

    def queries(self, features: Tensor) -> tuple[Tensor, ...]:
        """Predictions for both views, [B, projection] each, from features [B, 2, D]."""
        return self.predictor(self.projector(by_view(features))).chunk(2)

    def contrast(self, query: Tensor, key: Tensor, batch: "Batch") -> Tensor:
        """C(query, key) over the valid images of all ranks."""
        part = torch.where(batch.valid, 0, -1)
        zero = torch.zeros_like(batch.index)
        loss = contrastive_loss(
            query, key, query_ids=Ids(batch.index, part, zero), key_ids=Ids(batch.index, part, zero + 1),
            temperature=self.config.temperature, reduction="mean_valid", group=self.group,
        )  # fmt: skip
        return 2 * self.config.temperature * loss

    def compare(self, online: Tensor, targets: Tensor, batch: "Batch") -> dict[str, Tensor]:
        """The symmetric contrast."""
        q1, q2 = self.queries(online)
        with torch.no_grad():
            k1, k2 = self.target_projector(by_view(targets)).chunk(2)
        return {"loss": self.contrast(q1, k2, batch) + self.contrast(q2, k1, batch)}

    def after_step(self, progress: Progress) -> None:
        """Update the momentum copies; the decay rises from ``momentum`` to 1 as a cosine."""
        decay = cosine_momentum(self.config.momentum, progress.fraction)
        update_momentum(self.target, self.encoder, decay)
        update_momentum(self.target_projector, self.projector, decay)
