"""``fgfast pretrain METHOD --show-config``: the settings of a run as a file that ``--config`` reads."""

import dataclasses

from fgfast.config import TrainConfig, validate
from fgfast.config_text import toml_value


def settings_text(method: str, config: TrainConfig) -> str:
    """All options as TOML: those that differ from the method's defaults, then the rest.

    Args:
        method: name of the method.
        config: its options; a data set and a run folder need not be among them.

    Raises:
        UserError: an option is out of range, or two contradict each other.

    Example:
        >>> from fgfast.methods.simclr import SimCLRConfig
        >>> print(settings_text("simclr", SimCLRConfig(lr=0.5))[:44])
        method = "simclr"
        # not the default
        lr = 0.5
    """
    validate(dataclasses.replace(config, data=config.data or ".", out=config.out or "."))
    defaults = vars(type(config)())
    lines = {name: f"{name} = {toml_value(value)}" for name, value in vars(config).items()}
    changed = [line for name, line in lines.items() if getattr(config, name) != defaults[name]]
    rest = [line for name, line in lines.items() if getattr(config, name) == defaults[name]]
    heads = ["# not the default"] if changed else []
    return "\n".join([f"method = {toml_value(method)}", *heads, *changed, "# the defaults", *rest]) + "\n"
