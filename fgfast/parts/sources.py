"""Part sources: what gives the pixels of every image of a set their part ids, block by block."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fgfast.data.imageset import ImageSet
from fgfast.data.loader import make_loader
from fgfast.data.manifest import check_images
from fgfast.data.normalise import IMAGENET, InputStats
from fgfast.data.views import ViewSpec
from fgfast.files import digest_of
from fgfast.models.backbone import Backbone
from fgfast.parts.folder import FORMAT, Origin, weights_digest

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PIXELS = InputStats((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
BATCH = 32  # images that are labelled at once, each separately


class DiscoveryConfig(NamedTuple):
    """How the id maps of a set are made, apart from the source.

    Args:
        image_size: side to which the images are resized, ignoring their aspect ratio.
        map_size: side of the id maps; those of clustered ViTs have the size of its grid of keys.
        run: origin of the maps, for maps.json.
        seed: seed of the k-means starts.
        threads: threads of the loader.
        loader: backend of the loader.
        network: options of the network beside its weights, such as its --model and --model-args.
    """

    image_size: int
    map_size: int
    run: str
    seed: int = 0
    threads: int = 2
    loader: str = "auto"
    network: str = ""


class Source(ABC):
    """Gives the pixels of every image of a set their part ids, in blocks that depend on its place in the set only.

    Attributes:
        config: sizes, origin, seed and loader.
        encoder: the network that it looks at, or None.
        device: the device of images and of what ranks exchange; that of the network if there is one.
        n_parts: number of ids.
        side: side of a map in pixels.
        block: number of consecutive images that are labelled together.
        common: whether the images of a block have common ids, so that one lost map needs all of them made again.
        centroids: float32 [K, D], what a source with shared ids has learned from the set; else None.
        shared: whether it needs :attr:`centroids`.
    """

    n_parts: int
    block = BATCH
    common = False
    shared = False

    def __init__(
        self, config: DiscoveryConfig, encoder: Backbone | None = None, device: torch.device | None = None
    ) -> None:
        self.config, self.encoder, self.centroids = config, encoder, None
        if encoder is not None:
            device = next(encoder.parameters()).device
        self.device = torch.device("cpu") if device is None else device

    encoder: Backbone | None
    centroids: Tensor | None

    @property
    def side(self) -> int:
        """Side of a map in pixels."""
        return self.config.map_size

    @property
    def stats(self) -> InputStats:
        """How images are resized and normalised: as the network takes them, or as pixels in [0, 1] without one."""
        return PIXELS if self.encoder is None else self.encoder.stats

    @property
    @abstractmethod
    def settings(self) -> str:
        """Its settings in words."""

    @abstractmethod
    def content(self, images: ImageSet) -> dict[str, Any]:
        """All that changes a map beside the network, its weights, the paths of the images and the sizes, for a digest.

        Raises:
            UserError: the images cannot be labelled with these settings.
        """

    @abstractmethod
    def label(self, images: ImageSet, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield positions [B] and id maps, int64 [B, side, side] on any device, -1 for no part.

        Args:
            images: the set.
            rows: ascending positions of the images to label; those that cannot be read are left out.
        """

    def fit(self, images: ImageSet, group: "ProcessGroup | None" = None) -> None:
        """Learn :attr:`centroids` from a set, for a source that is ``shared``; all ranks call it at the same time."""
        raise NotImplementedError(f"{type(self).__name__} has no shared ids.")

    def passes(self, n_images: int) -> float:
        """How often the network sees each of ``n_images``, on average."""
        return 0 if self.encoder is None else 1

    def describe(self, weights: str = "") -> str:
        """The network, by a digest of its weights, and the settings in words."""
        return self.settings if self.encoder is None else f"weights {weights[:12]}, {self.settings}"

    def origin(self, images: ImageSet, weights: str = "") -> Origin:
        """Check the settings and describe the maps that they give.

        Args:
            images: the images.
            weights: :func:`weights_digest` of the network's weights if they are not those of now.

        Raises:
            UserError: the images cannot be labelled with these settings.
        """
        c, content = self.config, self.content(images)
        content |= {"format": FORMAT, "images": digest_of([images.banner, *images.paths]), "side": self.side}
        if self.encoder is not None:
            weights = weights or weights_digest(self.encoder.net)
            content |= {"weights": weights, "network": [self.encoder.name, self.encoder.grey, c.network]}
            if self.stats != IMAGENET:  # as versions before --mean had it
                content["statistics"] = self.stats.texts()
        run = f"{c.run}, {self.describe(weights)}"
        return Origin(run, self.n_parts, self.side, digest_of(content), self.block, self.common)


def readable(images: ImageSet, rows: np.ndarray) -> np.ndarray:
    """Those of the positions whose images can be read."""
    return rows[np.isin(rows, check_images(images, quiet=True, lenient=True).index)]


def read_blocks(
    images: ImageSet, rows: np.ndarray, size: int, config: DiscoveryConfig, device: torch.device, stats: InputStats
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield the positions and the full images [B, 3, H, W] of blocks of consecutive images of a set.

    Args:
        images: the set.
        rows: ascending positions of the images to read; unreadable ones are left out.
        size: images per block; image i of the set is in block i // size.
        config: side of the images and loader.
        device: device of the images.
        stats: how they are resized and normalised.
    """
    rows = readable(images, rows)
    if not len(rows):
        return
    batches = make_loader(
        images.subset(rows), ViewSpec(whole=config.image_size).with_stats(stats), size, shuffle=False, device=device,
        threads=config.threads, backend=config.loader, lenient=True,
    )  # fmt: skip
    read: list[tuple[int, Tensor]] = []

    def block() -> tuple[np.ndarray, Tensor]:
        return np.array([row for row, _ in read]), torch.stack([image for _, image in read])

    try:
        for batch in batches:
            assert batch.whole is not None  # the specification asks for it
            for row, image in zip(rows[batch.index[batch.valid].cpu().numpy()], batch.whole[batch.valid], strict=True):
                if read and read[-1][0] // size != row // size:
                    yield block()
                    read.clear()
                read.append((int(row), image))
    finally:
        batches.close()
    if read:
        yield block()
