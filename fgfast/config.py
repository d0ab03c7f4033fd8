"""The options of a training run, as a flat dataclass that the command line, config.toml and the methods share."""

import dataclasses
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_type_hints

from fgfast.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Range:
    """The numbers that an option takes, for its type: ``Annotated[float, Range(0, 1)]``.

    Args:
        least: smallest one.
        most: largest one.
        open: leave ``least`` itself out.

    Example:
        >>> 0.0 in Range(0, 1), 0.0 in Range(0, 1, open=True), float("nan") in Range(0), str(Range(2))
        (True, False, False, 'at least 2')
    """

    least: float
    most: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.least if self.open else value >= self.least
        return above and value <= self.most and math.isfinite(value)

    def __str__(self) -> str:
        start = f"{'more than' if self.open else 'at least'} {self.least:g}"
        return start if math.isinf(self.most) else f"{start} and at most {self.most:g}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open=True)]
Fraction = Annotated[float, Range(0, 1)]


@dataclass
class TrainConfig:
    """Options of every method; each method's own class adds to them."""

    takes_unlabelled: ClassVar[bool] = True
    """Whether the method can train on images that have no label."""
    grey_input: ClassVar[bool] = False
    """Whether the encoder sees lightness alone, in training and in evaluation."""

    data: str = ""
    """Folder of the images: an image folder, or a data set in its official layout."""
    unlabelled: str = ""
    """Folder of further images without labels, which are trained on and never scored."""
    out: str = ""
    """Run folder that is written."""
    model: str = "resnet18"
    """A timm model name."""
    model_args: str = ""
    """Further arguments of the timm model, such as "channels=(32,64,128,256),output_stride=16"."""
    init: str = "none"
    """Weights to start from: "timm" (downloaded), "none" (random), a weights file or a run folder."""
    size: Annotated[int, Range(16)] = 64
    """Side of the training views, pixels."""
    epochs: Count = 100
    """Epochs in all; with --rounds they are split evenly over the rounds."""
    passes: Natural = 0
    """Encoder passes over images in all; over 0 it replaces --epochs (equal passes, equal compute)."""
    batch_size: Annotated[int, Range(2)] = 128
    """Images a step and process."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser, fused."""
    lr: Weight = 1e-3
    """Peak learning rate, as it is (not scaled by the batch)."""
    weight_decay: Weight = 1e-4
    """Weight decay; norms and biases get none."""
    warmup: Fraction = 0.05
    """Share of the steps with a linear warm-up; then half a cosine to 0."""
    clip: Weight = 5.0
    """Largest gradient norm; 0 does not clip."""
    amp: Literal["bf16", "off"] = "bf16"
    """Autocast of the networks; losses accumulate in float32."""
    crop_scale: Annotated[float, Range(0, 1, open=True)] = 0.2
    """Smallest share of an image's area that a crop takes."""
    seed: Natural = 0
    """Seed of weights, views and order."""
    holdout: Annotated[float, Range(0, 0.9)] = 0.0
    """Share of the training split that is kept from training, for tuning."""
    device: str = "auto"
    """auto (CUDA when there), cpu, cuda, cuda:N."""
    threads: Count = 2
    """CPU threads of the data pipeline."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """Data pipeline."""
    log_every: Count = 20
    """Steps between lines of metrics.jsonl."""
    knn_every: Natural = 10
    """Epochs between online scores (kNN; srgan also PSNR and SSIM); 0 for none."""
    save_every: Count = 10
    """Epochs between checkpoints."""
    resume: bool = False
    """Go on from RUN/last.pt."""
    compile: bool = False
    """torch.compile the encoder."""

    def check(self) -> None:
        """Raise a UserError for options that do not go together."""

    def learning_rate(self, step: int, total: int) -> float:
        """Linear warm-up over ``warmup`` of the steps, then half a cosine from ``lr`` to 0; steps count from 0."""
        warm = round(self.warmup * total)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


C = TypeVar("C", bound="DataclassInstance")


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a TOML file.

    Raises:
        UserError: the file is missing or does not parse.
    """
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"The config file {path} does not exist: check the path.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"The config file {path} is no TOML: {error}.") from None
    except OSError as error:
        raise UserError(f"The config file {path} cannot be read ({error.strerror}): give a TOML file.") from None


def with_values(config: C, values: dict[str, Any], source: str) -> C:
    """``config`` with some fields replaced, names and types checked.

    Args:
        config: the defaults.
        values: field names and their values.
        source: where the values come from, for the message.

    Raises:
        UserError: a name does not exist or a value is of the wrong type.
    """
    fields = {f.name for f in dataclasses.fields(config)}
    values = {k: v for k, v in values.items() if k != "environment"}  # a note in config.toml, no setting
    hints = get_type_hints(type(config))
    checked: dict[str, Any] = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        if key not in fields:
            raise UserError(f"{source} sets {name!r}, which {type(config).__name__} does not have: remove it.")
        hint = hints[key]
        choices = get_args(hint)
        if choices and value not in choices:
            raise UserError(f"{source} sets {name} = {value!r}: choose one of {', '.join(map(str, choices))}.")
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if (not choices and not isinstance(value, hint)) or (hint is int and isinstance(value, bool)):
            raise UserError(f"{source} sets {name} = {value!r}: a value of type {hint.__name__} is needed.")
        checked[key] = value
    return dataclasses.replace(config, **checked)


def parse_values(config: "DataclassInstance", pairs: dict[str, str], source: str) -> dict[str, Any]:
    """Field values from text, by the fields' types, for "name=value" lists."""
    hints = get_type_hints(type(config))
    values: dict[str, Any] = {}
    for name, text in pairs.items():
        hint = hints.get(name.replace("-", "_"), str)
        try:
            values[name] = (
                text.lower() in ("1", "true", "yes") if hint is bool else hint(text) if hint in (int, float) else text
            )
        except ValueError:
            raise UserError(f"{source} sets {name} = {text!r}: a value of type {hint.__name__} is needed.") from None
    return values


def validate(config: TrainConfig) -> None:
    """Raise a UserError for a value that no run can use."""
    if not config.data:
        raise UserError("No data set is named: give --data DIR.")
    if not config.out:
        raise UserError("No run folder is named: give --out RUN.")
    if config.unlabelled and not config.takes_unlabelled:
        raise UserError("--unlabelled adds images that supervised training has no use for: leave it out.")
    check_ranges(config)
    config.check()


def check_range(name: str, value: float, wanted: Range) -> None:
    """Raise a UserError for a number outside its range.

    Example:
        >>> check_range("--lr", float("inf"), Range(0))
        Traceback (most recent call last):
        ...
        fgfast.errors.UserError: --lr is inf: give a finite number of at least 0.
    """
    if value not in wanted:
        raise UserError(f"{name} is {value}: give {'' if math.isfinite(value) else 'a finite number of '}{wanted}.")


def check_ranges(config: TrainConfig) -> None:
    """Raise a UserError for an option outside its range."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        for wanted in getattr(hint, "__metadata__", ()):
            check_range(f"--{name.replace('_', '-')}", value, wanted)


def to_toml(config: TrainConfig, method: str) -> str:
    """The configuration as TOML: the method's name, the options, and under [environment] the versions."""
    from fgfast.info import versions

    def text(value: Any) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, str):
            escaped = value.replace("\\", "\\\\").replace('"', '\\"')
            return f'"{escaped}"'
        return repr(value)

    lines = [f'method = "{method}"']
    lines += [f"{f.name} = {text(getattr(config, f.name))}" for f in dataclasses.fields(config)]
    lines += ["", "[environment]", *(f'"{name}" = {text(version)}' for name, version in versions().items())]
    return "\n".join(lines) + "\n"
