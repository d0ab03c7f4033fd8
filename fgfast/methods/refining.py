"""What follows from the origin of the initial weights: whether BatchNorm keeps its statistics, the encoder's rate."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fgfast.config import AUTO, TrainConfig, with_values
from fgfast.run import ENCODER, INIT, LAST, PREVIOUS, read_options

C = TypeVar("C", bound=TrainConfig)
PLAIN: dict[str, Any] = {"freeze_bn": "off", "encoder_rate": 1.0}
"""What auto stands for with random weights."""
PRETRAINED: dict[str, Any] = {"freeze_bn": "on", "encoder_rate": 0.1}
"""What auto stands for with pretrained weights: the statistics by the controlled runs in benchmarks/RESULTS.md, and a
rate which at the default --lr is between those tried there."""


def with_refinement(config: C, default: dict[str, Any] | None = None) -> C:
    """The configuration with ``freeze_bn`` and ``encoder_rate`` as given, and in place of auto what they stand for.

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
    missing = [name for name in PLAIN if getattr(config, name) == AUTO]
    if not missing:
        return config
    if default is None:
        default = _of_weights(config)
        if config.sync_bn or config.clean_stats:
            default = default | {"freeze_bn": "off"}
    return replace(config, **{name: default[name] for name in missing})


def encoder_rate(config: TrainConfig) -> float:
    """The learning rate of the encoder relative to that of its heads.

    Example:
        >>> encoder_rate(TrainConfig()), encoder_rate(TrainConfig(init="timm"))
        (1.0, 0.1)
    """
    rate = with_refinement(config).encoder_rate
    assert rate != AUTO
    return rate


def _of_weights(config: TrainConfig) -> dict[str, Any]:
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
    own = {name: value for name, value in values.items() if name in PLAIN and value != AUTO}
    stored = with_values(TrainConfig(), own, str(file))
    return PLAIN | {name: getattr(stored, name) for name in own}
