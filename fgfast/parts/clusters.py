"""The source of discovered parts: clusters of the pixels of each image, with ids of its own or shared by the set."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fgfast.data.imageset import ImageSet
from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.models.probe import evaluating, probe_image
from fgfast.ops.kmeans import kmeans
from fgfast.parts.clustering import ClusteringConfig, check_pixels, discover_group, pyramid_clusters
from fgfast.parts.sources import BATCH, DiscoveryConfig, Source, read_blocks
from fgfast.ranks import gather, on_all, ranks_of, share_first

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GROUP = 30  # images that a ViT clusters together, with common ids
SAMPLED = 16_384  # vectors of parts from which shared ids are learned


class Clustered(NamedTuple):
    """A block of clustered images: positions [B], id maps int64 [B, h, w] and a vector of each part [B, K, D]."""

    rows: np.ndarray
    labels: Tensor
    vectors: Tensor


class Clusters(Source):
    """Clusters of the pixels of each image: of a CNN by ``cluster_pyramid``, of a ViT by ``discover_group``.

    With ``shared`` ids the vectors of the parts of sampled images are clustered once more by their cosine, into as many
    clusters as an image has, and a part takes the id of the nearest centroid: id 3 then means the same in every image.
    The vector of a part is its mean feature less that of its image, as what images differ in would outweigh it. Parts
    of an image with the same id become one. The background of a ViT stays id 0.

    Args:
        encoder: the network whose features are clustered.
        clustering: number of parts (maps of a ViT have one more id, for the background), levels, metric, border.
        config: sizes, origin, seed and loader.
        shared: give ids that mean the same in every image; :meth:`fit` comes before :meth:`label`.
    """

    def __init__(
        self, encoder: Backbone, clustering: ClusteringConfig, config: DiscoveryConfig, *, shared: bool = False
    ) -> None:
        super().__init__(config, encoder)
        self.clustering, self.shared = clustering, shared
        self.common = encoder.is_vit
        self.block = GROUP if encoder.is_vit else BATCH
        self.n_parts = clustering.n_parts + encoder.is_vit

    encoder: Backbone

    @property
    def side(self) -> int:
        """Side of a map: that of the grid of keys of a ViT."""
        if not self.encoder.is_vit:
            return self.config.map_size
        return (self.config.image_size - self.encoder.patch) // self.encoder.key_stride + 1

    @property
    def settings(self) -> str:
        """Sizes, levels, seed, and what differs from the release."""
        c = self.config
        text = f"image size {c.image_size}, levels {self.clustering.levels}, seed {c.seed}"
        text += "" if self.encoder.is_vit else self.clustering.describe()
        return text + (", shared ids" if self.shared else "")

    def check(self) -> None:
        """Raise a UserError if these settings, or this network for images of this size, give no parts."""
        side, net = self.config.image_size, self.encoder.net
        self._check_settings()
        self.encoder.check_side(side, "--image-size")
        if self.encoder.is_vit:
            self.encoder.check_attention()
            return
        with torch.no_grad(), evaluating(self.encoder):
            self.encoder.pyramid(probe_image(net, side), self.clustering.levels)

    def _check_settings(self) -> None:
        if not self.encoder.is_vit:
            self.clustering.check()
            check_pixels(self.clustering, self.config.map_size)

    def content(self, images: ImageSet) -> dict[str, Any]:
        """The clustering, the size of the images and the seed."""
        n_parts, vit = self.clustering.n_parts, self.encoder.is_vit
        self._check_settings()
        content: dict[str, Any] = {"image_size": self.config.image_size, "seed": self.config.seed}
        content["clustering"] = {"n_parts": n_parts, "group": GROUP} if vit else asdict(self.clustering)
        if not self.clustering.first_parts:
            content["clustering"].pop("first_parts", None)  # as versions before --first-parts had it
        return content | ({"ids": "set", "sampled": SAMPLED} if self.shared else {})

    def label(self, images: ImageSet, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield positions and id maps of blocks of images."""
        for of_block, labels, vectors in self.cluster(images, rows):
            if self.shared:
                labels = replace_ids(labels, self.nearest(vectors)[0])
            yield of_block, labels

    @torch.no_grad()
    def cluster(self, images: ImageSet, rows: np.ndarray) -> Iterator[Clustered]:
        """Yield blocks of images with ids that are not shared, and vectors of their parts.

        The vector of a part that an image lacks is NaN, as is that of the background of a ViT.
        """
        with evaluating(self.encoder):
            for of_block, whole in read_blocks(images, rows, self.block, self.config, self.device, self.stats):
                yield Clustered(of_block, *self._cluster(whole))

    def _cluster(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        if not self.encoder.is_vit:
            c = self.config
            return pyramid_clusters(self.encoder, whole, self.clustering, size=c.map_size, seed=c.seed)
        return discover_group(
            self.encoder, whole, n_parts=self.clustering.n_parts, stride=self.encoder.key_stride, seed=self.config.seed
        )

    def fit(self, images: ImageSet, group: "ProcessGroup | None" = None) -> None:
        """Learn the centroids of shared ids from the parts of sampled images, as many as make 16,384 parts.

        The memory that this takes does not grow with the set. Whole blocks are sampled, the same for any number of
        ranks, which share them; k-means runs on the joined vectors in the order of the images.

        Args:
            images: the set.
            group: processes that call this at the same time, or None.

        Raises:
            UserError: no image has a part, as all are background.
        """
        ranks = ranks_of(group, self.device)
        blocks = np.random.default_rng(self.config.seed).permutation(-(-len(images) // self.block))
        blocks = np.sort(blocks[: self._sampled_blocks])[ranks.rank :: ranks.world]
        rows = np.flatnonzero(np.isin(np.arange(len(images)) // self.block, blocks))

        def collect() -> list[tuple[np.ndarray, Tensor]]:
            return [(of_block, vectors.cpu()) for of_block, _, vectors in self.cluster(images, rows)]

        found = [block for of_rank in gather(ranks, on_all(ranks, collect)) for block in of_rank]
        found.sort(key=lambda block: int(block[0][0]))
        self.centroids = share_first(ranks, lambda: self._cluster_parts(torch.cat([vectors for _, vectors in found])))

    @property
    def _sampled_blocks(self) -> int:
        """Number of blocks of images that :meth:`fit` reads at most."""
        return max(1, SAMPLED // (self.clustering.n_parts * self.block))

    def passes(self, n_images: int) -> float:
        """How often the network sees each of ``n_images``, on average: once, and once more for the sampled ones."""
        return 1 + (min(1.0, self._sampled_blocks * self.block / n_images) if self.shared else 0)

    def _cluster_parts(self, vectors: Tensor) -> Tensor:
        """The centroids [K, D] of the parts that are there, from vectors [N, K, D]."""
        flat = torch.nn.functional.normalize(vectors[~vectors.isnan().any(2)].to(self.device), dim=1)
        if not len(flat):
            raise UserError("No image has a part that is not background: give a larger --border, or 0.")
        n_parts = min(self.clustering.n_parts, len(flat))
        result = kmeans(flat, n_parts, n_iter=100, n_init=5, metric="cosine", seed=self.config.seed)
        return result.centroids.view(n_parts, -1).cpu()

    def nearest(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The shared id of each part and its cosine with the centroid, both [B, K], from their vectors [B, K, D].

        A part that is not there keeps its id, with the cosine -1.
        """
        assert self.centroids is not None  # fit() comes first
        unit = torch.nn.functional.normalize(vectors, dim=2)
        cosine, nearest = (unit @ self.centroids.to(vectors.device).T).max(2)
        absent = vectors.isnan().any(2)
        first = int(self.encoder.is_vit)  # id 0 of a ViT is the background
        own = torch.arange(vectors.shape[1], device=vectors.device)
        return torch.where(absent, own, nearest + first), torch.where(absent, -1, cosine)


def replace_ids(labels: Tensor, ids: Tensor) -> Tensor:
    """Replace id k of image b by ``ids[b, k]``; -1 stays.

    Args:
        labels: int64 [B, H, W] in -1..K-1.
        ids: int64 [B, K].

    Example:
        >>> replace_ids(torch.tensor([[[0, 1, -1]]]), torch.tensor([[5, 4]])).tolist()
        [[[5, 4, -1]]]
    """
    flat = labels.flatten(1)
    return torch.where(flat < 0, -1, ids.gather(1, flat.clamp(min=0))).view_as(labels)
