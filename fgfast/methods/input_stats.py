"""The input statistics of a configuration: as given, or those that its initial weights were trained with."""

from pathlib import Path

from fgfast.config import AUTO, TrainConfig
from fgfast.data.normalise import IMAGENET, InputStats
from fgfast.models.backbone import parse_model_args
from fgfast.models.input_stats import stats_from_texts, stats_of_file, stats_of_timm


def input_stats(config: TrainConfig) -> InputStats:
    """The statistics of a configuration; those that are not given follow the weights of ``init``.

    Raises:
        UserError: one does not have its form, or the weights cannot be read.

    Example:
        >>> input_stats(TrainConfig(model="tf_efficientnet_lite0", init="timm", std="1,1,1"))
        InputStats(mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0), interpolation='bicubic')
    """
    follows = AUTO in (config.mean, config.std, config.interpolation)
    return stats_from_texts(vars(config), "--", stats_of_weights(config)[0] if follows else IMAGENET)


def stats_of_weights(config: TrainConfig) -> tuple[InputStats, str]:
    """The statistics that the initial weights were trained with, and a clause that says why.

    In this order: what a file or a run folder says, what timm says of the network, and ImageNet's (random weights).

    Raises:
        UserError: the file cannot be read.
    """
    default = IMAGENET, "no others are known"
    if config.init == "none":
        return default
    if config.init != "timm" and (found := stats_of_file(Path(config.init))) is not None:
        return found
    tag = parse_model_args(config.model_args).get("pretrained_cfg")  # timm's other way to name weights
    name = f"{config.model.partition('.')[0]}.{tag}" if isinstance(tag, str) else config.model
    stats, why = stats_of_timm(name) or default
    return stats, why if config.init == "timm" else f"{config.init} names none and {why}"
