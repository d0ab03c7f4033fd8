"""Linear probes by SGD, as the papers run them: views drawn anew in every epoch, through the frozen encoder."""

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fgfast.config import TrainConfig
from fgfast.data.imageset import ImageSet
from fgfast.data.loader import make_loader
from fgfast.data.views import Batch, Crop, ViewSpec
from fgfast.errors import UserError
from fgfast.evaluate.features import extract, stats_of
from fgfast.evaluate.finetune import train_epoch
from fgfast.evaluate.resume import Progress
from fgfast.models.backbone import Backbone

CRITERION = nn.CrossEntropyLoss()
CENTER = 224 / 256  # of the short side: Resize(256) and CenterCrop(224)


@dataclass(frozen=True)
class SGDOptions:
    """Options of :func:`sgd_probe`."""

    recipe: ClassVar[str]
    lr: float = 30.0
    """Learning rate of the first epoch."""
    epochs: int = 100
    """Number of epochs."""
    batch_size: int = 256
    """Images per step."""
    weight_decay: float = 0.0
    """Weight decay of SGD."""
    augment: bool = True
    """Draw new views in every epoch, as released; otherwise the features of the centred squares are computed once."""
    normalise: bool = True
    """Divide features by their norm."""
    report: Literal["last", "best"] = "last"
    """Epoch whose classifier is scored: the last one, or the one with the best top-1 on the test images."""
    seed: int = 0
    """Seed of the classifier, the views and the order."""

    def rate(self, epoch: int) -> float:
        """The learning rate in an epoch, from 0."""
        raise NotImplementedError


@dataclass(frozen=True)
class LCROptions(SGDOptions):
    """Options of the linear probe of Shu et al.; the rate falls to a tenth after 60% and after 80% of the epochs."""

    recipe: ClassVar[str] = "lcr"

    def rate(self, epoch: int) -> float:
        return self.lr * 0.1 ** sum(10 * epoch >= tenths * self.epochs for tenths in (6, 8))


@dataclass(frozen=True)
class LoDiscOptions(SGDOptions):
    """Options of the linear probe of Shi et al.; the rate falls to 0 as half a cosine."""

    recipe: ClassVar[str] = "lodisc"
    lr: float = 0.5
    """Learning rate of the first epoch for 256 images a step; in proportion for other numbers."""
    normalise: bool = False

    def rate(self, epoch: int) -> float:
        return self.lr * self.batch_size / 256 * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


class SGDProbe(NamedTuple):
    """What :func:`sgd_probe` returns.

    Args:
        logits: float32 [M, C] of the test images that can be read, on the CPU.
        truth: their classes, int64 [M].
        epoch: the epoch after which they were computed, from 1.
    """

    logits: Tensor
    truth: Tensor
    epoch: int

    def top5(self) -> float:
        """Fraction of the images whose class is among the five with the largest logits."""
        largest = self.logits.topk(min(5, self.logits.shape[1]), dim=1).indices
        return float((largest == self.truth[:, None]).any(1).double().mean())


def sgd_probe(
    encoder: Backbone,
    fit: ImageSet,
    test: ImageSet,
    config: TrainConfig,
    options: SGDOptions,
    *,
    device: torch.device,
    state_file: Path | None = None,
    start: str = "",
) -> SGDProbe:
    """Train a linear classifier by SGD with momentum 0.9 on a frozen encoder, and classify ``test``.

    Weights start from a normal distribution with deviation 0.01, biases from 0. Training views are windows of 8% to
    100% of the image, resized to ``config.size``, and flips. A test view is the centred square of 224 / 256 of the
    short side. The encoder is in evaluation mode and never changes.

    Args:
        encoder: the network.
        fit: labelled images.
        test: images to classify.
        config: configuration of the run: size of the views, data threads.
        options: ``LCROptions`` or ``LoDiscOptions``.
        device: device of the encoder.
        state_file: file for the state after every epoch, as for :func:`fgfast.evaluate.finetune.finetune`; unused
            without new views, when training takes less time than the features.
        start: identifies the weights of ``encoder``; the state of other weights is ignored.

    Raises:
        UserError: a loss is not finite.

    Source: the releases of Shu, van den Hengel, Liu, "Learning Common Rationale to Improve Self-Supervised
    Representation for Fine-Grained Visual Recognition Problems", CVPR 2023 (on the features of its encoder: averaged
    over the map, or weighted by its attention), and of Shi, Wei, Nie, Huang, "LoDisc", IEEE TCSVT 2025. Both report the
    best epoch on the test images; here that is ``report="best"``.
    """
    o = options
    features = nn.Sequential(encoder, _Normalise()) if o.normalise else encoder
    features.eval().requires_grad_(False)
    test_x, truth = _extract(features, test, config, device)
    loader = _batches(features, fit, config, o, device)
    call = {
        "recipe": o.recipe, **asdict(o), "start": start, "data": str(fit.root.resolve()), "images": len(fit),
        "tested": len(test),
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(o.seed)
        head = nn.Linear(test_x.shape[1], len(fit.classes))
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        head.to(device)
        reported = copy.deepcopy(head)  # of the epoch that is scored
        optimizer = torch.optim.SGD(head.parameters(), lr=o.rate(0), momentum=0.9, weight_decay=o.weight_decay)
        modules = nn.ModuleList([head, reported])
        progress = Progress(state_file if o.augment else None, call, modules, optimizer, loader)
        try:
            state = progress.load()
            best, best_epoch = float(state.get("best", -1)), int(state.get("best_epoch", 0))
            for epoch in range(state["epoch"], o.epochs):
                for group in optimizer.param_groups:
                    group["lr"] = o.rate(epoch)
                loss = train_epoch(features if o.augment else nn.Identity(), head, CRITERION, optimizer, loader)
                if not np.isfinite(loss):
                    raise UserError(f"The loss is not finite after epoch {epoch + 1} of the linear probe: lower --lr.")
                top1 = _top1(head, test_x, truth) if o.report == "best" else float(epoch)
                if top1 > best:
                    best, best_epoch = top1, epoch + 1
                    reported.load_state_dict(head.state_dict())
                if epoch + 1 < o.epochs:
                    progress.save(epoch + 1, best=best, best_epoch=best_epoch)
        finally:
            loader.close()
    with torch.no_grad():
        return SGDProbe(reported(test_x).cpu(), truth, best_epoch)


class _Normalise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=1)


def _extract(features: nn.Module, images: ImageSet, config: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Features of the centred squares on ``device``, and their classes on the CPU."""
    x, y = extract(
        features, images, config.size, device=device, center=CENTER, threads=config.threads, loader=config.loader
    )
    return x.to(device), y


def _top1(head: nn.Linear, x: Tensor, truth: Tensor) -> float:
    with torch.no_grad():
        return float((head(x).argmax(1).cpu() == truth).double().mean())


def _batches(features: nn.Module, fit: ImageSet, config: TrainConfig, options: SGDOptions, device: torch.device) -> Any:
    """The loader of the training views, or the batches of their features."""
    if options.augment:
        crop = Crop(size=config.size, jitter=(0, 0, 0, 0), jitter_p=0)
        return make_loader(
            fit, ViewSpec(crops=(crop,)).with_stats(stats_of(features)), options.batch_size, seed=options.seed,
            device=device, threads=config.threads, backend=config.loader,
        )  # fmt: skip
    x, y = _extract(features, fit, config, device)
    return _Rows(x, y.to(device), options.batch_size, options.seed)


class _Rows:
    """Batches of features, in a new order each epoch."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, seed: int) -> None:
        self.x, self.y, self.batch_size = x, y, batch_size
        self.order = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        for rows in torch.randperm(len(self.x), generator=self.order).to(self.x.device).split(self.batch_size):
            yield Batch(views=[self.x[rows]], target=self.y[rows], valid=torch.ones_like(rows, dtype=torch.bool))

    def close(self) -> None:
        """Nothing is open."""
