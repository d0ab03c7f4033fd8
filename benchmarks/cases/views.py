"""Batches of views on a CPU: holes, gamma, block shuffles and puzzle tiles, one index for all images of a batch.

Contenders: the reference or torchvision's functions in a loop over the images, plain torch over the batch, and DALI's
own operators ``fn.erase`` and ``fn.multi_paste``, each in its own pipeline, whose cost is timed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from benchmarks.cases.common import judge_by, peer, sizes
from benchmarks.timing import Answer, Case, Run, Variant
from fgfast.data.normalise import IMAGENET_MEAN, IMAGENET_STD
from fgfast.data.photometric import photometric
from fgfast.data.rearrange import rearrange
from fgfast.data.sampling import Draw, draw_crop, generator
from fgfast.data.tiles import brighten, cut_tiles, draw_puzzles
from fgfast.data.transforms import BlockShuffle, Gamma, Holes, Transform
from fgfast.data.views import Crop
from fgfast.methods.permutations import permutation_set
from fgfast.reference import rearrange as reference
from fgfast.reference import tiles as reference_tiles

UNIT = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))  # mean and std that leave 0..255
NORMAL = (list(IMAGENET_MEAN), list(IMAGENET_STD))
GRID = 3  # of a puzzle


class Views(NamedTuple):
    """uint8 pixels [B, S, S, 3], the random numbers of each view, and the same numbers as each contender takes them."""

    pixels: Tensor
    draw: Draw
    lists: list[Any]
    feeds: Mapping[str, Sequence[np.ndarray]] = MappingProxyType({})


def noise(batch: int, size: int, seed: int, transform: Transform, **crop: Any) -> tuple[Tensor, Draw]:
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (batch, size, size, 3), generator=g, dtype=torch.uint8)
    spec = Crop(size=size, transforms=(transform,), **crop)
    return pixels, draw_crop(spec, np.full((batch, 2), size), generator(seed, 0, 0, 0))


def torchvision() -> Any:
    return peer("torchvision.transforms.v2.functional", "torchvision")


def dali(batch: int, names: Sequence[str], operator: Callable[[Any, Any], Any]) -> Run:
    """One operator in its own pipeline."""
    module = peer("nvidia.dali", "DALI")
    pipe = peer("nvidia.dali.pipeline", "DALI").Pipeline(batch, 1, None, prefetch_queue_depth=1)
    with pipe:
        inputs = {name: module.fn.external_source(name=name, no_copy=True) for name in names}
        inputs["image"] = module.fn.external_source(name="image", layout="HWC", no_copy=True)
        pipe.set_outputs(operator(module.fn, inputs))
    pipe.build()

    def run(x: Views) -> Answer:
        for name, values in {"image": list(x.pixels.numpy()), **x.feeds}.items():
            pipe.feed_input(name, values)
        pipe.schedule_run()
        return [from_dlpack(pipe.outputs()[0].as_tensor())]

    return run


def rearranged(x: Views) -> Answer:
    return [rearrange(x.pixels, x.draw)[0]]


def expected(x: Views) -> Answer:
    """Image by image, rectangle by rectangle."""
    holes = [None] * len(x.pixels) if x.draw.holes is None else x.draw.holes.tolist()
    blocks = [None] * len(x.pixels) if x.draw.blocks is None else list(torch.from_numpy(x.draw.blocks))
    images = zip(x.pixels, holes, blocks, strict=True)
    return [torch.stack([reference.rearrange([p], [(0, 255)], holes=h, blocks=b)[0] for p, h, b in images])]


def _case(name: str, batch: int, size: int, make: Callable[[int], Any], variants: Sequence[Variant], right: Run,
          tolerance: float = 0.0) -> Case:  # fmt: skip
    shape = f"{name} {sizes(B=batch, S=size)}"
    return Case("views", shape, "uint8", make, variants, judge_by(right), tolerance, host=True)


def holes(batch: int, size: int) -> Case:
    def make(seed: int) -> Views:
        pixels, draw = noise(batch, size, seed, Holes((5, 20)))
        assert draw.holes is not None
        lists = [[hole for hole in image if hole[2]] for image in draw.holes.tolist()]
        anchors = [np.array(some, np.float32)[:, :2].ravel() for some in lists]
        shapes = [np.array(some, np.float32)[:, 2].repeat(2) for some in lists]
        return Views(pixels, draw, lists, {"anchor": anchors, "shape": shapes})

    def erase_each() -> Run:
        erase, black = torchvision().erase, torch.zeros((), dtype=torch.uint8)

        def run(x: Views) -> Answer:
            out = x.pixels.permute(0, 3, 1, 2).clone()
            for image, some in zip(out, x.lists, strict=True):
                for top, left, side in some:
                    erase(image, top, left, side, side, black, inplace=True)
            return [out.permute(0, 2, 3, 1)]

        return run

    def mask_all(x: Views) -> Answer:
        place, step = torch.from_numpy(x.draw.holes), torch.arange(size)
        rows, columns = (
            ((step >= place[..., i, None]) & (step < place[..., i, None] + place[..., 2:])).float() for i in (0, 1)
        )
        return [x.pixels.masked_fill((torch.bmm(rows.transpose(1, 2), columns) > 0)[..., None], 0)]

    def erase(fn: Any, x: Any) -> Any:
        return fn.erase(x["image"], anchor=x["anchor"], shape=x["shape"], axis_names="HW")

    variants = (
        Variant("fgfast", lambda: rearranged),
        Variant("torchvision erase", erase_each),
        Variant("one mask", lambda: mask_all),
        Variant("DALI erase", lambda: dali(batch, ("anchor", "shape"), erase)),
    )
    return _case("holes", batch, size, make, variants, expected)


def gamma(batch: int, size: int) -> Case:
    def make(seed: int) -> Views:
        pixels, draw = noise(batch, size, seed, Gamma((0.5, 2.5)), jitter_p=0.0)
        assert draw.gamma is not None
        return Views(pixels, draw, draw.gamma.tolist())

    def powers(x: Views, dtype: torch.dtype = torch.float32) -> Answer:
        values = x.pixels.permute(0, 3, 1, 2).to(dtype).mul_(1 / 255)
        return [values.pow_(torch.tensor(x.lists, dtype=dtype)[:, None, None, None]).mul_(255)]

    def one_by_one() -> Run:
        tv = torchvision()

        def run(x: Views) -> Answer:
            images = tv.to_dtype(x.pixels.permute(0, 3, 1, 2), torch.float32, scale=True)
            return [255 * torch.stack([tv.adjust_gamma(image, g) for image, g in zip(images, x.lists, strict=True)])]

        return run

    variants = (
        Variant("fgfast", lambda: lambda x: [photometric(x.pixels, x.draw, *UNIT)]),
        Variant("torchvision adjust_gamma", one_by_one),
        Variant("powers of the batch", lambda: powers),
    )
    return _case("gamma", batch, size, make, variants, partial(powers, dtype=torch.float64), 1e-4)


def blocks(batch: int, size: int, n: int, reach: int) -> Case:
    edges = [i * size // n for i in range(n + 1)]
    corners = np.array([[i, j] for i in edges[:-1] for j in edges[:-1]], np.int32)

    def make(seed: int) -> Views:
        pixels, draw = noise(batch, size, seed, BlockShuffle(n, reach))
        assert draw.blocks is not None
        orders = draw.blocks.reshape(batch, -1).tolist()
        feeds = {
            "ids": [np.full(n * n, i, np.int32) for i in range(batch)],
            "cut": [corners[order] for order in orders],
            "shapes": [np.full((n * n, 2), size // n, np.int32)] * batch,
            "to": [corners] * batch,
        }
        return Views(pixels, draw, orders, feeds)

    def paste(fn: Any, x: Any) -> Any:
        return fn.multi_paste(
            x["image"], in_ids=x["ids"], in_anchors=x["cut"], shapes=x["shapes"], out_anchors=x["to"],
            output_size=[size, size],
        )  # fmt: skip

    variants = [Variant("fgfast", lambda: rearranged), Variant("plain loop", lambda: expected)]
    if size % n == 0:
        variants.append(Variant("DALI multi_paste", lambda: dali(batch, ("ids", "cut", "shapes", "to"), paste)))
    name = f"{n} x {n} blocks" + ("" if not reach else f" within {reach}")
    return _case(name, batch, size, make, variants, expected)


class Puzzle(NamedTuple):
    values: Tensor  # [B, 3, S, S] in 0..1
    images: Tensor  # normalised
    source: Tensor
    corner: Tensor
    factor: Tensor


def puzzles(batch: int, size: int, side: int) -> Case:
    """3 x 3 tiles per image, each cropped at its own place, permuted, and changed in brightness."""
    tile = size // GRID
    border = (size - GRID * tile) // 2

    def make(seed: int) -> Puzzle:
        g = torch.Generator().manual_seed(seed)
        values = torch.rand(batch, 3, size, size, generator=g).to(memory_format=torch.channels_last)
        mean, std = (torch.tensor(x)[:, None, None] for x in NORMAL)
        numbers = draw_puzzles(100, GRID**2, batch, tile - side, (0.5, 1.5), np.random.default_rng(seed))
        label, corner, factor = (torch.from_numpy(x) for x in numbers)
        source = torch.from_numpy(permutation_set(100, GRID**2))[label]
        return Puzzle(values, (values - mean) / std, source, corner, factor)

    def cut(p: Puzzle, function: Callable[..., Tensor]) -> Answer:
        tiles = function(p.images, GRID, side, p.source, p.corner)
        return [brighten(tiles, p.factor.flatten(), IMAGENET_MEAN, IMAGENET_STD)]

    def crops() -> Run:
        tv = torchvision()

        def run(p: Puzzle) -> Answer:
            tiles = []
            for image, *numbers in zip(p.values, p.source.tolist(), p.corner.tolist(), p.factor.tolist(), strict=True):
                for t, (down, across), f in zip(*numbers, strict=True):
                    y, x = border + t // GRID * tile + down, border + t % GRID * tile + across
                    tiles.append(tv.adjust_brightness(tv.crop(image, y, x, side, side), f))
            return [tv.normalize(torch.stack(tiles), *NORMAL)]

        return run

    loop = partial(cut, function=reference_tiles.cut_tiles)
    variants = (
        Variant("fgfast", lambda: partial(cut, function=cut_tiles)),
        Variant("plain loop", lambda: loop),
        Variant("torchvision", crops),
    )
    return _case(f"puzzle of {side}-pixel tiles", batch, size, make, variants, loop, 1e-5)


def cases(device: torch.device, tiny: bool = False) -> Iterator[Case]:
    batch = 3 if tiny else 64
    for size in (12,) if tiny else (64, 224):
        yield holes(batch, size)
        yield gamma(batch, size)
        yield blocks(batch, size, 4, 0)
        yield blocks(batch, size, 7, 1)
    for size, side in ((24, 6),) if tiny else ((64, 18), (225, 64)):
        yield puzzles(batch, size, side)
