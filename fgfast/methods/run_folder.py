"""Run folders of a method: read its configuration and load its encoder."""

from pathlib import Path
from typing import Literal

import torch

from fgfast.config import TrainConfig, check_ranges, parse_values, with_values
from fgfast.methods.base import method_class
from fgfast.models.backbone import Backbone
from fgfast.run import load_checkpoint, read_options

Checkpoint = Literal["init", "last"]


def read_run(run: Path) -> tuple[str, TrainConfig]:
    """The method's name and the configuration of a run folder.

    Raises:
        UserError: the folder is not a run folder.
    """
    name, values = read_options(run)
    return name, with_values(method_class(name).Config(), values, str(run / "config.toml"))


def load_run_encoder(
    run: Path, checkpoint: Checkpoint, device: torch.device, settings: dict[str, str] | None = None
) -> tuple[Backbone, TrainConfig]:
    """The encoder of a run at step 0 ("init") or at its newest checkpoint ("last"), in evaluation mode.

    ``settings`` replace options of the run, such as how many blocks srgan's encoder leaves out.

    Raises:
        UserError: the run or the checkpoint is missing, belongs to another method or does not fit the settings.
    """
    name, config = read_run(run)
    config = with_values(config, parse_values(config, settings or {}, "--set"), "--set")
    check_ranges(config)
    state = load_checkpoint(run / f"{checkpoint}.pt", name)
    encoder = method_class(name).stored_encoder(config, state)
    return encoder.to(device, memory_format=torch.channels_last).eval(), config  # type: ignore[call-overload]
