"""What a method is: views in, losses out, an encoder that is evaluated, and images of what it sees."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from fgfast.config import TrainConfig
from fgfast.errors import UserError
from fgfast.models.backbone import Backbone, parse_model_args
from fgfast.models.weights import encoder_state, load_encoder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fgfast.data.imageset import ImageSet
    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec


MOST_HELD_OUT = 4000  # images that held-out scores look at


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step."""

    step: int  # steps done
    total: int  # steps in all

    @property
    def fraction(self) -> float:
        """Fraction of the steps that are done, in [0, 1]."""
        return self.step / max(self.total, 1)


class Method(nn.Module):
    """Base of every method.

    A method holds its networks, says which views it wants and turns a batch into a dictionary with a "loss".

    Attributes:
        name: what the command line calls it.
        Config: its options, a subclass of TrainConfig with flat fields.
        encoder: the network that is evaluated and exported.
        passes_per_image: encoder passes that an image costs in a step, the unit in which runs are made equal: one is a
            forward pass over a view, with or without gradient; a larger image counts by its area.
        passes_to_prepare: encoder passes that an image costs before each round.
        held_out: terms of ``forward`` that are also taken on held-out images, beside the online kNN.
        idle_parameters: some parameters get no gradient in some steps (ranks must then look for them).
        group: process group whose ranks share their columns, or None.
    """

    name: ClassVar[str]
    Config: ClassVar[type[TrainConfig]] = TrainConfig
    passes_per_image: float
    passes_to_prepare: float = 0
    held_out: ClassVar[tuple[str, ...]] = ()
    idle_parameters: ClassVar[bool] = False
    encoder: Backbone
    group: "ProcessGroup | None" = None

    @classmethod
    def paper(cls, model: str | None) -> TrainConfig:
        """The released settings of the authors for ``model`` (None: their own choice)."""
        raise UserError(f"{cls.name} has no --preset paper: leave it out.")

    def views(self) -> "ViewSpec":
        """What the data pipeline must deliver."""
        raise NotImplementedError(f"{type(self).__name__} does not say which views it wants.")

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """Losses of a batch: "loss" is minimised, the other entries are logged."""
        raise NotImplementedError(f"{type(self).__name__} has no forward pass.")

    def set_group(self, group: "ProcessGroup | None") -> None:
        """Let the ranks of ``group`` share their columns."""
        self.group = group

    def before_step(self, progress: Progress) -> None:
        """Choose what the next step does, where training has stages."""

    def after_step(self, progress: Progress) -> None:
        """Move what the optimiser does not: momentum encoders, queues, schedules."""

    @torch.no_grad()
    def scores(self, device: torch.device) -> dict[str, float]:
        """Scores on at most 4,000 held-out images, written beside the online kNN: means of the terms of ``held_out``.

        Each is called "held_out_NAME" and needs no label. The views are those of training, the same at every call;
        empty where nothing is held out.
        """
        from fgfast.data.loader import make_loader
        from fgfast.data.splits import scored_images

        config: TrainConfig = self.config  # type: ignore[assignment]  # every method has one of its own class
        test = scored_images(config)
        if not self.held_out or not len(test):
            return {}
        test = test.subset(np.sort(np.random.default_rng(0).permutation(len(test))[:MOST_HELD_OUT]))
        loader = make_loader(
            test, self.views(), config.batch_size, shuffle=False, seed=config.seed, device=device,
            threads=config.threads, backend=config.loader,
        )  # fmt: skip
        sums, count = dict.fromkeys(self.held_out, 0.0), 0
        was_training = self.training
        self.eval()
        try:
            for batch in loader:
                n = int(batch.valid.sum())
                out = self(batch)
                sums = {name: total + n * float(out[name]) for name, total in sums.items()}
                count += n
        finally:
            loader.close()
            self.train(was_training)
        return {f"held_out_{name}": total / max(1, count) for name, total in sums.items()}

    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """What the method sees, as rows of panels under a title: its views unless a method shows more."""
        from fgfast.data.panels import Panel, to_uint8

        rows = [
            [Panel(to_uint8(view[i]), f"view {v + 1}") for v, view in enumerate(batch.views)]
            for i in range(min(8, len(batch)))
        ]
        return {"views": rows}

    def check_training_set(self, images: "ImageSet") -> None:
        """Raise a UserError for images that the method cannot train on, before anything is written."""

    def prepare(self, images: "ImageSet", run: Path, round_: int) -> Path | None:
        """Work before the round ``round_`` of training, such as part discovery; returns a folder of id maps or None."""
        return None

    @classmethod
    def stored_encoder(cls, config: TrainConfig, checkpoint: dict[str, Any]) -> Backbone:
        """The encoder of a checkpoint of a run with ``config``."""
        args = parse_model_args(config.model_args)
        encoder = Backbone(config.model, size=config.size, args=args, grey=config.grey_input)
        tensors = encoder_state(checkpoint)
        encoder.net.load_state_dict({k: tensors[k] for k in encoder.net.state_dict()})
        return encoder


def build_encoder(config: TrainConfig) -> Backbone:
    """The backbone that a configuration asks for, its weights loaded."""
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
        UserError: there is no such method.
    """
    import importlib

    if name not in METHODS:
        raise UserError(f"There is no method {name!r}: choose one of {', '.join(METHODS)}.")
    module = importlib.import_module(f"fgfast.methods.{name}")
    found: Any = next(c for c in vars(module).values() if isinstance(c, type) and getattr(c, "name", None) == name)
    return found


METHODS = ("color", "jigsaw", "lodisc", "mocov3", "particle", "simclr", "srgan", "supervised", "synthpair")
