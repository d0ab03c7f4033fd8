"""Settings of part discovery on photographs, scored on training images: ``python -m benchmarks.discovery --birds CUB``.

Each setting gives the id maps of the same images, with ids shared by the set. Scores: normalised mutual information and
adjusted Rand index between key points and the ids under them, the fraction of visible key points that lie in a part,
and the intersection over union of all parts with the boxes of the birds and with the masks of the pets (``--pets``).
``--record`` writes results/discovery.csv, and results/discovery.png: the parts of the first images, without the
photographs, with boxes and key points.
"""

import argparse
import csv
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from benchmarks.record import RESULTS
from fgfast.config import TrainConfig
from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.maps import ABSENT, read_map
from fgfast.data.palette import label_colours
from fgfast.data.panels import Panel
from fgfast.evaluate.iou import count_pixels, iou
from fgfast.evaluate.keypoints import Located, box_iou, locate, nmi_ari_under
from fgfast.methods.base import build_encoder
from fgfast.methods.run_folder import resolve_stats
from fgfast.models.backbone import Backbone
from fgfast.parts.clustering import PHOTOGRAPHS, ClusteringConfig
from fgfast.parts.discover import DiscoveryConfig, discover
from fgfast.report.pictures import write_grid

SIDE = 224  # of the images
PICTURED = 8  # images
RELEASED = ClusteringConfig()
FOREGROUND = ClusteringConfig(n_parts=8, levels=2, border=1.0, position=0.3)
TWO_STAGES = replace(FOREGROUND, n_parts=12, first_parts=8)


def settings() -> Iterator[ClusteringConfig]:
    """The released setting, and one or two changes at a time of the better ones."""
    yield RELEASED
    yield FOREGROUND
    yield PHOTOGRAPHS
    yield replace(RELEASED, border=1.0)
    yield replace(FOREGROUND, border=0.0)
    for change in (
        {"n_parts": 5}, {"n_parts": 15}, {"levels": 1}, {"levels": 4}, {"position": 0.0}, {"position": 1.0},
        {"border": 0.7}, {"metric": "cosine", "position": 0.0},
    ):  # fmt: skip
        yield replace(FOREGROUND, **change)
    yield TWO_STAGES
    for change in (
        {"n_parts": 5}, {"n_parts": 8}, {"n_parts": 15}, {"first_parts": 12}, {"levels": 1}, {"position": 0.0},
        {"position": 1.0}, {"border": 1.4}, {"metric": "cosine", "position": 0.0},
    ):  # fmt: skip
        yield replace(TWO_STAGES, **change)
    yield replace(PHOTOGRAPHS, position=0.0)


def mask_iou(images: ImageSet, maps: Path) -> float:
    """Intersection over union of all parts with the foreground of the masks (id 0), at the resolution of the maps."""
    assert images.masks is not None  # checked before
    counts = []
    for path in images.paths:
        found = torch.from_numpy(read_map(maps, path) != ABSENT)[None].long()
        mask = torch.from_numpy(read_map(images.masks, path))[None, None].float()
        true = torch.nn.functional.interpolate(mask, found.shape[1:]).long()[0]
        true = torch.where(true == ABSENT, -1, (true == 0).long())  # -1: the border of the pet, which does not count
        counts.append(count_pixels(found, true, 2).numpy())
    return float(iou(np.concatenate(counts))[1])


def draw_parts(images: ImageSet, located: Located, maps: Path, setting: ClusteringConfig) -> list[Panel]:
    """The parts of the first images in colours, grey where there is none, with the box and the visible key points."""
    panels = []
    sizes = [Image.open(images.root / path).size for path in images.paths[:PICTURED]]
    for row, (width, height) in enumerate(sizes):
        ids = read_map(maps, images.paths[row])
        colours = np.concatenate([label_colours(setting.n_parts), np.full((1, 3), 225, np.uint8)])
        pixels: NDArray[np.uint8] = colours[np.where(ids == ABSENT, setting.n_parts, ids)]
        picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        draw = ImageDraw.Draw(picture)
        x, y, w, h = located.boxes[row]
        draw.rectangle((x, y, x + w, y + h), outline="black", width=2)
        for px, py in located.points[row][located.visible[row]]:
            draw.ellipse((px - 3, py - 3, px + 3, py + 3), fill="white", outline="black")
        panels.append(Panel(np.asarray(picture), describe(setting) if row == 0 else ""))
    return panels


def describe(setting: ClusteringConfig) -> str:
    """The setting in a few words."""
    stages = f"{setting.first_parts}, then " if setting.first_parts else ""
    return f"{stages}{setting.n_parts}, {setting.levels} levels{setting.describe().partition(', first')[0]}"


def score(
    encoder: Backbone, setting: ClusteringConfig, birds: ImageSet, pets: ImageSet | None, network: str
) -> tuple[dict[str, Any], list[Panel]]:
    """The row of a setting, and the parts of the first images."""
    config = DiscoveryConfig(image_size=SIDE, map_size=64, run="a benchmark", network=network)
    with tempfile.TemporaryDirectory() as folder:
        maps = discover(encoder, birds, Path(folder, "birds"), setting, config, shared=True)
        located = locate(birds, maps)
        nmi, ari = nmi_ari_under(located)
        covered = float((located.ids[located.visible] >= 0).mean())
        row = {**asdict(setting), "nmi": nmi, "ari": ari, "covered": covered, "box_iou": box_iou(located)}
        panels = draw_parts(birds, located, maps, setting)
        if pets is not None:
            row["mask_iou"] = mask_iou(pets, discover(encoder, pets, Path(folder, "pets"), setting, config))
    return {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}, panels


def main() -> None:
    """Score every setting, print the table and record it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--birds", type=Path, required=True, help="set with key points and boxes: CUB-200-2011")
    parser.add_argument("--pets", type=Path, help="set with masks of the foreground: Oxford-IIIT Pet")
    parser.add_argument("--model", default="tf_efficientnet_lite0", help="timm model")
    parser.add_argument("--init", required=True, help="initial weights, as for fgfast pretrain")
    parser.add_argument("--images", type=int, default=300, help="training images of each set")
    parser.add_argument("--record", action="store_true", help="write results/discovery.csv and discovery.png")
    args = parser.parse_args()
    encoder = build_encoder(resolve_stats(TrainConfig(model=args.model, init=args.init))[0]).eval()
    birds = open_images(args.birds).train_set().sample(args.images)
    pets = open_images(args.pets).train_set().sample(args.images) if args.pets else None
    if birds.keypoints is None or birds.boxes is None or (pets is not None and pets.masks is None):
        parser.error("--birds needs key points and boxes, --pets masks: give CUB-200-2011 and Oxford-IIIT Pet.")
    rows: list[dict[str, Any]] = []
    pictures: list[list[Panel]] = []
    for setting in settings():
        row, panels = score(encoder, setting, birds, pets, args.model)
        if not rows:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        print("| " + " | ".join(str(v) for v in row.values()) + " |", flush=True)
        rows.append(row)
        if setting in (RELEASED, FOREGROUND, PHOTOGRAPHS):
            pictures.append(panels)
    if args.record:
        with (RESULTS / "discovery.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        text = "Parts of eight photographs (not shown) under three settings, with boxes and key points"
        write_grid(pictures, RESULTS / "discovery.png", cell=110, description=text)


if __name__ == "__main__":
    main()
