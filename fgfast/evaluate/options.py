"""The options of evaluation protocols, from the command line and from --protocols of a comparison."""

from dataclasses import fields
from typing import Any, Literal, get_args

from fgfast.config import Range, check_range, parse_values, with_values
from fgfast.errors import UserError
from fgfast.evaluate.few_shot import SegmentationOptions
from fgfast.evaluate.finetune import FinetuneOptions
from fgfast.evaluate.keypoints import KeypointOptions
from fgfast.evaluate.linear_sgd import LCROptions, LoDiscOptions
from fgfast.evaluate.mlp import MLPOptions
from fgfast.evaluate.sweep import SweepOptions
from fgfast.formats import shorten

Protocol = Literal["knn", "linear", "parts", "mlp", "finetune", "retrieval", "segmentation"]
Options = (
    MLPOptions | FinetuneOptions | SegmentationOptions | KeypointOptions | SweepOptions | LCROptions | LoDiscOptions
)
OPTIONS: dict[str, type[Options]] = {
    "mlp": MLPOptions, "finetune": FinetuneOptions, "segmentation": SegmentationOptions, "parts": KeypointOptions,
}  # fmt: skip
"""The options of the protocols that have any."""
RECIPES: dict[str, type[Options]] = {kind.recipe: kind for kind in (SweepOptions, LCROptions, LoDiscOptions)}
"""The options of linear by recipe; the default recipe, logistic, has none."""
_COMPARED = [name for name in get_args(Protocol) if name != "segmentation"]  # that give a top-1
_RANGES = {
    "epochs": Range(1), "patience": Range(1), "hidden": Range(1), "batch_size": Range(2), "seed": Range(0),
    "weight_decay": Range(0), "lr": Range(0, open=True), "n_labelled": Range(2), "folds": Range(2), "every": Range(1),
    "val": Range(0, 0.9, open=True), "background": Range(-1, 254),
}  # fmt: skip


def parse_options(protocol: str, values: dict[str, Any], source: str) -> Options | None:
    """The checked options of a protocol; None if it has no options.

    Args:
        protocol: name of the protocol.
        values: option names and their values, as text or of their type.
        source: where the values come from, for the message.

    Raises:
        UserError: the protocol does not have an option, or a value cannot be used.
    """
    kind = OPTIONS.get(protocol)
    if protocol == "linear":
        recipe = values.get("recipe", "logistic")
        if recipe not in ("logistic", *RECIPES):
            choices = ", ".join(("logistic", *RECIPES))
            raise UserError(f"{source} sets recipe = {shorten(repr(recipe))}: choose one of {choices}.")
        kind, values = RECIPES.get(recipe), {name: value for name, value in values.items() if name != "recipe"}
        if kind is None and values:
            name = next(iter(values))
            raise UserError(f"{source} sets {name!r}, which recipe=logistic does not have: choose another recipe.")
    if kind is None:
        if values:
            raise UserError(f"{source}: the protocol {protocol} has no option {next(iter(values))!r}: leave it out.")
        return None
    default = kind()
    texts = {k: v for k, v in values.items() if isinstance(v, str)}
    options = with_values(default, values | parse_values(default, texts, source), source)
    for name, wanted in _RANGES.items():
        value = getattr(options, name, None)
        if value is not None:
            check_range(f"{name} of {source}", value, wanted)
    if isinstance(options, FinetuneOptions) and not (options.stages == "all" or options.stages.isdecimal()):
        raise UserError(f"{source} sets stages = {options.stages!r}: give a number of stages, or all.")
    return options


def options_text(options: Options | None) -> str:
    """The options that differ from their defaults, as "name=value,name=value"."""
    if options is None:
        return ""
    default = type(options)()
    names = ["recipe"] if hasattr(options, "recipe") else []
    names += [f.name for f in fields(options) if getattr(options, f.name) != getattr(default, f.name)]
    return ",".join(f"{name}={getattr(options, name)}" for name in names)


def parse_protocols(texts: list[str]) -> dict[str, tuple[str, Options | None]]:
    """Protocols by label, each as its name and options.

    Args:
        texts: one or several texts of the form "linear,knn,finetune:stages=all,epochs=5".

    Raises:
        UserError: a protocol does not exist or does not have an option.

    Example:
        >>> list(parse_protocols(["linear,finetune:stages=2,epochs=20", "knn"]))
        ['linear', 'finetune:stages=2', 'knn']
    """
    entries: list[tuple[str, dict[str, str]]] = []
    for word in (word for text in texts for word in text.split(",") if word):
        name, colon, rest = word.partition(":")
        if "=" not in name:
            entries.append((name, {}))
        pair = rest if colon else word if "=" in name else ""
        key, sign, value = pair.partition("=")
        if pair and not (sign and entries):
            raise UserError(f"--protocols is {','.join(texts)!r}: give names, or name:option=value,option=value.")
        if pair:
            entries[-1][1][key] = value
    protocols: dict[str, tuple[str, Options | None]] = {}
    for name, values in entries:
        if name == "segmentation":
            raise UserError("segmentation gives no top-1 to compare: run fgfast eval segmentation on each run.")
        if name not in _COMPARED:
            raise UserError(f"There is no protocol {name!r}: choose one of {', '.join(_COMPARED)}.")
        options = parse_options(name, values, "--protocols")
        text = options_text(options)
        protocols[f"{name}:{text}" if text else name] = name, options
    if not protocols:
        raise UserError(f"--protocols is empty: give {', '.join(_COMPARED)}.")
    return protocols
