"""The options of a training run: a flat dataclass for the command line, config.toml and the methods."""

import dataclasses
import math
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, TypeVar, get_args, get_type_hints

from fgfast import formats
from fgfast.errors import UserError
from fgfast.formats import shorten

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

AUTO: Final = "auto"  # an option that follows from others


@dataclass(frozen=True)
class Range:
    """The range of an option, given in its type: ``Annotated[float, Range(0, 1)]``.

    Args:
        least: smallest value.
        most: largest value.
        open: exclude ``least`` itself.

    Example:
        >>> 0.0 in Range(0, 1), 0.0 in Range(0, 1, open=True), float("nan") in Range(0), str(Range(2))
        (True, False, False, 'at least 2')
    """

    least: float
    most: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.least if self.open else value >= self.least
        return above and value <= self.most and (value < 2**63 if isinstance(value, int) else math.isfinite(value))

    def __str__(self) -> str:
        start = f"{'more than' if self.open else 'at least'} {self.least:g}"
        return start if math.isinf(self.most) else f"{start} and at most {self.most:g}"


@dataclass(frozen=True)
class Interval:
    """The time between checkpoints, from the text of ``--save-every``.

    Args:
        amount: a positive number.
        unit: "epochs", "steps" or "minutes".

    Example:
        >>> Interval.parse("3"), Interval.parse("500s"), Interval.parse("0.5m").amount
        (Interval(amount=3, unit='epochs'), Interval(amount=500, unit='steps'), 0.5)
    """

    amount: float
    unit: str

    @classmethod
    def parse(cls, text: str) -> "Interval":
        """Read "3" (epochs), "500s" (steps) or "10m" (minutes).

        Raises:
            UserError: the text is none of these.
        """
        if match := re.fullmatch(r"([1-9][0-9]{0,8})(s?)", text.strip()):
            return cls(int(match[1]), "steps" if match[2] else "epochs")
        match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)m", text.strip())
        if match is None or float(match[1]) == 0:
            raise UserError(f"--save-every is {text!r}: give 3 (epochs), 500s (steps) or 10m (minutes).")
        return cls(float(match[1]), "minutes")


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open=True)]
Fraction = Annotated[float, Range(0, 1)]


@dataclass
class TrainConfig:
    """Options of every method; the Config of a method is a subclass that adds its own."""

    takes_unlabelled: ClassVar[bool] = True
    """Whether the method can train on images that have no label."""
    grey_input: ClassVar[bool] = False
    """Whether the encoder sees only the lightness of images, in training and in evaluation."""

    data: str = ""
    """Data set: an image folder, or a data set in its official layout."""
    unlabelled: str = ""
    """Folder of additional images without labels, used for training only."""
    out: str = ""
    """Run folder, which is created."""
    model: str = "resnet18"
    """Name of a timm model."""
    model_args: str = ""
    """Additional arguments of the timm model, such as "channels=(32,64,128,256),output_stride=16"."""
    init: str = "none"
    """Initial weights: "none" (random), "timm" (pretrained, downloaded), a run folder, or a file of timm, torchvision,
    transformers, lightly, efficientnet_pytorch, MoCo, DINO, solo-learn or VISSL (position embeddings are resampled)."""
    mean: str = AUTO
    """Mean of each channel of the images, as in "0.5,0.5,0.5" for values in [0, 1]; auto takes that with which the
    initial weights were trained, ImageNet's for random ones."""
    std: str = AUTO
    """Standard deviation of each channel, like --mean."""
    interpolation: Literal["auto", "bilinear", "bicubic"] = AUTO
    """How images are resized; auto takes that with which the initial weights were trained, bilinear for random ones."""
    size: Annotated[int, Range(16)] = 64
    """Side of the training views in pixels."""
    epochs: Count = 100
    """Total number of epochs; --rounds splits them evenly."""
    passes: Natural = 0
    """Total number of encoder passes over images; if above 0, it replaces --epochs (equal passes, equal compute)."""
    batch_size: Annotated[int, Range(2)] = 128
    """Images per step and process."""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """Optimiser: fused AdamW, fused SGD with momentum 0.9, or LARS (SGD with a rate per matrix, for large batches)."""
    lr: Weight = 1e-3
    """Peak learning rate; it is not scaled by the batch size."""
    weight_decay: Weight = 1e-4
    """Weight decay; not applied to norms and biases."""
    warmup: Fraction = 0.05
    """Fraction of the steps used for linear warm-up; then the learning rate falls to 0 as half a cosine."""
    head_warmup: Annotated[float | Literal["auto"], Range(0, 1)] = AUTO
    """Fraction of the steps in which the encoder is held and only its heads learn; then its own schedule begins.
    auto: 0.3 from weights of timm or of a file, as in the run from those of a run, and 0 otherwise."""
    encoder_rate: Annotated[float | Literal["auto"], Range(0, open=True)] = AUTO
    """Learning rate of the encoder relative to --lr, which the heads have. auto: 0.05 from weights of timm or of
    a file, as in the run from those of a run, and 1 otherwise."""
    layer_decay: Annotated[float, Range(0, 1, open=True)] = 1.0
    """Learning rate of each layer of the encoder relative to that of the layer after it; 1 gives all the same."""
    freeze_bn: Literal["auto", "on", "off"] = AUTO
    """Keep the BatchNorm statistics of the encoder as they are in the initial weights, while scales and shifts
    learn. auto: on from weights of timm or of a file, as in the run from those of a run, and off otherwise, and with
    --sync-bn or --clean-stats."""
    stages: str = "all"
    """Last stages of the encoder (blocks of a ViT) that learn: a number, or all; those before them keep the initial
    weights and statistics, and need no backward pass."""
    clean_stats: Natural = 0
    """Images without augmentation from which the BatchNorm statistics of the encoder are taken again after the last
    step; 0 keeps those of training."""
    average: Annotated[float, Range(0, 0.999999)] = 0.0
    """Decay per step of a moving average of the encoder's weights, which is evaluated and exported in their place; 0
    takes the weights themselves."""
    clip: Weight = 5.0
    """Largest gradient norm; 0 disables clipping."""
    amp: Literal["bf16", "off"] = "bf16"
    """Autocast of the networks to bfloat16; losses accumulate in float32."""
    crop_scale: Annotated[float, Range(0, 1, open=True)] = 0.2
    """Smallest fraction of the image area that a crop covers."""
    color_strength: Annotated[float | Literal["auto"], Range(0, 1)] = AUTO
    """Colour changes of the views relative to those of the method: strength of jitter, probability of grey and
    solarise; 0 leaves colours as they are. auto: 0.25 from weights of timm or of a file, as in the run from those of a
    run, and 1 otherwise."""
    seed: Natural = 0
    """Seed of the weights, the views and the order of the images."""
    holdout: Annotated[float, Range(0, 0.9)] = 0.0
    """Fraction of the training split that is held out from training, for tuning."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto uses CUDA if available."""
    threads: Count = 2
    """CPU threads of the data loader."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """Data loader; auto uses DALI if available."""
    log_every: Count = 20
    """Steps between rows of metrics.jsonl."""
    log: Literal["tensorboard", "wandb"] = "tensorboard"
    """Curves beside metrics.jsonl: TensorBoard, or Weights & Biases too."""
    knn_every: Natural = 10
    """Epochs between evaluations during training (kNN, and scores of the method); 0 disables them."""
    save_every: str = "10m"
    """Time between checkpoints: 3 (epochs), 500s (steps) or 10m (minutes)."""
    sync_bn: bool = False
    """Compute the statistics of BatchNorm over the images of all ranks; otherwise each rank keeps its own, and those of
    the first rank are evaluated and exported."""
    rank_timeout: Positive = 300.0
    """Seconds after which a rank that does not answer ends the run on all ranks."""
    resume: bool = False
    """Resume from RUN/last.pt if it exists."""
    compile: bool = False
    """Compile the encoder with torch.compile; the whole step compiled is no faster on a CPU."""
    micro_batch: Natural = 0
    """Images that the encoders see at a time, for batches that no card holds: heads and loss see the whole batch, with
    the same gradients, and the encoder runs once more without a graph; 0 takes all at once."""
    micro_bn: Literal["refuse", "chunk"] = "refuse"
    """BatchNorm in training with --micro-batch (that of the encoders) or --accumulate: refuse it, or let it use the
    statistics of the images that it sees at a time."""
    accumulate: Count = 1
    """Parts in which a batch goes through all networks, one after the other, before the step of the optimiser; for
    methods whose loss is a mean over images on their own."""
    grad_checkpoint: bool = False
    """Keep only the inputs of the encoder's stages or blocks in memory, and compute the rest again in the backward
    pass."""
    shard: Literal["none", "fsdp"] = "none"
    """Divide weights, gradients and optimiser states among the ranks (FSDP2), for networks that no card holds."""

    def check(self) -> None:
        """Raise a UserError for options that contradict each other."""

    def learning_rate(self, step: int, total: int) -> float:
        """The learning rate of a step, from 0: linear warm-up over ``warmup`` of the steps, then half a cosine to 0."""
        warm = round(self.warmup * total)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

    def weight_decay_at(self, step: int, total: int) -> float:
        """The weight decay of a step, from 0: constant, unless a method has a schedule."""
        return self.weight_decay


_SWITCHES = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
C = TypeVar("C", bound="DataclassInstance")


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a file with options.

    Raises:
        UserError: the file is missing, cannot be read, or does not parse.
    """
    return formats.read_toml(path, remedy="give a TOML file in UTF-8")


def with_values(config: C, values: dict[str, Any], source: str) -> C:
    """``config`` with some fields replaced, after a check of names, types and ranges.

    Args:
        config: the defaults.
        values: field names and their values.
        source: where the values come from, for the message.

    Raises:
        UserError: a field does not exist or a value has the wrong type, is out of range or no file can hold it.
    """
    fields = {f.name for f in dataclasses.fields(config)}
    values = {k: v for k, v in values.items() if k != "environment"}  # written to config.toml for information
    hints, ranges = get_type_hints(type(config)), get_type_hints(type(config), include_extras=True)
    checked: dict[str, Any] = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        if key not in fields:
            raise UserError(f"{source} sets {name!r}, which {type(config).__name__} does not have: remove it.")
        kind = _kind(hints[key])
        if kind is float and type(value) is int:
            value = float(value)
        if key == "save_every" and type(value) is int:  # as earlier versions wrote it
            value = str(value)
        if key == "freeze_bn" and type(value) is bool:  # likewise
            value = "on" if value else "off"
        if remedy := _misfit(value, hints[key]):
            raise UserError(f"{source} sets {name} = {shorten(repr(value))}: {remedy}.")
        for wanted in () if value in _words(hints[key]) else getattr(ranges[key], "__metadata__", ()):
            check_range(f"{source} sets {name}, which", value, wanted)
        if isinstance(value, str):
            check_text(f"{source}: {name}", value)
        checked[key] = value
    return dataclasses.replace(config, **checked)


def parse_values(config: "DataclassInstance", pairs: dict[str, str], source: str) -> dict[str, Any]:
    """Convert the texts of "name=value" lists to the types of the fields."""
    hints = get_type_hints(type(config))
    values: dict[str, Any] = {}
    for name, text in pairs.items():
        hint = hints.get(name.replace("-", "_"), str)
        kind = _kind(hint)
        try:
            if text in _words(hint):
                values[name] = text
            elif kind is bool or name.replace("-", "_") == "freeze_bn":  # which was a switch in earlier versions
                values[name] = _SWITCHES[text.lower()]
            else:
                values[name] = kind(text) if kind in (int, float) else text
        except (KeyError, ValueError):
            wrong = f"{source} sets {name} = {shorten(repr(text))}"
            raise UserError(f"{wrong}: {_misfit(None, hint)}.") from None
    return values


def _words(hint: Any) -> tuple[str, ...]:
    """The words that an option takes: of ``Literal["a", "b"]`` and of ``float | Literal["a"]``."""
    literals = [part for part in (hint, *get_args(hint)) if typing.get_origin(part) is Literal]
    return tuple(word for literal in literals for word in get_args(literal))


def _kind(hint: Any) -> type:
    """The type of an option, beside the words that it takes."""
    return str if typing.get_origin(hint) is Literal else next(iter(get_args(hint)), hint)


def _misfit(value: object, hint: Any) -> str:
    """What to give in place of a value that does not have the type of an option; empty if it has."""
    kind, words = _kind(hint), _words(hint)
    if words and kind is str:
        return "" if value in words else f"choose one of {', '.join(words)}"
    fits = value in words or (isinstance(value, kind) and not (kind is int and isinstance(value, bool)))
    return "" if fits else f"give a value of type {kind.__name__}{''.join(f', or {word}' for word in words)}"


def validate(config: TrainConfig) -> None:
    """Raise a UserError for options that are missing, out of range or contradict each other."""
    if not config.data:
        raise UserError("No data set is given: give --data DIR.")
    if not config.out:
        raise UserError("No run folder is given: give --out RUN.")
    for name, value in vars(config).items():
        if isinstance(value, str):
            check_text(flag(name), value)
    if config.unlabelled and not config.takes_unlabelled:
        raise UserError("--unlabelled adds images that supervised training cannot use: leave it out.")
    check_ranges(config)
    channel_values("--mean", config.mean, Range(0, 1))
    channel_values("--std", config.std, Range(0, open=True))
    Interval.parse(str(config.save_every))
    if config.freeze_bn == "on" and config.init == "none":
        raise UserError("--freeze-bn on keeps the statistics of initial weights: give --init, or --freeze-bn off.")
    if config.stages != "all" and config.init == "none":
        raise UserError("--stages keeps the initial weights of other stages: give weights by --init, or leave it out.")
    for name, other in (("--sync-bn", config.sync_bn), ("--clean-stats", config.clean_stats)):
        if config.freeze_bn == "on" and other:
            raise UserError(f"--freeze-bn on keeps what {name} computes: give --freeze-bn off, or leave {name} out.")
    if config.clean_stats == 1:
        raise UserError("--clean-stats is 1, and one image has no variance: give 2 or more, or leave it out.")
    for name in ("micro_batch", "accumulate"):
        if (given := getattr(config, name)) > config.batch_size:
            raise UserError(f"{flag(name)} is {given}: give at most --batch-size, {config.batch_size}.")
    if config.micro_batch and config.accumulate > 1:
        raise UserError("--micro-batch and --accumulate both divide a batch: leave one of them out.")
    config.check()


def check_text(name: str, value: str) -> None:
    """Raise a UserError for a text that no file name and no config.toml can hold."""
    if re.search("[\0\ud800-\udfff]", value):  # Python's stand-ins for bytes that are no UTF-8
        raise UserError(f"{name} is {shorten(repr(value))}, which is not valid UTF-8: give another name.")


def channel_values(name: str, text: str, wanted: Range) -> tuple[float, float, float] | None:
    """The numbers of the three channels in a text, or None for "auto".

    Raises:
        UserError: there are not three, or one is no number or out of range.

    Example:
        >>> channel_values("--mean", "0.5, 0.5,.5", Range(0, 1))
        (0.5, 0.5, 0.5)
    """
    if text == AUTO:
        return None
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        shown = shorten(repr(text))
        raise UserError(f"{name} is {shown}: give three numbers, one per channel, as in 0.5,0.5,0.5.") from None
    for value in (red, green, blue):
        check_range(f"A number of {name}", value, wanted)
    return red, green, blue


def flag(name: str) -> str:
    """The flag of an option on the command line.

    Example:
        >>> flag("batch_size")
        '--batch-size'
    """
    return "--" + name.replace("_", "-")


def check_range(name: str, value: float, wanted: Range) -> None:
    """Raise a UserError for a number outside its range.

    Example:
        >>> check_range("--lr", float("inf"), Range(0))
        Traceback (most recent call last):
        ...
        fgfast.errors.UserError: --lr is inf: give a finite number of at least 0.
    """
    if value not in wanted:
        kind = "" if abs(value) < 2**63 else "a finite number of "
        raise UserError(f"{name} is {shorten(repr(value))}: give {kind}{wanted}.")


def check_ranges(config: TrainConfig) -> None:
    """Raise a UserError for an option outside its range, or that is none of the words that it takes."""
    hints, ranges = get_type_hints(type(config)), get_type_hints(type(config), include_extras=True)
    for name, hint in hints.items():
        value, words = getattr(config, name), _words(hint)
        if words and (remedy := _misfit(value, hint)):
            raise UserError(f"{flag(name)} is {shorten(repr(value))}: {remedy}.")
        for wanted in () if value in words else getattr(ranges[name], "__metadata__", ()):
            check_range(flag(name), value, wanted)
