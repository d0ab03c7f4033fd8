"""PARTICLE: parts found by clustering pixels, then contrasted across two views."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from fgfast.config import Count, Fraction, Natural, Positive, Range, TrainConfig, Weight
from fgfast.errors import UserError
from fgfast.losses import DINOLoss, PartContrastiveLoss
from fgfast.methods.base import Method, Progress, build_encoder
from fgfast.methods.simclr import nt_xent
from fgfast.models.heads import MLP, DINOHead, cosine_momentum, momentum_copy, update_momentum
from fgfast.parts.clustering import ClusteringConfig, check_pixels, cluster_keys, cluster_pyramid, grid_labels
from fgfast.parts.discover import discover

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fgfast.data.imageset import ImageSet
    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec


@dataclass
class PARTICLEConfig(TrainConfig):
    """Options of PARTICLE."""

    parts: Literal["discovered", "online", "truth", "grid", "random"] = "discovered"
    """Id maps: stored clusters, clusters made inside the step, the set's own masks, fixed cells, or noise."""
    maps: str = ""
    """Folder of id maps for --parts discovered, as fgfast discover writes them; none are discovered then."""
    rounds: Count = 1
    """Outer rounds: before each, parts are discovered anew with the network as it is."""
    n_parts: Annotated[int, Range(2, 254)] = 15
    """Clusters an image (ViT: foreground parts; 5 in the paper)."""
    max_parts: Natural = 10
    """Parts sampled an image and view; 0 takes all that are there."""
    negatives: Literal["all", "same_image", "other_images"] = "all"
    """Which parts a part is contrasted with."""
    levels: Count = 4
    """Last maps of the network that the hypercolumns take, at most all of them; 1 is the last map alone."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """Distance of pixels in the clustering of a CNN; a ViT's keys always take cosine."""
    border: Weight = 0.0
    """Clusters of a CNN that touch the border by more than border x sqrt(area) are background (1, say); 0 keeps all."""
    position: Weight = 0.0
    """Variance of the pixels' coordinates, in units of the features', which join them in the clustering of a CNN."""
    discover_size: Natural = 0
    """Side to which the whole image is squashed for discovery; 0 is twice the training size."""
    map_size: Annotated[int, Range(2)] = 64
    """Side of the id maps."""
    grid: Annotated[int, Range(1, 15)] = 4
    """Cells a side of --parts grid."""
    temperature: Positive = 0.1
    """Temperature of the contrast."""
    hidden: Count = 512
    """Width of the hidden layers of projector and predictor."""
    projection: Count = 128
    """Width of the projection."""
    norm: Literal["batch", "layer"] = "layer"
    """Norm inside the heads; "batch" also counts the zero rows of absent parts."""
    target: Literal["momentum", "self"] = "momentum"
    """Keys of the contrast: a momentum copy behind a predictor (DetCon-B), or the network itself (DetCon-S)."""
    momentum: Fraction = 0.99
    """Start of the momentum encoder's decay, which rises to 1 as a cosine."""
    image_weight: Weight = 0.0
    """Weight of NT-Xent between whole views beside the contrast of parts (CNN only); 0 leaves it out."""
    dino_weight: Weight = 1.0
    """Weight of the DINO loss (ViT only)."""
    prototypes: Annotated[int, Range(2)] = 4096
    """Outputs of the DINO head (65,536 in the paper)."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the released settings of the authors for the network at hand."""

    def check(self) -> None:
        """Refuse maps that are not used, and a clustering that cannot be."""
        if self.maps and self.parts != "discovered":
            raise UserError(f"--maps are the parts of --parts discovered, not {self.parts}: leave one of them out.")
        self.clustering.check()

    @property
    def clustering(self) -> ClusteringConfig:
        """How pixels are clustered."""
        return ClusteringConfig(self.n_parts, self.levels, self.metric, self.border, self.position)


_PAPER = {
    False: {  # CNN
        "size": 224, "n_parts": 15, "max_parts": 10, "hidden": 4096, "projection": 256, "norm": "layer",
        "momentum": 0.996, "optimizer": "sgd", "lr": 0.005, "weight_decay": 1.5e-6, "batch_size": 320, "epochs": 600,
        "crop_scale": 0.08, "clip": 0.0, "warmup": 0.0, "discover_size": 224, "amp": "off",
    },
    True: {  # ViT
        "size": 224, "n_parts": 5, "max_parts": 6, "hidden": 2048, "projection": 256, "norm": "layer",
        "momentum": 0.996, "optimizer": "adamw", "lr": 2.5e-8, "weight_decay": 0.4, "batch_size": 64, "epochs": 100,
        "crop_scale": 0.08, "clip": 3.0, "warmup": 0.1, "prototypes": 65_536, "amp": "off",
    },
}  # fmt: skip


IMAGE_TEMPERATURE = 0.2  # of NT-Xent between whole views: SimCLR's default
ONLINE = 4  # id maps made inside a step are this much smaller than stored ones: nearer to the grid that pools


class PARTICLE(Method):
    """Part discovery and part contrast (DetCon-B loss); for a ViT together with DINO.

    Before each round the pixels of every image are clustered; in training the id map of an image is warped with
    each view, the maps of the encoder are averaged over each part, and

        loss = PartContrast(predictor(projector(part)), projector'(part')) over both directions,

    where the primed networks are momentum copies (``--target self``: the networks themselves, and no predictor, as in
    DetCon-S). A ViT adds ``dino_weight`` x DINO on the CLS tokens of both views. For a CNN the paper has the parts
    alone; ``--image-weight`` is ours and adds NT-Xent between the averages of whole views, which nothing trains else.

    Defaults that are ours: heads of 512 and 128, momentum 0.99 to 1, blur scaled by the size of the views, parts that
    are absent from a view masked and the mean taken over the rows with a positive.
    ``--preset paper`` gives the released settings. Quirks of the release that are not reproduced, because they are
    mistakes there: ids drawn for absent parts become positives of each other (masked here); solarise at 0.5 of a
    0..255 image (128 here); a warm-up that is computed and never applied; momentum capped in early steps. Left out
    besides: the dense CRF of the ViT recipe, as its package no longer builds, and its drop path of 0.1 (give it by
    ``--model-args drop_path_rate=0.1``); the CNN's flat momentum, which rises to 1 here. The weights that the authors
    start from are given by ``--init PATH``.

    Source: Saha and Maji, "PARTICLE: Part Discovery and Contrastive Learning for Fine-grained Recognition", 2023;
    Henaff et al., "Efficient Visual Pretraining with Contrastive Detection", 2021.
    """

    name = "particle"
    Config = PARTICLEConfig

    def __init__(self, config: PARTICLEConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.encoder = build_encoder(config)
        self.n_parts = self._count_parts()
        if config.parts in ("discovered", "online") and not config.maps and not self.encoder.is_vit:
            check_pixels(config.n_parts, config.map_size if config.parts == "discovered" else self.online_size)
        with_copy = config.target == "momentum"
        if self.encoder.is_vit and not with_copy:
            raise UserError("A ViT learns by DINO too, which needs its momentum copy: leave --target self out.")
        whole = (self.discover_size / config.size) ** 2  # a pass over the whole image, in passes over a view
        self.passes_per_image = (4 if with_copy else 2) + (whole if config.parts == "online" else 0)
        self.passes_to_prepare = whole if config.parts == "discovered" and not config.maps else 0
        dim, head = self.encoder.dim, config.projection
        projector = MLP((dim, config.hidden, head), config.norm)
        predictor = MLP((head, config.hidden, head), config.norm) if with_copy else None
        self.target = momentum_copy(self.encoder) if with_copy else None
        self.part_loss = PartContrastiveLoss(
            self.n_parts, projector, predictor, momentum_copy(projector) if with_copy else None, config.temperature,
            config.negatives, max_parts=config.max_parts or None,
        )  # fmt: skip
        if config.image_weight:
            if self.encoder.is_vit:
                raise UserError("A ViT contrasts whole views by DINO (--dino-weight): leave --image-weight out.")
            self.image_projector = MLP((dim, config.hidden, head))
        if self.encoder.is_vit:
            self.dino_head = DINOHead(dim, config.prototypes)
            self.target_dino_head = momentum_copy(self.dino_head)
            self.dino = DINOLoss(config.prototypes, teacher_temp=0.07, warmup_teacher_temp_epochs=20)
        self.epoch = 0

    @classmethod
    def paper(cls, model: str | None) -> PARTICLEConfig:
        """The released settings: ResNet-50 or ViT-S/8; their DetCon or DINO weights are given by ``init``."""
        import timm

        model = model or "resnet50"
        if not timm.is_model(model):
            return PARTICLEConfig(model=model)  # building the encoder says what is wrong
        is_vit = model.startswith(("vit_", "deit"))
        return PARTICLEConfig(model=model, preset="paper", **_PAPER[is_vit])  # type: ignore[arg-type]

    def _count_parts(self) -> int:
        config = self.config
        if config.parts == "grid":
            return config.grid**2
        if config.parts == "truth":
            from fgfast.data.maps import read_maps_info

            return int(read_maps_info(self._truth())["n_parts"])
        if config.parts == "discovered" and config.maps:
            from fgfast.data.maps import read_maps_info

            return int(read_maps_info(Path(config.maps))["n_parts"])
        return config.n_parts + int(self.encoder.is_vit and config.parts == "discovered")

    def _truth(self) -> Path:
        from fgfast.data.layouts import open_images

        masks = open_images(Path(self.config.data)).masks
        if masks is None:
            raise UserError(f"{self.config.data} has no part masks: choose another --parts than truth.")
        return masks

    def get_extra_state(self) -> dict[str, int]:
        """The epoch, which DINO's teacher temperature follows; kept in checkpoints."""
        return {"epoch": self.epoch}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Take the epoch from a checkpoint."""
        self.epoch = state["epoch"]

    def set_group(self, group: "ProcessGroup | None") -> None:
        """Contrast the parts of all ranks."""
        super().set_group(group)
        self.part_loss.group = group

    def views(self) -> "ViewSpec":
        """The BYOL pair without grey: blur 1.0 and 0.1, solarise 0 and 0.2; id maps or the whole image as needed."""
        from fgfast.data.views import Crop, ViewSpec

        c = self.config
        sigma = (0.1, max(0.2, 2.0 * c.size / 224))
        common: dict[str, Any] = {"size": c.size, "scale": (c.crop_scale, 1.0), "blur_sigma": sigma}
        crops = (Crop(blur=1.0, **common), Crop(blur=0.1, solarize=0.2, **common))
        online = c.parts == "online"
        return ViewSpec(
            crops=crops, masks=c.parts in ("discovered", "truth"), whole=self.discover_size if online else None
        )

    @property
    def online_size(self) -> int:
        """Side of the id maps that are made inside a step, pixels."""
        return max(2, self.config.map_size // ONLINE)

    @property
    def discover_size(self) -> int:
        """Side of the whole image in discovery, pixels."""
        return self.config.discover_size or 2 * self.config.size

    def check_training_set(self, images: "ImageSet") -> None:
        """The set's own masks are needed for every image."""
        if self.config.parts == "truth" and (images.targets < 0).any():
            raise UserError("--parts truth has no masks of images without a label: choose other --parts.")

    def prepare(self, images: "ImageSet", run: Path, round_: int) -> Path | None:
        """Discover the parts of a round, or point to the set's own masks."""
        c = self.config
        if c.parts == "truth":
            return self._truth()
        if c.parts != "discovered":
            return None
        if c.maps:
            return Path(c.maps)
        out = run / f"parts_{round_}"
        if not (out / "maps.json").exists():
            discover(
                self.encoder, images, out, self.config.clustering, image_size=self.discover_size, map_size=c.map_size,
                run=f"{run.name}, round {round_}", device=next(self.parameters()).device, threads=c.threads,
                seed=c.seed, loader=c.loader,
            )  # fmt: skip
        return out

    def labels(self, batch: "Batch") -> list[Tensor]:
        """The id map of each view, int64 [B, S, S], -1 where no part is."""
        from fgfast.data.views import warp_labels

        c = self.config
        if c.parts in ("discovered", "truth"):
            return batch.labels
        side = batch.views[0].shape[-1]
        if c.parts == "random":
            shape = (len(batch), self.grid_side(side), self.grid_side(side))
            return [torch.randint(c.n_parts, shape, device=v.device) for v in batch.views]
        grid = c.parts == "grid"
        whole = (
            grid_labels(len(batch), c.grid, batch.boxes.device) if grid else self.cluster(batch.whole, self.online_size)
        )
        return [warp_labels(whole, batch.boxes[:, v], side) for v in range(len(batch.views))]

    @torch.no_grad()
    def cluster(self, images: Tensor | None, size: int) -> Tensor:
        """Parts of whole images by the momentum encoder, if there is one, int64 [B, size, size] (ViT: its grid)."""
        assert images is not None  # views() asks for them
        c = self.config
        network = self.encoder if self.target is None else self.target
        was_training = network.training
        network.eval()
        try:
            if self.encoder.is_vit:
                return cluster_keys(network, images, n_parts=c.n_parts, seed=c.seed)
            return cluster_pyramid(network, images, self.config.clustering, size=size, n_iter=10, seed=c.seed)
        finally:
            network.train(was_training)

    def grid_side(self, side: int) -> int:
        """Side of the encoder's map for views of ``side`` pixels."""
        if not hasattr(self, "_sides"):
            self._sides: dict[int, int] = {}
        if side not in self._sides:
            self._sides[side] = self.encoder.map_side(side)
        return self._sides[side]

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """Part contrast of both views, and DINO for a ViT."""
        size = (batch.views[0].shape[-2], batch.views[0].shape[-1])
        labels = [torch.where(batch.valid[:, None, None], m, -1) for m in self.labels(batch)]
        both = torch.cat(batch.views)
        online = self.encoder.features(both)
        f1, f2 = self.encoder.to_map(online, size).chunk(2)
        targets: tuple[Tensor, ...] = ()
        if self.target is not None:
            with torch.no_grad():
                momentum = self.target.features(both)
            targets = self.target.to_map(momentum, size).chunk(2)
        part = self.part_loss(f1, f2, labels[0], labels[1], *targets)
        if self.config.image_weight:
            z = self.image_projector(self.encoder.pool(online))
            image = nt_xent(z, batch, IMAGE_TEMPERATURE, self.group)
            return {"loss": part + self.config.image_weight * image, "part": part.detach(), "image": image.detach()}
        if not self.encoder.is_vit:
            return {"loss": part}
        assert self.target is not None  # a ViT has it
        student = self.dino_head(self.encoder.pool(online)).chunk(2)
        with torch.no_grad():
            teacher = self.target_dino_head(self.target.pool(momentum)).chunk(2)
        dino = self.dino(list(teacher), list(student), epoch=self.epoch)
        return {"loss": part + self.config.dino_weight * dino, "part": part.detach(), "dino": dino.detach()}

    def after_step(self, progress: Progress) -> None:
        """Move the momentum copies; the decay rises from ``momentum`` to 1 as a cosine."""
        self.epoch = int(progress.fraction * self.config.epochs)
        if self.target is None:
            return
        decay = cosine_momentum(self.config.momentum, progress.fraction)
        target_projector = self.part_loss.target_projector
        assert target_projector is not None  # given in __init__
        pairs: list[tuple[nn.Module, nn.Module]] = [
            (self.target, self.encoder),
            (target_projector, self.part_loss.projector),
        ]
        if self.encoder.is_vit:
            pairs.append((self.target_dino_head, self.dino_head))
        for target, online in pairs:
            update_momentum(target, online, decay)

    def pictures(self, batch: "Batch") -> "dict[str, list[list[Panel]]]":
        """Parts over whole photographs as the network finds them now, and its views, each beside its parts."""
        from fgfast.data.panels import Panel, in_rows, overlay, to_uint8

        def beside(image: Tensor, labels: Tensor, caption: str) -> list[Panel]:
            return [Panel(to_uint8(image), caption), Panel(overlay(image, labels), f"parts of the {caption}")]

        shown = range(min(8, len(batch)))
        found: dict[str, list[list[Panel]]] = {}
        if batch.whole is not None:
            parts = self.cluster(batch.whole, self.config.map_size)
            found["parts"] = in_rows([p for i in shown for p in beside(batch.whole[i], parts[i], "photograph")], 4)
        views = list(enumerate(zip(batch.views, self.labels(batch), strict=True), start=1))
        found["views"] = [[p for v, (x, ids) in views for p in beside(x[i], ids[i], f"view {v}")] for i in shown]
        return found
