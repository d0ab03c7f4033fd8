"""SRGAN: super-resolution by a factor of 4 as the pretext task; the encoder is the generator or the discriminator."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fgfast.config import Count, Fraction, Natural, Range, TrainConfig, Weight
from fgfast.data.fidelity import psnr, ssim
from fgfast.data.normalise import normalise
from fgfast.errors import UserError
from fgfast.losses.over_ranks import count_valid, mean_valid
from fgfast.methods.base import Method, Progress, hold_as_asked
from fgfast.methods.input_stats import input_stats
from fgfast.models.backbone import Backbone
from fgfast.models.srgan import Discriminator, Generator, SRGANEncoder, check_fixed
from fgfast.models.weights import load_encoder, load_tensors

if TYPE_CHECKING:
    from fgfast.data.imageset import ImageSet
    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec

log = logging.getLogger("fgfast")

FACTOR = 4
N_SCORED = 256  # held-out images on which PSNR and SSIM are computed
MAX_DB = 60.0  # a flat window is reproduced exactly: its infinite PSNR would make the mean infinite


@dataclass
class SRGANConfig(TrainConfig):
    """Options of SRGAN."""

    model: str = "srgan"
    """Only srgan: the networks of this method, see --width and --blocks."""
    size: Annotated[int, Range(16)] = 96
    """Side of the true windows in pixels, a multiple of 4; the input of the generator has a quarter of it."""
    batch_size: Annotated[int, Range(2)] = 16
    """Images per step and process."""
    weight_decay: Weight = 0.0
    """Weight decay; not applied to norms and biases."""
    clip: Weight = 0.0
    """Largest gradient norm of both networks together; 0 disables clipping."""
    width: Count = 64
    """Channels of the generator, and of the first block of the discriminator."""
    blocks: Count = 16
    """Residual blocks of the generator."""
    gan_share: Fraction = 36 / 216
    """Fraction of the steps, at the end, that are adversarial; those before minimise only the squared error."""
    gan_lr: Weight = 1e-4
    """Peak learning rate of the adversarial steps."""
    schedule: Literal["cosine", "step"] = "cosine"
    """Learning rate: warm-up and half a cosine in each stage, or constant with a step to a tenth in the middle of the
    adversarial stage."""
    perceptual: str = "none"
    """Network of the perceptual loss: none, a run folder, a timm name (downloaded) or NAME=WEIGHTS_FILE."""
    perceptual_weight: Weight = 0.006
    """Weight of the perceptual loss."""
    adversarial_weight: Weight = 0.001
    """Weight of the generator's adversarial loss."""
    features: Literal["generator", "discriminator"] = "generator"
    """The network that is the encoder."""
    drop: Natural = 0
    """Number of its last blocks that the encoder leaves out."""
    fixed_flatten: bool = False
    """Refuse images whose final feature map in the discriminator is not 6 x 6 (81 to 96 pixels), as in the paper."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the settings released by the authors."""

    def first_adversarial(self, total: int) -> int:
        """Index of the first adversarial step of ``total``."""
        return total - round(self.gan_share * total)

    def learning_rate(self, step: int, total: int) -> float:
        """The schedule starts over with the adversarial stage: the discriminator would else start at a rate near 0."""
        first = self.first_adversarial(total)
        start, end, peak = (0, first, self.lr) if step < first else (first, total, self.gan_lr)
        if self.schedule == "step":
            return peak if step < (first + total) / 2 else 0.1 * peak
        return TrainConfig.learning_rate(replace(self, lr=peak), step - start, end - start)


class SRGAN(Method):
    """Super-resolution by 4 as the pretext task: squared error, in a second stage with an adversarial loss.

    x = G(y), y the true window t downscaled by 4 (bicubic).  First stage: loss = mean |x - t|^2.  Second stage:

        generator      |x - t|^2 + 0.006 |V(x) - V(t)|^2 - 0.001 log D(x)
        discriminator  - log D(t) - log(1 - D(x))

    V is the final feature map of ``--perceptual`` (of a VGG the one before its last pooling) for images normalised as
    that network wants; without a network the term is left out, with a warning. One optimiser holds both networks.
    The sum of the losses trains each network by its own loss: Adam's step of a parameter depends only on the gradient
    of that parameter, the discriminator's loss sees x detached, and the generator's loss sees the weights of the
    discriminator detached.

    The encoder is the generator or the discriminator without its last ``drop`` blocks, followed by average pooling; it
    takes images of any size. ``fgfast eval ... --set features=discriminator --set drop=3`` evaluates another encoder of
    the same run.

    Differences from the release and the code that it builds on: both networks are updated in the same step, not the
    discriminator first; the discriminator averages its final map into 6 x 6 cells, which is equal at 81 to 96 pixels
    and possible at other sizes (``--fixed-flatten`` refuses those); the downstream features of the generator are its
    averaged map, not a new convolution and a linear layer with 3 x 176 x 176 inputs, which fix the image size; probes
    have no class weights, where the release weights classes by their frequency. How long the release trained is
    unknown: ``--preset paper`` has the epochs, rates and losses of the code that it builds on, and should be given its
    VGG19 by ``--perceptual vgg19`` (downloaded) or ``--perceptual vgg19=FILE``. Different defaults here: a cosine in
    each stage, and a first learning rate of 1e-3. A step counts as one encoder pass in both stages.

    Source: Ledig et al., "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network", CVPR
    2017; as a pretext: Al Breiki, Ridzuan, Grandhe, "Self-Supervised Learning for Fine-Grained Image Classification",
    2021.
    """

    name = "srgan"
    shardable = False
    adds_up = True
    Config = SRGANConfig
    config: SRGANConfig
    passes_per_image = 1

    def __init__(self, config: SRGANConfig) -> None:
        super().__init__()
        if config.model != "srgan" or config.model_args or config.init == "timm" or config.compile:
            raise UserError(
                "srgan has its own networks: leave --model, --model-args, --init timm and --compile out (in a "
                "comparison with a shared model give srgan:model=srgan)."
            )
        if config.average:
            raise UserError("srgan is evaluated by parts of its networks, which have no average: leave --average out.")
        if config.size % FACTOR:
            raise UserError(f"--size is {config.size}: srgan needs a multiple of {FACTOR}.")
        if config.fixed_flatten:
            check_fixed(config.size)
        self.config = config
        self.generator = Generator(config.width, config.blocks)
        self.discriminator = Discriminator(config.width, config.fixed_flatten)
        self.adversarial = config.gan_share >= 1
        self.stats = input_stats(config)
        self._perceptual: list[Backbone] = []  # in a list, not as a submodule, as it is neither trained nor stored
        encoder = self.encoder
        if config.init != "none":
            load_encoder(encoder.net, Path(config.init))
        hold_as_asked(encoder, config)

    @classmethod
    def paper(cls, model: str | None) -> SRGANConfig:
        """The settings of the code that the release builds on; its perceptual network has to be given."""
        return SRGANConfig(
            model=model or "srgan", preset="paper", epochs=216, lr=1e-4, gan_lr=1e-4, warmup=0.0, schedule="step",
            fixed_flatten=True,
        )  # fmt: skip

    @property
    def encoder(self) -> Backbone:  # type: ignore[override]
        """The encoder, which shares the weights of the network that is trained."""
        network = self.generator if self.config.features == "generator" else self.discriminator
        return SRGANEncoder(network, self.config.drop, self.stats).train(self.training)

    @classmethod
    def stored_encoder(cls, config: TrainConfig, checkpoint: dict[str, Any]) -> Backbone:
        """The encoder stored in a checkpoint: the network and blocks that ``config`` chooses."""
        assert isinstance(config, SRGANConfig)
        method = cls(replace(config, init="none"))
        load_tensors(method, checkpoint["method"], "The weights of the checkpoint")
        return method.encoder

    def checkpoint_activations(self) -> None:
        """Those of the generator's blocks; the discriminator keeps its own."""
        self.generator.checkpoint_activations()

    def views(self) -> "ViewSpec":
        """A window at the original resolution and its copy downscaled by 4."""
        from fgfast.data.views import Patch, ViewSpec

        return ViewSpec(patch=Patch(self.config.size, FACTOR))

    def prepare(self, images: "ImageSet", run: Path, round_: int) -> None:
        """Refuse images of either split that are too small and a perceptual network that cannot be loaded."""
        from fgfast.data.base import check_patch
        from fgfast.data.layouts import open_images
        from fgfast.data.manifest import check_images
        from fgfast.ranks import on_all, ranks_of

        ranks = ranks_of(self.group, next(self.parameters()).device)
        patch = self.views().patch
        assert patch is not None

        def check() -> Backbone | None:
            check_patch(check_images(open_images(Path(self.config.data)), full=False, quiet=True, lenient=True), patch)
            return self.perceptual_network if self.config.gan_share > 0 else None

        network = on_all(ranks, check)
        if self.config.gan_share > 0 and ranks.first:
            if network is None:
                log.warning("srgan trains without a perceptual loss; give a network for it by --perceptual.")
            else:
                log.warning("srgan's perceptual loss compares feature maps of %s.", self.config.perceptual)

    @property
    def perceptual_network(self) -> Backbone | None:
        """The frozen network of the perceptual loss, loaded at the first access; None without one."""
        if not self._perceptual and self.config.perceptual != "none":
            network = load_perceptual_network(self.config.perceptual, self.config.size)
            self._perceptual.append(network.to(next(self.parameters()).device).requires_grad_(False).eval())
        return self._perceptual[0] if self._perceptual else None

    def before_step(self, progress: Progress) -> None:
        """Choose the stage of the next step."""
        self.adversarial = progress.step >= self.config.first_adversarial(progress.total)

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """Losses of the current stage, means over the valid images."""
        truth, valid = batch.patch, batch.valid
        assert truth is not None
        assert batch.reduced is not None
        generated = self.generator(batch.reduced).float()
        count = count_valid(valid, self.group)
        pixel = mean_valid((generated - truth).square().flatten(1).mean(1), valid, count=count)
        if not self.adversarial:
            return {"loss": pixel, "pixel": pixel.detach()}
        c, terms = self.config, {"pixel": pixel.detach()}
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        logits = functional_call(self.discriminator, frozen, (generated,)).float()[:, 0]
        adversarial = mean_valid(F.softplus(-logits), valid, count=count)
        real, fake = (self.discriminator(x).float()[:, 0] for x in (truth, generated.detach()))
        discriminator = mean_valid(F.softplus(-real) + F.softplus(fake), valid, count=count)
        generator = pixel + c.adversarial_weight * adversarial
        if self.perceptual_network is not None:
            with torch.no_grad():
                true_map = perceptual_map(self.perceptual_network, truth).float()
            difference = perceptual_map(self.perceptual_network, generated).float() - true_map
            perceptual = mean_valid(difference.square().flatten(1).mean(1), valid, count=count)
            generator = generator + c.perceptual_weight * perceptual
            terms["perceptual"] = perceptual.detach()
        terms |= {"adversarial": adversarial.detach(), "discriminator": discriminator.detach()}
        return {"loss": generator + discriminator, **terms}

    @torch.no_grad()
    def scores(self, device: torch.device) -> dict[str, float]:
        """Mean PSNR (dB, at most 60 per window) and SSIM of windows of held-out images, generated and bicubic."""

        def score(batch: "Batch") -> Tensor:
            assert batch.patch is not None
            assert batch.reduced is not None
            pair = self.generator(batch.reduced), bicubic(batch.reduced)
            scores = [f(x.clamp(0, 1), batch.patch).clamp(max=MAX_DB) for f in (psnr, ssim) for x in pair]
            return torch.stack(scores, 1)[batch.valid]

        names = ("psnr", "psnr_bicubic", "ssim", "ssim_bicubic")
        return self.mean_scores(names, score, 16, device, most=N_SCORED, seed=0)

    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """The input of the generator, its bicubic enlargement, the output of the generator, and the true window."""
        from fgfast.data.panels import Panel, to_pixels

        assert batch.patch is not None
        assert batch.reduced is not None
        small, truth = batch.reduced[:8], batch.patch[:8]
        enlarged = {"bicubic": bicubic(small).clamp(0, 1), "generated": self.generator(small).clamp(0, 1)}
        rows = [[Panel(to_pixels(x), "input")] for x in small]
        for name, large in enlarged.items():
            for row, x, score in zip(rows, large, psnr(large, truth), strict=True):
                row.append(Panel(to_pixels(x), f"{name}, {score:.1f} dB"))
        for row, x in zip(rows, truth, strict=True):
            row.append(Panel(to_pixels(x), "truth"))
        return {"super-resolution": rows}


def bicubic(small: Tensor) -> Tensor:
    """Images [B, 3, H, W] enlarged to [B, 3, 4 H, 4 W], with PIL's kernel (a = -1/2) and border."""
    return F.interpolate(small, scale_factor=FACTOR, mode="bicubic", antialias=True)


def load_perceptual_network(text: str, size: int) -> Backbone:
    """Load the network given by ``--perceptual``: a run folder, NAME=FILE, or a timm name.

    Raises:
        UserError: the network or its weights cannot be loaded.
    """
    from fgfast.methods.run_folder import load_run_encoder

    name, sign, file = text.partition("=")
    if Path(text).is_dir():
        return load_run_encoder(Path(text), "last", torch.device("cpu"))[0]
    if Path(text).is_file():
        raise UserError(f"--perceptual {text} is a file of weights: give its network too, such as vgg19={text}.")
    stats = input_stats(TrainConfig(model=name, init=file if sign else "timm"))
    network = Backbone(name, size=size, pretrained=not sign, stats=stats)
    if sign:
        load_encoder(network.net, Path(file))
    return network


def perceptual_map(network: Backbone, x: Tensor) -> Tensor:
    """The final feature map [B, D, h, w] of images in [0, 1], before the pooling that a VGG ends with."""
    layers = getattr(network.net, "features", None)
    pooled = isinstance(layers, nn.Sequential) and isinstance(layers[-1], nn.MaxPool2d)
    return network.pyramid(normalise(x, network.stats), 2)[1 if pooled else 0]
