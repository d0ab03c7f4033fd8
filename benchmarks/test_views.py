"""Pixels that change places or go in a batch of views: one index for all images, against loops over the images.

Contenders: a loop of torchvision's functions or slices over the images, plain torch over the batch where there is a
plain way, and DALI's own operators ``fn.erase`` and ``fn.multi_paste``, each in a pipeline of its own, whose cost is in
the time. Every answer is compared with that of the loop before it is timed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from benchmarks.conftest import Race, Run
from fgfast.data.photometric import photometric
from fgfast.data.rearrange import rearrange
from fgfast.data.sampling import Draw, draw_crop, generator
from fgfast.data.views import Crop

BATCH = 64
RAW = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))
SIZES = [64, 224]


def views(size: int, **change: Any) -> tuple[Tensor, Draw]:
    """A batch of noise, uint8 [B, S, S, 3], and what happens to it."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (BATCH, size, size, 3), generator=rng, dtype=torch.uint8)
    return pixels, draw_crop(Crop(size=size, **change), np.full((BATCH, 2), size), generator(0, 0, 0, 0))


def dali(pixels: Tensor, operator: Callable[[Any, Any], Any], inputs: dict[str, list[np.ndarray]]) -> Run:
    """One operator in a pipeline of its own."""
    module: Any = pytest.importorskip("nvidia.dali")
    pipe = module.pipeline.Pipeline(BATCH, 1, None, prefetch_queue_depth=1)
    with pipe:
        names = {name: module.fn.external_source(name=name, no_copy=True) for name in inputs}
        image = module.fn.external_source(name="image", layout="HWC", no_copy=True)
        pipe.set_outputs(operator(module.fn, {"image": image} | names))
    pipe.build()
    images = list(pixels.numpy())

    def run() -> list[Tensor]:
        pipe.feed_input("image", images)
        for name, values in inputs.items():
            pipe.feed_input(name, values)
        pipe.schedule_run()
        (found,) = pipe.outputs()
        return [from_dlpack(found.as_tensor())]

    return run


@pytest.mark.benchmark(group="views: holes")
@pytest.mark.parametrize("size", SIZES)
def test_holes(race: Race, size: int) -> None:
    tv = pytest.importorskip("torchvision.transforms.v2.functional")
    pixels, draw = views(size, holes=(5, 20))
    assert draw.holes is not None
    holes = [[hole for hole in image if hole[2]] for image in draw.holes.tolist()]

    def erased() -> list[Tensor]:
        out = pixels.permute(0, 3, 1, 2).clone()
        for image, some in zip(out, holes, strict=True):
            for y, x, side in some:
                tv.erase(image, y, x, side, side, torch.zeros((), dtype=torch.uint8), inplace=True)
        return [out.permute(0, 2, 3, 1)]

    def masked() -> list[Tensor]:
        place, step = torch.from_numpy(draw.holes), torch.arange(size)
        rows, columns = (
            ((step >= place[..., i, None]) & (step < place[..., i, None] + place[..., 2:])).float() for i in (0, 1)
        )
        return [pixels.masked_fill((torch.bmm(rows.transpose(1, 2), columns) > 0)[..., None], 0)]

    feeds = {
        "anchor": [np.array(some, np.float32)[:, :2].ravel() for some in holes],
        "shape": [np.array(some, np.float32)[:, 2].repeat(2) for some in holes],
    }
    race(
        {
            "ours": lambda: [rearrange(pixels, draw)[0]],
            "torchvision erase": erased,
            "one mask of all holes": masked,
            "DALI erase": dali(
                pixels,
                lambda fn, x: fn.erase(x["image"], anchor=x["anchor"], shape=x["shape"], axis_names="HW"),
                feeds,
            ),
        },
        "torchvision erase",
    )  # fmt: skip


@pytest.mark.benchmark(group="views: gamma")
@pytest.mark.parametrize("size", SIZES)
def test_gamma(race: Race, size: int) -> None:
    tv = pytest.importorskip("torchvision.transforms.v2.functional")
    pixels, draw = views(size, gamma=(0.5, 2.5), jitter_p=0.0)
    assert draw.gamma is not None
    gamma = draw.gamma.tolist()

    def one_by_one() -> list[Tensor]:
        x = tv.to_dtype(pixels.permute(0, 3, 1, 2), torch.float32, scale=True)
        return [255 * torch.stack([tv.adjust_gamma(view, g) for view, g in zip(x, gamma, strict=True)])]

    def powers() -> list[Tensor]:
        x = pixels.permute(0, 3, 1, 2).to(torch.float32).mul_(1 / 255)
        return [x.pow_(torch.tensor(gamma)[:, None, None, None]).mul_(255)]

    race(
        {
            "ours": lambda: [photometric(pixels, draw, *RAW)],
            "torchvision adjust_gamma": one_by_one,
            "powers of the batch": powers,
        },
        "torchvision adjust_gamma",
    )


@pytest.mark.benchmark(group="views: jigsaw")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("change", [{"grid": 4}, {"grid": 7, "reach": 1}])
def test_jigsaw(race: Race, size: int, change: dict[str, int]) -> None:
    pixels, draw = views(size, **change)
    assert draw.blocks is not None
    n = change["grid"]
    edges = [i * size // n for i in range(n + 1)]
    orders = draw.blocks.reshape(BATCH, -1).tolist()

    def sliced() -> list[Tensor]:
        out = torch.empty_like(pixels)
        for view, image, order in zip(out, pixels, orders, strict=True):
            for place, block in enumerate(order):
                (i, j), (k, m) = divmod(place, n), divmod(block, n)
                to = view[edges[i] : edges[i + 1], edges[j] : edges[j + 1]]
                cut = image[edges[k] : edges[k + 1], edges[m] : edges[m + 1]][: len(to), : to.shape[1]]
                to[: len(cut), : cut.shape[1]] = cut
                to[len(cut) :] = to[len(cut) - 1]  # a block that is a pixel too short
                to[:, cut.shape[1] :] = to[:, cut.shape[1] - 1 : cut.shape[1]]
        return [out]

    contenders: dict[str, Run] = {"ours": lambda: [rearrange(pixels, draw)[0]], "slices": sliced}
    if size % n == 0:
        corners = np.array([[i, j] for i in edges[:-1] for j in edges[:-1]], np.int32)
        feeds = {
            "ids": [np.full(n * n, i, np.int32) for i in range(BATCH)],
            "cut": [corners[order] for order in orders],
            "shapes": [np.full((n * n, 2), size // n, np.int32)] * BATCH,
            "to": [corners] * BATCH,
        }
        contenders["DALI multi_paste"] = dali(
            pixels,
            lambda fn, x: fn.multi_paste(
                x["image"], in_ids=x["ids"], in_anchors=x["cut"], shapes=x["shapes"], out_anchors=x["to"],
                output_size=[size, size],
            ),
            feeds,
        )  # fmt: skip
    race(contenders, "slices")
