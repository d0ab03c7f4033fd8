"""Evaluation of a run under a protocol: scores with an interval over the test images, stored in RUN/eval.json."""

import hashlib
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fgfast.config import TrainConfig
from fgfast.data.imageset import ImageSet
from fgfast.data.maps import read_maps_info
from fgfast.data.splits import Splits, labelled_splits
from fgfast.errors import UserError
from fgfast.evaluate.bootstrap import accuracy_interval
from fgfast.evaluate.features import PartFeatures, extract
from fgfast.evaluate.finetune import FinetuneOptions, finetune, last_stages
from fgfast.evaluate.knn import knn_predict
from fgfast.evaluate.linear import linear_probe
from fgfast.evaluate.mlp import MLPOptions, class_weights, mlp_probe
from fgfast.evaluate.options import OPTIONS, Options, Protocol, options_text
from fgfast.evaluate.retrieval import retrieve
from fgfast.evaluate.scores import read_scores, store_score
from fgfast.files import check_folder
from fgfast.info import require
from fgfast.methods.base import leave_out
from fgfast.methods.run_folder import Checkpoint, load_run_encoder
from fgfast.models.backbone import Backbone
from fgfast.parts.folder import weights_digest
from fgfast.ranks import on_all, ranks_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KNN_K = 20
MAX_ONLINE = 4000  # images of each split in the online kNN


@dataclass(frozen=True)
class Score:
    """Scores of one checkpoint under one protocol; the prediction of retrieval is the class of the nearest image."""

    protocol: Protocol
    checkpoint: Checkpoint
    correct: np.ndarray  # bool [test images]
    low: float  # 95% bootstrap interval of top-1 over the test images
    high: float
    n_train: int
    macro_f1: float = float("nan")  # mean F1 over the classes that occur or are predicted
    weighted_f1: float = float("nan")  # the same, weighted by the number of images of each class
    options: str = ""  # options that differ from the protocol's defaults, "name=value,name=value"
    more: dict[str, Any] = field(default_factory=dict)  # of some protocols: rank5 and map; settings (all options)
    images: str = ""  # one line on what was read of the data set, and what was left out

    @property
    def top1(self) -> float:
        """Fraction of the test images that are classified correctly, 0 to 1."""
        return float(self.correct.mean())

    def row(self) -> dict[str, Any]:
        """The score as plain values."""
        return {
            "protocol": self.protocol, "checkpoint": self.checkpoint, "top1": self.top1,
            "low": self.low, "high": self.high, "macro_f1": self.macro_f1, "weighted_f1": self.weighted_f1,
            "n": len(self.correct), "n_train": self.n_train, "options": self.options, **self.more,
        }  # fmt: skip


def _features(encoder: Backbone, images: ImageSet, config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    return extract(encoder, images, config.size, device=device, threads=config.threads, loader=config.loader)


def _part_features(
    encoder: Backbone, images: ImageSet, config: TrainConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    assert images.masks is not None  # checked before
    n_parts = int(read_maps_info(images.masks)["n_parts"])
    return extract(
        PartFeatures(encoder, n_parts), images, config.size, device=device, threads=config.threads,
        loader=config.loader, maps=images.masks,
    )  # fmt: skip


def _classify(
    protocol: Protocol, encoder: Backbone, config: TrainConfig, fit: ImageSet, test: ImageSet, device: torch.device,
    options: Options | None,
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Predicted and true classes of the test images from frozen features, and the number of training images."""
    features_of = _part_features if protocol == "parts" else _features
    train_x, train_y = features_of(encoder, fit, config, device)
    test_x, truth = features_of(encoder, test, config, device)
    if protocol == "knn":
        predicted = knn_predict(train_x, train_y, test_x, k=KNN_K, n_classes=len(fit.classes))
    elif isinstance(options, MLPOptions):
        predicted = mlp_probe(train_x, train_y, test_x, fit.classes, options)
    else:
        predicted = linear_probe(train_x, train_y, test_x)
    return predicted, truth, len(train_x)


def _splits(config: TrainConfig, data: Path) -> Splits:
    """The labelled images, after a check that there are some to score and two classes to tell apart."""
    splits = labelled_splits(replace(config, data=str(data)))
    if len(splits.scored()) == 0:
        raise UserError(
            f"{data} has no test images to score on: give a set with a test split, or train with --holdout."
        )
    n = len(np.unique(splits.training().targets))
    if n < 2:
        raise UserError(f"{data} has training images of {n} class{'es' * (n != 1)}: scores need two classes or more.")
    return splits


def check_protocol(
    protocol: Protocol, encoder: Backbone, config: TrainConfig, data: Path, options: Options | None = None
) -> Splits:
    """The images to fit classifiers on and those to score, after all checks that need no features.

    Args:
        protocol: the protocol.
        encoder: the network; its weights do not matter.
        config: configuration of the run.
        data: a labelled set.
        options: options of "mlp" and "finetune".

    Raises:
        UserError: this protocol cannot score this network on these images.
    """
    require("sklearn")
    splits = _splits(config, data)
    fit, test = splits.training(), splits.scored()
    if protocol == "retrieval":
        if len(test) < 2:
            raise UserError(f"{data} has one test image: retrieval needs two or more.")
        if np.bincount(test.targets).max() < 2:
            raise UserError(f"No class of {data} has two test images: retrieval needs two or more of a class.")
    if protocol == "parts":
        if fit.masks is None:
            raise UserError(f"{data} has no part masks: choose another protocol than parts.")
        read_maps_info(fit.masks)
        encoder.map_side(config.size)
    if options is not None:
        class_weights(fit.targets, fit.classes, options.class_weights)
    if isinstance(options, FinetuneOptions):
        last_stages(encoder, options.stages)
    return splits


def evaluate(
    run: Path, protocol: Protocol, data: Path, *, checkpoint: Checkpoint = "last", device: torch.device,
    options: Options | None = None, settings: dict[str, str] | None = None,
) -> Score:  # fmt: skip
    """Score a checkpoint of a run and store the score in RUN/eval.json.

    Args:
        run: run folder.
        protocol: "knn": cosine, k = 20, votes weighted by exp(similarity / 0.07). "linear": logistic regression.
            "parts": the same on the concatenated averages over each true part; for sets with part masks.
            "mlp": a classifier with one hidden layer on the features. "finetune": trains the last stages of the encoder
            and a new classifier. "retrieval": every test image is a query for the other ones.
        data: a labelled set.
        checkpoint: "init" (before training) or "last".
        device: where the networks run.
        options: options of "mlp" and "finetune"; None takes their defaults.
        settings: options that replace those of the run, as text.

    Returns:
        The score with its 95% interval.

    Raises:
        UserError: the run, the checkpoint or the data cannot be used, or RUN/eval.json is damaged.
    """
    read_scores(run)  # a damaged file would stop the score from being stored at the end
    encoder, config = load_run_encoder(run, checkpoint, device, settings)
    options = OPTIONS[protocol]() if options is None and protocol in OPTIONS else options
    splits = check_protocol(protocol, encoder, config, data, options)
    fit, test = splits.training(), splits.scored()
    check_folder(run)
    state_file = None
    more: dict[str, Any] = {} if options is None else {"settings": asdict(options)}
    if protocol == "retrieval":
        x, y = _features(encoder, test, config, device)
        if len(x) < 2:
            raise UserError(f"One test image of {data} can be read: retrieval needs two or more.")
        result = retrieve(x, y)
        queries = result.has_match
        if not queries.any():
            raise UserError(f"No class of {data} has two test images that can be read: retrieval needs them.")
        predicted, truth, n_train = result.nearest[queries], y[queries], 0
        rank5, precision = (float(v[queries].double().mean()) for v in (result.rank5, result.precision))
        more = {"rank5": rank5, "map": precision}
    elif isinstance(options, FinetuneOptions):
        key = hashlib.sha1(os.fsencode(f"{options}{settings or ''}{data.resolve()}")).hexdigest()[:8]
        state_file = run / f"finetune-{checkpoint}-{key}.pt"
        predicted, truth = finetune(
            encoder, fit, test, config, options, device=device, state_file=state_file,
            start=weights_digest(encoder.net),
        )  # fmt: skip
        n_train = len(fit)
    else:
        predicted, truth, n_train = _classify(protocol, encoder, config, fit, test, device, options)
    score = score_predictions(protocol, checkpoint, predicted, truth, n_train, options_text(options), more)
    score = replace(score, images=splits.describe())
    changed = {"set": ",".join(f"{k}={v}" for k, v in sorted(settings.items()))} if settings else {}
    store_score(run, {**score.row(), "data": data.name, "path": str(data.resolve()), **changed})
    if state_file is not None:
        state_file.unlink(missing_ok=True)  # only now: until the score is stored, it saves the training
    return score


def score_predictions(
    protocol: Protocol, checkpoint: Checkpoint, predicted: Tensor, truth: Tensor, n_train: int, options: str,
    more: dict[str, Any],
) -> Score:  # fmt: skip
    """The score of predicted classes against true ones, both int64 [M]; the other arguments are fields of Score."""
    from sklearn.metrics import f1_score

    classes, labels = np.asarray(predicted), np.asarray(truth)
    macro, weighted = (
        float(f1_score(labels, classes, average=kind, zero_division=0)) for kind in ("macro", "weighted")
    )
    correct = classes == labels
    low, high = accuracy_interval(correct)
    return Score(protocol, checkpoint, correct, low, high, n_train, macro, weighted, options, more)


def online_knn(
    encoder: Backbone, config: TrainConfig, device: torch.device, group: "ProcessGroup | None" = None
) -> float | None:
    """Top-1 of kNN during training, on at most 4,000 images per split; None if the set cannot be scored.

    Missing and broken images are left out, and no mistake in the data ends the training.

    Args:
        encoder: the network.
        config: options of the run.
        device: where the network runs.
        group: processes that call this at the same time and share the work; all return the same number.
    """
    ranks = ranks_of(group, device)
    was_training = encoder.training
    encoder.eval()
    try:
        splits = on_all(ranks, lambda: _splits(config, Path(config.data)))
        x, y, test_x, truth = (
            value
            for images in (splits.training(), splits.scored())
            for value in extract(
                encoder, images.subset(np.sort(np.random.default_rng(0).permutation(len(images))[:MAX_ONLINE])),
                config.size, device=device, threads=config.threads, loader=config.loader, group=group, lenient=True,
            )
        )  # fmt: skip
    except (UserError, OSError) as error:  # on every rank: no reason to end the training
        if ranks.first:
            leave_out("The online kNN is left out", str(error))
        return None
    finally:
        encoder.train(was_training)
    predicted = knn_predict(x, y, test_x, k=KNN_K, n_classes=len(splits.images.classes))
    return float((predicted.cpu() == truth).float().mean())
