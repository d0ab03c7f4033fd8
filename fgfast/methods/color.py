"""Colourisation: which colour has each place of a grey image?"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgfast.config import Count, Fraction, TrainConfig
from fgfast.data.lab import lab_to_rgb, lightness, rgb_to_lab, to_grey
from fgfast.data.normalise import denormalise
from fgfast.errors import UserError
from fgfast.methods.ab_classes import AbClasses, rebalancing_weights
from fgfast.methods.base import Method, build_encoder

if TYPE_CHECKING:
    from fgfast.data.imageset import ImageSet
    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec

STRIDE = 4  # pixels of a view a side for each colour that is predicted


@dataclass
class ColorConfig(TrainConfig):
    """Options of colourisation."""

    grey_input: ClassVar[bool] = True

    hidden: Count = 128
    """Width of the decoder."""
    uniform: Fraction = 0.5
    """Share of the uniform distribution in the prior that rare colours are weighted by; 1 weights all alike."""
    prior_pictures: Count = 10_000
    """Training images, at most, on which that prior is measured."""


class Color(Method):
    """The encoder sees lightness alone; a decoder tells the colour, as one of the bins of the ab plane, every 4 pixels.

    loss = mean over places of  w(z) x ( - sum_q z_q log p_q ),   z the soft label of the place's colour over its five
    nearest bins, p = softmax(decoder(encoder(grey))), and w the weight of the nearest bin,

    w = 1 / ((1 - uniform) prior + uniform / Q), with expectation 1 under the prior, that of the training images
    smoothed by a Gaussian of 5 units. It is measured before training and kept in RUN/colours.json. In evaluation the
    encoder sees grey images too. "accuracy" is the share of places whose nearest bin is told.

    What is ours: the network (any of timm's with a decoder of two layers, instead of a dilated VGG), the bins (309 that
    surround the colours of sRGB, where the release has 313), colours averaged over 4 x 4 pixels before they become
    classes, a prior of the training images and not of ImageNet, random crops, the optimiser. A ViT's CLS, which is
    what is evaluated, is added to its patches, or it would learn nothing.

    Source: Zhang, Isola, Efros, "Colorful Image Colorization", ECCV 2016.
    """

    name = "color"
    Config = ColorConfig
    passes_per_image = 1
    held_out = ("accuracy",)

    def __init__(self, config: ColorConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config)
        self.classes = AbClasses()
        self.narrow = nn.Conv2d(self.encoder.dim, config.hidden, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(config.hidden)
        self.classifier = nn.Conv2d(config.hidden, len(self.classes), 1)
        self.weights = torch.ones(len(self.classes))  # no buffer: a run's own file holds the prior

    def views(self) -> "ViewSpec":
        """One crop with flip; the colours stay."""
        from fgfast.data.views import Crop, ViewSpec

        return ViewSpec(crops=(Crop(size=self.config.size, scale=(self.config.crop_scale, 1.0), jitter_p=0.0),))

    def prepare(self, images: "ImageSet", run: Path, round_: int) -> Path | None:
        """Measure the prior of the colours, or read it where this run has done so before."""
        from fgfast.files import write_json

        chosen = np.sort(np.random.default_rng(0).permutation(len(images))[: self.config.prior_pictures])
        measured = {"root": str(images.root), "pictures": len(chosen), "of": len(images), "size": self.config.size}
        file = run / "colours.json"
        found = json.loads(file.read_text()) if file.is_file() else {}
        if {k: found.get(k) for k in measured} != measured:
            found = {**measured, "prior": self.measure(images.subset(chosen)).tolist()}
            write_json(file, found)
        prior = torch.tensor(found["prior"], dtype=torch.float64)
        self.weights = rebalancing_weights(prior, self.config.uniform).float().to(self.classes.centres.device)
        return None

    @torch.no_grad()
    def measure(self, images: "ImageSet") -> Tensor:
        """Smoothed prior over the bins of whole images at the size of the predictions, float64 [Q] on the CPU."""
        from fgfast.data.loader import make_loader
        from fgfast.data.views import ViewSpec

        c, device = self.config, self.classes.centres.device
        loader = make_loader(
            images, ViewSpec(whole=c.size), c.batch_size, shuffle=False, device=device, threads=c.threads,
            backend=c.loader,
        )  # fmt: skip
        counts = torch.zeros(len(self.classes), dtype=torch.float64, device=device)
        try:
            for batch in loader:
                assert batch.whole is not None  # the spec asks for it
                counts += self.classes.histogram(self.colours(batch.whole[batch.valid]))
        finally:
            loader.close()
        if not counts.sum() > 0:
            raise UserError(f"No image of {images.root} could be read for the prior of its colours: check the data.")
        return self.classes.smoothed(counts).cpu()

    def colours(self, images: Tensor) -> Tensor:
        """Mean colour of every 4 x 4 pixels of normalised images [B, 3, S, S], ab [B * (S / 4)^2, 2]."""
        side = images.shape[-1] // STRIDE
        small = F.adaptive_avg_pool2d(denormalise(images).clamp(0, 1), side)
        return rgb_to_lab(small)[:, 1:].permute(0, 2, 3, 1).reshape(-1, 2)

    def logits(self, images: Tensor) -> Tensor:
        """Logits [B, S / 4, S / 4, Q] of normalised images [B, 3, S, S]."""
        features = self.encoder.features(images)
        size = (images.shape[-2], images.shape[-1])
        found = self.encoder.to_map(features, size)
        if self.encoder.is_vit:
            found = found + self.encoder.pool(features)[:, :, None, None]
        found = F.interpolate(self.narrow(found), (size[0] // STRIDE, size[1] // STRIDE), mode="bilinear")
        return self.classifier(self.norm(found).relu()).permute(0, 2, 3, 1)

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """Weighted cross-entropy with soft labels and accuracy over the places of the valid images."""
        images = batch.views[0]
        logits = self.logits(images).flatten(0, 2).float()  # [N, Q]
        with torch.no_grad():
            index, soft = self.classes.encode(self.colours(images))  # [N, 5]
            places = len(logits) // len(batch)
            counted = batch.valid.repeat_interleave(places, output_size=len(logits))
            count = counted.sum().clamp(min=1)
            right = ((logits.argmax(1) == index[:, 0]) & counted).sum()
        losses = self.weights.to(index.device)[index[:, 0]] * (
            logits.logsumexp(1) - (soft * logits.gather(1, index)).sum(1)
        )
        return {"loss": torch.where(counted, losses, 0).sum() / count, "accuracy": right / count}

    @torch.no_grad()
    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """What the encoder sees, the colours that are told (annealed mean), and the photograph."""
        from fgfast.data.panels import Panel, to_uint8

        shown = batch.views[0][:8]
        was_training = self.training
        self.eval()
        try:
            ab = self.classes.annealed_mean(self.logits(shown)).permute(0, 3, 1, 2)
        finally:
            self.train(was_training)
        ab = F.interpolate(ab, shown.shape[-2:], mode="bilinear")
        told = lab_to_rgb(torch.cat([lightness(denormalise(shown).clamp(0, 1)), ab], 1))
        grey = to_grey(shown)
        rows = [
            [
                Panel(to_uint8(grey[i]), "grey"),
                Panel(to_uint8((255 * told[i]).round().byte()), "colours told"),
                Panel(to_uint8(photograph), "photograph"),
            ]
            for i, photograph in enumerate(shown)
        ]
        return {"colours": rows}
