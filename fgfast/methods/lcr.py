"""LCR: a contrast, and an attention map that learns where the gradient of the contrast is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fgfast.config import Count, Fraction, Positive, TrainConfig, Weight
from fgfast.losses.over_ranks import count_valid, mean_valid, rank_and_world
from fgfast.methods.base import build_encoder, new_encoder
from fgfast.methods.mocov3 import byol_views
from fgfast.methods.objectives import BYOLBase, MoCoV2Base, ObjectiveMethod
from fgfast.methods.simclr import simclr_views
from fgfast.models.backbone import Backbone
from fgfast.models.rationale import RationaleEncoder, scale_to_unit
from fgfast.models.statistics import KeyQueue
from fgfast.models.weights import encoder_state, load_tensors

if TYPE_CHECKING:
    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec


@dataclass
class LCRConfig(TrainConfig):
    """Options of LCR."""

    base: Literal["moco", "byol"] = "moco"
    """The contrastive objective that it builds on: MoCo v2 or BYOL."""
    temperature: Positive = 0.2
    """Temperature of the contrast (MoCo)."""
    hidden: Count = 512
    """Width of the hidden layers of the heads."""
    projection: Count = 128
    """Width of the projection."""
    momentum: Fraction = 0.99
    """Decay of the momentum encoder: constant (MoCo), or its start, which rises to 1 as a cosine (BYOL)."""
    queue: Count = 512
    """Length of the queue of keys (MoCo)."""
    channels: Count = 32
    """Channels of the attention, the largest of which counts at each position."""
    rationale_weight: Weight = 0.01
    """Weight of the rationale loss, which is summed over the images of a step."""
    rationale_temperature: Positive = 0.4
    """Temperature of the softmax of target and attention over the positions."""
    target: Literal["scaled", "raw"] = "scaled"
    """The target: Grad-CAM scaled to [0, 1] in each image like the attention, or as it is."""
    pooling: Literal["attention", "mean"] = "attention"
    """Features in evaluation: weighted by the attention, or the plain average over positions."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the settings released by the authors."""


class LCR(ObjectiveMethod):
    r"""MoCo v2 or BYOL, and an attention map that is trained to resemble the Grad-CAM of their loss.

    .. math:: L = L_C + \beta \sum_i \text{KL}(\text{softmax}(G_i / \tau) \| \text{softmax}(A_i / \tau)), \qquad
              G_i = \text{ReLU}(\sum_d F_{id} \, \partial L_i / \partial F_{id}),

    over the positions of view 1 of each image i: A is the attention of :class:`RationaleEncoder` over the final feature
    map F, G the target, with the element-wise first-order gradient of the image's own contrast L_i, scaled to [0, 1]
    and without gradient; beta = ``rationale_weight``, tau = ``rationale_temperature``. In evaluation features are
    weighted by the attention (``fgfast eval --set pooling=mean`` takes the plain average). The exported network is the
    plain one; the attention is in the checkpoints.

    Differences from the release, with their reasons:

    - Attention is scaled by the minimum and maximum of each image, not of the batch, by which the features of an image
      depend on the images beside it.
    - The target is scaled in the same way (``--target raw`` leaves it as it is): in the release it is the gradient of a
      mean over the batch, so small beside the temperature that its softmax is almost the same at every position.
    - The target has no gradient; in the MoCo version of the release it has one, and trains the encoder.
    - Softmax over all positions with temperature 0.4, as in the BYOL version; that for MoCo takes it over rows of the
      map, without temperature.
    - A second contrast of attention-pooled features, computed in the release but not added to its loss, is left out.
    - BYOL: its own loss and rising decay, and a network with its max-pooling; the release has a quarter of that loss, a
      constant decay, and no max-pooling for maps of 14 x 14 (here: output_stride in ``--model-args``).

    The released runs start from supervised ImageNet weights: give them by ``--init``. The defaults are for sets of
    thousands of small images, and refine such weights more gently than the release does (``--preset paper``).

    Source: Shu, van den Hengel, Liu, "Learning Common Rationale to Improve Self-Supervised Representation for
    Fine-Grained Visual Recognition Problems", CVPR 2023.
    """

    name = "lcr"
    shardable = False
    Config = LCRConfig
    config: LCRConfig
    encoder: RationaleEncoder

    def __init__(self, config: LCRConfig) -> None:
        base = BYOLBase if config.base == "byol" else MoCoV2Base
        super().__init__(config, base, build_encoder(config, encoder_class(config)))
        if base.has_queue:
            self.queue = KeyQueue(config.queue, config.projection)
        for copy in self.base.modules():
            if isinstance(copy, RationaleEncoder):
                copy.weighted = False  # only evaluation weights features

    @classmethod
    def paper(cls, model: str | None) -> LCRConfig:
        """The settings released for MoCo v2."""
        return LCRConfig(
            model=model or "resnet50", preset="paper", size=224, hidden=2048, projection=256, queue=65_536,
            momentum=0.999, temperature=0.2, optimizer="sgd", lr=0.03, weight_decay=1e-4, warmup=0.0, batch_size=128,
            epochs=100, crop_scale=0.2, clip=0.0, amp="off",
        )  # fmt: skip

    @classmethod
    def stored_encoder(cls, config: TrainConfig, checkpoint: dict[str, Any]) -> Backbone:
        """The encoder stored in a checkpoint, with its attention."""
        assert isinstance(config, LCRConfig)
        encoder = new_encoder(config, encoder_class(config))
        own = {k.removeprefix("encoder."): v for k, v in checkpoint["method"].items() if k.startswith("encoder.")}
        own |= {f"net.{name}": x for name, x in encoder_state(checkpoint).items()}  # the average, if there is one
        load_tensors(encoder, own, "The weights of the checkpoint")
        return encoder

    def views(self) -> "ViewSpec":
        """The views of MoCo v2 or of BYOL."""
        return byol_views(self.config) if self.config.base == "byol" else simclr_views(self.config)

    def contrast(self, batch: "Batch", count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The contrast, the final feature maps of view 1 [B, D, h, w], and the target over their positions [B, h, w].

        ``count``, from :func:`count_valid`, turns the gradient of the mean into that of each image's own loss.
        """
        maps = self.encoder.features(torch.cat(batch.views[: self.base.n_online_views]))
        loss = self.base(self.encoder.pool(maps), batch, self.queue)
        (slope,) = torch.autograd.grad(loss, maps, retain_graph=True)
        first = maps[: len(batch)]
        cam = grad_cam(first, slope[: len(batch)] * count)
        return loss, first, scale_to_unit(cam) if self.config.target == "scaled" else cam

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """The contrast and the rationale loss."""
        count = count_valid(batch.valid, self.group)
        contrast, maps, target = self.contrast(batch, count)
        divergence = kl_over_positions(target, self.encoder.attention(maps), self.config.rationale_temperature)
        rationale = mean_valid(divergence, batch.valid, count=count)
        images = count * rank_and_world(self.group)[1]
        loss = contrast + self.config.rationale_weight * images * rationale
        return {"loss": loss, "contrast": contrast.detach(), "rationale": rationale.detach()}

    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """View 1 as it is, and darkened where the target and the attention are small."""
        from fgfast.data.panels import Panel, in_rows, to_uint8

        with torch.enable_grad():
            _, maps, target = self.contrast(batch, count_valid(batch.valid, self.group))
            attention = self.encoder.attention(maps)
        panels = []
        for i, view in enumerate(batch.views[0][:8]):
            image = to_uint8(view, self.encoder.stats)
            panels.append(Panel(image, "view"))
            for light, caption in ((scale_to_unit(target)[i], "target"), (attention[i], "attention")):
                large = torch.nn.functional.interpolate(light.detach()[None, None], view.shape[1:], mode="bilinear")
                shade = 0.2 + 0.8 * large[0, 0, :, :, None].cpu().numpy()
                panels.append(Panel((image * shade).astype("uint8"), caption))
        return {"attention": in_rows(panels, 6)} | super().pictures(batch)


def encoder_class(config: LCRConfig) -> Callable[..., RationaleEncoder]:
    """The encoder with the options that are its own."""
    return partial(RationaleEncoder, channels=config.channels, weighted=config.pooling == "attention")


def grad_cam(maps: Tensor, gradient: Tensor) -> Tensor:
    """The positive part of the sum over channels of maps x gradient, float32 [B, h, w] from [B, D, h, w]; detached.

    Example:
        >>> grad_cam(torch.ones(1, 2, 1, 2), torch.tensor([[[[1.0, -1.0]], [[2.0, -2.0]]]])).tolist()
        [[[3.0, 0.0]]]
    """
    return (maps.detach().float() * gradient.detach().float()).sum(1).relu()


def kl_over_positions(target: Tensor, attention: Tensor, temperature: float) -> Tensor:
    """KL(softmax(target / T) || softmax(attention / T)) over the positions of maps [B, h, w]: [B].

    Example:
        >>> kl_over_positions(torch.zeros(1, 2, 2), torch.ones(1, 2, 2), 0.4).tolist()
        [0.0]
    """
    log_p, log_q = ((x.flatten(1) / temperature).log_softmax(1) for x in (target, attention))
    return (log_p.exp() * (log_p - log_q)).sum(1)
