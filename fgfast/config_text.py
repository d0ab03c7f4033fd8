"""Options as the text of config.toml."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from typing import Any

from fgfast.config import TrainConfig


def to_toml(config: TrainConfig, method: str, resumed: Sequence[dict[str, Any]] = (), images: str = "") -> str:
    """The configuration as TOML: the name of the method, the options, and the versions under [environment].

    Args:
        config: the options.
        method: the method.
        resumed: a table for every time that the run was resumed, written to [[environment.resumed]].
        images: one line on the images of the run, written as a comment.
    """
    from fgfast.info import versions

    lines = [f"# {images}"] if images else []
    lines += [f"method = {toml_value(method)}"]
    lines += [f"{f.name} = {toml_value(getattr(config, f.name))}" for f in dataclasses.fields(config)]
    lines += ["", "[environment]", *(f"{toml_value(k)} = {toml_value(v)}" for k, v in versions().items())]
    for table in resumed:  # here, because versions of fgfast that know nothing of it skip all of [environment]
        lines += ["", "[[environment.resumed]]", *(f"{toml_value(k)} = {toml_value(v)}" for k, v in table.items())]
    return "\n".join(lines) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML on one line.

    Example:
        >>> print(toml_value({"lr": 0.1, "out": "a b", "resume": True}))
        { "lr" = 0.1, "out" = "a b", "resume" = true }
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # a JSON string, except that TOML forbids one more control character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{toml_value(k)} = {toml_value(v)}" for k, v in value.items()) + " }"
    return repr(value)
