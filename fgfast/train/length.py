"""The length of a run in steps, from its epochs or its budget of encoder passes."""

from dataclasses import dataclass

from fgfast.config import TrainConfig
from fgfast.errors import UserError
from fgfast.methods.base import Method


def rounds_of(config: TrainConfig) -> int:
    """Number of rounds of a run."""
    return max(1, getattr(config, "rounds", 1))


@dataclass(frozen=True)
class Length:
    """The length of runs of a method on some images.

    Args:
        method: the method with its configuration.
        n_images: number of images that can be read.
        world: number of ranks.
    """

    method: Method
    n_images: int
    world: int

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return -(-self.n_images // (self.method.config.batch_size * self.world))

    @property
    def total(self) -> int:
        """Steps of the complete run."""
        return self.of(self.method.config)

    def of(self, config: TrainConfig) -> int:
        """Steps of the complete run with the length of another configuration.

        Raises:
            UserError: its budget of passes allows no step.
        """
        if not config.passes:
            return config.epochs * self.per_epoch
        preparation = rounds_of(config) * self.method.passes_before_round(self.n_images)
        steps = int((config.passes - preparation) / (self.method.passes_per_image * config.batch_size * self.world))
        if steps < 1:
            raise UserError(f"--passes {config.passes} does not allow one step: give more.")
        return steps
