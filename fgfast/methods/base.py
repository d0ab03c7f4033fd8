"""The base class of every method: views in, losses out, and the encoder that is evaluated."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fgfast.config import TrainConfig
from fgfast.errors import UserError
from fgfast.models.backbone import Backbone, parse_model_args
from fgfast.models.weights import encoder_state, load_encoder, load_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fgfast.data.imageset import ImageSet
    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec


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
        passes_to_prepare: encoder passes per image before each round.
        held_out: terms of ``forward`` that are also computed on held-out images, beside the online kNN.
        idle_parameters: whether some parameters get no gradient in some steps (distributed training looks for them).
        group: process group over which losses are computed, or None for this process only.
    """

    name: ClassVar[str]
    Config: ClassVar[type[TrainConfig]] = TrainConfig
    passes_per_image: float
    passes_to_prepare: float = 0
    held_out: ClassVar[tuple[str, ...]] = ()
    idle_parameters: ClassVar[bool] = False
    config: TrainConfig
    encoder: Backbone
    group: "ProcessGroup | None" = None

    @classmethod
    def paper(cls, model: str | None) -> TrainConfig:
        """The settings of ``--preset paper``: those released by the authors for ``model`` (None: their own choice)."""
        raise UserError(f"{cls.name} has no --preset paper: leave it out.")

    def views(self) -> "ViewSpec":
        """The views that the data pipeline delivers in each batch."""
        raise NotImplementedError(f"{type(self).__name__} does not implement views().")

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """Losses of a batch: "loss" is minimised, the other entries are only logged."""
        raise NotImplementedError(f"{type(self).__name__} does not implement forward().")

    def set_group(self, group: "ProcessGroup | None") -> None:
        """Compute losses over the images of all ranks of ``group``."""
        self.group = group

    def before_step(self, progress: Progress) -> None:
        """Prepare the next step, for training in stages; ``progress.step`` steps are done."""

    def after_step(self, progress: Progress) -> None:
        """Update what the optimiser does not: momentum encoders, queues, schedules."""

    @torch.no_grad()
    def scores(self, device: torch.device) -> dict[str, float]:
        """Scores that are logged with the online kNN: means of the terms in ``held_out``, as "held_out_NAME".

        They need no labels and are computed in evaluation mode on at most 4,000 images: the held-out ones, or the test
        split without ``--holdout``. The views are those of training, the same at every call.
        """
        from fgfast.data.loader import make_loader
        from fgfast.data.splits import scored_images

        config = self.config
        images = scored_images(config)
        if not self.held_out or not len(images):
            return {}
        images = images.subset(np.sort(np.random.default_rng(0).permutation(len(images))[:MAX_HELD_OUT]))
        loader = make_loader(
            images, self.views(), config.batch_size, shuffle=False, seed=config.seed, device=device,
            threads=config.threads, backend=config.loader,
        )  # fmt: skip
        sums, count = dict.fromkeys(self.held_out, 0.0), 0
        was_training = self.training
        self.eval()
        try:
            for batch in loader:
                valid = int(batch.valid.sum())
                terms = self(batch)
                sums = {name: total + valid * float(terms[name]) for name, total in sums.items()}
                count += valid
        finally:
            loader.close()
            self.train(was_training)
        return {f"held_out_{name}": total / max(1, count) for name, total in sums.items()}

    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """Figures for ``fgfast pictures``, as rows of panels per title: by default the views of up to 8 images."""
        from fgfast.data.panels import Panel, to_uint8

        rows = [
            [Panel(to_uint8(view[i]), f"view {v + 1}") for v, view in enumerate(batch.views)]
            for i in range(min(8, len(batch)))
        ]
        return {"views": rows}

    def check_training_set(self, images: "ImageSet") -> None:
        """Raise a UserError if the method cannot train on ``images``; called before anything is written."""

    def prepare(self, images: "ImageSet", run: Path, round_: int) -> Path | None:
        """Work before round ``round_`` of training, such as part discovery.

        Called first on the first rank, which writes to ``run``, then on the other ranks.

        Returns:
            The folder of the id maps that the views need, or None.
        """
        return None

    @classmethod
    def stored_encoder(cls, config: TrainConfig, checkpoint: dict[str, Any]) -> Backbone:
        """The encoder stored in a checkpoint of a run with ``config``."""
        args = parse_model_args(config.model_args)
        encoder = Backbone(config.model, size=config.size, args=args, grey=config.grey_input)
        load_tensors(encoder.net, encoder_state(checkpoint), "The weights of the checkpoint")
        return encoder


def build_encoder(config: TrainConfig) -> Backbone:
    """The backbone of a configuration, with the weights of ``--init`` loaded."""
    encoder = Backbone(
        config.model, size=config.size, args=parse_model_args(config.model_args), pretrained=config.init == "timm",
        grey=config.grey_input,
    )  # fmt: skip
    if config.init not in ("timm", "none"):
        load_encoder(encoder.net, Path(config.init))
    return encoder


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


METHODS = ("color", "jigsaw", "lodisc", "mocov3", "particle", "simclr", "srgan", "supervised", "synthpair")
