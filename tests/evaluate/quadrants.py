"""A set of four coloured quadrants, whose masks can be read from the colours, and segmentations of it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fgfast.config import TrainConfig
from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.maps import write_maps_info
from fgfast.evaluate.few_shot import SegmentationOptions
from fgfast.evaluate.segmentation import Segmentation, segment
from fgfast.models.backbone import Backbone
from tests.conftest import TINY

CPU = torch.device("cpu")
CONFIG = TrainConfig(size=64, threads=1, amp="off")
COLOURS = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # of absent, id 0, 1, 2


def draw(root: Path, n: int = 16, **info: Any) -> Path:
    """Images of 64 px: black, with one red, one green and one blue quadrant; masks have ids 0, 1 and 2 there."""
    rng = np.random.default_rng(0)
    for i in range(n):
        quadrants = rng.permutation([-1, 0, 1, 2]).reshape(2, 2)
        ids = quadrants.repeat(32, 0).repeat(32, 1)
        rel = f"{'train' if i % 2 else 'test'}/{'ab'[i // 2 % 2]}/{i}.png"
        for folder, content in (
            (root, (255 * COLOURS.numpy()[ids + 1]).astype(np.uint8)),
            (root / "part_masks", np.where(ids < 0, 255, ids).astype(np.uint8)),
        ):
            file = folder / (rel if folder == root else f"{rel}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(file)
    write_maps_info(root / "part_masks", 3, (64, 64), "truth", **info)
    return root


def score(
    data: Path | ImageSet, net: Backbone | None = None, state_file: Path | None = None, **values: Any
) -> Segmentation:
    images = data if isinstance(data, ImageSet) else open_images(data)
    options = SegmentationOptions(
        **{"n_labelled": 8, "folds": 2, "epochs": 1, "every": 1, "lr": 1e-2, "batch_size": 4} | values
    )
    torch.manual_seed(0)
    return segment(
        net or Backbone(TINY, size=64), images.train_set(), images.test_set(), CONFIG, options, device=CPU,
        state_file=state_file, start="one",
    )  # fmt: skip


def encoder() -> Backbone:
    torch.manual_seed(0)
    return Backbone(TINY, size=64)


def count_steps(net: Backbone, stop: int | None = None) -> list[int]:
    """A list that grows with each training step of the network, which is interrupted at a number of steps."""
    steps: list[int] = []

    def count(*_: object) -> None:
        if torch.is_grad_enabled():
            if len(steps) == stop:
                raise KeyboardInterrupt
            steps.append(1)

    net.net.conv1.register_forward_pre_hook(count)
    return steps
