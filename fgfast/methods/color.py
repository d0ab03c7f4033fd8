"""Colourisation: predict the colours of a grey image."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgfast.config import Count, Fraction, TrainConfig
from fgfast.data.lab import lab_to_rgb, lightness, rgb_to_lab, to_grey
from fgfast.data.normalise import denormalise
from fgfast.errors import UserError
from fgfast.files import digest_of, write_json
from fgfast.losses.over_ranks import count_valid, mean_valid
from fgfast.methods.ab_classes import AbClasses, rebalancing_weights
from fgfast.methods.base import Method, build_encoder
from fgfast.models.probe import evaluating
from fgfast.ranks import gather, on_all, on_first, ranks_of, share_first

if TYPE_CHECKING:
    from fgfast.data.imageset import ImageSet
    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec

log = logging.getLogger("fgfast")

STRIDE = 4  # a colour is predicted for every 4 x 4 pixels


@dataclass
class ColorConfig(TrainConfig):
    """Options of colourisation."""

    grey_input: ClassVar[bool] = True

    hidden: Count = 128
    """Width of the decoder."""
    uniform: Fraction = 0.5
    """Weight of the uniform distribution in the prior by whose inverse colours are weighted; 1 weights all equally."""
    prior_pictures: Count = 10_000
    """Largest number of training images on which that prior is measured."""


class Color(Method):
    """The encoder sees only lightness; a decoder predicts, for every 4 x 4 pixels, one of the bins of the ab plane.

    loss = mean over positions of  w(z) x ( - sum_q z_q log p_q ),   z the soft label of the colour over its five
    nearest bins, p = softmax(decoder(encoder(grey))), and w the weight of the nearest bin,

    w = 1 / ((1 - uniform) prior + uniform / Q), scaled to expectation 1 under the prior. The prior is the distribution
    of the colours of the training images, smoothed by a Gaussian of 5 units; it is measured before training and stored
    in RUN/colours.json. In evaluation too the encoder sees grey images. "accuracy" is the fraction of positions whose
    nearest bin is predicted.

    Differences from the paper: the network (any timm model with a decoder of two layers, not a dilated VGG), the bins
    (309 that surround the colours of sRGB; the release has 313), colours averaged over 4 x 4 pixels before they are
    assigned to classes, the prior (of the training images, not of ImageNet), random crops, the optimiser. The CLS token
    of a ViT, which is what evaluation uses, is added to its patch tokens; otherwise it would get no gradient.

    Source: Zhang, Isola, Efros, "Colorful Image Colorization", ECCV 2016.
    """

    name = "color"
    adds_up = True
    Config = ColorConfig
    config: ColorConfig
    passes_per_image = 1
    held_out = ("accuracy",)

    def __init__(self, config: ColorConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.classes = AbClasses()
        self.narrow = nn.Conv2d(self.encoder.map_dim, config.hidden, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(config.hidden)
        self.classifier = nn.Conv2d(config.hidden, len(self.classes), 1)
        self.weights = torch.ones(len(self.classes))  # not a buffer: RUN/colours.json holds the prior

    def views(self) -> "ViewSpec":
        """One crop with flip and no colour changes."""
        from fgfast.data.views import Crop, ViewSpec

        return ViewSpec(crops=(Crop(size=self.config.size, scale=(self.config.crop_scale, 1.0), jitter_p=0.0),))

    def prepare(self, images: "ImageSet", run: Path, round_: int) -> Path | None:
        """Measure the prior of the colours, or read it if this run has measured it before on the same images."""
        ranks = ranks_of(self.group, self.classes.centres.device)
        chosen = images.sample(self.config.prior_pictures)
        paths = digest_of([images.banner, *chosen.paths])
        measured = {"pictures": len(chosen), "of": len(images), "size": self.config.size, "images": paths}
        file = run / "colours.json"
        prior = share_first(ranks, lambda: self._read_prior(file, measured | {"root": str(images.root)}))
        if prior is None:
            prior = self.measure_prior(chosen).tolist()
            stored = {"root": str(images.root), **measured, "prior": prior}
            on_first(ranks, lambda: write_json(file, stored | {"digest": digest_of(stored)}))
        weights = rebalancing_weights(torch.tensor(prior, dtype=torch.float64), self.config.uniform)
        self.weights = weights.float().to(self.classes.centres.device)
        return None

    def _read_prior(self, file: Path, measured: dict[str, Any]) -> list[float] | None:
        """The prior in a file; None if it was changed since it was written, or is of other images."""
        if not file.exists():
            return None
        try:
            stored = json.loads(file.read_bytes())
            digest = stored.pop("digest", None)
            earlier = digest is None and "images" not in stored
            prior = stored.pop("prior")
            unknown = "images" if earlier else "root"  # of which a set may move
            same = all(stored.get(name) == measured[name] for name in measured if name != unknown)
            whole = len(prior) == len(self.classes) and min(prior) >= 0 and abs(sum(prior) - 1) < 1e-6
            if same and whole and (earlier or digest == digest_of(stored | {"prior": prior})):
                return list(map(float, prior))
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
            pass  # it is no file of this run, or one that was mended by hand
        log.warning("%s is damaged, or of other images or another size: the colours are measured again.", file)
        return None

    @torch.no_grad()
    def measure_prior(self, images: "ImageSet") -> Tensor:
        """Smoothed distribution of the colours of full images over the bins, float64 [Q] on the CPU.

        The images have the resolution of the predictions; the ranks share them.
        """
        from fgfast.data.loader import make_loader
        from fgfast.data.views import ViewSpec

        c, device = self.config, self.classes.centres.device
        ranks = ranks_of(self.group, device)

        def count() -> Tensor:
            loader = make_loader(
                images, ViewSpec(whole=c.size).with_stats(self.encoder.stats), c.batch_size, shuffle=False,
                device=device, threads=c.threads, rank=ranks.rank, world=ranks.world, backend=c.loader, lenient=True,
            )  # fmt: skip
            counts = torch.zeros(len(self.classes), dtype=torch.float64, device=device)
            try:
                for batch in loader:
                    assert batch.whole is not None  # the spec asks for it
                    counts += self.classes.histogram(self.colours(batch.whole[batch.valid]))
            finally:
                loader.close()
            return counts.cpu()

        counts = torch.stack(gather(ranks, on_all(ranks, count))).sum(0)
        if not counts.sum() > 0:
            raise UserError(f"No image of {images.root} could be read to measure the colours: check the data.")
        return self.classes.smooth(counts.to(device)).cpu()

    def colours(self, images: Tensor) -> Tensor:
        """Mean colour of every 4 x 4 pixels of normalised images [B, 3, S, S], in ab, [B * (S / 4)^2, 2]."""
        side = images.shape[-1] // STRIDE
        small = F.adaptive_avg_pool2d(denormalise(images, self.encoder.stats).clamp(0, 1), side)
        return rgb_to_lab(small)[:, 1:].permute(0, 2, 3, 1).reshape(-1, 2)

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, S / 4, S / 4, Q] of normalised images [B, 3, S, S]."""
        features = self.encoder.features(images)
        size = (images.shape[-2], images.shape[-1])
        x = self.encoder.to_map(features, size)
        if self.encoder.is_vit:
            x = x + self.encoder.pool(features)[:, :, None, None]
        x = F.interpolate(self.narrow(x), (size[0] // STRIDE, size[1] // STRIDE), mode="bilinear")
        return self.classifier(self.norm(x).relu()).permute(0, 2, 3, 1)

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """Weighted cross-entropy with soft labels, and accuracy, over the positions of the valid images."""
        images = batch.views[0]
        logits = self.logits(images).flatten(0, 2).float()  # [N, Q]
        with torch.no_grad():
            index, soft = self.classes.encode(self.colours(images))  # [N, 5]
            positions = len(logits) // len(batch)
            valid = batch.valid.repeat_interleave(positions, output_size=len(logits))
            count = count_valid(valid, self.group)
            correct = (logits.argmax(1) == index[:, 0]).float()
        losses = self.weights.to(index.device)[index[:, 0]] * (
            logits.logsumexp(1) - (soft * logits.gather(1, index)).sum(1)
        )
        return {
            "loss": mean_valid(losses, valid, count=count), "accuracy": mean_valid(correct, valid, count=count),
        }  # fmt: skip

    @torch.no_grad()
    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """The input of the encoder, the predicted colours (annealed mean), and the image."""
        from fgfast.data.panels import Panel, to_uint8

        shown, stats = batch.views[0][:8], self.encoder.stats
        with evaluating(self):
            ab = self.classes.annealed_mean(self.logits(shown)).permute(0, 3, 1, 2)
        ab = F.interpolate(ab, shown.shape[-2:], mode="bilinear")
        predicted = lab_to_rgb(torch.cat([lightness(denormalise(shown, stats).clamp(0, 1)), ab], 1))
        grey = to_grey(shown, stats)
        rows = [
            [
                Panel(to_uint8(grey[i], stats), "grey"),
                Panel(to_uint8((255 * predicted[i]).round().byte()), "predicted colours"),
                Panel(to_uint8(image, stats), "image"),
            ]
            for i, image in enumerate(shown)
        ]
        return {"colours": rows}
