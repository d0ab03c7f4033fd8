"""The input statistics that weights were trained with, from timm and from files of weights."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgfast.config import AUTO, Range, channel_values
from fgfast.data.normalise import IMAGENET, IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS, InputStats
from fgfast.errors import UserError
from fgfast.formats import read_json
from fgfast.models.checkpoints import inspect_checkpoint, is_run_checkpoint
from fgfast.models.matching import flatten
from fgfast.models.weights import HUB_FILES, weights_file

ENTRY = "input"
"""Entry of a checkpoint with the texts of its statistics."""
# Self-supervised methods whose releases normalise with ImageNet's statistics, whatever timm's weights want
_RELEASES = re.compile(
    r"\b(encoder_q|base_encoder|online_(network|encoder)|(teacher|student)(_backbone)?|query_backbone"
    r"|momentum_(backbone|encoder)|(backbone|encoder)_momentum|_feature_blocks)\."
)
_TORCHVISION_VIT = re.compile(r"\bencoder\.layers\.encoder_layer_\d+\.")  # timm's ViTs of the same shapes want 0.5


def stats_from_texts(texts: Mapping[str, Any], source: str, default: InputStats = IMAGENET) -> InputStats:
    """The statistics that :meth:`InputStats.texts` gives, each taken from ``default`` if it is missing or "auto".

    Args:
        texts: "mean", "std" and "interpolation".
        source: where they come from, with a space or "--" behind it, for the message.
        default: the others.

    Raises:
        UserError: one does not have its form or is out of range.

    Example:
        >>> stats_from_texts({"mean": "0.5,0.5,0.5"}, "--").std
        (0.229, 0.224, 0.225)
    """
    mean = channel_values(f"{source}mean", str(texts.get("mean", AUTO)), Range(0, 1)) or default.mean
    std = channel_values(f"{source}std", str(texts.get("std", AUTO)), Range(0, open=True)) or default.std
    interpolation = texts.get("interpolation", AUTO)
    interpolation = default.interpolation if interpolation == AUTO else interpolation
    if interpolation not in INTERPOLATIONS:
        raise UserError(f"{source}interpolation is {interpolation!r}: choose one of {', '.join(INTERPOLATIONS)}.")
    return InputStats(mean, std, interpolation)


def stats_of_timm(name: str) -> tuple[InputStats, str] | None:
    """The statistics of timm's weights of a network, and a clause that says so; None if timm lacks the network.

    Example:
        >>> stats_of_timm("tf_efficientnet_lite0")[0].mean
        (0.5, 0.5, 0.5)
    """
    import timm

    config = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name) else None
    if config is None:
        return None
    whose = f"timm's {config.architecture}{'.' if config.tag else ''}{config.tag or ''}"
    return _stats(config.mean, config.std, config.interpolation, whose), f"{whose} has them"


def stats_of_file(path: Path) -> tuple[InputStats, str] | None:
    """The statistics that weights in a file or folder name or imply, and a clause that says why; or None.

    Exports and checkpoints of fgfast name them; those of versions that did not used ImageNet's. Releases of MoCo,
    DINO, DetCon, BYOL and VISSL, lightly and solo-learn by default, and torchvision's ViTs used ImageNet's mean and
    deviation. Beside weights of Hugging Face, the description is read.

    Raises:
        UserError: the file cannot be read, or the statistics in it are not of their form.
    """
    file = weights_file(path)
    content, texts = inspect_checkpoint(file)
    of_run = is_run_checkpoint(content)
    if of_run and isinstance(content.get(ENTRY), Mapping):
        texts = content[ENTRY]
    if "mean" in texts and (of_run or "timm_model" in texts):
        return stats_from_texts(texts, f"In {file} "), f"{file} names them"
    if of_run or "timm_model" in texts:
        return IMAGENET, f"{file} is of a version of fgfast that used them for every network"
    if file.name in HUB_FILES and (found := _described(file.parent)):
        return found
    names = flatten(content)
    if any(map(_RELEASES.search, names)):
        return IMAGENET._replace(interpolation="bicubic"), f"releases such as {file} used them"
    if any(map(_TORCHVISION_VIT.search, names)):
        return IMAGENET, f"torchvision's ViTs, such as {file}, used them"
    return None


def _stats(mean: Any, std: Any, interpolation: Any, source: str) -> InputStats:
    """Statistics from a description; of other interpolations bicubic is the nearest."""
    interpolation = interpolation if interpolation in INTERPOLATIONS else "bicubic"
    try:
        return InputStats(tuple(mean), tuple(std), interpolation).check()
    except (TypeError, ValueError) as error:
        reason = str(error).partition(":")[0]
        raise UserError(f"The input statistics of {source} cannot be used ({reason}): give --mean and --std.") from None


def _described(folder: Path) -> tuple[InputStats, str] | None:
    """The statistics in a description by timm or transformers, if one is there."""
    own, theirs = folder / "config.json", folder / "preprocessor_config.json"
    remedy = "correct or remove it"
    values = read_json(own, dict[str, Any], remedy=remedy).get("pretrained_cfg") if own.is_file() else None
    if isinstance(values, dict):
        return _stats(values.get("mean"), values.get("std"), values.get("interpolation"), str(own)), f"{own} names them"
    if theirs.is_file():
        values = read_json(theirs, dict[str, Any], remedy=remedy)
        mean, std = values.get("image_mean", IMAGENET_MEAN), values.get("image_std", IMAGENET_STD)
        interpolation = {2: "bilinear"}.get(values.get("resample", 3), "bicubic")  # numbers of Pillow
        return _stats(mean, std, interpolation, str(theirs)), f"{theirs} names them"
    return None
