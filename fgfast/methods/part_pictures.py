"""Figures of parts: views beside their parts, and the best examples of parts whose ids mean the same in every image."""

import heapq
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fgfast.data.decode import read_image
from fgfast.data.manifest import check_images
from fgfast.data.normalise import InputStats
from fgfast.data.panels import Panel, in_rows, overlay, to_uint8
from fgfast.parts.clusters import Clusters, replace_ids

if TYPE_CHECKING:
    from fgfast.data.imageset import ImageSet
    from fgfast.data.views import Batch

SHOWN = 8  # images of a batch that are shown
SEARCHED = 1000  # images among which examples are searched
LEARNED = 100  # images from which shared ids of a figure are learned
EXAMPLES = 6  # examples of a part
SIDE = 160  # longer side of an example in pixels


def beside(image: Tensor, labels: Tensor, caption: str, stats: InputStats) -> list[Panel]:
    """An image and the same with its parts."""
    painted = overlay(image, labels, stats=stats)
    return [Panel(to_uint8(image, stats), caption), Panel(painted, f"parts of the {caption}")]


def views_with_parts(batch: "Batch", labels: list[Tensor], stats: InputStats) -> list[list[Panel]]:
    """One row for each of up to 8 images: its views beside their id maps."""
    views = list(enumerate(zip(batch.views, labels, strict=True), start=1))
    return [
        [p for v, (x, ids) in views for p in beside(x[i], ids[i], f"view {v}", stats)]
        for i in range(min(SHOWN, len(batch)))
    ]


def best_examples(source: Clusters, images: "ImageSet") -> list[list[Panel]]:
    """One row for each part with shared ids: the images whose part is nearest to its centroid, the part outlined.

    The nearest has the largest cosine. A part that is in none of the images has no row.

    Args:
        source: the source with its centroids.
        images: the set, of which up to 1,000 images are searched.
    """
    best: dict[int, list[tuple[float, int, np.ndarray]]] = {}  # heaps of cosine, -row and mask
    images = images.sample(SEARCHED)
    for rows, labels, vectors in source.cluster(images, np.arange(len(images))):
        ids, cosine = source.nearest(vectors)
        maps = replace_ids(labels, ids).cpu().numpy()
        for place, row in enumerate(rows.tolist()):
            for part in ids[place][cosine[place] > -1].unique().tolist():
                value = float(cosine[place][ids[place] == part].max())
                heap = best.setdefault(part, [])
                add = heapq.heappush if len(heap) < EXAMPLES else heapq.heappushpop
                add(heap, (value, -row, maps[place] == part))
    return [
        [_example(images, -row, part, mask, cosine) for cosine, row, mask in sorted(best[part], reverse=True)]
        for part in sorted(best)
    ]


def discovered(source: Clusters, images: "ImageSet") -> list[list[Panel]]:
    """Up to 8 images beside their parts; with shared ids a colour is the same part in every image.

    Args:
        source: the source; shared ids are learned from up to 100 of the images.
        images: the set.

    Raises:
        UserError: no image can be read, or all of them is background.
    """
    if source.shared:
        source.fit(images.sample(LEARNED))
    images = images.sample(SHOWN)
    check_images(images)
    panels = []
    for rows, labels in source.label(images, np.arange(len(images))):
        for row, ids in zip(rows.tolist(), labels.cpu().numpy(), strict=True):
            small = thumbnail(images, row)
            panels += [Panel(small, Path(images.paths[row]).stem), Panel(overlay(small, ids), "parts")]
    return in_rows(panels, 4)


def thumbnail(images: "ImageSet", row: int) -> np.ndarray:
    """An image of a set without its banner, uint8 [H, W, 3] with a longer side of at most 160 pixels."""
    from PIL import Image

    pixels = read_image(images.file(row))
    small = Image.fromarray(pixels[: max(1, len(pixels) - images.banner)])
    small.thumbnail((SIDE, SIDE))
    return np.asarray(small)


def _example(images: "ImageSet", row: int, part: int, mask: np.ndarray, cosine: float) -> Panel:
    painted = overlay(thumbnail(images, row), np.where(mask, part, -1), alpha=0.25)
    return Panel(painted, f"part {part}, cosine {cosine:.2f}")
