"""Evaluation of a run: frozen features of a checkpoint, kNN or a linear probe, an interval over the test pictures."""

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fgfast.data.layouts import ImageSet, open_images
from fgfast.errors import UserError
from fgfast.evaluate.bootstrap import accuracy_interval
from fgfast.evaluate.features import extract
from fgfast.evaluate.knn import knn_predict
from fgfast.evaluate.linear import linear_probe
from fgfast.methods.base import method_class
from fgfast.models.backbone import Backbone
from fgfast.train.checkpoint import load_checkpoint, write_json
from fgfast.train.config import TrainConfig, parse_values, with_values
from fgfast.train.splits import training_images

Protocol = Literal["knn", "linear"]
Checkpoint = Literal["init", "last"]
KNN_K = 20
MOST_FOR_ONLINE = 4000  # pictures of each split that the online score looks at


@dataclass(frozen=True)
class Score:
    """Top-1 of one checkpoint under one protocol."""

    protocol: Protocol
    checkpoint: Checkpoint
    correct: np.ndarray  # bool [test pictures]
    low: float  # 95% bootstrap interval over the test pictures
    high: float
    n_train: int

    @property
    def top1(self) -> float:
        """Share of the test pictures that are right, 0 to 1."""
        return float(self.correct.mean())

    def row(self) -> dict[str, Any]:
        """The score as plain values."""
        return {
            "protocol": self.protocol, "checkpoint": self.checkpoint, "top1": self.top1,
            "low": self.low, "high": self.high,
            "n": len(self.correct), "n_train": self.n_train,
        }  # fmt: skip


def read_run(run: Path) -> tuple[str, TrainConfig]:
    """The method's name and the configuration of a run folder.

    Raises:
        UserError: the folder is no run.
    """
    file = run / "config.toml"
    if not file.is_file():
        raise UserError(f"{run} is no run folder (it has no config.toml): give the --out of fgfast pretrain.")
    try:
        values = tomllib.loads(file.read_text())
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file} does not parse ({error}): restore it or train again.") from None
    name = values.pop("method", "")
    return name, with_values(method_class(name).Config(), values, str(file))


def load_encoder_of(
    run: Path, checkpoint: Checkpoint, device: torch.device, settings: dict[str, str] | None = None
) -> tuple[Backbone, TrainConfig]:
    """The encoder of a run at step 0 ("init") or at its newest checkpoint ("last"), in evaluation mode.

    ``settings`` replace settings of the run, such as the blocks that srgan's encoder leaves out.

    Raises:
        UserError: the run or the checkpoint is missing or of another method, or does not fit the settings.
    """
    name, config = read_run(run)
    config = with_values(config, parse_values(config, settings or {}, "--set"), "--set")
    state = load_checkpoint(run / f"{checkpoint}.pt", name)
    encoder = method_class(name).stored_encoder(config, state)
    return encoder.to(device, memory_format=torch.channels_last).eval(), config  # type: ignore[call-overload]


def predict(
    protocol: Protocol, encoder: Backbone, config: TrainConfig, data: Path, device: torch.device
) -> tuple[np.ndarray, np.ndarray, int]:
    """Predicted and true classes of the test split (of the held-out part under --holdout), and the training count."""
    fit, test = _splits(config, data)
    x, y = extract(encoder, fit, config.size, device=device, threads=config.threads, loader=config.loader)
    tx, ty = extract(encoder, test, config.size, device=device, threads=config.threads, loader=config.loader)
    if protocol == "knn":
        predicted = knn_predict(x, y, tx, k=min(KNN_K, len(x)), n_classes=len(fit.classes))
    else:
        predicted = linear_probe(x, y, tx)
    return np.asarray(predicted), np.asarray(ty), len(x)


def _splits(config: TrainConfig, data: Path) -> tuple[ImageSet, ImageSet]:
    """The pictures that features are fitted on, and those that are scored."""
    fit, held = training_images(replace(config, data=str(data)))
    test = held if config.holdout else open_images(data).test_set()
    if len(test) == 0:
        raise UserError(
            f"{data} has no test pictures to score on: give a set with a test split, or train with --holdout."
        )
    if len(fit.classes) < 2:
        raise UserError(
            f"{data} has {len(fit.classes)} class: kNN and linear scores need labels of two classes or more."
        )
    return fit, test


def evaluate(
    run: Path,
    protocol: Protocol,
    data: Path,
    *,
    checkpoint: Checkpoint = "last",
    device: torch.device,
    settings: dict[str, str] | None = None,
) -> Score:
    """Score a checkpoint of a run and note it in RUN/eval.json.

    Args:
        run: run folder.
        protocol: "knn": cosine, k = 20, votes weighted by exp(similarity / 0.07). "linear": logistic regression.
        data: a labelled set.
        checkpoint: "init" (before training) or "last".
        device: where the features are computed.
        settings: settings that replace the run's, as text.

    Returns:
        The score with its 95% interval.

    Raises:
        UserError: the run, the checkpoint or the data cannot be used.
    """
    encoder, config = load_encoder_of(run, checkpoint, device, settings)
    predicted, truth, n_train = predict(protocol, encoder, config, data, device)
    correct = predicted == truth
    low, high = accuracy_interval(correct)
    score = Score(protocol, checkpoint, correct, low, high, n_train)
    note = {"set": ",".join(f"{k}={v}" for k, v in sorted(settings.items()))} if settings else {}
    note_score(run, {**score.row(), "data": data.name, "path": str(data.resolve()), **note})
    return score


def note_score(run: Path, row: dict[str, Any]) -> None:
    """Put a row into RUN/eval.json in place of the one with the same protocol, checkpoint, path and settings."""
    import json

    file = run / "eval.json"
    rows = json.loads(file.read_text()) if file.is_file() else []
    key = ("protocol", "checkpoint", "path", "set")
    rows = [r for r in rows if any(r.get(k) != row.get(k) for k in key)]
    write_json(file, [*rows, row])


def online_knn(encoder: Backbone, config: TrainConfig, device: torch.device) -> float | None:
    """Top-1 of kNN in training, on at most 4,000 pictures a split; None where the set has no labels to score."""
    try:
        fit, test = _splits(config, Path(config.data))
    except UserError:
        return None
    keep = [np.random.default_rng(0).permutation(len(s))[:MOST_FOR_ONLINE] for s in (fit, test)]
    fit, test = (s.subset(np.sort(k)) for s, k in zip((fit, test), keep, strict=True))
    was_training = encoder.training
    encoder.eval()
    try:
        x, y = extract(encoder, fit, config.size, device=device, threads=config.threads, loader=config.loader)
        tx, ty = extract(encoder, test, config.size, device=device, threads=config.threads, loader=config.loader)
    finally:
        encoder.train(was_training)
    predicted = knn_predict(x, y, tx, k=min(KNN_K, len(x)), n_classes=len(fit.classes))
    return float((np.asarray(predicted) == np.asarray(ty)).mean())
