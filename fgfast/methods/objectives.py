"""Contrastive objectives that methods build on: SimCLR, MoCo v2, SimSiam and BYOL, from pooled features to a loss.

An objective holds heads and momentum copies; the encoder, its features and the queue belong to the method. The same
objective can therefore be applied to images and to images decoded from their features. :class:`ObjectiveMethod` is the
method that does nothing else.
"""

from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgfast.ids import Ids
from fgfast.losses.over_ranks import mean_valid
from fgfast.methods.base import build_encoder
from fgfast.methods.chunked import ChunkedMethod, by_image, by_view
from fgfast.methods.simclr import nt_xent
from fgfast.models.heads import MLP, cosine_momentum, momentum_copy, update_momentum
from fgfast.models.statistics import KeyQueue
from fgfast.ops.contrast import contrastive_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fgfast.config import TrainConfig
    from fgfast.data.views import Batch
    from fgfast.methods.base import Progress
    from fgfast.models.backbone import Backbone


class Heads(Protocol):
    """The options that objectives read; not every one reads the temperature and the momentum."""

    hidden: int
    projection: int
    temperature: float
    momentum: float


class Base(nn.Module):
    """An objective on two views of each image.

    Attributes:
        n_online_views: number of views that go through the online encoder, from the first.
        passes: encoder passes per pair of views, those of the momentum encoder included.
        has_queue: whether it needs a queue of keys.
        group: process group over whose images the loss is computed, or None.
    """

    n_online_views = 2
    passes = 2
    has_queue = False
    group: "ProcessGroup | None" = None

    def forward(
        self, features: Tensor, batch: "Batch", queue: "KeyQueue | None" = None, targets: Tensor | None = None
    ) -> Tensor:
        """The loss of a batch of two views.

        Args:
            features: pooled online features [n_online_views x B, D], view by view.
            batch: the views, the indices of the images and which of them are valid.
            queue: further negatives if ``has_queue``; in training the new keys are pushed to it.
            targets: what :meth:`represent_targets` gives for the batch; None computes it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward().")

    def represent_targets(self, batch: "Batch") -> Tensor | None:
        """Pooled features [V B, D] of the momentum encoder, view by view; None for objectives without one."""
        return None

    def after_step(self, encoder: "Backbone", progress: "Progress") -> None:
        """Update the momentum copies, if there are any."""


class SimCLRBase(Base):
    """NT-Xent over the views of all images. Source: Chen et al., 2020 (arXiv 2002.05709)."""

    def __init__(self, encoder: "Backbone", config: Heads) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.projector = MLP((encoder.dim, config.hidden, config.projection))

    def forward(
        self, features: Tensor, batch: "Batch", queue: "KeyQueue | None" = None, targets: Tensor | None = None
    ) -> Tensor:
        """The mean over valid views."""
        return nt_xent(self.projector(features), batch, self.temperature, self.group)


class MoCoBase(Base):
    """View 1 is contrasted with the momentum key of view 2 and a queue of older keys (MoCo v2).

    The release shuffles batches among GPUs to keep BatchNorm from leaking information between queries and keys; here
    each encoder sees complete batches. The decay is constant. Source: Chen et al., 2020 (arXiv 2003.04297).

    Attributes:
        norm: norm of the projector's hidden layer.
    """

    n_online_views = 1
    has_queue = True
    norm = "batch"

    def __init__(self, encoder: "Backbone", config: Heads) -> None:
        super().__init__()
        self.temperature, self.momentum = config.temperature, config.momentum
        self.projector = MLP((encoder.dim, config.hidden, config.projection), self.norm)
        self.target, self.target_projector = momentum_copy(encoder), momentum_copy(self.projector)

    def represent_targets(self, batch: "Batch") -> Tensor:
        """Momentum features [B, D] of view 2."""
        return self.target(batch.views[1])

    def forward(
        self, features: Tensor, batch: "Batch", queue: "KeyQueue | None" = None, targets: Tensor | None = None
    ) -> Tensor:
        """InfoNCE in one direction."""
        assert queue is not None  # has_queue
        query = at_least_float32(self.projector(features))
        with torch.no_grad():
            targets = self.represent_targets(batch) if targets is None else targets
            key = at_least_float32(self.target_projector(targets))
        part, zero = torch.where(batch.valid, 0, -1), torch.zeros_like(batch.index)
        bank = queue.keys.clone()  # the backward pass reads it after the push
        loss = contrastive_loss(
            query, key, query_ids=Ids(batch.index, part, zero), key_ids=Ids(batch.index, part, zero + 1), bank=bank,
            negatives="same_image", temperature=self.temperature, reduction="mean_valid", group=self.group,
        )  # fmt: skip
        if self.training:
            queue.push(F.normalize(key, dim=1), batch.valid, self.group)
        return loss

    def after_step(self, encoder: "Backbone", progress: "Progress") -> None:
        """Update the momentum copies."""
        update_momentum(self.target, encoder, self.momentum)
        update_momentum(self.target_projector, self.projector, self.momentum)


class MoCoV2Base(MoCoBase):
    """:class:`MoCoBase` with the released projector, which has no norm."""

    norm = "none"


class SimSiamBase(Base):
    """Each view predicts the projection of the other, without gradient: loss = -(cos(p1, z2) + cos(p2, z1)) / 2.

    Source: Chen and He, 2021 (arXiv 2011.10566).
    """

    def __init__(self, encoder: "Backbone", config: Heads) -> None:
        super().__init__()
        hidden, out = config.hidden, config.projection
        self.projector = MLP((encoder.dim, hidden, hidden, out), bias=False, last_norm=True)
        self.predictor = MLP((out, max(1, hidden // 4), out))

    def forward(
        self, features: Tensor, batch: "Batch", queue: "KeyQueue | None" = None, targets: Tensor | None = None
    ) -> Tensor:
        """The mean over valid images."""
        z = self.projector(features)
        p1, p2 = self.predictor(z).chunk(2)
        z1, z2 = z.detach().chunk(2)
        return -mean_valid(cosine(p1, z2) + cosine(p2, z1), batch.valid, self.group) / 2


class BYOLBase(Base):
    """Each view predicts the momentum projection of the other: loss = 4 - 2 cos(p1, z2') - 2 cos(p2, z1').

    The decay rises from ``momentum`` to 1 as a cosine. Source: Grill et al., 2020 (arXiv 2006.07733).
    """

    passes = 4

    def __init__(self, encoder: "Backbone", config: Heads) -> None:
        super().__init__()
        self.momentum = config.momentum
        self.projector = MLP((encoder.dim, config.hidden, config.projection))
        self.predictor = MLP((config.projection, config.hidden, config.projection))
        self.target, self.target_projector = momentum_copy(encoder), momentum_copy(self.projector)

    def represent_targets(self, batch: "Batch") -> Tensor:
        """Momentum features [2 B, D] of both views."""
        return self.target(torch.cat(batch.views))

    def forward(
        self, features: Tensor, batch: "Batch", queue: "KeyQueue | None" = None, targets: Tensor | None = None
    ) -> Tensor:
        """The mean over valid images."""
        p1, p2 = self.predictor(self.projector(features)).chunk(2)
        with torch.no_grad():
            targets = self.represent_targets(batch) if targets is None else targets
            z1, z2 = self.target_projector(targets).chunk(2)
        return mean_valid(4 - 2 * cosine(p1, z2) - 2 * cosine(p2, z1), batch.valid, self.group)

    def after_step(self, encoder: "Backbone", progress: "Progress") -> None:
        """Update the momentum copies."""
        decay = cosine_momentum(self.momentum, progress.fraction)
        update_momentum(self.target, encoder, decay)
        update_momentum(self.target_projector, self.projector, decay)


BASES: dict[str, type[Base]] = {"simclr": SimCLRBase, "moco": MoCoBase, "simsiam": SimSiamBase, "byol": BYOLBase}


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosines [B] of rows [B, D], in float32 or float64."""
    return F.cosine_similarity(at_least_float32(x), at_least_float32(y), dim=1)


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or float64 if it is that.

    Example:
        >>> at_least_float32(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ObjectiveMethod(ChunkedMethod):
    """An objective on the pooled features of the encoder; a subclass whose objective needs a queue sets ``queue``.

    Args:
        config: the options.
        base: the objective.
        encoder: the encoder; None builds it from the options.
    """

    def __init__(self, config: "TrainConfig", base: type[Base], encoder: "Backbone | None" = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config) if encoder is None else encoder
        self.base = base(self.encoder, config)
        self.queue: KeyQueue | None = None
        self.passes_per_image = base.passes

    def set_group(self, group: "ProcessGroup | None") -> None:
        """Compute losses over the images of all ranks."""
        super().set_group(group)
        self.base.group = group

    def represent(self, batch: "Batch") -> Tensor:
        """Features [B, n_online_views, D]."""
        n_views = self.base.n_online_views
        return by_image(self.encoder(torch.cat(batch.views[:n_views])), n_views)

    def represent_targets(self, batch: "Batch") -> Tensor | tuple[()]:
        """Momentum features [B, V, D] of the views whose keys the objective takes, if it takes any."""
        targets = self.base.represent_targets(batch)
        return () if targets is None else by_image(targets, len(targets) // len(batch))

    def compare(self, online: Tensor, targets: Tensor | tuple[()], batch: "Batch") -> dict[str, Tensor]:
        """The loss of the objective."""
        keys = by_view(targets) if isinstance(targets, Tensor) else None
        return {"loss": self.base(by_view(online), batch, self.queue, keys)}

    def after_step(self, progress: "Progress") -> None:
        """Update the momentum copies."""
        self.base.after_step(self.encoder, progress)
