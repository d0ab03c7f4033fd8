"""The figure of the README, computed on a drawn bird: ``python -m fgfast.report.overview OUT.png``.

The encoder has random weights: the figure shows what the operations compute, not what training gains.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from fgfast.data.layouts import open_images
from fgfast.data.manifest import read_image
from fgfast.data.normalise import normalise
from fgfast.data.palette import label_colours
from fgfast.data.panels import overlay
from fgfast.data.synthetic import generate
from fgfast.models.backbone import Backbone
from fgfast.ops.part_pool import part_pool
from fgfast.parts.clustering import ClusteringConfig, cluster_pyramid
from fgfast.report.plots import FAINT, INK

SIDE = 256  # pixels of the image
WINDOWS = ((6, 16, 180), (30, 36, 216))  # left, top and side of the two views
VIEW = 448  # pixels to which the views are enlarged for the encoder
DIMENSIONS = 32  # of a part vector, as drawn
WIDTH, HEIGHT = 1600, 510
PANELS = (  # left edge, title, caption
    (20, "1  Image", "No labels. Two random crops\nare its views."),
    (420, "2  Clusters", "k-means of its feature maps\ngives parts and background."),
    (820, "3  Pooled parts", "One vector per part and view:\nthe mean of its features."),
    (1220, "4  Contrast", "Similarity across views: equal parts\nattract (boxes), others repel."),
)


def draw_image() -> NDArray[np.uint8]:
    """One drawn bird, uint8 [SIDE, SIDE, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        data = generate(Path(folder, "set"), classes=6, images=12, size=SIDE, seed=1, difficulty=0.2, nuisance=0.4)
        return read_image(open_images(data).files()[7])


def cluster(encoder: Backbone, image: Tensor) -> Tensor:
    """Id map int64 [SIDE, SIDE]: parts are 0, 1, ... from the largest to the smallest, -1 is background."""
    config = ClusteringConfig(n_parts=14, position=2.5, border=0.6)
    labels = cluster_pyramid(encoder, image, config, size=SIDE // 2)[0].repeat_interleave(2, 0).repeat_interleave(2, 1)
    rank = torch.bincount(labels[labels >= 0], minlength=config.n_parts).argsort(descending=True).argsort()
    return torch.where(labels < 0, -1, rank[labels.clamp(min=0)])


def add_panel(figure: Figure, image: NDArray[Any], left: int, top: int, width: int, height: int, **how: Any) -> Axes:
    """Axes of the given place and size in pixels that show ``image``."""
    axes = figure.add_axes((left / WIDTH, 1 - (top + height) / HEIGHT, width / WIDTH, height / HEIGHT))
    axes.imshow(image, **how)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes


def draw_overview() -> Image.Image:
    """Four panels: an image and two views, its clusters, the pooled parts of both views, their contrast."""
    torch.manual_seed(0)
    encoder = Backbone("resnet18", size=SIDE, args={"output_stride": 8}).eval()
    pixels = draw_image()
    image = normalise(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255, encoder.stats)
    labels = cluster(encoder, image)
    n_parts = int(labels.max()) + 1
    colours = label_colours(n_parts) / 255
    views, ids = ([x[..., y : y + n, x0 : x0 + n] for x0, y, n in WINDOWS] for x in (image, labels))
    with torch.no_grad():
        maps = [encoder.pyramid(interpolate(v, (VIEW, VIEW), mode="bilinear"), 1)[0] for v in views]
    vectors = torch.cat([part_pool(m, i[None], n_parts).pooled for m, i in zip(maps, ids, strict=True)])  # [2, K, D]
    vectors = vectors[:, :, vectors.std((0, 1)) > 0]
    vectors = (vectors - vectors.mean((0, 1))) / vectors.std((0, 1))
    similarity = normalize(vectors[0], dim=1) @ normalize(vectors[1], dim=1).T  # [K, K]

    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor="white")
    canvas = FigureCanvasAgg(figure)
    for x, title, caption in PANELS:
        figure.text(x / WIDTH, 1 - 40 / HEIGHT, title, fontsize=19, fontweight="bold", color=INK)
        figure.text(x / WIDTH, 1 - 446 / HEIGHT, caption, fontsize=14.5, color=FAINT, va="top", linespacing=1.35)
    axes = add_panel(figure, pixels, 20, 60, 370, 370)
    for left, top, side in WINDOWS:
        axes.add_patch(Rectangle((left, top), side, side, fill=False, color="white", linewidth=3))
    add_panel(figure, overlay(pixels, labels), 420, 60, 370, 370)
    panels = []
    for i, top in enumerate((60, 250)):
        panels.append(add_panel(figure, overlay(views[i][0], ids[i], stats=encoder.stats), 820, top, 180, 180))
        bars = add_panel(figure, vectors[i, :, :DIMENSIONS].numpy(), 1010, top, 150, 180, cmap="PuOr", vmin=-2, vmax=2)
        bars.hlines(np.arange(1, n_parts) - 0.5, -0.5, DIMENSIONS - 0.5, color="white", linewidth=4)
        bars.barh(range(n_parts), -2.5, left=-1, color=colours, height=0.8)
        bars.set(xlim=(-3.5, DIMENSIONS - 0.5), aspect="auto")
    for part, colour in enumerate(colours):
        (y0, x0), (y1, x1) = ((i == part).nonzero().float().mean(0).tolist() for i in ids)
        ends: dict[str, Any] = {"xyA": (x0, y0), "xyB": (x1, y1), "axesA": panels[0], "axesB": panels[1]}
        figure.add_artist(ConnectionPatch(coordsA="data", **ends, color=colour, linewidth=2.5))
    axes = add_panel(figure, similarity.numpy(), 1220, 78, 352, 352, cmap="RdBu_r", vmin=-1.4, vmax=1.4)
    for part, colour in enumerate(colours):
        axes.add_patch(Rectangle((part - 0.46, part - 0.46), 0.92, 0.92, fill=False, color=INK, linewidth=3))
        axes.add_patch(Rectangle((-0.86, part - 0.4), 0.22, 0.8, color=colour, clip_on=False))
        axes.add_patch(Rectangle((part - 0.4, -0.86), 0.8, 0.22, color=colour, clip_on=False))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256, kmeans=3)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fgfast.report.overview OUT.png")
    draw_overview().save(sys.argv[1], format="PNG", optimize=True)
