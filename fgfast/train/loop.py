"""The training loop, from a configuration to a run folder."""

import sys
from pathlib import Path

import torch

from fgfast.config import TrainConfig, flag, validate
from fgfast.data.splits import pretext_splits
from fgfast.errors import UserError
from fgfast.info import require, versions
from fgfast.methods.base import Method, method_class
from fgfast.methods.run_folder import resolve
from fgfast.ranks import Ranks
from fgfast.train.compiling import check_compiler
from fgfast.train.distributed import check_equal, joined
from fgfast.train.length import Length
from fgfast.train.resume import claim_run, list_digest, open_run, run_images
from fgfast.train.step import check_step
from fgfast.train.trainer import Trainer


def pretrain(method: str | type[Method], config: TrainConfig, *, train: bool = True) -> Path:
    """Train a method and write its run folder.

    The folder holds config.toml, images.json (the images of the run), init.pt (the weights of step 0), last.pt
    (everything that ``resume`` needs) and previous.pt (the one before), encoder.safetensors, metrics.jsonl, log.txt,
    tensorboard/ (and wandb/) and, for methods that discover parts, parts_0/, ...

    Args:
        method: the name or the class of a method.
        config: its configuration, an instance of the method's Config.
        train: False stops after init.pt, for scores before training.

    Returns:
        The run folder.

    Raises:
        UserError: a setting, the data or the run folder cannot be used, or another rank has failed.
        KeyboardInterrupt: stopped by a signal; last.pt was written before if a step was done.
    """
    validate(config)
    require("PIL", "numpy", "rich", "safetensors", "timm")
    if config.log == "wandb":
        require("wandb", extra="wandb")
    with joined(config.device, config.rank_timeout) as ranks:
        return _pretrain(method_class(method) if isinstance(method, str) else method, config, ranks, train=train)


def _pretrain(kind: type[Method], config: TrainConfig, ranks: Ranks, *, train: bool) -> Path:
    if config.compile and train:
        check_compiler(ranks.device)
    config, notes = resolve(config)
    splits = pretext_splits(config)
    listed, description = splits.pretext(), splits.describe()
    options = {flag(name): value for name, value in vars(config).items() if name not in ("device", "threads")}
    of_packages = {f"the version of {name}": version for name, version in versions().items()}
    check_equal(ranks, {"the method": kind.name, **options, **of_packages, "the list of images": list_digest(listed)})
    torch.manual_seed(config.seed)
    built = kind(config)
    if config.shard == "fsdp" and ranks.world == 1:
        raise UserError("--shard fsdp divides a network among ranks, and there is one: start several by torchrun.")
    check_step(built)
    if config.grad_checkpoint:
        built.checkpoint_activations()
    built.to(ranks.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    built.check_training_set(listed)
    kept, run = run_images(config, listed, splits.held_out_paths()), Path(config.out)
    check_equal(ranks, {"the list of images that can be read": list_digest(kept.images)})
    length = None
    if train:
        length = Length(built, len(kept.records), ranks.world)
        length.of(config)
    with claim_run(run, ranks) as claim:
        resumed = open_run(built, ranks, length, description, kept)
        check_equal(ranks, {"the step of the checkpoint": "none" if resumed is None else resumed.step})
        if length is None:
            return run
        if ranks.first and (resumed is None or resumed.step < length.total):
            print(description, file=sys.stderr, flush=True)  # before the parts are discovered, which takes time
        trainer = Trainer(built, kept, description, ranks, length, claim)
        trainer.notes += notes
        trainer.train(resumed)
    return run
