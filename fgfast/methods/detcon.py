"""DetCon: contrast of image segments, found by their colour once, across two views."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fgfast.config import Count, Fraction, Natural, Positive, TrainConfig
from fgfast.losses import DetConBLoss, DetConSLoss
from fgfast.losses.over_ranks import count_valid, sample_images
from fgfast.methods.base import Progress, build_encoder
from fgfast.methods.chunked import ChunkedMethod, by_image, by_view
from fgfast.methods.mocov3 import byol_views
from fgfast.methods.part_pictures import views_with_parts
from fgfast.models.backbone import Backbone
from fgfast.models.heads import MLP, cosine_momentum, momentum_copy, update_momentum
from fgfast.ops.part_pool import part_pool
from fgfast.parts.rounds import Rounds
from fgfast.parts.segments import SCALE, Segments, most_segments
from fgfast.parts.sources import DiscoveryConfig, Source

if TYPE_CHECKING:
    from fgfast.data.imageset import ImageSet
    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec


@dataclass
class DetConConfig(TrainConfig):
    """Options of DetCon."""

    target: Literal["momentum", "self"] = "momentum"
    """Network of the keys: a momentum copy, with a predictor for the queries (DetCon-B), or the same (DetCon-S)."""
    masks: Count = 16
    """Segments sampled per view, with replacement."""
    scale: Positive = SCALE
    """Scale of the segmentation and least number of pixels of a segment, for images of 224 x 224."""
    segment_size: Natural = 0
    """Side to which full images are resized to be segmented; 0 takes twice --size."""
    temperature: Positive = 0.1
    """Temperature of the contrast."""
    hidden: Count = 512
    """Width of the hidden layers of projector and predictor."""
    projection: Count = 128
    """Width of the projection."""
    momentum: Fraction = 0.99
    """Start of the momentum encoder's decay, which rises to 1 as a cosine."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the authors' settings for ImageNet."""


class DetCon(ChunkedMethod):
    """Contrast of segments: DetCon-B, or DetCon-S with ``--target self``.

    The segments of every image are found once, before the training, by the colour of the pixels (:class:`Segments`),
    and cropped with each view. The final feature map of the encoder is averaged over each of the ``masks`` segments
    that are sampled, with replacement, among those in the view, and

        loss = DetConB(predictor(projector(segment)), projector'(segment')),

    where the primed networks are momentum copies (DetCon-S: the networks themselves, without predictor). Online and
    target network take the same sample, and the mean is over the segments of all valid images.

    Different defaults here: heads of 512 and 128, momentum from 0.99 to 1, crops of at least 0.2 of the image area,
    blur in proportion to the size of the views. ``--preset paper`` has the authors' settings, with the 300 epochs of
    the public PyTorch port. Their heads have a bias in the first layer, which the norm after it removes.

    Source: Henaff et al., "Efficient Visual Pretraining with Contrastive Detection", ICCV 2021.
    """

    name = "detcon"
    shardable = False
    Config = DetConConfig
    config: DetConConfig

    def __init__(self, config: DetConConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.n_parts = most_segments(config.scale)
        with_copy = config.target == "momentum"
        self.passes_per_image = 4 if with_copy else 2
        hidden, out = config.hidden, config.projection
        self.projector = MLP((self.encoder.map_dim, hidden, out), bias=False)
        self.predictor = MLP((out, hidden, out), bias=False) if with_copy else None
        self.target = momentum_copy(self.encoder) if with_copy else None
        self.target_projector = momentum_copy(self.projector) if with_copy else None
        side = config.segment_size or 2 * config.size
        how = DiscoveryConfig(side, side, "the images shown", threads=config.threads, loader=config.loader)
        self.rounds = Rounds(self._source, how, partial(build_encoder, replace(config, init="none")))

    def _source(self, encoder: Backbone, config: DiscoveryConfig) -> Source:
        return Segments(self.n_parts, config, self.config.scale, next(encoder.parameters()).device)

    @classmethod
    def paper(cls, model: str | None) -> DetConConfig:
        """The settings for ImageNet: LARS with a learning rate of 0.2 per 256 images."""
        return DetConConfig(
            model=model or "resnet50", preset="paper", size=224, segment_size=224, hidden=4096, projection=256,
            momentum=0.996, optimizer="lars", lr=3.2, weight_decay=1.5e-6, warmup=10 / 300, batch_size=4096, epochs=300,
            crop_scale=0.08, clip=0.0, amp="off",
        )  # fmt: skip

    def views(self) -> "ViewSpec":
        """The pair of BYOL with its id maps."""
        return replace(byol_views(self.config), masks=True)

    def prepare(self, images: "ImageSet", run: Path, round_: int) -> Path | None:
        """Segment every image, unless that was done."""
        return self.rounds.prepare(self.encoder, images, run, round_, self.group)

    def figure_maps(self, images: "ImageSet", run: Path, scratch: Path) -> Path | None:
        """The segments of the run, or of the images shown if they are others."""
        return self.rounds.for_figures(self.encoder, images, run, scratch)

    def represent(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """Mean features [B, 2, K, D] and areas [B, 2, K] of the segments of both views."""
        return self.pool(self.encoder, batch)

    def represent_targets(self, batch: "Batch") -> Tensor | tuple[()]:
        """Mean momentum features [B, 2, K, D], if there is a momentum encoder."""
        return () if self.target is None else self.pool(self.target, batch)[0]

    def compare(self, online: tuple[Tensor, Tensor], targets: Tensor | tuple[()], batch: "Batch") -> dict[str, Tensor]:
        """The loss of both views."""
        pooled, area = map(by_view, online)
        ids = self.sample(area)
        rows = self._rows(pooled, ids, self.projector)
        masks = ids.chunk(2)
        of_valid = len(batch) / count_valid(batch.valid, self.group)  # the losses count padding too
        options: dict[str, Any] = {"gather_distributed": False, "group": self.group}
        if not isinstance(targets, Tensor):
            loss = DetConSLoss(self.config.temperature, **options)(*rows.chunk(2), *masks)
            return {"loss": loss * of_valid}
        assert self.predictor is not None  # they come with the copy
        assert self.target_projector is not None
        with torch.no_grad():
            target = self._rows(by_view(targets), ids, self.target_projector)
        predicted = self.predictor(rows.flatten(0, 1)).view_as(rows)
        loss = DetConBLoss(self.config.temperature, **options)(*predicted.chunk(2), *target.chunk(2), *masks)
        return {"loss": loss * of_valid}

    def pool(self, encoder: Backbone, batch: "Batch") -> tuple[Tensor, Tensor]:
        """Mean features [B, 2, K, D] and areas [B, 2, K] of the segments of both views; none of padded images."""
        labels = torch.cat([torch.where(batch.valid[:, None, None], ids, -1) for ids in batch.labels])
        views = torch.cat(batch.views)
        maps = encoder.to_map(encoder.features(views), (views.shape[-2], views.shape[-1]))
        pooled, area = part_pool(maps, labels, self.n_parts)
        return by_image(pooled, 2), by_image(area, 2)

    def sample(self, area: Tensor) -> Tensor:
        """Sampled ids [2 B, M] of the segments in each view, from areas [2 B, K]; -1 in a view without any."""
        n_masks = self.config.masks

        def draw(n: int, **options: Any) -> Tensor:
            return torch.rand(n, 2, n_masks, **options)

        drawn = sample_images(draw, len(area) // 2, area.device, self.group, self.rng).transpose(0, 1).flatten(0, 1)
        present = area > 0
        count = present.sum(1, keepdim=True)
        in_order = present.byte().sort(dim=1, descending=True, stable=True).indices  # those in the view come first
        place = (drawn * count).long().minimum(count - 1).clamp(min=0)
        return torch.where(count > 0, in_order.gather(1, place), -1)

    @staticmethod
    def _rows(pooled: Tensor, ids: Tensor, head: MLP) -> Tensor:
        """The sampled segments [N, M, D] through a head: [N, M, E]."""
        index = ids.clamp(min=0)[:, :, None].expand(-1, -1, pooled.shape[2])
        return head(pooled.gather(1, index).flatten(0, 1)).unflatten(0, ids.shape)

    def after_step(self, progress: Progress) -> None:
        """Update the momentum copies; the decay rises from ``momentum`` to 1 as a cosine."""
        if self.target is None or self.target_projector is None:
            return
        decay = cosine_momentum(self.config.momentum, progress.fraction)
        update_momentum(self.target, self.encoder, decay)
        update_momentum(self.target_projector, self.projector, decay)

    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """Views beside their segments."""
        return {"views": views_with_parts(batch, batch.labels, self.encoder.stats)}
