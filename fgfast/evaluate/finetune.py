"""Fine-tuning of the last stages of an encoder, or all of it, with labels."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fgfast.config import TrainConfig
from fgfast.data.imageset import ImageSet
from fgfast.data.loader import make_loader
from fgfast.data.views import Crop, ViewSpec
from fgfast.errors import UserError
from fgfast.evaluate.features import extract
from fgfast.evaluate.mlp import ClassWeights, class_weights
from fgfast.evaluate.resume import Progress
from fgfast.models.backbone import Backbone
from fgfast.models.stages import unfreeze


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of :func:`finetune`; the defaults are those of Al Breiki et al."""

    stages: str = "1"
    """How many of the last stages (blocks of a ViT) are trained: a number, 0 for only the classifier, or all."""
    epochs: int = 20
    """Epochs; the weights of the last one are scored."""
    lr: float = 1e-4
    """Learning rate of Adam, constant."""
    weight_decay: float = 5e-4
    """Weight decay of Adam."""
    batch_size: int = 32
    """Images per step."""
    class_weights: ClassWeights = "none"
    """Weights of the classes: none, inverse to their frequency, or proportional to it (as released)."""
    seed: int = 0
    """Seed of the classifier, the views and the order."""


def finetune(
    encoder: Backbone,
    fit: ImageSet,
    test: ImageSet,
    config: TrainConfig,
    options: FinetuneOptions,
    *,
    device: torch.device,
    state_file: Path | None = None,
    start: str = "",
) -> tuple[Tensor, Tensor]:
    """Train the last stages and a new linear classifier on ``fit``, then classify ``test``.

    Training views are those of supervised training: a crop, a flip, mild colour jitter; test images are used in full.
    Adam with a constant rate. Frozen stages run in evaluation mode.

    Args:
        encoder: the network to start from; it is changed.
        fit: labelled images.
        test: images to classify.
        config: configuration of the run: size of the views, crops, precision, data threads.
        options: see ``FinetuneOptions``.
        device: device of the encoder.
        state_file: file for the state after every epoch, from which an interrupted call with the same options resumes;
            the caller removes it once it has stored what this call returns.
        start: identifies the weights of ``encoder``; the state of other weights is ignored.

    Returns:
        Predicted and true classes of the test images that can be read, int64 [M].

    Raises:
        UserError: no such number of stages, a class without a training image, or a loss that is not finite.

    Source: the downstream training of Al Breiki, Ridzuan and Grandhe, "Self-Supervised Learning for Fine-Grained Image
    Classification", 2021. Differences: the views (the release repeats the set under six transforms); the new
    classifier is trained (the release freezes it, because of a mistake in a name).
    """
    o = options
    weight = class_weights(fit.targets, fit.classes, o.class_weights)
    trainable = unfreeze(encoder, o.stages)
    crop = Crop(size=config.size, scale=(config.crop_scale, 1.0), jitter=(0.2, 0.2, 0.2, 0.02))
    loader = make_loader(
        fit, ViewSpec(crops=(crop,)).with_stats(encoder.stats), o.batch_size, seed=o.seed, device=device,
        threads=config.threads, backend=config.loader,
    )  # fmt: skip
    call = {**asdict(o), "start": start, "data": str(fit.root.resolve()), "pictures": len(fit)}
    with torch.random.fork_rng():
        torch.manual_seed(o.seed)
        head = nn.Linear(encoder.dim, len(fit.classes)).to(device)
        optimizer = torch.optim.Adam([*trainable, *head.parameters()], lr=o.lr, weight_decay=o.weight_decay, fused=True)
        criterion = nn.CrossEntropyLoss(None if weight is None else weight.to(device))
        modules = nn.ModuleList([encoder, head])
        progress = Progress(state_file, call, modules, optimizer, loader)
        try:
            for epoch in range(progress.load()["epoch"], o.epochs):
                loss = train_epoch(encoder, head, criterion, optimizer, loader, config.amp == "bf16")
                if not np.isfinite(loss):
                    raise UserError(f"The loss is not finite after epoch {epoch + 1} of fine-tuning: lower --lr.")
                if epoch + 1 < o.epochs:
                    progress.save(epoch + 1)
        finally:
            loader.close()
    predicted, truth = extract(
        nn.Sequential(encoder, head), test, config.size, device=device, threads=config.threads, loader=config.loader
    )
    return predicted.argmax(1), truth


def train_epoch(
    encoder: nn.Module, head: nn.Linear, criterion: nn.Module, optimizer: torch.optim.Optimizer, loader: Any,
    amp: bool = False,
) -> float:  # fmt: skip
    """One epoch of what is trainable in both networks; returns the sum of the losses, finite if all are."""
    total = torch.zeros((), device=head.weight.device)
    for batch in loader:
        valid = batch.valid
        with torch.autocast(head.weight.device.type, torch.bfloat16, enabled=amp):
            logits = head(encoder(batch.views[0]))
        loss = criterion(logits.float()[valid], batch.target[valid])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return float(total)
