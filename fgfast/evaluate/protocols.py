"""Evaluation of a run: a protocol, its scores, an interval over the test images."""

import hashlib
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fgfast.config import TrainConfig, parse_values, with_values
from fgfast.data.imageset import ImageSet
from fgfast.data.maps import read_maps_info
from fgfast.data.splits import scored_images, training_images
from fgfast.errors import UserError
from fgfast.evaluate.bootstrap import accuracy_interval
from fgfast.evaluate.features import PartFeatures, extract
from fgfast.evaluate.finetune import FinetuneOptions, finetune
from fgfast.evaluate.knn import knn_predict
from fgfast.evaluate.linear import linear_probe
from fgfast.evaluate.mlp import MLPOptions, mlp_probe
from fgfast.evaluate.retrieval import retrieve
from fgfast.files import write_json
from fgfast.methods.stored import Checkpoint, load_encoder_of
from fgfast.models.backbone import Backbone

Protocol = Literal["knn", "linear", "parts", "mlp", "finetune", "retrieval"]
Options = MLPOptions | FinetuneOptions
OPTIONS: dict[str, type[Options]] = {"mlp": MLPOptions, "finetune": FinetuneOptions}
"""The options of the protocols that have some."""
KNN_K = 20
MOST_FOR_ONLINE = 4000  # images of each split that the online score looks at


@dataclass(frozen=True)
class Score:
    """Scores of one checkpoint under one protocol; of retrieval, the nearest other image is the prediction."""

    protocol: Protocol
    checkpoint: Checkpoint
    correct: np.ndarray  # bool [test images]
    low: float  # 95% bootstrap interval of top-1 over the test images
    high: float
    n_train: int
    macro_f1: float = float("nan")  # mean of the classes' F1, classes that occur or are predicted
    weighted_f1: float = float("nan")  # the same weighted by how many images a class has
    options: str = ""  # those that are not the protocol's defaults, "name=value,name=value"
    more: dict[str, Any] = field(default_factory=dict)  # what only this protocol has: rank5 and map; all options

    @property
    def top1(self) -> float:
        """Share of the test images that are right, 0 to 1."""
        return float(self.correct.mean())

    def row(self) -> dict[str, Any]:
        """The score as plain values."""
        return {
            "protocol": self.protocol, "checkpoint": self.checkpoint, "top1": self.top1,
            "low": self.low, "high": self.high, "macro_f1": self.macro_f1, "weighted_f1": self.weighted_f1,
            "n": len(self.correct), "n_train": self.n_train, "options": self.options, **self.more,
        }  # fmt: skip


def parse_options(protocol: str, values: dict[str, Any], source: str) -> Options | None:
    """The options of a protocol, checked; None for one that has none.

    Args:
        protocol: its name.
        values: option names and their values, as text or of their type.
        source: where they come from, for the message.

    Raises:
        UserError: the protocol does not have the option, or the value cannot be used.
    """
    if protocol not in OPTIONS:
        if values:
            raise UserError(f"{source}: the protocol {protocol} has no option {next(iter(values))!r}: leave it out.")
        return None
    default = OPTIONS[protocol]()
    texts = {k: v for k, v in values.items() if isinstance(v, str)}
    options = with_values(default, values | parse_values(default, texts, source), source)
    for name, least in {"epochs": 1, "patience": 1, "hidden": 1, "batch_size": 2, "seed": 0, "weight_decay": 0}.items():
        if getattr(options, name, least) < least:
            raise UserError(f"{source} sets {name} = {getattr(options, name)}: give at least {least}.")
    if options.lr <= 0:
        raise UserError(f"{source} sets lr = {options.lr}: give more than 0.")
    if isinstance(options, FinetuneOptions) and not (options.stages == "all" or options.stages.isdecimal()):
        raise UserError(f"{source} sets stages = {options.stages!r}: give a number of stages, or all.")
    return options


def options_text(options: Options | None) -> str:
    """The options that are not the default, "name=value,name=value"."""
    if options is None:
        return ""
    default = type(options)()
    names = [f.name for f in fields(options) if getattr(options, f.name) != getattr(default, f.name)]
    return ",".join(f"{name}={getattr(options, name)}" for name in names)


def parse_protocols(texts: list[str]) -> dict[str, tuple[str, Options | None]]:
    """Protocols by their label, from "linear,knn,finetune:stages=all,epochs=5" or several such texts.

    Raises:
        UserError: there is no such protocol, or it does not have an option.

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
            raise UserError(f"--protocols {','.join(texts)!r} is not of the form name:option=value,option=value,name.")
        if pair:
            entries[-1][1][key] = value
    found: dict[str, tuple[str, Options | None]] = {}
    for name, values in entries:
        if name not in get_args(Protocol):
            raise UserError(f"There is no protocol {name!r}: choose among {', '.join(get_args(Protocol))}.")
        options = parse_options(name, values, "--protocols")
        text = options_text(options)
        found[f"{name}:{text}" if text else name] = name, options
    if not found:
        raise UserError("--protocols names none: give linear, knn, parts, mlp, finetune or retrieval.")
    return found


def _features(encoder: Backbone, images: ImageSet, config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    return extract(encoder, images, config.size, device=device, threads=config.threads, loader=config.loader)


def _part_features(
    encoder: Backbone, images: ImageSet, config: TrainConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    if images.masks is None:
        raise UserError(f"{images.root} has no true part masks: choose another protocol than parts.")
    n_parts = int(read_maps_info(images.masks)["n_parts"])
    return extract(
        PartFeatures(encoder, n_parts), images, config.size, device=device, threads=config.threads,
        loader=config.loader, maps=images.masks,
    )  # fmt: skip


def _classify(
    protocol: Protocol, encoder: Backbone, config: TrainConfig, fit: ImageSet, test: ImageSet, device: torch.device,
    options: Options | None,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Predicted and true classes of the test images from frozen features, and the training count."""
    take = _part_features if protocol == "parts" else _features
    x, y = take(encoder, fit, config, device)
    tx, ty = take(encoder, test, config, device)
    if protocol == "knn":
        return knn_predict(x, y, tx, k=min(KNN_K, len(x)), n_classes=len(fit.classes)), ty, len(x)
    if isinstance(options, MLPOptions):
        return mlp_probe(x, y, tx, fit.classes, options), ty, len(x)
    return linear_probe(x, y, tx), ty, len(x)


def _splits(config: TrainConfig, data: Path) -> tuple[ImageSet, ImageSet]:
    """The images that features are fitted on, and those that are scored."""
    config = replace(config, data=str(data))
    fit, test = training_images(config)[0], scored_images(config)
    if len(test) == 0:
        raise UserError(
            f"{data} has no test images to score on: give a set with a test split, or train with --holdout."
        )
    if len(fit.classes) < 2:
        raise UserError(f"{data} has {len(fit.classes)} class: scores need labels of two classes or more.")
    return fit, test


def evaluate(
    run: Path, protocol: Protocol, data: Path, *, checkpoint: Checkpoint = "last", device: torch.device,
    options: Options | None = None, settings: dict[str, str] | None = None,
) -> Score:  # fmt: skip
    """Score a checkpoint of a run and note it in RUN/eval.json.

    Args:
        run: run folder.
        protocol: "knn": cosine, k = 20, votes weighted by exp(similarity / 0.07). "linear": logistic regression.
            "parts": the same on features averaged over each true part, side by side; for sets with part masks.
            "mlp": one hidden layer, on features too. "finetune": the last stages of the encoder and a new classifier.
            "retrieval": every test image queries the other ones by their features.
        data: a labelled set.
        checkpoint: "init" (before training) or "last".
        device: where the networks run.
        options: of "mlp" and "finetune"; None takes their defaults.
        settings: settings that replace the run's, as text.

    Returns:
        The score with its 95% interval.

    Raises:
        UserError: the run, the checkpoint or the data cannot be used.
    """
    encoder, config = load_encoder_of(run, checkpoint, device, settings)
    fit, test = _splits(config, data)
    options = OPTIONS[protocol]() if options is None and protocol in OPTIONS else options
    more: dict[str, Any] = {} if options is None else {"settings": asdict(options)}
    if protocol == "retrieval":
        if len(test) < 2:
            raise UserError(f"{data} has one test image: retrieval needs two or more.")
        x, y = _features(encoder, test, config, device)
        found = retrieve(x, y)
        if not found.counted.any():
            raise UserError(f"No class of {data} has two test images: there is nothing to retrieve.")
        predicted, truth, n_train = found.nearest[found.counted], y[found.counted], 0
        rank5, precision = (float(v[found.counted].double().mean()) for v in (found.rank5, found.precision))
        more = {"rank5": rank5, "map": precision}
    elif isinstance(options, FinetuneOptions):
        stamp = (run / f"{checkpoint}.pt").stat()
        name = hashlib.sha1(f"{options}{settings or ''}{data.resolve()}".encode()).hexdigest()[:8]
        predicted, truth = finetune(
            encoder, fit, test, config, options, device=device, keep=run / f"finetune-{checkpoint}-{name}.pt",
            start=f"{checkpoint} {stamp.st_size} {stamp.st_mtime_ns}",
        )  # fmt: skip
        n_train = len(fit)
    else:
        predicted, truth, n_train = _classify(protocol, encoder, config, fit, test, device, options)
    score = _score(protocol, checkpoint, predicted, truth, n_train, options_text(options), more)
    note = {"set": ",".join(f"{k}={v}" for k, v in sorted(settings.items()))} if settings else {}
    note_score(run, {**score.row(), "data": data.name, "path": str(data.resolve()), **note})
    return score


def _score(
    protocol: Protocol, checkpoint: Checkpoint, predicted: Tensor, truth: Tensor, n_train: int, options: str,
    more: dict[str, Any],
) -> Score:  # fmt: skip
    from sklearn.metrics import f1_score

    p, t = np.asarray(predicted), np.asarray(truth)
    macro, weighted = (float(f1_score(t, p, average=kind, zero_division=0)) for kind in ("macro", "weighted"))
    low, high = accuracy_interval(p == t)
    return Score(protocol, checkpoint, p == t, low, high, n_train, macro, weighted, options, more)


def note_score(run: Path, row: dict[str, Any]) -> None:
    """Put a row into RUN/eval.json in place of the one of the same protocol, options, checkpoint, data and settings."""
    import json

    file = run / "eval.json"
    rows = json.loads(file.read_text()) if file.is_file() else []
    key = ("protocol", "checkpoint", "path", "set")
    rows = [r for r in rows if any(r.get(k) != row.get(k) for k in key) or r.get("options", "") != row["options"]]
    write_json(file, [*rows, row])


def online_knn(encoder: Backbone, config: TrainConfig, device: torch.device) -> float | None:
    """Top-1 of kNN in training, on at most 4,000 images a split; None where the set has no labels to score."""
    try:
        fit, test = _splits(config, Path(config.data))
    except UserError:
        return None
    keep = [np.random.default_rng(0).permutation(len(s))[:MOST_FOR_ONLINE] for s in (fit, test)]
    fit, test = (s.subset(np.sort(k)) for s, k in zip((fit, test), keep, strict=True))
    was_training = encoder.training
    encoder.eval()
    try:
        predicted, truth, _ = _classify("knn", encoder, config, fit, test, device, None)
    finally:
        encoder.train(was_training)
    return float((predicted.cpu() == truth).float().mean())
