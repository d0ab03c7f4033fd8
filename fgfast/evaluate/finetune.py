"""Fine-tuning the last stages of an encoder, or all of it, with labels."""

import re
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
from fgfast.models.backbone import Backbone
from fgfast.models.weights import read_checkpoint
from fgfast.run import save_checkpoint


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of :func:`finetune`; the defaults are those of Al Breiki et al."""

    stages: str = "1"
    """How many of the last stages (blocks of a ViT) are trained: a number, 0 for the classifier alone, or all."""
    epochs: int = 20
    """Epochs; the last one is scored."""
    lr: float = 1e-4
    """Learning rate of Adam, constant."""
    weight_decay: float = 5e-4
    """Weight decay of Adam."""
    batch_size: int = 32
    """Images a step."""
    class_weights: ClassWeights = "none"
    """Weights of the classes: none, inverse to frequency, or the release's proportional to frequency."""
    seed: int = 0
    """Seed of the classifier, the views and the order."""


def stages_of(net: Any) -> list[list[str]]:
    """Names of the parameters of the stem and of every stage after it, as timm groups them.

    A stage is a layer1, a stages.0 or a ViT's block; what stands behind the last one (a last norm) is part of it.

    Raises:
        UserError: timm does not know the stages of this network.
    """
    from timm.models import group_parameters

    if not hasattr(net, "group_matcher"):
        raise UserError(f"timm does not know the stages of {type(net).__name__}: give --stages all.")
    matcher = net.group_matcher(coarse=True)
    groups = list(group_parameters(net, matcher).values())
    patterns = [
        p for spec in matcher.values() for p in ([spec] if isinstance(spec, str) else [s[0] for s in spec or ()])
    ]
    if len(groups) > 1 and not any(re.match(pattern, groups[-1][0]) for pattern in patterns):
        groups[-2:] = [groups[-2] + groups[-1]]  # what no pattern names comes last
    return groups


def unfreeze(encoder: Backbone, stages: str) -> list[nn.Parameter]:
    """Let the last stages train, and hold everything before them still, BatchNorm's statistics included.

    Returns:
        The parameters that train.

    Raises:
        UserError: ``stages`` is neither "all" nor a number of stages that the network has.
    """
    net: nn.Module = encoder.net
    if stages == "all":
        names = {name for name, _ in net.named_parameters()}
    else:
        groups = stages_of(net)
        if not stages.isdecimal() or int(stages) >= len(groups):
            raise UserError(
                f"--stages is {stages}: {encoder.name} has {len(groups) - 1} stages, give a number up to that or all."
            )
        names = {name for group in groups[len(groups) - int(stages) :] for name in group}
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name in names)
    encoder.eval()
    moving: dict[str, bool] = {}
    for name, module in net.named_modules():  # a module comes before what is in it
        inside = [f"{name}.{inner}" if name else inner for inner, _ in module.named_parameters()]
        moving[name] = names.issuperset(inside) if inside else moving[name.rpartition(".")[0]]
        module.training = moving[name]
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def finetune(
    encoder: Backbone,
    fit: ImageSet,
    test: ImageSet,
    config: TrainConfig,
    options: FinetuneOptions,
    *,
    device: torch.device,
    keep: Path | None = None,
    start: str = "",
) -> tuple[Tensor, Tensor]:
    """Train the last stages and a new linear classifier on ``fit``, then classify ``test``.

    Views are those of supervised training: a crop, a flip, mild colour jitter; tests are whole images. Adam with a
    constant rate. Frozen stages run in evaluation mode.

    Args:
        encoder: where training starts; it is changed.
        fit: labelled images.
        test: images to classify.
        config: of the run: size of the views, crops, precision, data threads.
        options: see ``FinetuneOptions``.
        device: where the encoder is.
        keep: file that holds the state after every epoch, from which an interrupted call with the same options goes on;
            removed at the end.
        start: names the weights of ``encoder``; a kept state of other weights is not taken up.

    Returns:
        Predicted and true classes of the test images that decode, int64 [M].

    Raises:
        UserError: no such number of stages, a class without a training image, or a loss that is not finite.

    Source: the downstream training of Al Breiki, Ridzuan and Grandhe, "Self-Supervised Learning for Fine-Grained Image
    Classification", 2021. Not as there: the views (the release repeats the set under six transforms), and the new
    classifier trains (the release freezes it by a mistake in a name).
    """
    o = options
    weight = class_weights(fit.targets, fit.classes, o.class_weights)
    trained = unfreeze(encoder, o.stages)
    crop = Crop(size=config.size, scale=(config.crop_scale, 1.0), jitter=(0.2, 0.2, 0.2, 0.02))
    loader = make_loader(
        fit, ViewSpec(crops=(crop,)), o.batch_size, seed=o.seed, device=device, threads=config.threads,
        backend=config.loader,
    )  # fmt: skip
    what = {**asdict(o), "start": start, "data": str(fit.root.resolve()), "pictures": len(fit)}
    with torch.random.fork_rng():
        torch.manual_seed(o.seed)
        head = nn.Linear(encoder.dim, len(fit.classes)).to(device)
        optimizer = torch.optim.Adam([*trained, *head.parameters()], lr=o.lr, weight_decay=o.weight_decay, fused=True)
        criterion = nn.CrossEntropyLoss(None if weight is None else weight.to(device))
        modules = nn.ModuleList([encoder, head])
        try:
            for epoch in range(_resume(keep, what, modules, optimizer, loader), o.epochs):
                loss = _epoch(encoder, head, criterion, optimizer, loader, config.amp == "bf16")
                if not np.isfinite(loss):
                    raise UserError(f"The loss is not finite after epoch {epoch + 1} of fine-tuning: lower --lr.")
                if keep is not None and epoch + 1 < o.epochs:
                    state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
                    more = {"what": what, "loader": loader.state_dict(), "rng": torch.get_rng_state()}
                    save_checkpoint(keep, state | more)
        finally:
            loader.close()
    predicted, truth = extract(
        nn.Sequential(encoder, head), test, config.size, device=device, threads=config.threads, loader=config.loader
    )
    if keep is not None:
        keep.unlink(missing_ok=True)
    return predicted.argmax(1), truth


def _epoch(
    encoder: Backbone, head: nn.Linear, criterion: nn.Module, optimizer: torch.optim.Optimizer, loader: Any, amp: bool
) -> float:
    """One pass; returns the sum of the losses, so that one that is not finite shows."""
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


def _resume(
    keep: Path | None, what: dict[str, Any], modules: nn.Module, optimizer: torch.optim.Optimizer, loader: Any
) -> int:
    """Take up the kept state of an interrupted call with the same options; returns the number of epochs done."""
    if keep is None or not keep.is_file():
        return 0
    state = read_checkpoint(keep)
    if state.get("what") != what:
        return 0
    modules.load_state_dict(state["modules"])
    optimizer.load_state_dict(state["optimizer"])
    loader.load_state_dict(state["loader"])
    torch.set_rng_state(state["rng"])
    return int(state["epoch"])
