"""Contrast of images that are decoded from features before and after unimportant dimensions are perturbed."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast.config import Count, Fraction, Natural, Positive, Range, TrainConfig, Weight
from fgfast.errors import UserError
from fgfast.losses.over_ranks import count_valid, draw_joined, join_rows, mean_valid, rank_and_world
from fgfast.methods.base import Method, Progress, build_encoder
from fgfast.methods.objectives import BASES
from fgfast.methods.simclr import simclr_views
from fgfast.models.decoder import Decoder
from fgfast.models.statistics import KeyQueue, RunningVariance, freeze_bn_stats
from fgfast.ops.perturb import Perturbed, perturb, smallest_mask
from fgfast.reference.draws import philox

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec


@dataclass
class SynthPairConfig(TrainConfig):
    """Options of contrast of synthesised pairs."""

    base: Literal["simclr", "moco", "simsiam", "byol"] = "simclr"
    """The contrastive objective that it builds on."""
    temperature: Positive = 0.2
    """Temperature of the contrast (SimCLR, MoCo)."""
    hidden: Count = 512
    """Width of the hidden layers of the heads."""
    projection: Count = 128
    """Width of the projection."""
    momentum: Fraction = 0.99
    """Decay of the momentum encoder: constant (MoCo), or its start, which rises to 1 as a cosine (BYOL)."""
    queue: Count = 512
    """Length of the queues of keys (MoCo)."""
    criterion: Literal["both", "variance", "gradcam", "random"] = "both"
    """Criterion for unimportant dimensions: low variance, low Grad-CAM importance, both, or random (a control)."""
    combine: Literal["union", "intersection"] = "union"
    """How --criterion both combines the two sets of dimensions."""
    importance: Literal["absolute", "positive"] = "absolute"
    """Grad-CAM importance: |w r|, or max(w r, 0)."""
    p_v: Fraction = 0.3
    """Fraction of the dimensions that are unimportant by their variance."""
    p_g: Fraction = 0.3
    """Fraction of the dimensions of each image that are unimportant by Grad-CAM (or at random)."""
    decay: Annotated[float, Range(0, 0.9999)] = 0.99
    """Decay of the running variance."""
    strategy: Literal["noise", "swap", "zero"] = "noise"
    """How a dimension is perturbed: noise of its standard deviation, the value of another image, or zero."""
    strength: Weight = 1.0
    """Strength of the perturbation, lambda; 0 changes nothing."""
    alpha: Weight = 0.05
    """Weight of the reconstruction loss."""
    nu: Weight = 0.2
    """Weight of the contrast of synthesised pairs."""
    synth_warmup: Fraction = 0.15
    """Fraction of the steps before synthesised pairs are used."""
    synth_share: Annotated[float, Range(0, 1, open=True)] = 1.0
    """Fraction of the batch from which pairs are synthesised."""
    synth_size: Natural = 0
    """Side to which decoded images are resized before they are encoded; 0 keeps --size."""
    both_views: bool = False
    """Reconstruct the second view too, if the objective encodes both; doubles the time of the decoder."""
    stop_gradient: bool = False
    """Train only the decoder by the reconstruction loss, not the encoder."""
    latent: Count = 128
    """Width of the code of the decoder."""
    decoder_width: Natural = 0
    """Channels of the decoder at the resolution of the encoder; 0 takes those of the encoder, at most 512."""
    decoder_depth: Count = 1
    """Residual blocks per stage of the decoder."""


MAX_ENERGY = 0.5  # largest fraction of the energy of a feature vector that may be perturbed


class SynthPair(Method):
    r"""A contrastive objective, a decoder, and the same objective on pairs of images made by the decoder.

    .. math:: L = L_C + \alpha L_R + \nu L_{Cp}, \quad L_R = \|D(r) - x\|^2, \quad
              L_{Cp} = \text{contrast of } D(r) \text{ with } D(r'), \quad r' = r + M \lambda \|r\| \sigma \epsilon,

    r the pooled features of the view x. The mask M holds the dimensions of low variance over the data (running, of
    r / ||r||) and, in each image, those of least Grad-CAM importance |w r|, w the mean over positions of the gradient
    of L_C; together at most half of the energy of r. The decoded images get no gradient: L_Cp trains only the encoder,
    to be invariant to the perturbation. nu is 0 until the decoder has learned to reconstruct (``synth_warmup``).

    This is a re-creation: the code, settings and tables of the paper are not public. The paper gives the two criteria,
    the three losses, and that it builds on objectives such as MoCo v2 and SimSiam. Chosen here: all numbers; the
    running variance; the first-order gradient as Grad-CAM weight, and its absolute value (for a loss either sign
    matters); the limit on the energy; noise of the standard deviation of the dimension (of the mean one for dimensions
    of low variance, where it would not be visible); the group norms of the decoder (two equal vectors give the same
    image); pairs made from the first view, only flipped at random, with a separate queue and without effect on the
    running statistics of the encoder.

    ``passes_per_image`` includes the encoder passes over decoded images after the warm-up, by their number and area;
    the decoder is not counted.

    Source: after Wang, Liu, Weston, Tian, Li, "On Learning Discriminative Features from Synthesized Data for
    Self-Supervised Fine-Grained Visual Recognition", ECCV 2024.
    """

    name = "synthpair"
    shardable = False
    Config = SynthPairConfig
    config: SynthPairConfig

    def __init__(self, config: SynthPairConfig) -> None:
        super().__init__()
        self.config = c = config
        if c.synth_size and not 16 <= c.synth_size <= c.size:
            raise UserError(f"--synth-size is {c.synth_size}: give 0, or 16 to --size {c.size}.")
        self.encoder = build_encoder(c)
        if self.encoder.dim != self.encoder.map_dim:
            raise UserError(f"{c.model} widens its feature map before it is pooled: choose another --model.")
        self.base = BASES[c.base](self.encoder, c)
        self.queues = torch.nn.ModuleList(KeyQueue(c.queue, c.projection) for _ in range(2 * self.base.has_queue))
        self.decoder = Decoder(
            self.encoder.dim, c.size, self.encoder.map_side(c.size), c.latent, c.decoder_width, c.decoder_depth
        )
        self.variance = RunningVariance(self.encoder.dim, c.decay)
        area = ((c.synth_size or c.size) / c.size) ** 2
        pairs = c.synth_share * area * (1 - c.synth_warmup) if c.nu else 0.0
        self.passes_per_image = self.base.passes * (1 + pairs)
        self.progress = Progress(0, 1)

    def get_extra_state(self) -> dict[str, int]:
        """The step, on which warm-up and noise depend; stored in checkpoints."""
        return {"step": self.progress.step, "total": self.progress.total}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Restore the step from a checkpoint."""
        self.progress = Progress(state["step"], state["total"])

    def set_group(self, group: "ProcessGroup | None") -> None:
        """Compute losses and statistics over the images of all ranks."""
        super().set_group(group)
        self.base.group = group

    def views(self) -> "ViewSpec":
        """The views of SimCLR, which MoCo v2 uses too."""
        return simclr_views(self.config)

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """L_C + alpha L_R, and after the warm-up nu L_Cp."""
        c = self.config
        x = torch.cat(batch.views[: self.base.n_online_views])  # [V B, 3, S, S]
        valid = batch.valid.repeat(self.base.n_online_views)
        maps = self.encoder.features(x)
        r = self.encoder.pool(maps)  # [V B, D]
        contrast = self.base(r, batch, self.queue(0))
        self.variance.update(r, valid, self.group)
        n_decoded = len(x) if c.both_views else len(batch)
        decoded = self.decoder(r[:n_decoded].detach() if c.stop_gradient else r[:n_decoded]).float()
        error = (decoded - x[:n_decoded]).square().mean((1, 2, 3))
        count = count_valid(batch.valid, self.group)
        reconstruction = mean_valid(error, valid[:n_decoded], count=count * (n_decoded // len(batch)))
        out = {"contrast": contrast.detach(), "reconstruction": reconstruction.detach()}
        loss = contrast + c.alpha * reconstruction
        if c.nu and self.progress.fraction >= c.synth_warmup:
            first, total = self._first_images(batch)
            n = len(first)
            perturbed = self.perturb_features(r[:n], maps, contrast, total)
            with torch.no_grad():
                decoded_again = self.decoder(perturbed.features).float()
            pair = self.contrast_pair(decoded[:n].detach(), decoded_again, first)
            loss = loss + c.nu * pair
            changed = mean_valid(perturbed.mask.float().mean(1), first.valid, self.group)
            out |= {"pair": pair.detach(), "changed": changed}
        return {"loss": loss, **out}

    def _first_images(self, batch: "Batch") -> tuple["Batch", int]:
        """The images of this rank from which pairs are synthesised, and their number on all ranks.

        They are the first ones of the joined batch. Every rank has as many, at least two for batch norms: those beyond
        that number are not valid.
        """
        from fgfast.data.views import Batch

        rank, world = rank_and_world(self.group)
        joined = len(batch) * world
        total = min(joined, max(2, round(self.config.synth_share * joined)))
        n = min(len(batch), max(2, -(-total // world)))
        counted = torch.arange(n, device=batch.valid.device) * world + rank < total
        first = Batch(target=batch.target[:n], index=batch.index[:n], valid=batch.valid[:n] & counted)
        return first, total

    def perturb_features(self, r: Tensor, maps: Tensor, contrast: Tensor, total: int | None = None) -> Perturbed:
        """Perturb the dimensions of pooled features that matter least to the contrast.

        With a group the first ``total`` images of the joined batch are perturbed, as one process would do it.

        Args:
            r: features of the first n images, [n, D].
            maps: feature maps of the encoder from which they were pooled, of n or more images.
            contrast: the loss; its graph is retained.
            total: number of images of all ranks that are perturbed; None takes all.
        """
        c, dim = self.config, r.shape[1]
        rank, world = rank_and_world(self.group)
        joined = join_rows(r.float(), self.group)
        features = joined[:total]
        variance = self.variance.variance
        low = smallest_mask(variance[None], int(c.p_v * dim + 1e-9))[0]
        std = variance.sqrt()
        std = torch.where(low, std.mean(), std)
        gradient, importance = None, "given"
        if c.criterion == "random":
            gradient = philox(self._seed(1), len(features), dim, r.device)
        elif c.criterion != "variance":
            (slope,) = torch.autograd.grad(contrast, maps, retain_graph=True)
            positions = (2, 3) if slope.dim() == 4 else (1,)
            gradient = join_rows(slope[: len(r)].float().mean(positions), self.group)[:total]
            importance = c.importance
        changed, mask = perturb(
            features, gradient, low_variance=low if c.criterion in ("variance", "both") else None, std=std,
            fraction=c.p_g, importance=importance, combine=c.combine, strategy=c.strategy, strength=c.strength,
            budget=MAX_ENERGY, seed=self._seed(0),
        )  # fmt: skip
        rest = joined[len(features) :]
        changed, mask = torch.cat([changed, rest]), torch.cat([mask, torch.zeros_like(rest, dtype=torch.bool)])
        return Perturbed(changed[rank::world], mask[rank::world])

    def contrast_pair(self, decoded: Tensor, decoded_again: Tensor, batch: "Batch") -> Tensor:
        """L_Cp of the first images of a batch, decoded from their features and from the perturbed ones."""
        from fgfast.data.views import Batch

        n, side = len(decoded), self.config.synth_size
        coins = draw_joined(lambda m: philox(self._seed(2), 2, m, decoded.device).T, n, self.group) < 0.5
        views = [
            torch.where(coin[:, None, None, None], y.flip(3), y)
            for y, coin in zip((decoded, decoded_again), coins.unbind(1), strict=True)
        ]
        if side:
            views = [F.interpolate(y, (side, side), mode="bilinear", antialias=True) for y in views]
        pairs = Batch(views=views, target=batch.target[:n], index=batch.index[:n], valid=batch.valid[:n])
        with freeze_bn_stats(self.encoder, self.base):
            r = self.encoder(torch.cat(views[: self.base.n_online_views]))
            return self.base(r, pairs, self.queue(1))

    def queue(self, number: int) -> KeyQueue | None:
        """The queue of views (0) or of decoded images (1); None for objectives without a queue."""
        queue = self.queues[number] if self.base.has_queue else None
        assert queue is None or isinstance(queue, KeyQueue)
        return queue

    def _seed(self, stream: int) -> int:
        """A seed for this step: with counter-based random numbers a resumed run repeats the same draws."""
        return (self.config.seed % 2**16) << 46 | stream << 44 | self.progress.step

    def after_step(self, progress: Progress) -> None:
        """Update the momentum copies and the step."""
        self.base.after_step(self.encoder, progress)
        self.progress = progress

    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """Views beside the images decoded from their features and from the perturbed features."""
        from fgfast.data.panels import Panel, in_rows, to_uint8

        x = torch.cat(batch.views[: self.base.n_online_views])
        with torch.enable_grad():
            maps = self.encoder.features(x)
            r = self.encoder.pool(maps)
            perturbed = self.perturb_features(r[: len(batch)], maps, self.base(r, batch, self.queue(0)))
        with torch.no_grad():
            decoded, decoded_again = self.decoder(r.float()), self.decoder(perturbed.features)
        panels, stats = [], self.encoder.stats
        for i in range(min(8, len(batch))):
            panels += [
                Panel(to_uint8(x[i], stats), "view"),
                Panel(to_uint8(decoded[i], stats), "decoded"),
                Panel(to_uint8(decoded_again[i], stats), f"decoded, {perturbed.mask[i].float().mean():.0%} perturbed"),
            ]
        return {"decoded": in_rows(panels, 6)} | super().pictures(batch)
