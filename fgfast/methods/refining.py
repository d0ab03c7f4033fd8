"""What follows from the origin of the initial weights: how gently the encoder learns, and the colours of the views."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fgfast.config import AUTO, TrainConfig, with_values
from fgfast.run import ENCODER, INIT, LAST, PREVIOUS, read_options

C = TypeVar("C", bound=TrainConfig)


class Refinement(NamedTuple):
    """Options that are auto by default, by the names that they have in a configuration."""

    head_warmup: float
    encoder_rate: float
    freeze_bn: str
    color_strength: float


PLAIN = Refinement(head_warmup=0.0, encoder_rate=1.0, freeze_bn="off", color_strength=1.0)
"""What auto stands for with random weights."""
PRETRAINED = Refinement(head_warmup=0.3, encoder_rate=0.05, freeze_bn="on", color_strength=0.25)
"""What auto stands for with pretrained weights; the runs that chose it are in benchmarks/RESULTS.md."""


def with_refinement(config: C, default: Refinement | None = None) -> C:
    """The configuration with the options of :class:`Refinement` as given, and in place of auto what it stands for.

    Weights of timm or of a file are pretrained; those of a run are trained further as the run was. Statistics that are
    computed by ``sync_bn`` or ``clean_stats`` are not kept, and ``--preset paper`` trains all weights like random ones.

    Args:
        config: the options.
        default: what auto stands for; by default it follows the initial weights.

    Raises:
        UserError: config.toml of the run that ``init`` names cannot be read.

    Example:
        >>> config = with_refinement(TrainConfig(init="timm", encoder_rate=0.5))
        >>> config.freeze_bn, config.encoder_rate
        ('on', 0.5)
    """
    missing = [name for name in Refinement._fields if getattr(config, name) == AUTO]
    if not missing:
        return config
    if default is None:
        default = _of_weights(config)
        if config.sync_bn or config.clean_stats:
            default = default._replace(freeze_bn="off")
    return replace(config, **{name: getattr(default, name) for name in missing})


def refinement(config: TrainConfig) -> Refinement:
    """The options of a configuration, in place of auto what it stands for.

    Example:
        >>> refinement(TrainConfig()).encoder_rate, refinement(TrainConfig(init="timm")).encoder_rate
        (1.0, 0.05)
    """
    resolved: Any = with_refinement(config)
    return Refinement(*(getattr(resolved, name) for name in Refinement._fields))


def _of_weights(config: TrainConfig) -> Refinement:
    if config.init == "none" or getattr(config, "preset", "") == "paper":
        return PLAIN
    path = Path(config.init)
    run = path.parent if path.name in (ENCODER, INIT, LAST, PREVIOUS) and path.is_file() else path
    file = run / "config.toml"
    if config.init == "timm" or not file.is_file():
        return PRETRAINED
    method, values = read_options(run)
    if not method:  # a file of another program
        return PRETRAINED
    own = {name: value for name, value in values.items() if name in Refinement._fields and value != AUTO}
    stored = with_values(TrainConfig(), own, str(file))
    return PLAIN._replace(**{name: getattr(stored, name) for name in own})
