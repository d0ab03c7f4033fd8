"""Views: invalid specifications are refused, and id maps are cropped like their view."""

import numpy as np
import pytest
import torch

from fgfast.data.transforms import BlockShuffle, Gamma, Holes, PasteOnWhite, PatchSwap, Transform, TrimBorder
from fgfast.data.views import Batch, Crop, ViewSpec, warp_labels


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"size": 0}, "size"),
        ({"flip": 1.5}, "flip"),
        ({"blur": -0.1}, "blur"),
        ({"scale": (0.5, 1.5)}, "scale"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"jitter": (0.1, 0.1, 0.1, 0.6)}, "jitter"),
        ({"transforms": (PatchSwap(0.2), PatchSwap(0.3))}, "transforms"),
    ],
)
def test_a_crop_names_the_invalid_field(kwargs: dict, name: str) -> None:
    with pytest.raises(ValueError, match=rf"Crop\.{name}"):
        Crop(**kwargs)


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (TrimBorder(0.5), "fraction"),
        (Gamma((0.0, 2.0)), "exponent"),
        (Holes((3, 2)), "count"),
        (Holes((-1, 2)), "count"),
        (Holes((0, 0)), "count"),
        (Holes((1, 2), (0.0, 0.1)), "side"),
        (PatchSwap(0.6), "side"),
        (PatchSwap(0.001), "side"),
        (BlockShuffle(0), "grid"),
        (BlockShuffle(33), "grid"),
        (BlockShuffle(4, reach=4), "reach"),
        (PasteOnWhite((0.5, 1.5)), "side"),
    ],
)
def test_a_transform_names_the_invalid_field(transform: Transform, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{type(transform).__name__}\.{name} is"):
        Crop(size=32, transforms=(transform,))


@pytest.mark.parametrize(
    "kwargs", [{}, {"crops": (Crop(),), "center": 0.8}, {"whole": 8, "masks": True}, {"whole": 8, "center": 2.0}]
)
def test_a_contradictory_specification_is_refused(kwargs: dict) -> None:
    with pytest.raises(ValueError, match="ViewSpec"):
        ViewSpec(**kwargs)


def test_warp_labels_equals_a_loop_over_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 9, (5, 13, 21), generator=generator)
    box = torch.rand(5, 4, generator=generator) * 0.5
    boxes = torch.cat([box, torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0]])], 1)
    got = warp_labels(labels, boxes, 7)
    for b in range(5):
        y0, x0, h, w, flip = boxes[b].numpy()
        for i in range(7):
            for j in range(7):
                at = np.float32(1) - np.float32((j + 0.5) / 7) if flip else np.float32((j + 0.5) / 7)
                row = int((y0 + np.float32((i + 0.5) / 7) * h) * 13)
                assert got[b, i, j] == labels[b, row, int((x0 + at * w) * 21)]


def test_the_full_window_at_the_map_size_is_the_map() -> None:
    labels = torch.randint(-1, 5, (2, 16, 16))
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0, 1.0]])
    warped = warp_labels(labels, box, 16)
    assert torch.equal(warped[0], labels[0])
    assert torch.equal(warped[1], labels[1].flip(1))


def test_warp_labels_refuses_views_without_a_box() -> None:
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0], [torch.nan] * 5])
    with pytest.raises(ValueError, match=r"take Batch\.labels"):
        warp_labels(torch.zeros(2, 4, 4, dtype=torch.int64), boxes, 3)


def test_warp_labels_takes_an_empty_batch_and_refuses_wrong_shapes() -> None:
    assert warp_labels(torch.zeros(0, 4, 4, dtype=torch.int64), torch.zeros(0, 5), 3).shape == (0, 3, 3)
    with pytest.raises(ValueError, match=r"boxes: expected shape \[2, 5\], got \[3, 5\]"):
        warp_labels(torch.zeros(2, 4, 4), torch.zeros(3, 5), 3)


def test_all_tensors_of_a_batch_move_to_the_device() -> None:
    batch = Batch(views=[torch.zeros(2, 3, 4, 4)], target=torch.zeros(2, dtype=torch.int64)).to("meta")
    assert batch.views[0].device.type == batch.target.device.type == "meta"
    assert batch.whole is None
