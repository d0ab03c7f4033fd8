"""The options of evaluation protocols, from the command line and from --protocols of a comparison."""

from dataclasses import fields
from typing import Any, Literal, get_args

from fgfast.config import Range, check_range, parse_values, with_values
from fgfast.errors import UserError
from fgfast.evaluate.finetune import FinetuneOptions
from fgfast.evaluate.mlp import MLPOptions

Protocol = Literal["knn", "linear", "parts", "mlp", "finetune", "retrieval"]
Options = MLPOptions | FinetuneOptions
OPTIONS: dict[str, type[Options]] = {"mlp": MLPOptions, "finetune": FinetuneOptions}
"""The options of the protocols that have any."""
_RANGES = {
    "epochs": Range(1), "patience": Range(1), "hidden": Range(1), "batch_size": Range(2), "seed": Range(0),
    "weight_decay": Range(0), "lr": Range(0, open=True),
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
    if protocol not in OPTIONS:
        if values:
            raise UserError(f"{source}: the protocol {protocol} has no option {next(iter(values))!r}: leave it out.")
        return None
    default = OPTIONS[protocol]()
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
    names = [f.name for f in fields(options) if getattr(options, f.name) != getattr(default, f.name)]
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
        if name not in get_args(Protocol):
            raise UserError(f"There is no protocol {name!r}: choose one of {', '.join(get_args(Protocol))}.")
        options = parse_options(name, values, "--protocols")
        text = options_text(options)
        protocols[f"{name}:{text}" if text else name] = name, options
    if not protocols:
        raise UserError(f"--protocols is empty: give {', '.join(get_args(Protocol))}.")
    return protocols
