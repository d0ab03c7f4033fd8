"""The encoder of a run folder, or of a network and weights without a run, and its configuration."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from fgfast.config import AUTO, TrainConfig, flag, parse_values, with_values
from fgfast.data.normalise import IMAGENET, InputStats
from fgfast.errors import UserError
from fgfast.methods.base import METHODS, Method, build_encoder, method_class
from fgfast.methods.input_stats import stats_of_weights
from fgfast.methods.refining import PLAIN, refinement, with_refinement
from fgfast.models.backbone import Backbone
from fgfast.models.input_stats import stats_from_texts
from fgfast.models.weights import load_tensors
from fgfast.run import INIT, has_checkpoint, load_checkpoint, load_newest, read_options

log = logging.getLogger("fgfast")

Checkpoint = Literal["init", "last"]


def read_run(run: Path) -> tuple[str, TrainConfig]:
    """The method's name and the configuration of a run folder.

    What it does not name is as in earlier versions: ImageNet's input statistics for every network, no refinement.

    Raises:
        UserError: the folder is not a run folder, or its config.toml names no method.
    """
    name, values = read_options(run)
    if name not in METHODS:
        wrong = f"has method = {name!r}" if name else "names no method"
        raise UserError(f"{run / 'config.toml'} {wrong}: correct it to one of {', '.join(METHODS)}.")
    config = with_values(method_class(name).Config(), values, str(run / "config.toml"))
    stats = stats_from_texts(vars(config), f"In {run / 'config.toml'} ")
    return name, with_refinement(_with_stats(config, stats), PLAIN)


def _with_stats(config: TrainConfig, stats: InputStats) -> TrainConfig:
    return with_values(config, {**stats.texts()}, "The input statistics")


def complete_as(run: TrainConfig, config: TrainConfig) -> TrainConfig:
    """The configuration with what it leaves to auto as in that of a run: input statistics and refinement.

    Raises:
        UserError: a statistic does not have its form.
    """
    stats = stats_from_texts(vars(config), "--", stats_from_texts(vars(run), "--"))
    return with_refinement(_with_stats(config, stats), refinement(run))


def resolve(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """The configuration with nothing left to auto that follows from the run that it resumes or its initial weights.

    Returns:
        The configuration; and sentences for the log on what a reader would not expect of random weights.

    Raises:
        UserError: a statistic does not have its form, or the run or the weights cannot be read.
    """
    run = Path(config.out)
    if config.resume and has_checkpoint(run):
        return complete_as(read_run(run)[1], config), []
    config, note = resolve_stats(config)
    notes = [note] if note else []
    resolved = with_refinement(config)
    now, plain = refinement(resolved)._asdict(), PLAIN._asdict()
    if chosen := [name for name in plain if getattr(config, name) == AUTO and now[name] != plain[name]]:
        new, old = (" ".join(f"{flag(name)} {how[name]}" for name in chosen) for how in (now, plain))
        notes.append(f"the initial weights are pretrained, so auto is {new} (as for random weights: {old})")
    return resolved, notes


def resolve_stats(config: TrainConfig) -> tuple[TrainConfig, str]:
    """The configuration with all input statistics: as given, else those of its weights.

    Returns:
        The configuration; and a sentence for the log if the statistics are not ImageNet's or not those of the weights.

    Raises:
        UserError: a statistic does not have its form, or the weights cannot be read.
    """
    of_weights, why = stats_of_weights(config)
    stats = stats_from_texts(vars(config), "--", of_weights)
    note = "" if config.init == "none" or stats == of_weights == IMAGENET else f"input statistics: {stats} ({why})"
    if note and stats != of_weights:
        note = f"input statistics as given: {stats}, where the weights had {of_weights} ({why})"
    return _with_stats(config, stats), note


def load_run_encoder(
    run: Path, checkpoint: Checkpoint, device: torch.device, settings: dict[str, str] | None = None
) -> tuple[Backbone, TrainConfig]:
    """The encoder of a run at step 0 ("init") or at its newest whole checkpoint ("last"), in evaluation mode.

    ``settings`` replace options of the run, such as how many blocks srgan's encoder leaves out; auto stands for input
    statistics of the run.

    Raises:
        UserError: the run or the checkpoint is missing, belongs to another method or does not fit the settings.
    """
    name, stored = read_run(run)
    config = complete_as(stored, with_values(stored, parse_values(stored, settings or {}, "--set"), "--set"))
    config = replace(config, out=str(run))  # where the run is now, which names the images that it holds out
    state = _load(run, checkpoint, name)
    return _ready(method_class(name).stored_encoder(config, state), device), config


def load_network(config: TrainConfig, device: torch.device) -> tuple[Backbone, TrainConfig]:
    """The network of a configuration with its initial weights, without a run, in evaluation mode.

    Returns:
        The network; and the configuration with the input statistics that the network uses.

    Raises:
        UserError: timm has no such network, or the weights cannot be read or do not fit.
    """
    config, note = resolve_stats(with_refinement(config, PLAIN))
    if note:
        log.warning("%s", note)
    return _ready(build_encoder(config), device), config


def size_of_weights(model: str, init: str) -> int:
    """Side in pixels of the images that weights were trained on: as a run says, or timm of its own; 224 if unknown.

    Args:
        model: timm's name of the network.
        init: the weights, as ``--init`` names them.

    Example:
        >>> size_of_weights("vit_small_patch14_dinov2", "timm")
        518
    """
    if (Path(init) / "config.toml").is_file():
        return read_run(Path(init))[1].size
    import timm

    known: Any = timm.get_pretrained_cfg(model, allow_unregistered=True) if timm.is_model(model) else None
    return known.input_size[-1] if known else 224


def _ready(encoder: Backbone, device: torch.device) -> Backbone:
    return encoder.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def load_run_method(run: Path, checkpoint: Checkpoint, name: str, config: TrainConfig) -> Method:
    """The complete method of a run, with all its networks, at step 0 ("init") or its newest whole checkpoint ("last").

    Args:
        run: run folder.
        checkpoint: "init" or "last".
        name: name of the method.
        config: options of the run.

    Raises:
        UserError: the checkpoint is missing, belongs to another method or does not fit the options.
    """
    method = method_class(name)(config)
    load_tensors(method, _load(run, checkpoint, name)["method"], "The weights of the checkpoint")
    return method


def _load(run: Path, checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    if checkpoint == "init":
        return load_checkpoint(run / INIT, name)
    state, notes = load_newest(run, name)
    for note in notes:
        log.warning("%s", note)
    return state
