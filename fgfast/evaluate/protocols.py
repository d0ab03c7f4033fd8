"""Evaluation of a run under a protocol: scores with an interval over the test images, stored in RUN/eval.json."""

import hashlib
import os
import shutil
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
from fgfast.evaluate.confusion import confused_pairs
from fgfast.evaluate.features import PartFeatures, extract
from fgfast.evaluate.few_shot import SegmentationOptions
from fgfast.evaluate.finetune import FinetuneOptions, finetune
from fgfast.evaluate.keypoints import KeypointOptions, check_keypoints, discover_shared, score_keypoints
from fgfast.evaluate.knn import knn_predict
from fgfast.evaluate.linear import linear_probe
from fgfast.evaluate.linear_sgd import SGDOptions, sgd_probe
from fgfast.evaluate.mlp import MLPOptions, class_weights, mlp_probe
from fgfast.evaluate.options import OPTIONS, Options, Protocol, options_text
from fgfast.evaluate.retrieval import retrieve
from fgfast.evaluate.scores import read_scores, store_score
from fgfast.evaluate.segmentation import segment
from fgfast.evaluate.sweep import SweepOptions, sweep_probe
from fgfast.files import check_folder
from fgfast.info import require
from fgfast.methods.base import scoring
from fgfast.methods.run_folder import Checkpoint, load_run_encoder
from fgfast.models.backbone import Backbone
from fgfast.models.stages import last_stages
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
    n_train: int
    correct: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))  # [test images]; none if not classified
    low: float = float("nan")  # 95% bootstrap interval of top-1 over the test images
    high: float = float("nan")
    macro_f1: float = float("nan")  # mean F1 over the classes that occur or are predicted
    weighted_f1: float = float("nan")  # the same, weighted by the number of images of each class
    options: str = ""  # options that differ from the protocol's defaults, "name=value,name=value"
    more: dict[str, Any] = field(default_factory=dict)  # rank5 and map; miou, deviation, ...; settings (all options)
    images: str = ""  # one line on what was read of the data set, and what was left out

    @property
    def top1(self) -> float:
        """Fraction of the test images that are classified correctly, 0 to 1; NaN if none is classified."""
        return float(self.correct.mean()) if len(self.correct) else float("nan")

    def row(self) -> dict[str, Any]:
        """The score as plain values."""
        classified = {
            "top1": self.top1, "low": self.low, "high": self.high, "macro_f1": self.macro_f1,
            "weighted_f1": self.weighted_f1, "n": len(self.correct),
        } if len(self.correct) else {}  # fmt: skip
        return {
            "protocol": self.protocol, "checkpoint": self.checkpoint, **classified, "n_train": self.n_train,
            "options": self.options, **self.more,
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
) -> tuple[Tensor, Tensor, int, dict[str, float]]:  # fmt: skip
    """What :func:`_predict` returns, from frozen features."""
    more: dict[str, float] = {}
    features_of = _part_features if protocol == "parts" else _features
    train_x, train_y = features_of(encoder, fit, config, device)
    test_x, truth = features_of(encoder, test, config, device)
    if protocol == "knn":
        predicted = knn_predict(train_x, train_y, test_x, k=KNN_K, n_classes=len(fit.classes))
    elif isinstance(options, MLPOptions):
        predicted = mlp_probe(train_x, train_y, test_x, fit.classes, options)
    elif isinstance(options, SweepOptions):
        predicted, *chosen = sweep_probe(train_x, train_y, test_x, options, device)
        more = dict(zip(("l2", "val_top1"), chosen, strict=True))
    else:
        predicted = linear_probe(train_x, train_y, test_x)
    return predicted, truth, len(train_x), more


def _predict(
    protocol: Protocol, encoder: Backbone, config: TrainConfig, fit: ImageSet, test: ImageSet, device: torch.device,
    options: Options | None, state_file: Path | None,
) -> tuple[Tensor, Tensor, int, dict[str, float]]:  # fmt: skip
    """Predicted and true classes of the test images, the number of training images, and further scores."""
    if protocol == "retrieval":
        x, y = _features(encoder, test, config, device)
        if len(x) < 2:
            raise UserError(f"One test image of {test.root} can be read: retrieval needs two or more.")
        result = retrieve(x.to(device), y)
        queries = result.has_match
        if not queries.any():
            raise UserError(f"No class of {test.root} has two test images that can be read: retrieval needs them.")
        rank5, precision = (float(v[queries].double().mean()) for v in (result.rank5, result.precision))
        return result.nearest[queries], y[queries], 0, {"rank5": rank5, "map": precision}
    if isinstance(options, FinetuneOptions):
        predicted, truth = finetune(
            encoder, fit, test, config, options, device=device, state_file=state_file,
            start=weights_digest(encoder.net),
        )  # fmt: skip
        return predicted, truth, len(fit), {}
    if isinstance(options, SGDOptions):
        probe = sgd_probe(
            encoder, fit, test, config, options, device=device, state_file=state_file,
            start=weights_digest(encoder.net),
        )  # fmt: skip
        return probe.logits.argmax(1), probe.truth, len(fit), {"top5": probe.top5(), "epoch": probe.epoch}
    return _classify(protocol, encoder, config, fit, test, device, options)


def _splits(config: TrainConfig, data: Path, classes: int = 2) -> Splits:
    """The labelled images, after a check that there are some to score and enough classes to tell apart."""
    splits = labelled_splits(replace(config, data=str(data)))
    if len(splits.scored()) == 0:
        raise UserError(
            f"{data} has no test images to score on: give a set with a test split, or train with --holdout."
        )
    n = len(np.unique(splits.training().targets))
    if n < classes:
        raise UserError(f"{data} has training images of {n} class{'es' * (n != 1)}: scores need two classes or more.")
    return splits


def check_protocol(
    protocol: Protocol, encoder: Backbone, config: TrainConfig, data: Path, options: Options | None = None
) -> Splits:
    """The images to fit classifiers on and those to score, after all checks that need no features.

    Segmentation checks masks when it draws the labelled images, before it trains.

    Args:
        protocol: the protocol.
        encoder: the network; its weights do not matter.
        config: configuration of the run.
        data: a labelled set.
        options: options of the protocol, as of ``parse_options``.

    Raises:
        UserError: this protocol cannot score this network on these images.
    """
    require("sklearn")
    splits = _splits(config, data, classes=1 if protocol == "segmentation" else 2)
    fit, test = splits.training(), splits.scored()
    if protocol == "retrieval":
        if len(test) < 2:
            raise UserError(f"{data} has one test image: retrieval needs two or more.")
        if np.bincount(test.targets).max() < 2:
            raise UserError(f"No class of {data} has two test images: retrieval needs two or more of a class.")
    if protocol == "parts" and fit.masks is None:
        check_keypoints(fit, test, data, options if isinstance(options, KeypointOptions) else KeypointOptions())
    elif protocol == "parts":
        assert fit.masks is not None
        if options not in (None, KeypointOptions()):
            raise UserError(f"{data} has part masks, which parts takes: leave out {options_text(options)}.")
        read_maps_info(fit.masks)
        encoder.map_side(config.size)
    if isinstance(options, MLPOptions | FinetuneOptions):
        class_weights(fit.targets, fit.classes, options.class_weights)
    if isinstance(options, FinetuneOptions):
        last_stages(encoder, options.stages)
    if isinstance(options, SweepOptions) and np.bincount(fit.targets).max() < 2:
        raise UserError(f"No class of {data} has two training images, one to choose L2 on: choose recipe=logistic.")
    return splits


def evaluate(
    run: Path, protocol: Protocol, data: Path, *, checkpoint: Checkpoint = "last", device: torch.device,
    options: Options | None = None, settings: dict[str, str] | None = None,
) -> Score:  # fmt: skip
    """Score a checkpoint of a run and store the score in RUN/eval.json.

    Args:
        run: run folder.
        protocol: "knn": cosine, k = 20, votes weighted by exp(similarity / 0.07). "linear": logistic regression, or a
            linear classifier by another recipe.
            "parts": the same on the concatenated averages over each true part, for sets with part masks; for sets with
            key points alone, scores of the parts of the run, see ``score_keypoints``.
            "mlp": a classifier with one hidden layer on the features. "finetune": trains the last stages of the encoder
            and a new classifier. "retrieval": every test image is a query for the other ones. "segmentation": trains
            the encoder and a decoder on a few images with part masks; mIoU.
        data: a labelled set.
        checkpoint: "init" (before training) or "last".
        device: where the networks run.
        options: options of the protocol, as of ``parse_options``; None takes the defaults.
        settings: options that replace those of the run, as text.

    Returns:
        The score with its 95% interval.

    Raises:
        UserError: the run, the checkpoint or the data cannot be used, or RUN/eval.json is damaged.
    """
    read_scores(run)  # a damaged file would stop the score from being stored at the end
    encoder, config = load_run_encoder(run, checkpoint, device, settings)
    return evaluate_encoder(
        encoder, config, protocol, data, run, checkpoint=checkpoint, options=options, settings=settings
    )


def evaluate_encoder(
    encoder: Backbone, config: TrainConfig, protocol: Protocol, data: Path, out: Path, *, network: str = "",
    checkpoint: Checkpoint = "init", options: Options | None = None, settings: dict[str, str] | None = None,
) -> Score:  # fmt: skip
    """Score a network and store the score in OUT/eval.json.

    Args:
        encoder: the network.
        config: its options.
        protocol: see :func:`evaluate`, like all others.
        data: a labelled set.
        out: a run folder, or another for the scores of networks without a run.
        network: name of a network without a run and of its weights; scores of each are kept.
        checkpoint: "init" or "last".
        options: options of the protocol.
        settings: options that replaced others, for the record.

    Returns:
        The score with its 95% interval.

    Raises:
        UserError: the data cannot be used, or OUT/eval.json is damaged.
    """
    device = next(encoder.parameters()).device
    options = OPTIONS[protocol]() if options is None and protocol in OPTIONS else options
    splits = check_protocol(protocol, encoder, config, data, options)
    fit, test = splits.training(), splits.scored()
    check_folder(out)
    if isinstance(options, KeypointOptions) and fit.masks is not None:
        options = None
    key = hashlib.sha1(os.fsencode(f"{options}{settings or ''}{network}{data.resolve()}")).hexdigest()[:8]
    scratch = out / f"{protocol}-{checkpoint}-{key}"  # of the maps of an evaluation, which are not part of the run
    state_file = None
    if isinstance(options, FinetuneOptions | SegmentationOptions | SGDOptions):
        state_file = out / f"{scratch.name}.pt"
    more: dict[str, Any] = {} if options is None else {"settings": asdict(options)}
    if isinstance(options, SegmentationOptions):
        segmented = segment(
            encoder, fit, test, config, options, device=device, state_file=state_file,
            start=weights_digest(encoder.net),
        )  # fmt: skip
        more |= segmented.row()
        score = Score(protocol, checkpoint, segmented.n_labelled, options=options_text(options), more=more)
    elif isinstance(options, KeypointOptions):
        maps, background = Path(options.maps), options.background
        if not options.maps:
            used = splits.images.subset(np.isin(splits.images.paths, [*fit.paths, *test.paths]))
            maps, background = discover_shared(encoder, config, used, scratch), 0 if encoder.is_vit else -1
        more |= score_keypoints(fit, test, maps, background)
        score = Score(protocol, checkpoint, len(fit), options=options_text(options), more=more)
    else:
        predicted, truth, n_train, ranked = _predict(protocol, encoder, config, fit, test, device, options, state_file)
        more |= ranked | {"confused": confused_pairs(np.asarray(predicted), np.asarray(truth), test)}
        score = score_predictions(protocol, checkpoint, predicted, truth, n_train, options_text(options), more)
    score = replace(score, images=splits.describe())
    changed = {"set": ",".join(f"{k}={v}" for k, v in sorted(settings.items()))} if settings else {}
    if network:
        changed["network"] = network
    store_score(out, {**score.row(), "data": data.name, "path": str(data.resolve()), **changed})
    if state_file is not None:
        state_file.unlink(missing_ok=True)  # only now: until the score is stored, it saves the training
    shutil.rmtree(scratch, ignore_errors=True)
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
    return Score(protocol, checkpoint, n_train, correct, low, high, macro, weighted, options, more)


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
    with scoring(encoder, "The online kNN is left out", ranks):
        splits = on_all(ranks, lambda: _splits(config, Path(config.data)))
        x, y, test_x, truth = (
            value
            for images in (splits.training(), splits.scored())
            for value in extract(
                encoder, images.sample(MAX_ONLINE), config.size, device=device, threads=config.threads,
                loader=config.loader, group=group, lenient=True,
            )
        )  # fmt: skip
        predicted = knn_predict(x, y, test_x, k=KNN_K, n_classes=len(splits.images.classes))
        return float((predicted.cpu() == truth).float().mean())
    return None
