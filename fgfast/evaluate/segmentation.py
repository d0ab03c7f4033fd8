"""Few-shot part segmentation: fine-tunes the network on a few images with part masks; cross-validated mIoU."""

from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast.config import TrainConfig
from fgfast.data.imageset import ImageSet
from fgfast.data.loader import Loader, make_loader
from fgfast.data.views import Crop, ViewSpec
from fgfast.errors import UserError
from fgfast.evaluate.few_shot import IGNORED, MaskClasses, SegmentationOptions, choose_images
from fgfast.evaluate.iou import count_pixels, cross_validate
from fgfast.evaluate.resume import Progress
from fgfast.models.backbone import Backbone
from fgfast.models.segmentation import Segmenter

SCORED = 32  # images of a batch when scoring


@dataclass(frozen=True)
class Segmentation:
    """Scores of a segmentation.

    Args:
        miou: mean over the folds of the mean IoU of the classes.
        deviation: standard deviation over the folds (the population's). Folds share most of their images and all of
            their checkpoints, so it says less than the spread between seeds.
        iou: IoU of each class that the test images show, mean over the folds.
        folds: mIoU of each fold.
        chosen: epochs after which the checkpoint was taken that each fold chose.
        n_labelled: labelled images.
        n_test: images that were scored.
    """

    miou: float
    deviation: float
    iou: dict[str, float]
    folds: list[float]
    chosen: list[int]
    n_labelled: int
    n_test: int

    def row(self) -> dict[str, Any]:
        """The scores as plain values, as RUN/eval.json has them beside "n_train", which is ``n_labelled``."""
        values = asdict(self)
        del values["n_labelled"]
        return {"n": values.pop("n_test"), **values}


def segment(
    encoder: Backbone, fit: ImageSet, test: ImageSet, config: TrainConfig, options: SegmentationOptions, *,
    device: torch.device, state_file: Path | None = None, start: str = "",
) -> Segmentation:  # fmt: skip
    """Fine-tune an encoder and a new decoder on a few images with masks, and score the masks of test images.

    All weights are trained with Adam at a constant rate on the cross-entropy of the pixels. Images are resized to the
    training size of the run without keeping their aspect ratio, masks by nearest neighbour; training images get colour
    jitter (0.2, with probability 0.5) and a flip, under which left and right parts swap. Every few epochs all test
    images are scored; :func:`fgfast.evaluate.iou.cross_validate` then chooses a checkpoint in each fold. The same seed
    gives the same result on a CPU; on a GPU, where resizing backwards adds in any order, up to roundings.

    Args:
        encoder: the network to start from; it is changed.
        fit: images with masks, from which the labelled ones are drawn.
        test: images with masks to score.
        config: configuration of the run: size of the images, precision, data threads.
        options: see :class:`fgfast.evaluate.few_shot.SegmentationOptions`.
        device: device of the encoder.
        state_file: file for the state after every checkpoint, from which an interrupted call with the same options
            resumes; the caller removes it once it has stored what this call returns.
        start: identifies the weights of ``encoder``; the state of other weights is ignored.

    Raises:
        UserError: see :func:`fgfast.evaluate.few_shot.choose_images`; the encoder has neither a map nor keys, or a
            value is not finite.

    Source: the few-shot evaluation of Saha and Maji, "PARTICLE: Part Discovery and Contrastive Learning for
    Fine-grained Recognition", 2023. Not reproduced: crops to the box of the labelled pixels (whole images are used);
    the last stage of ResNet without stride (the network is taken as the run has it: ``--set
    model_args=output_stride=16`` takes the stride away); parts that overlap, with a binary loss each (an id map has one
    part a pixel); the release's swap of left and right, which makes both the left one.
    """
    o, few = options, choose_images(fit, test, options)
    call = {**asdict(o), "start": start, "data": str(fit.root.resolve()), "images": list(few.labelled.paths)}
    with torch.random.fork_rng():
        torch.manual_seed(o.seed)
        net = Segmenter(encoder.requires_grad_(True), len(few.classes.names), config.size).to(device)
        optimizer = torch.optim.Adam(net.parameters(), lr=o.lr, fused=True)
        crop = Crop(size=config.size, scale=None, flip=0.5, jitter=(0.2, 0.2, 0.2, 0.0), jitter_p=0.5)
        with (
            closing(make_loader(
                few.labelled, ViewSpec(crops=(crop,), masks=True).with_stats(encoder.stats),
                min(o.batch_size, len(few.labelled)), drop_last=True, seed=o.seed, maps=few.labelled.masks,
                device=device, threads=config.threads, backend=config.loader,
            )) as labelled,
            closing(make_loader(
                few.test, ViewSpec(whole=config.size, whole_masks=True).with_stats(encoder.stats), SCORED,
                shuffle=False, maps=few.test.masks, device=device, threads=config.threads, backend=config.loader,
            )) as scored,
        ):  # fmt: skip
            progress = Progress(state_file, call, net, optimizer, labelled)
            state = progress.load()
            counts = list(state.get("counts", ()))
            for epoch in range(state["epoch"] + 1, o.epochs + 1):
                loss = _train_epoch(net, few.classes, optimizer, labelled, config.amp == "bf16")
                if not np.isfinite(loss):
                    raise UserError(f"The loss is not finite after epoch {epoch} of segmentation: lower --lr.")
                if epoch in _checkpoints(o):
                    counts.append(_count(net, few.classes, scored, len(few.test)))
                    progress.save(epoch, counts=torch.stack(counts))
    result = cross_validate(torch.stack(counts).numpy(), few.folds)
    shown = [c for c in range(len(few.classes.names)) if not np.isnan(result.classes[:, c]).all()]
    return Segmentation(
        miou=float(result.scores.mean()),
        deviation=float(result.scores.std()),
        iou={few.classes.names[c]: float(np.nanmean(result.classes[:, c])) for c in shown},
        folds=result.scores.tolist(),
        chosen=[_checkpoints(o)[i] for i in result.chosen],
        n_labelled=len(few.labelled),
        n_test=len(few.test),
    )


def _checkpoints(options: SegmentationOptions) -> list[int]:
    """The epochs after which the test images are scored."""
    return sorted({*range(options.every, options.epochs + 1, options.every), options.epochs})


def _train_epoch(
    net: Segmenter, classes: MaskClasses, optimizer: torch.optim.Optimizer, loader: Loader, amp: bool
) -> float:
    """One epoch; returns the sum of the losses, which is finite only if all of them are."""
    net.train()
    total = torch.zeros((), device=next(net.parameters()).device)
    for batch in loader:
        valid = batch.valid
        images, flipped = batch.views[0][valid], batch.boxes[valid, 0, 4] > 0.5
        if len(images) < 2:  # others were lost; a BatchNorm may need two
            continue
        truth = classes.of(batch.labels[0][valid], flipped)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            logits = net(images)
        loss = F.cross_entropy(logits.float(), truth, ignore_index=IGNORED, reduction="sum")
        loss = loss / (truth != IGNORED).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return float(total)


@torch.no_grad()
def _count(net: Segmenter, classes: MaskClasses, loader: Loader, n_images: int) -> Tensor:
    """Pixels of every image and class that agree, are predicted and are true, int64 [M, 3, C], on the CPU."""
    net.eval()
    counts = torch.zeros(n_images, 3, len(classes.names), dtype=torch.int64)
    for batch in loader:
        assert batch.whole is not None  # the specification asks for both
        assert batch.whole_labels is not None
        valid = batch.valid
        logits = net(batch.whole[valid])
        if not logits.isfinite().all():
            raise UserError("The logits of a segmentation are not finite: lower --lr.")
        truth = classes.of(batch.whole_labels[valid])
        counts[batch.index[valid].cpu()] = count_pixels(logits.argmax(1), truth, len(classes.names), IGNORED).cpu()
    return counts
