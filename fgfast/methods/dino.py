"""DINO: a student predicts from each view, small crops among them, what its momentum teacher sees in large crops."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor

from fgfast.config import Count, Fraction, Natural, Positive, Range, TrainConfig, Weight
from fgfast.errors import UserError
from fgfast.losses import DINOLoss, KoLeoLoss
from fgfast.methods.base import Progress, build_encoder
from fgfast.methods.chunked import ChunkedMethod, by_image, by_view
from fgfast.methods.simclr import blur_sigma
from fgfast.models.heads import DINOHead, cosine_momentum, momentum_copy, update_momentum
from fgfast.models.probe import SizeError, evaluating

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec


@dataclass
class DINOConfig(TrainConfig):
    """Options of DINO."""

    crop_scale: Annotated[float, Range(0, 1, open=True)] = 0.05
    """Smallest fraction of the image area that a local crop covers."""
    split_scale: Annotated[float, Range(0, 1, open=True)] = 0.4
    """Largest fraction of the image area that a local crop covers, and smallest one of a global crop."""
    local_crops: Natural = 6
    """Local crops of each image, which only the student sees; 0 leaves them out."""
    local_size: Natural = 0
    """Side of the local crops in pixels; 0 takes 3/7 of --size, rounded to a multiple of a ViT's patches."""
    hidden: Count = 512
    """Width of the hidden layers of the head."""
    projection: Count = 128
    """Width of the head before the prototypes."""
    prototypes: Annotated[int, Range(2)] = 4096
    """Outputs of the head (65,536 in the paper)."""
    norm_last_layer: bool = True
    """Keep the norms of the prototypes at 1."""
    freeze_last: Fraction = 0.01
    """Fraction of the steps, from the first, in which the prototypes are not trained (the first of 100 epochs)."""
    centering: Literal["mean", "sinkhorn"] = "mean"
    """Balance of the teacher's outputs: a moving mean is subtracted, or three iterations of Sinkhorn (DINOv2)."""
    koleo: Weight = 0.0
    """Weight of KoLeo on the features of the global crops (0.1 in DINOv2); 0 leaves it out."""
    temperature: Positive = 0.1
    """Temperature of the student."""
    teacher_temperature: Positive = 0.04
    """Temperature of the teacher after its warm-up."""
    teacher_start: Positive = 0.04
    """Temperature of the teacher in the first step."""
    teacher_warmup: Fraction = 0.3
    """Fraction of the steps in which the temperature of the teacher goes linearly to its final value."""
    momentum: Fraction = 0.996
    """Start of the teacher's decay, which rises to 1 as a cosine."""
    weight_decay: Weight = 0.04
    """Weight decay of the first step; not applied to norms and biases."""
    weight_decay_end: Weight = 0.4
    """Weight decay of the last step, to which it goes as half a cosine."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the settings released by the authors."""

    def check(self) -> None:
        """Refuse local crops larger than global ones."""
        if self.local_size > self.size:
            raise UserError(f"--local-size is {self.local_size}: give at most --size, {self.size}.")
        if self.crop_scale > self.split_scale:
            raise UserError(f"--crop-scale is {self.crop_scale}: give at most --split-scale, {self.split_scale}.")

    def weight_decay_at(self, step: int, total: int) -> float:
        """The weight decay of a step, from 0: half a cosine from ``weight_decay`` to ``weight_decay_end``."""
        past = 0.5 * (1 - math.cos(math.pi * step / max(1, total - 1)))
        return self.weight_decay + past * (self.weight_decay_end - self.weight_decay)


class DINO(ChunkedMethod):
    """Self-distillation without labels, with two global and n local crops of each image.

    loss = mean over pairs t != s of  - sum_k softmax((g'(x_t) - c) / T_t)_k log softmax(g(x_s) / T)_k,

    t over the global crops, s over all crops; g = head(encoder(crop)) of the student, g' that of the teacher, a
    momentum copy; c a moving mean of the teacher's outputs. With ``--centering sinkhorn`` the targets are balanced over
    the global crops of the batch instead, as in DINOv2; ``--koleo W`` adds W x the sum of KoLeo over the two global
    crops. Means, centre, Sinkhorn and the neighbours of KoLeo are those of the images of all ranks (DINOv2 searches
    the neighbours on each rank).

    Different defaults here: 6 local crops; heads of 512, 128 and 4,096; blur in proportion to the size of the views.
    ``--preset paper`` has the released ones for a ViT-S/16; its learning rate is for one process, and the authors
    multiply it by their number. Not reproduced: gradients are clipped by their total norm, not by that of each
    parameter; schedules run over steps, not over epochs (the teacher's temperature, the frozen prototypes); the
    learning rate falls to 0 instead of 1e-6 and rises linearly from 1 / warm-up steps; crops are resized bilinearly
    unless the weights say otherwise (released: bicubic); autocast is to bfloat16 (float16); the head starts from
    PyTorch's random weights (normal ones with a deviation of 0.02). The teacher runs without drop path, as released.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021; Oquab et al.,
    "DINOv2: Learning Robust Visual Features without Supervision", 2023 (Sinkhorn, KoLeo).
    """

    name = "dino"
    Config = DINOConfig
    config: DINOConfig

    def __init__(self, config: DINOConfig) -> None:
        from timm.layers.drop import DropPath

        super().__init__()
        config.check()
        self.config = config
        self.encoder = build_encoder(config)
        self.local_size = self._choose_local_size()
        self.passes_per_image = 4 + config.local_crops * (self.local_size / config.size) ** 2
        self.head = DINOHead(self.encoder.dim, config.prototypes, config.hidden, config.projection)
        self.target, self.target_head = momentum_copy(self.encoder), momentum_copy(self.head)
        for module in self.target.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        self.loss = DINOLoss(config.prototypes, student_temp=config.temperature, center_mode=config.centering)
        self.spread = KoLeoLoss()
        self.head.last.parametrizations.weight.original0.requires_grad_(not config.norm_last_layer)
        self.teacher_temperature = config.teacher_start

    @classmethod
    def paper(cls, model: str | None) -> DINOConfig:
        """The released settings for ViT-S/16 and 100 epochs."""
        return DINOConfig(
            model=model or "vit_small_patch16_224", preset="paper", model_args="drop_path_rate=0.1", size=224,
            local_crops=8, local_size=96, hidden=2048, projection=256, prototypes=65_536, batch_size=64, lr=1.25e-4,
            epochs=100, warmup=0.1, clip=3.0,
        )  # fmt: skip

    def _choose_local_size(self) -> int:
        """The side of the local crops, after a check that the encoder takes them."""
        c, patch = self.config, self.encoder.patch
        side = c.local_size or max(1, round(c.size * 3 / 7 / patch)) * patch
        if side % patch:
            raise UserError(f"--local-size is {side}: {c.model} takes multiples of its patches of {patch} pixels.")
        if not c.local_crops:
            return side
        try:
            with evaluating(self.encoder):
                self.encoder(torch.zeros(1, 3, side, side))
        except SizeError as error:
            raise UserError(
                f"{c.model} does not take local crops of {side} x {side} pixels ({error.reason}): choose another "
                "--local-size, or give --local-crops 0."
            ) from error
        return side

    def set_group(self, group: "ProcessGroup | None") -> None:
        """Centre, balance and spread over the images of all ranks."""
        super().set_group(group)
        self.spread.group = group

    def views(self) -> "ViewSpec":
        """Two global crops as in BYOL (grey 0.2; blur 1.0 and 0.1; solarise 0 and 0.2), then local ones (blur 0.5)."""
        from fgfast.data.views import Crop, ViewSpec

        c = self.config
        common: dict[str, Any] = {"grayscale": 0.2, "blur_sigma": blur_sigma(c.size)}
        large: dict[str, Any] = {"size": c.size, "scale": (c.split_scale, 1.0), **common}
        small = Crop(size=self.local_size, scale=(c.crop_scale, c.split_scale), blur=0.5, **common)
        return ViewSpec(
            crops=(Crop(blur=1.0, **large), Crop(blur=0.1, solarize=0.2, **large), *[small] * c.local_crops)
        )

    def before_step(self, progress: Progress) -> None:
        """Choose the teacher's temperature, and whether the prototypes are trained."""
        c, last = self.config, self.head.last.parametrizations.weight
        warm = 1.0 if progress.fraction >= c.teacher_warmup else progress.fraction / c.teacher_warmup
        self.teacher_temperature = c.teacher_start + warm * (c.teacher_temperature - c.teacher_start)
        trained = progress.fraction >= c.freeze_last
        last.original0.requires_grad_(trained and not c.norm_last_layer)
        last.original1.requires_grad_(trained)

    def represent(self, batch: "Batch") -> tuple[Tensor, ...]:
        """Features [B, 2, D] of the global crops, and [B, n, D] of the local ones if there are any."""
        kinds = filter(None, (batch.views[:2], batch.views[2:]))
        return tuple(by_image(self.encoder(torch.cat(crops)), len(crops)) for crops in kinds)

    def represent_targets(self, batch: "Batch") -> Tensor:
        """The teacher's features [B, 2, D] of the global crops."""
        return by_image(self.target(torch.cat(batch.views[:2])), 2)

    def compare(self, online: tuple[Tensor, ...], targets: Tensor, batch: "Batch") -> dict[str, Tensor]:
        """The distillation from the global crops, and KoLeo if it has a weight."""
        features = by_view(online[0])
        student = self.head(torch.cat([by_view(x) for x in online])).chunk(len(batch.views))
        with torch.no_grad():
            teacher = self.target_head(by_view(targets)).chunk(2)
        options: dict[str, Any] = {"valid": batch.valid, "group": self.group}
        loss = self.loss(teacher, student, self.teacher_temperature, **options)
        if not self.config.koleo:
            return {"loss": loss}
        koleo = torch.stack([self.spread(x, valid=batch.valid) for x in features.chunk(2)]).sum()
        return {"loss": loss + self.config.koleo * koleo, "dino": loss.detach(), "koleo": koleo.detach()}

    def after_step(self, progress: Progress) -> None:
        """Update the teacher; the decay rises from ``momentum`` to 1 as a cosine."""
        decay = cosine_momentum(self.config.momentum, progress.fraction)
        update_momentum(self.target, self.encoder, decay)
        update_momentum(self.target_head, self.head, decay)

    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """The global and the local crops of up to 8 images."""
        from fgfast.data.panels import Panel

        (title, rows), *_ = super().pictures(batch).items()
        names = ["global", "global", *["local"] * (len(batch.views) - 2)]
        captions = [f"{name} {v + 1}" for v, name in enumerate(names)]
        return {title: [[Panel(p.image, c) for p, c in zip(row, captions, strict=True)] for row in rows]}
