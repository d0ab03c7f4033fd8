"""What follows from the origin of the initial weights: whether BatchNorm keeps its statistics, the encoder's rate."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fgfast.config import AUTO, TrainConfig
from fgfast.run import has_checkpoint, read_options

C = TypeVar("C", bound=TrainConfig)
REFINED: dict[str, Any] = {"freeze_bn": "on", "encoder_rate": 0.1}
"""What auto stands for where the initial weights are pretrained; chosen by the trials in benchmarks/RESULTS.md."""
PLAIN: dict[str, Any] = {"freeze_bn": "off", "encoder_rate": 1.0}
"""What auto stands for elsewhere."""


def with_refinement(config: C, default: dict[str, Any] | None = None) -> C:
    """The configuration with ``freeze_bn`` and ``encoder_rate`` as given, and in place of auto what they stand for.

    Weights of timm or of a file are pretrained; those of a run are if this run was started from such weights and kept
    their statistics. Statistics that are computed by ``sync_bn`` or ``clean_stats`` are not kept.

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
        default = REFINED if _pretrained(config) else PLAIN
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
    return 1.0 if rate == AUTO else rate


def _pretrained(config: TrainConfig) -> bool:
    """Whether the initial weights are pretrained; ``--preset paper`` trains them as its authors do."""
    if config.init == "none" or getattr(config, "preset", "") == "paper":
        return False
    path = Path(config.init)
    run = path if path.is_dir() else path.parent
    if config.init == "timm" or not (has_checkpoint(run) and (run / "config.toml").is_file()):
        return True
    return read_options(run)[1].get("freeze_bn") in ("on", True)
