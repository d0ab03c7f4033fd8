"""Supervised training with the labels: an upper bound for methods that use none."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from torch import Tensor, nn

from fgfast.config import Range, TrainConfig
from fgfast.errors import UserError
from fgfast.losses.over_ranks import count_valid, mean_valid
from fgfast.methods.base import Method, build_encoder

if TYPE_CHECKING:
    from fgfast.data.views import Batch, ViewSpec


@dataclass
class SupervisedConfig(TrainConfig):
    """Options of supervised training."""

    takes_unlabelled: ClassVar[bool] = False

    n_classes: int = 0
    """Number of classes; 0 takes that of the data set."""
    smoothing: Annotated[float, Range(0, 0.99)] = 0.1
    """Label smoothing."""


class Supervised(Method):
    """Cross-entropy of a linear classifier on the pooled features, with the labels of the training split."""

    name = "supervised"
    adds_up = True
    Config = SupervisedConfig
    config: SupervisedConfig
    passes_per_image = 1

    def __init__(self, config: SupervisedConfig) -> None:
        super().__init__()
        self.config = config
        if config.n_classes < 1:
            from pathlib import Path

            from fgfast.data.layouts import open_images

            config.n_classes = len(open_images(Path(config.data)).classes)
        if config.n_classes < 2:
            raise UserError(f"{config.data} has {config.n_classes} class: supervised training needs two or more.")
        self.encoder = build_encoder(config)
        self.classifier = nn.Linear(self.encoder.dim, config.n_classes)

    def views(self) -> "ViewSpec":
        """One crop with flip and mild colour jitter."""
        from fgfast.data.views import Crop, ViewSpec

        return ViewSpec(
            crops=(Crop(size=self.config.size, scale=(self.config.crop_scale, 1.0), jitter=(0.2, 0.2, 0.2, 0.02)),)
        )

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """Cross-entropy over the valid images."""
        logits = self.classifier(self.encoder(batch.views[0])).float()
        losses = nn.functional.cross_entropy(
            logits, batch.target, label_smoothing=self.config.smoothing, reduction="none"
        )
        count = count_valid(batch.valid, self.group)
        correct = (logits.argmax(1) == batch.target).float()
        return {
            "loss": mean_valid(losses, batch.valid, count=count),
            "accuracy": mean_valid(correct, batch.valid, count=count),
        }
