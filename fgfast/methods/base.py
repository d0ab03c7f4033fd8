"""The base class of every method: views in, losses out, and the encoder that is evaluated."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fgfast.config import TrainConfig
from fgfast.errors import UserError
from fgfast.methods.input_stats import input_stats
from fgfast.methods.refining import refinement
from fgfast.models.backbone import Backbone, parse_model_args
from fgfast.models.frozen import freeze_batch_norm
from fgfast.models.probe import evaluating
from fgfast.models.stages import hold_stages
from fgfast.models.weights import encoder_state, load_encoder, load_tensors
from fgfast.ranks import Ranks, gather, on_all, ranks_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fgfast.data.imageset import ImageSet
    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec


log = logging.getLogger("fgfast")

MAX_HELD_OUT = 4000  # images on which held-out scores are computed


@dataclass(frozen=True)
class Progress:
    """Steps done and steps of the complete run."""

    step: int
    total: int

    @property
    def fraction(self) -> float:
        """Fraction of the steps that are done, in [0, 1]."""
        return self.step / max(self.total, 1)


class Method(nn.Module):
    """Base of every method: holds the networks, specifies the views and computes the losses of a batch.

    Attributes:
        name: its name on the command line.
        Config: its options, a subclass of TrainConfig with flat fields.
        config: the options of this instance.
        encoder: the network that is evaluated and exported.
        passes_per_image: encoder passes per image and step, the unit in which runs are made equal: one is a forward
            pass over a view, with or without gradient; a larger image counts in proportion to its area.
        passes_to_prepare: encoder passes per image before each round; see :meth:`passes_before_round`.
        held_out: terms of ``forward`` that are also computed on held-out images, beside the online kNN.
        adds_up: whether every term of ``forward`` is a mean over images on their own, so that the parts of a batch can
            follow one another (``--accumulate``).
        shardable: whether the parameters may be divided among ranks (``--shard``): ``forward`` computes no gradients,
            and :meth:`prepare` reads no weights.
        group: process group over which losses are computed, or None for this process only.
        part: number of the part of a batch that ``forward`` gets, for the random numbers of a step; 0 is all of it.
        rng: source of the random numbers that are drawn for the images of all ranks at once, in the same state on
            every rank; None is PyTorch's own, for this process only.
    """

    name: ClassVar[str]
    Config: ClassVar[type[TrainConfig]] = TrainConfig
    passes_per_image: float
    passes_to_prepare: float = 0
    held_out: ClassVar[tuple[str, ...]] = ()
    adds_up: ClassVar[bool] = False
    shardable: bool = True
    config: TrainConfig
    encoder: Backbone
    group: "ProcessGroup | None" = None
    rng: torch.Generator | None = None
    part: int = 0

    @classmethod
    def paper(cls, model: str | None) -> TrainConfig:
        """The settings of ``--preset paper``: those released by the authors for ``model`` (None: their own choice)."""
        raise UserError(f"{cls.name} has no --preset paper: leave it out.")

    def views(self) -> "ViewSpec":
        """The views that the data pipeline delivers in each batch."""
        raise NotImplementedError(f"{type(self).__name__} does not implement views().")

    def normalised_views(self) -> "ViewSpec":
        """:meth:`views`, resized and normalised for the encoder: what loaders are given."""
        return self.views().with_color(refinement(self.config).color_strength).with_stats(self.encoder.stats)

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """Losses of a batch: "loss" is minimised, the other entries are only logged."""
        raise NotImplementedError(f"{type(self).__name__} does not implement forward().")

    def set_group(self, group: "ProcessGroup | None") -> None:
        """Compute losses over the images of all ranks of ``group``."""
        self.group = group

    def set_rng(self, rng: torch.Generator | None) -> None:
        """Draw the random numbers of the images of all ranks from ``rng``."""
        self.rng = rng

    def checkpoint_activations(self) -> None:
        """Let the encoder compute its activations again in the backward pass (``--grad-checkpoint``).

        Raises:
            UserError: the network cannot do this.
        """
        self.encoder.checkpoint_activations()

    def before_step(self, progress: Progress) -> None:
        """Prepare the next step, for training in stages; ``progress.step`` steps are done."""

    def after_step(self, progress: Progress) -> None:
        """Update what the optimiser does not: momentum encoders, queues, schedules."""

    @torch.no_grad()
    def scores(self, device: torch.device) -> dict[str, float]:
        """Scores that are logged with the online kNN: means of the terms in ``held_out``, as "held_out_NAME".

        They need no labels and are computed in evaluation mode on at most 4,000 images: the held-out ones, or the test
        split without ``--holdout``. The views are those of training, the same at every call. Called on all ranks at the
        same time, which share the images; none if the images cannot be read.
        """
        if not self.held_out:
            return {}
        names = [f"held_out_{name}" for name in self.held_out]
        c = self.config
        return self.mean_scores(names, self._score, c.batch_size, device, most=MAX_HELD_OUT, seed=c.seed)

    def _score(self, batch: "Batch") -> Tensor:
        """The terms in ``held_out`` for every valid image: the means of the batch."""
        terms = self(batch)
        return torch.stack([terms[name].float() for name in self.held_out]).expand(int(batch.valid.sum()), -1)

    def mean_scores(
        self, names: Sequence[str], score: "Callable[[Batch], Tensor]", batch_size: int, device: torch.device, *,
        most: int, seed: int,
    ) -> dict[str, float]:  # fmt: skip
        """Means of ``score`` over scored images, which the ranks share; the same numbers on every rank.

        Args:
            names: N names.
            score: maps a batch of images to scores [B, N] of the valid ones, alone in this process.
            batch_size: images per batch.
            device: device of the batches.
            most: largest number of images.
            seed: seed of the views.
        """
        from fgfast.data.loader import make_loader
        from fgfast.data.splits import scored_images

        config, ranks = self.config, ranks_of(self.group, device)

        def sum_up() -> tuple[list[float], int]:
            images = scored_images(config)
            if not len(images):
                return [0.0] * len(names), 0
            loader = make_loader(
                images.sample(most), self.normalised_views(), batch_size, shuffle=False, seed=seed, device=device,
                threads=config.threads, rank=ranks.rank, world=ranks.world, backend=config.loader, lenient=True,
            )  # fmt: skip
            sums, count = torch.zeros(len(names), dtype=torch.float64), 0
            try:
                for batch in loader:
                    if batch.valid.any():
                        rows = score(batch)
                        sums, count = sums + rows.double().sum(0).cpu(), count + len(rows)
            finally:
                loader.close()
            return sums.tolist(), count

        group, own = self.group, None
        self.set_group(None)  # a forward pass that waits for other ranks would hang if one of them fails
        try:
            with scoring(self, f"The online scores of {self.name} are left out", ranks):
                own = on_all(ranks, sum_up)
        finally:
            self.set_group(group)
        if own is None:
            return {}
        sums, counts = zip(*gather(ranks, own), strict=True)
        means = [sum(column) / max(1, sum(counts)) for column in zip(*sums, strict=True)]
        return dict(zip(names, means, strict=True)) if sum(counts) else {}

    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """Figures for ``fgfast pictures``, as rows of panels per title: by default the views of up to 8 images."""
        from fgfast.data.panels import Panel, to_uint8

        rows = [
            [Panel(to_uint8(view[i], self.encoder.stats), f"view {v + 1}") for v, view in enumerate(batch.views)]
            for i in range(min(8, len(batch)))
        ]
        return {"views": rows}

    def set_pictures(self, images: "ImageSet", run: Path) -> "dict[str, list[list[Panel]]]":
        """Further figures for ``fgfast pictures``, which need more images than a batch: by default none."""
        return {}

    def check_training_set(self, images: "ImageSet") -> None:
        """Raise a UserError if the method cannot train on ``images``; called before anything is written."""

    def prepare(self, images: "ImageSet", run: Path, round_: int) -> Path | None:
        """Work before round ``round_`` of training, such as part discovery.

        Called on all ranks at the same time: what writes to ``run`` goes through :func:`fgfast.ranks.on_first`.

        Returns:
            The folder of the id maps that the views need, or None.
        """
        return None

    def passes_before_round(self, n_images: int) -> float:
        """Encoder passes of :meth:`prepare` on ``n_images`` images."""
        return self.passes_to_prepare * n_images

    def figure_maps(self, images: "ImageSet", run: Path, scratch: Path) -> Path | None:
        """The folder of the id maps that figures of ``images`` need; writes to ``scratch``, never to ``run``."""
        return None

    @classmethod
    def stored_encoder(cls, config: TrainConfig, checkpoint: dict[str, Any]) -> Backbone:
        """The encoder stored in a checkpoint of a run with ``config``."""
        encoder = new_encoder(config)
        load_tensors(encoder.net, encoder_state(checkpoint), "The weights of the checkpoint")
        return encoder


@contextmanager
def scoring(net: nn.Module, what: str, ranks: Ranks) -> Iterator[None]:
    """Evaluation mode without gradients, for a score of a run in training.

    Data that cannot be read end the block but not the training, and are logged once in a process.

    Args:
        net: the network or method; afterwards each of its modules has its own mode again.
        what: start of the message.
        ranks: the processes that compute the score; the error must be raised on all of them.
    """
    try:
        with evaluating(net):
            yield
    except (UserError, OSError) as error:
        if ranks.first:
            _warn_once(what, str(error))


@cache
def _warn_once(what: str, reason: str) -> None:
    log.warning("%s: %s", what, reason)


def new_encoder(config: TrainConfig, kind: Callable[..., Backbone] = Backbone, *, pretrained: bool = False) -> Backbone:
    """The backbone of a configuration, of class ``kind``, with random weights or those of timm."""
    return kind(
        config.model, size=config.size, args=parse_model_args(config.model_args), pretrained=pretrained,
        grey=config.grey_input, stats=input_stats(config),
    )  # fmt: skip


def build_encoder(config: TrainConfig, kind: Callable[..., Backbone] = Backbone) -> Backbone:
    """The backbone of a configuration, of class ``kind``, with the weights of ``--init`` loaded."""
    encoder = new_encoder(config, kind, pretrained=config.init == "timm")
    if config.init not in ("timm", "none"):
        load_encoder(encoder.net, Path(config.init))
    hold_as_asked(encoder, config)
    return encoder


def hold_as_asked(encoder: Backbone, config: TrainConfig) -> None:
    """Hold the BatchNorm statistics and the stages of an encoder that ``--freeze-bn`` and ``--stages`` name."""
    if refinement(config).freeze_bn == "on":
        freeze_batch_norm(encoder.net)
    if config.stages != "all":
        hold_stages(encoder, config.stages)


def method_class(name: str) -> type[Method]:
    """The class of a method by its name.

    Raises:
        UserError: there is no method of that name.
    """
    import importlib

    if name not in METHODS:
        raise UserError(f"There is no method {name!r}: choose one of {', '.join(METHODS)}.")
    module = importlib.import_module(f"fgfast.methods.{name}")
    return next(
        value for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and getattr(value, "name", None) == name
    )  # fmt: skip


METHODS = (
    "byol", "color", "detcon", "dino", "jigsaw", "lcr", "lodisc", "mocov2", "mocov3", "particle", "simclr", "simsiam",
    "srgan", "supervised", "synthpair",
)  # fmt: skip
