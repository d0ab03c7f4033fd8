"""The sources of parts that methods choose from: which one an option names, and how many parts it gives."""

from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from fgfast.data.layouts import open_images
from fgfast.data.maps import read_maps_info
from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.parts.clustering import ClusteringConfig
from fgfast.parts.clusters import Clusters
from fgfast.parts.keypoints import KeyPoints, count_points
from fgfast.parts.saliency import Saliency
from fgfast.parts.segments import Segments
from fgfast.parts.sources import DiscoveryConfig, Source

Parts: TypeAlias = Literal["discovered", "online", "truth", "keypoints", "felzenszwalb", "saliency", "grid", "random"]
STORED = ("discovered", "keypoints", "felzenszwalb", "saliency")  # id maps that are made before a round, and kept
BY_NETWORK = ("discovered", "saliency")  # those of them that the network makes


class Options(Protocol):
    """The options that say where parts come from."""

    data: str
    parts: Parts
    ids: Literal["image", "set"]
    maps: str
    n_parts: int
    grid: int

    @property
    def clustering(self) -> ClusteringConfig:
        """The settings of the clustering."""


def count_parts(options: Options, is_vit: bool) -> int:
    """The number of ids of the parts that the options choose.

    Raises:
        UserError: the data set or the folder of maps does not have such parts.
    """
    if options.parts == "grid":
        return options.grid**2
    if options.parts == "saliency":
        return Saliency.n_parts
    if options.parts == "keypoints":
        return count_points(open_images(Path(options.data)))
    if options.parts == "truth" or options.maps:
        maps = true_masks(options.data) if options.parts == "truth" else Path(options.maps)
        return int(read_maps_info(maps)["n_parts"])
    return options.n_parts + int(is_vit and options.parts == "discovered")


def true_masks(data: str) -> Path:
    """The folder of the part masks of a data set.

    Raises:
        UserError: it has none.
    """
    masks = open_images(Path(data)).masks
    if masks is None:
        raise UserError(f"{data} has no part masks: choose another --parts than truth.")
    return masks


def make_source(options: Options, n_parts: int, encoder: Backbone, config: DiscoveryConfig) -> Source:
    """The source that makes the id maps of ``--parts``, one of :data:`STORED`.

    Args:
        options: the options.
        n_parts: what :func:`count_parts` gave.
        encoder: the network of :data:`BY_NETWORK`; of it the others take only the device.
        config: sizes, origin and loader.
    """
    if options.parts == "discovered":
        return Clusters(encoder, options.clustering, config, shared=options.ids == "set")
    if options.parts == "saliency":
        return Saliency(encoder, config)
    device = next(encoder.parameters()).device
    if options.parts == "keypoints":
        return KeyPoints(n_parts, config, device)
    return Segments(n_parts, config, device=device)
