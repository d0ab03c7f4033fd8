"""LoDisc: MoCo v3 with local discrimination; local keys see only the patches that the momentum encoder attends to."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from torch import Tensor, nn

from fgfast.config import Count, Range, Weight
from fgfast.errors import UserError
from fgfast.losses.over_ranks import rank_and_world
from fgfast.methods.base import Progress
from fgfast.methods.mocov3 import MoCoV3, MoCoV3Config
from fgfast.models.probe import evaluating
from fgfast.ops.mask import PivotalMask, mask_images, pivotal_mask

if TYPE_CHECKING:
    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch


@dataclass
class LoDiscConfig(MoCoV3Config):
    """Options of LoDisc."""

    keep: Annotated[float, Range(0, 1, open=True)] = 0.3
    """Fraction of the patches that the local key sees."""
    strategy: Literal["topk", "sample", "block", "random"] = "topk"
    """Choice of the patches: the top k as in the paper, or a control (see fgfast.pivotal_mask)."""
    local_weight: Weight = 1.0
    """Weight of the local loss."""
    drop_tokens: bool = False
    """Drop the masked tokens of a ViT instead of setting their patches to zero: faster, and a different function."""
    project: bool = True
    """Contrast projections; otherwise the features themselves, as in the released training code."""
    ema_updates: Count = 1
    """Momentum updates per step (4 in the release)."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the settings released by the authors."""


class LoDisc(MoCoV3):
    """Global branch: MoCo v3. Local branch: the momentum encoder sees only the pivotal patches of each view.

    loss = C(q1, k2) + C(q2, k1) + local_weight x (C(q1, l2) + C(q2, l1)),

    q of the complete views, k = f'(x), l = f'(x masked), f' the momentum encoder and projector. The mask keeps the
    fraction ``keep`` of the patches with the largest product over layers of the attention of CLS, averaged over heads
    (a CNN: the norm of its final feature map); dropped patches are zero, the mean colour.

    Peculiarities of the release that are not the default, each with its switch: training bypasses the projector
    (``--no-project``); the momentum encoder is updated four times per step (``--ema-updates 4``); the patch embedding
    is trained although a flag is set to freeze it (``--no-freeze-patch-embed``). Its runs start from supervised
    ImageNet weights: give them by ``--init``, refined gently by default. Batch size and learning rate were not
    released: those of ``--preset paper`` are MoCo v3's for a ViT.

    Source: Shi, Wei, Nie, Huang, "LoDisc: Learning Global-Local Discriminative Features for Self-Supervised
    Fine-Grained Visual Recognition", 2024.
    """

    name = "lodisc"
    Config = LoDiscConfig
    config: LoDiscConfig

    def __init__(self, config: LoDiscConfig) -> None:
        super().__init__(config)
        if config.drop_tokens:
            self.encoder.check_dropping()
        if self.encoder.is_vit:
            self.encoder.check_attention()
        patches = self.encoder.map_side(config.size) ** 2
        if config.keep * patches < 1 - 1e-9:
            raise UserError(f"--keep is {config.keep} of {patches} patches: give at least {1 / patches:.4g}.")
        if not config.project:
            self.projector, self.target_projector = nn.Identity(), nn.Identity()  # type: ignore[assignment]
            if config.projection != self.encoder.dim:
                raise UserError(
                    f"With --no-project the predictor takes the features: give --projection {self.encoder.dim}."
                )
        self.passes_per_image = 4 + 2 * (config.keep if config.drop_tokens else 1)
        self.step, self.draws = 0, 0  # of training, and masks drawn in it: the seed of the next mask

    @classmethod
    def paper(cls, model: str | None) -> LoDiscConfig:
        """The released settings, for a ViT-B/16."""
        return LoDiscConfig(
            model=model or "vit_base_patch16_224", preset="paper", size=224, hidden=4096, projection=768, dropout=0.2,
            optimizer="adamw", lr=1.5e-4, weight_decay=0.5, warmup=0.0, batch_size=256, epochs=100, crop_scale=0.08,
            clip=0.0,
        )  # fmt: skip

    @torch.no_grad()
    def pivots(self, views: Tensor, *, strategy: str | None = None) -> tuple[Tensor, PivotalMask]:
        """Pooled momentum features [N, D] of complete views, and their pivotal masks with the masked images."""
        features, attention = self.target.attend(views)
        strategy = strategy or self.config.strategy
        images = None if self.config.drop_tokens else views
        seed = self._next_seed()
        if self.group is None or strategy not in ("sample", "random"):
            pivotal = pivotal_mask(attention, keep=self.config.keep, strategy=strategy, seed=seed, images=images)
        else:
            pivotal = self._joined_pivots(attention, strategy, seed)
            if images is not None:
                pivotal = pivotal._replace(images=mask_images(images, pivotal.mask))
        return self.target.pool(features), pivotal

    def _next_seed(self) -> int:
        """A seed on the host, the same on every rank, of the run, the step and the draws in it: no device is asked."""
        key = f"lodisc {self.config.seed} {self.step} {self.draws}"
        self.draws += 1
        return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1

    def _joined_pivots(self, attention: Tensor, strategy: str, seed: int) -> PivotalMask:
        """Masks of two views [L, 2 B, heads, P], drawn as for the joined batch, of which each rank knows its images."""
        rank, world = rank_and_world(self.group)
        views = attention.unflatten(1, (2, -1))
        joined = views.new_ones(*views.shape[:2], views.shape[2] * world, *views.shape[3:])
        joined[:, :, rank::world] = views
        drawn = pivotal_mask(joined.flatten(1, 2), keep=self.config.keep, strategy=strategy, seed=seed)
        mask, index = (x.unflatten(0, (2, -1))[:, rank::world].flatten(0, 1) for x in (drawn.mask, drawn.index))
        return PivotalMask(mask, index, None)

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """Global and local contrast of both views."""
        q1, q2 = self.queries(self.represent(batch))
        views = torch.cat(batch.views)
        with torch.no_grad():
            features, pivotal = self.pivots(views)
            if pivotal.images is None:
                local_features = self.target.pool(self.target.kept_features(views, pivotal.index))
            else:
                local_features = self.target(pivotal.images)
            k1, k2 = self.target_projector(features).chunk(2)
            l1, l2 = self.target_projector(local_features).chunk(2)
        global_ = self.contrast(q1, k2, batch) + self.contrast(q2, k1, batch)
        local = self.contrast(q1, l2, batch) + self.contrast(q2, l1, batch)
        loss = global_ + self.config.local_weight * local
        return {"loss": loss, "global": global_.detach(), "local": local.detach()}

    def before_step(self, progress: Progress) -> None:
        """Masks of a step are drawn from its number."""
        self.step, self.draws = progress.step, 0
        super().before_step(progress)

    def after_step(self, progress: Progress) -> None:
        """Update the momentum copies ``ema_updates`` times."""
        for _ in range(self.config.ema_updates):
            super().after_step(progress)

    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """Images beside the patches that each strategy keeps."""
        from fgfast.data.panels import Panel, to_uint8
        from fgfast.ops.mask import STRATEGIES

        shown, stats = (batch.views[0] if batch.whole is None else batch.whole)[:8], self.encoder.stats
        rows = [[Panel(to_uint8(x, stats), "image")] for x in shown]
        with evaluating(self.target):
            for strategy in STRATEGIES:
                _, pivotal = self.pivots(shown, strategy=strategy)
                for row, kept in zip(rows, mask_images(shown, pivotal.mask), strict=True):
                    row.append(Panel(to_uint8(kept, stats), strategy))
        return {"kept": rows} | super().pictures(batch)
