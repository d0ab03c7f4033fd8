"""PARTICLE: discover parts by clustering pixels, then contrast them across two views."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from fgfast.config import Count, Fraction, Natural, Positive, Range, TrainConfig, Weight
from fgfast.errors import UserError
from fgfast.losses import DINOLoss, PartContrastiveLoss
from fgfast.losses.over_ranks import sample_images
from fgfast.methods.base import Progress, build_encoder
from fgfast.methods.chunked import ChunkedMethod, by_image, by_view
from fgfast.methods.mocov3 import byol_views
from fgfast.methods.part_sources import BY_NETWORK, STORED, Parts, count_parts, make_source, true_masks
from fgfast.methods.simclr import nt_xent
from fgfast.models.backbone import Backbone, is_vit
from fgfast.models.heads import MLP, DINOHead, cosine_momentum, momentum_copy, update_momentum
from fgfast.models.probe import evaluating
from fgfast.parts.clustering import ClusteringConfig, check_pixels, cluster_keys, cluster_pyramid, grid_labels
from fgfast.parts.clusters import Clusters
from fgfast.parts.keypoints import check_points
from fgfast.parts.rounds import Rounds
from fgfast.parts.sources import DiscoveryConfig

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from fgfast.data.imageset import ImageSet
    from fgfast.data.panels import Panel
    from fgfast.data.views import Batch, ViewSpec


@dataclass
class PARTICLEConfig(TrainConfig):
    """Options of PARTICLE."""

    parts: Parts = "discovered"
    """Source of the id maps: clusters found before each round, or in each step (online); masks of the data set (truth);
    cells of its key points; segments of even colour (felzenszwalb); foreground and background by the network's own
    attention (saliency); fixed grid cells; or random ids."""
    ids: Literal["image", "set"] = "image"
    """Ids of discovered parts: of each image on their own, or clustered once more so that an id means the same in every
    image of the set."""
    maps: str = ""
    """Folder of id maps written by fgfast discover, for --parts discovered; no parts are discovered then."""
    rounds: Count = 1
    """Rounds of training; before each one, parts are discovered with the current network."""
    n_parts: Annotated[int, Range(2, 254)] = 15
    """Clusters per image (ViT: foreground parts; 5 in the paper); for felzenszwalb, the largest segments."""
    max_parts: Natural = 10
    """Parts sampled per image and view; 0 takes all."""
    negatives: Literal["all", "same_image", "other_images"] = "all"
    """Negatives of a part: all other parts, or only those of the same image or of other images."""
    levels: Count = 4
    """Number of feature maps in the hypercolumns, from the last one; 1 takes only the final feature map."""
    metric: Literal["euclidean", "cosine"] = "euclidean"
    """Distance of pixels in the clustering of a CNN; a ViT always uses cosine."""
    border: Weight = 0.0
    """Clusters of a CNN with more than border x sqrt(area) pixels on the image border are background (try 1); 0 keeps
    all clusters."""
    position: Weight = 0.0
    """Variance of the pixel coordinates that are appended to the features in the clustering of a CNN, relative to the
    variance of the features; 0 appends none."""
    first_parts: Annotated[int, Range(0, 254)] = 0
    """Clusters of a first stage for a CNN: those that --border keeps are the foreground, which is clustered alone into
    --n-parts; 0 clusters all pixels at once."""
    discover_size: Natural = 0
    """Side to which full images are resized for discovery; 0 takes twice --size."""
    map_size: Annotated[int, Range(2)] = 64
    """Side of the id maps in pixels."""
    grid: Annotated[int, Range(1, 15)] = 4
    """Cells per side, for --parts grid."""
    temperature: Positive = 0.1
    """Temperature of the contrast."""
    hidden: Count = 512
    """Width of the hidden layers of projector and predictor."""
    projection: Count = 128
    """Width of the projection."""
    norm: Literal["batch", "layer"] = "layer"
    """Norm in the heads; the statistics of batch include the zero vectors of absent parts."""
    target: Literal["momentum", "self"] = "momentum"
    """Network of the keys: a momentum copy, with a predictor for the queries (DetCon-B), or the same (DetCon-S)."""
    momentum: Fraction = 0.99
    """Start of the momentum encoder's decay, which rises to 1 as a cosine."""
    image_weight: Weight = 0.0
    """Weight of NT-Xent between complete views, added to the contrast of parts (CNN only); 0 leaves it out."""
    dino_weight: Weight = 1.0
    """Weight of the DINO loss (ViT only)."""
    prototypes: Annotated[int, Range(2)] = 4096
    """Outputs of the DINO head (65,536 in the paper)."""
    preset: Literal["small", "paper"] = "small"
    """paper takes the settings released by the authors for --model."""

    def check(self) -> None:
        """Refuse maps that are not used, and settings of the clustering that exclude each other."""
        if self.maps and self.parts != "discovered":
            raise UserError(f"--maps needs --parts discovered, not {self.parts}: leave one of them out.")
        if self.ids == "set" and (self.maps or self.parts != "discovered"):
            given = "--maps" if self.maps else f"--parts {self.parts}"
            raise UserError(f"--ids set is for parts that are discovered, not for {given}: leave one of them out.")
        self.clustering.check()

    @property
    def clustering(self) -> ClusteringConfig:
        """The settings of the clustering."""
        return ClusteringConfig(self.n_parts, self.levels, self.metric, self.border, self.position, self.first_parts)


_PAPER: dict[bool, dict[str, Any]] = {
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

IMAGE_TEMPERATURE = 0.2  # temperature of NT-Xent between complete views: the default of SimCLR
ONLINE_REDUCTION = 4  # factor by which id maps of --parts online are smaller: closer to the resolution of pooling


class PARTICLE(ChunkedMethod):
    """Part discovery and part contrast (DetCon-B loss); for a ViT together with DINO.

    Before each round the pixels of every image are clustered. In training the id map of an image is cropped with each
    view, the final feature map of the encoder is averaged over each part, and

        loss = PartContrast(predictor(projector(part)), projector'(part')) in both directions,

    where the primed networks are momentum copies (``--target self``: the networks themselves, without predictor, as in
    DetCon-S). A ViT adds ``dino_weight`` x DINO on the CLS tokens of both views. For a CNN the paper contrasts only
    parts; ``--image-weight``, which is not in the paper, adds NT-Xent between the averages over complete views.

    Different defaults here: heads of 512 and 128, momentum from 0.99 to 1, blur in proportion to the size of the views;
    parts that are absent from a view are masked out, and the mean is taken over the rows with a positive. ``--preset
    paper`` has the released settings. Not reproduced, as mistakes of the release: ids drawn for absent parts, which
    become positives of each other; solarise at 0.5 for images in 0..255 (128 here); a warm-up that is computed and
    never applied; momentum capped in early steps. Crops are resized bilinearly unless the weights say otherwise
    (released: bicubic). Also left out: the dense CRF of the ViT recipe, as its package no longer builds; its drop path
    of 0.1 (give ``--model-args drop_path_rate=0.1``); the constant momentum of the CNN recipe, which rises to 1 here.
    Weights from which the authors start: ``--init PATH``, refined gently unless ``--preset paper`` is given.

    Source: Saha and Maji, "PARTICLE: Part Discovery and Contrastive Learning for Fine-grained Recognition", 2023;
    Henaff et al., "Efficient Visual Pretraining with Contrastive Detection", 2021.
    """

    name = "particle"
    Config = PARTICLEConfig
    config: PARTICLEConfig

    def __init__(self, config: PARTICLEConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.encoder = build_encoder(config)
        self.n_parts = count_parts(config, self.encoder.is_vit)
        if config.parts in ("discovered", "online") and not config.maps and not self.encoder.is_vit:
            check_pixels(config.clustering, config.map_size if config.parts == "discovered" else self.online_size)
        self.shardable = config.parts not in STORED or bool(config.maps)
        with_copy = config.target == "momentum"
        made_by_network = config.parts in BY_NETWORK and not config.maps
        if self.encoder.is_vit and (made_by_network or config.parts == "online"):
            self.encoder.check_attention()
        if made_by_network or config.parts == "online":
            self.encoder.check_side(self.discover_size, "--discover-size")
        if self.encoder.is_vit and not with_copy:
            raise UserError("A ViT is trained by DINO too, which needs a momentum copy: leave --target self out.")
        self.passes_per_image = (4 if with_copy else 2) + (self.discovery_passes if config.parts == "online" else 0)
        self.passes_to_prepare = self.discovery_passes if made_by_network else 0
        dim, head = self.encoder.dim, config.projection
        projector = MLP((self.encoder.map_dim, config.hidden, head), config.norm)
        predictor = MLP((head, config.hidden, head), config.norm) if with_copy else None
        self.target = momentum_copy(self.encoder) if with_copy else None
        self.part_loss = PartContrastiveLoss(
            self.n_parts, projector, predictor, momentum_copy(projector) if with_copy else None, config.temperature,
            config.negatives, max_parts=config.max_parts or None,
        )  # fmt: skip
        if config.image_weight:
            if self.encoder.is_vit:
                raise UserError("A ViT contrasts complete views by DINO (--dino-weight): leave --image-weight out.")
            self.image_projector = MLP((dim, config.hidden, head))
        if self.encoder.is_vit:
            self.dino_head = DINOHead(dim, config.prototypes)
            self.target_dino_head = momentum_copy(self.dino_head)
            self.dino = DINOLoss(config.prototypes, teacher_temp=0.07, warmup_teacher_temp_epochs=20)
        self.epoch = 0
        how = DiscoveryConfig(
            self.discover_size, config.map_size, "the images shown", config.seed, config.threads, config.loader,
            network=f"{config.model} {config.model_args}",
        )  # fmt: skip
        build = partial(build_encoder, replace(config, init="none"))
        self.rounds = Rounds(partial(make_source, config, self.n_parts), how, build)

    @classmethod
    def paper(cls, model: str | None) -> PARTICLEConfig:
        """The released settings, for ResNet-50 or ViT-S/8; give their DetCon or DINO weights by ``init``."""
        import timm

        model = model or "resnet50"
        if not timm.is_model(model):
            return PARTICLEConfig(model=model)  # building the encoder raises the error
        return PARTICLEConfig(model=model, preset="paper", **_PAPER[is_vit(model)])

    def get_extra_state(self) -> dict[str, Any]:
        """The epoch, on which DINO's teacher temperature depends, and the round with a digest of its first weights."""
        return {"epoch": self.epoch, **self.rounds.state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the epoch and the round from a checkpoint."""
        self.epoch = state["epoch"]
        self.rounds.load(state)

    def set_group(self, group: "ProcessGroup | None") -> None:
        """Contrast the parts of the images of all ranks."""
        super().set_group(group)
        self.part_loss.group = group

    def set_rng(self, rng: torch.Generator | None) -> None:
        """Sample parts and random ids by ``rng``."""
        super().set_rng(rng)
        self.part_loss.generator = rng

    def views(self) -> "ViewSpec":
        """The BYOL pair without grey: blur 1.0 and 0.1, solarise 0 and 0.2; id maps or the full image as needed."""
        parts = self.config.parts
        pair, whole = byol_views(self.config, grayscale=0.0), self.discover_size if parts == "online" else None
        return replace(pair, masks=parts in (*STORED, "truth"), whole=whole)

    @property
    def online_size(self) -> int:
        """Side of the id maps of --parts online in pixels."""
        return max(2, self.config.map_size // ONLINE_REDUCTION)

    @property
    def discover_size(self) -> int:
        """Side of the full image in discovery in pixels."""
        return self.config.discover_size or 2 * self.config.size

    @property
    def discovery_passes(self) -> float:
        """A pass over the full image, in passes over a view."""
        return (self.discover_size / self.config.size) ** 2

    def check_training_set(self, images: "ImageSet") -> None:
        """Refuse images without a label for --parts truth, as they have no masks, and a set without a visible point."""
        if self.config.parts == "truth" and (images.targets < 0).any():
            raise UserError("--parts truth has no masks of images without a label: choose other --parts.")
        if self.config.parts == "keypoints":
            check_points(images)

    def passes_before_round(self, n_images: int) -> float:
        """Those over the full images, some of which shared ids are learned from before all are labelled."""
        source = self.rounds.make(self.encoder, self.rounds.config)
        return super().passes_before_round(n_images) * source.passes(n_images)

    def prepare(self, images: "ImageSet", run: Path, round_: int) -> Path | None:
        """Make the id maps of a round, or return the masks of the data set."""
        c = self.config
        if c.parts == "truth":
            return true_masks(c.data)
        if c.parts not in STORED:
            return None
        if c.maps:
            return Path(c.maps)
        return self.rounds.prepare(self.encoder, images, run, round_, self.group)

    def figure_maps(self, images: "ImageSet", run: Path, scratch: Path) -> Path | None:
        """The masks of the data set, the given maps, or those of the round, which are found again if they are lost."""
        if self.config.parts in STORED and not self.config.maps:
            return self.rounds.for_figures(self.encoder, images, run, scratch)
        return self.prepare(images, run, 0)

    def labels(self, batch: "Batch") -> list[Tensor]:
        """The id map of each view, int64 [B, S, S], -1 where there is no part."""
        from fgfast.data.views import warp_labels

        c = self.config
        if c.parts in (*STORED, "truth"):
            return batch.labels
        side = batch.views[0].shape[-1]
        if c.parts == "random":
            cells = self.grid_side(side)

            def sample(n: int, **options: Any) -> Tensor:
                return torch.randint(c.n_parts, (n, cells, cells), **options)

            return [sample_images(sample, len(batch), v.device, self.group, self.rng) for v in batch.views]
        if c.parts == "grid":
            full = grid_labels(len(batch), c.grid, batch.boxes.device)
        else:
            full = self.cluster(batch.whole, self.online_size)
        return [warp_labels(full, batch.boxes[:, v], side) for v in range(len(batch.views))]

    def cluster(self, images: Tensor | None, size: int) -> Tensor:
        """Parts of full images, int64 [B, size, size] (ViT: its grid), by the momentum encoder if there is one."""
        assert images is not None  # views() asks for them
        c = self.config
        network = self.encoder if self.target is None else self.target
        with evaluating(network):
            if self.encoder.is_vit:
                return cluster_keys(network, images, n_parts=c.n_parts, seed=c.seed)
            return cluster_pyramid(network, images, c.clustering, size=size, n_iter=10, seed=c.seed)

    def grid_side(self, side: int) -> int:
        """Side of the final feature map of the encoder for views of ``side`` pixels."""
        if not hasattr(self, "_sides"):
            self._sides: dict[int, int] = {}
        if side not in self._sides:
            self._sides[side] = self.encoder.map_side(side)
        return self._sides[side]

    def check_chunks(self) -> None:
        """Refuse --parts online, which clusters the images of a step together."""
        if self.config.parts == "online":
            raise UserError("--micro-batch cannot split the clustering of --parts online: choose other --parts.")

    def annotate(self, batch: "Batch") -> "Batch":
        """The batch with the id maps of its valid images: they are drawn or found for all of them at once."""
        return replace(batch, labels=[torch.where(batch.valid[:, None, None], x, -1) for x in self.labels(batch)])

    def represent(self, batch: "Batch") -> tuple[Tensor, ...]:
        """Pooled parts [B, 2, K, D], their areas [B, 2, K], and features [B, 2, D] of the views if these are used."""
        pooled, areas, features = self._pool(self.encoder, batch)
        used = self.encoder.is_vit or self.config.image_weight
        return (pooled, areas, by_image(self.encoder.pool(features), 2)) if used else (pooled, areas)

    def represent_targets(self, batch: "Batch") -> tuple[Tensor, ...]:
        """Momentum parts [B, 2, K, D], and features [B, 2, D] of the views for DINO."""
        if self.target is None:
            return ()
        pooled, _, features = self._pool(self.target, batch)
        return (pooled, by_image(self.target.pool(features), 2)) if self.encoder.is_vit else (pooled,)

    def _pool(self, encoder: Backbone, batch: "Batch") -> tuple[Tensor, Tensor, Tensor]:
        """Mean features and areas of the parts, and the unpooled features of both views."""
        features, shape = encoder.features(torch.cat(batch.views)), batch.views[0].shape
        f1, f2 = encoder.to_map(features, (shape[-2], shape[-1])).chunk(2)
        return *self.part_loss.pool(f1, f2, *batch.labels), features

    def compare(self, online: tuple[Tensor, ...], targets: tuple[Tensor, ...], batch: "Batch") -> dict[str, Tensor]:
        """Part contrast of both views; DINO for a ViT, and NT-Xent of complete views if it has a weight."""
        pooled, areas, *images = online
        part = self.part_loss.contrast(pooled, areas, targets[0] if targets else None)
        if self.config.image_weight:
            image = nt_xent(self.image_projector(by_view(images[0])), batch, IMAGE_TEMPERATURE, self.group)
            return {"loss": part + self.config.image_weight * image, "part": part.detach(), "image": image.detach()}
        if not self.encoder.is_vit:
            return {"loss": part}
        student = self.dino_head(by_view(images[0])).chunk(2)
        with torch.no_grad():
            teacher = self.target_dino_head(by_view(targets[1])).chunk(2)
        dino = self.dino(list(teacher), list(student), epoch=self.epoch, valid=batch.valid, group=self.group)
        return {"loss": part + self.config.dino_weight * dino, "part": part.detach(), "dino": dino.detach()}

    def after_step(self, progress: Progress) -> None:
        """Update the momentum copies; the decay rises from ``momentum`` to 1 as a cosine."""
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
        """Images and the parts that the current network finds in them, and views beside their parts."""
        from fgfast.data.panels import in_rows
        from fgfast.methods.part_pictures import SHOWN, beside, views_with_parts

        stats = self.encoder.stats
        figures: dict[str, list[list[Panel]]] = {}
        if batch.whole is not None:
            found = zip(batch.whole[:SHOWN], self.cluster(batch.whole[:SHOWN], self.config.map_size), strict=True)
            figures["parts"] = in_rows([p for image, ids in found for p in beside(image, ids, "image", stats)], 4)
        return figures | {"views": views_with_parts(batch, self.labels(batch), stats)}

    def set_pictures(self, images: "ImageSet", run: Path) -> "dict[str, list[list[Panel]]]":
        """The best examples of parts with ``--ids set``, found by the network that found the parts of the run."""
        if self.config.ids == "image":
            return {}
        from fgfast.methods.part_pictures import best_examples

        source = self.rounds.source(self.encoder, run)
        assert isinstance(source, Clusters)  # --parts discovered
        return {"part examples": best_examples(source, images)}
