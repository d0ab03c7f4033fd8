"""Transforms that move pixels: a batch equals a loop over its images, and draws have the documented distribution."""

import numpy as np
import pytest
import torch

from fgfast.data.rearrange import rearrange
from fgfast.data.sampling import Draw, draw_crop, generator
from fgfast.data.transforms import BlockShuffle, Gamma, Holes, PasteOnWhite, PatchSwap, Transform, TrimBorder
from fgfast.data.views import Crop
from fgfast.reference import rearrange as reference

SIZES = np.array([[90, 120]])
CHANGES: dict[str, tuple[Transform, ...]] = {
    "holes": (Holes((0, 9), (0.02, 0.3)),),
    "swap": (PatchSwap(0.39),),
    "half": (PatchSwap(0.5),),
    "blocks": (BlockShuffle(4),),
    "near": (BlockShuffle(7, reach=1),),
    "most blocks": (BlockShuffle(16),),
    "paste": (PasteOnWhite((0.3, 0.6)),),
    "full paste": (PasteOnWhite((1.0, 1.0)),),
    "all": (Holes((3, 5)), PatchSwap(0.3), BlockShuffle(5, reach=2), PasteOnWhite((0.4, 0.9))),
}


def draw_views(size: int, n: int, *transforms: Transform, seed: int = 0) -> Draw:
    return draw_crop(Crop(size=size, transforms=transforms), SIZES.repeat(n, 0), generator(seed, 0, 0, 0))


def pixels(n: int, size: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(n + size)
    return torch.randint(1, 255, (n, size, size, 3), generator=rng, dtype=torch.uint8)


def by_loop(x: torch.Tensor, draw: Draw, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found = []
    for i in range(len(x)):
        one = {name: value[i] for name, value in vars(draw).items() if value is not None}
        found.append(
            reference.rearrange(
                [x[i], labels[i]],
                [(0, 255), (-1, -1)],
                patches=one["patches"].tolist() if "patches" in one else None,
                blocks=torch.from_numpy(one["blocks"]) if "blocks" in one else None,
                holes=one["holes"].tolist() if "holes" in one else None,
                paste=tuple(one["paste"].tolist()) if "paste" in one else None,
            )
        )
    return torch.stack([a for a, _ in found]), torch.stack([b for _, b in found])


@pytest.mark.parametrize("size", [16, 21, 64])  # divisible by 4 and 16; by 7; by 4 and 16, with larger blocks
@pytest.mark.parametrize("change", CHANGES)
def test_a_batch_equals_the_loop_over_its_images(change: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgfast.data.rearrange._CHUNK_BYTES", 2 * 3 * size**2)  # two chunks of the three images
    n = 3
    draw, x = draw_views(size, n, *CHANGES[change]), pixels(n, size)
    labels = torch.randint(-1, 9, (n, size, size), generator=torch.Generator().manual_seed(0))
    kept = x.clone(), labels.clone()
    moved, ids = rearrange(x, draw, labels)
    expected, expected_ids = by_loop(x, draw, labels)
    assert torch.equal(moved, expected)
    assert ids is not None
    assert torch.equal(ids, expected_ids)
    assert ids.dtype == labels.dtype
    assert torch.equal(x, kept[0])  # the arguments may be memory of others
    assert torch.equal(labels, kept[1])
    assert torch.equal(rearrange(x.permute(0, 2, 1, 3), draw)[0], by_loop(x.permute(0, 2, 1, 3), draw, labels)[0])


def test_no_transform_no_image_and_no_hole_change_nothing() -> None:
    x = pixels(3, 16)
    assert rearrange(x, draw_views(16, 3))[0] is x
    empty = draw_views(16, 0, *CHANGES["all"])
    assert rearrange(x[:0], empty, torch.zeros(0, 16, 16))[0].shape == (0, 16, 16, 3)
    few = draw_views(16, 40, Holes((0, 4)))
    rows = [i for i in range(40) if not few.holes[i, :, 2].any()]
    assert 2 < len(rows) < 20
    assert torch.equal(rearrange(pixels(40, 16), few)[0][rows], pixels(40, 16)[rows])


def test_a_draw_depends_only_on_the_seed_and_windows_not_on_the_transforms() -> None:
    transforms = (Gamma((0.5, 2.5)), *CHANGES["all"])
    a, b = draw_views(64, 5, *transforms), draw_views(64, 5, *transforms[::-1])  # their order has no effect
    c = draw_views(64, 5, *transforms, seed=1)
    assert all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
    for name in ("gamma", "patches", "blocks", "holes", "paste"):
        assert not np.array_equal(getattr(a, name), getattr(c, name))
    plain = draw_views(64, 5)
    assert np.array_equal(plain.window, a.window)
    assert np.array_equal(plain.colour, a.colour)


def test_number_side_and_position_of_holes_are_uniform() -> None:
    y, x, side = draw_views(512, 4000, Holes((5, 20), (10 / 512, 25 / 512))).holes.transpose(2, 0, 1)
    count = np.bincount((side > 0).sum(1), minlength=21)
    assert count[:5].sum() == 0
    assert abs(count[5:] - 4000 / 16).max() < 5 * np.sqrt(4000 / 16)
    sides = np.bincount(side[side > 0], minlength=26)
    n = sides.sum()
    assert sides[1:10].sum() == 0
    assert abs(sides[10:] - n / 16).max() < 5 * np.sqrt(n / 16)
    for place in (y, x):
        assert place.min() == 0
        assert ((place + side)[side > 0]).max() == 512
        fraction = (place / (512 - side))[side > 0]
        assert np.allclose(np.quantile(fraction, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.01)
    small = draw_views(64, 4000, Holes((5, 20))).holes[..., 2]
    assert np.allclose(np.bincount(small[small > 0])[1:] / (small > 0).sum(), 1 / 3, atol=0.01)  # 1, 2, 3 pixels
    assert draw_views(16, 9, Holes((5, 5))).holes[..., 2].min() == 1  # less than a pixel is rounded up to one


def test_patches_are_anywhere_in_their_half() -> None:
    for size, side in ((512, 200), (65, 25)):  # with an odd size the middle row belongs to neither half
        upper, lower = draw_views(size, 4000, PatchSwap(200 / 512)).patches.transpose(1, 0, 2)
        assert (np.unique(upper[:, 2]), np.unique(lower[:, 2])) == (side, side)
        assert (upper[:, 0].min(), upper[:, 0].max()) == (0, size // 2 - side)
        assert (lower[:, 0].min(), lower[:, 0].max()) == (size - size // 2, size - side)
        for patch in (upper, lower):
            assert (patch[:, 1].min(), patch[:, 1].max()) == (0, size - side)
            assert abs(patch[:, 1].mean() - (size - side) / 2) < 0.02 * size


def test_all_orders_of_blocks_are_equally_likely() -> None:
    orders = draw_views(4, 24_000, BlockShuffle(2)).blocks.reshape(-1, 4)
    assert (np.sort(orders, 1) == np.arange(4)).all()
    _, count = np.unique(orders, axis=0, return_counts=True)
    assert len(count) == 24
    assert ((count - 1000) ** 2 / 1000).sum() < 55  # chi-square with 23 degrees of freedom: 2e-4
    many = draw_views(64, 8000, BlockShuffle(4)).blocks.reshape(-1, 16)
    frequency = np.stack([(many == block).mean(0) for block in range(16)])
    assert abs(frequency - 1 / 16).max() < 5 * np.sqrt(15 / 16**2 / 8000)


@pytest.mark.parametrize("reach", [1, 2, 6])
def test_blocks_move_at_most_by_their_reach(reach: int) -> None:
    blocks = draw_views(64, 4000, BlockShuffle(7, reach)).blocks
    assert (np.sort(blocks.reshape(-1, 49), 1) == np.arange(49)).all()
    down, across = blocks // 7 - np.arange(7)[:, None], blocks % 7 - np.arange(7)
    assert abs(down).max() == abs(across).max() == reach
    for move in (down, across):
        assert np.allclose((move > 0).mean(0), (move < 0).mean(0)[::-1, ::-1], atol=0.04)  # no drift to one side
    if reach == 1:  # neighbours swap if u - u' > 1, each uniform in +-1: 1 / 8; a first block has one neighbour
        assert abs((across[:, :, 0] == 1).mean() - 1 / 8) < 0.01
        assert abs((down[:, 0] == 1).mean() - 1 / 8) < 0.01


def test_gamma_is_uniform() -> None:
    gamma = draw_views(64, 20_000, Gamma((0.5, 2.5))).gamma
    assert 0.5 <= gamma.min() < 0.51
    assert 2.49 < gamma.max() <= 2.5
    steps = np.sort(gamma) - np.linspace(0.5, 2.5, 20_000)
    assert abs(steps).max() / 2 < 1.63 / np.sqrt(20_000)  # Kolmogorov and Smirnov, 1%


def test_the_pasted_region_has_uniform_sides_and_is_around_the_edges() -> None:
    sides = draw_views(512, 4000, PasteOnWhite((200 / 512, 300 / 512))).paste
    assert (sides.min(), sides.max()) == (200, 300)
    assert abs(sides.mean(0) - 250).max() < 2.5
    assert abs(np.corrcoef(sides.T)[0, 1]) < 0.06
    view = torch.full((1, 64, 64, 3), 120, dtype=torch.uint8)
    view[0, 40:50, 6:16] = 200  # edges at 40 and 50, 6 and 16: their mean is (44.75, 10.75)
    moved, _ = rearrange(view, draw_views(64, 1, PasteOnWhite((0.5, 0.5))))
    assert (moved[0, :16] == 255).all()
    assert (moved[0, 16:48, :16] == 255).all()
    assert (moved[0, 16:48, 16:48] == view[0, 28:60, :32]).all()  # shifted to stay inside the view


def test_the_border_of_the_window_is_trimmed() -> None:
    sizes = np.array([[512, 1024], [3, 1]])
    full = draw_crop(Crop(scale=None), sizes, generator(0, 0, 0, 0))
    trimmed = draw_crop(Crop(scale=None, transforms=(TrimBorder(10 / 512),)), sizes, generator(0, 0, 0, 0))
    assert full.window.tolist() == [[0, 0, 512, 1024], [0, 0, 3, 1]]
    assert trimmed.window.tolist() == [[10, 20, 492, 984], [0, 0, 3, 1]]
    assert np.array_equal(full.flip, trimmed.flip)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("change", CHANGES)
def test_the_gpu_gives_the_same(change: str) -> None:
    draw, x = draw_views(64, 9, *CHANGES[change]), pixels(9, 64)
    labels = torch.arange(9 * 64 * 64).reshape(9, 64, 64)
    a, b = rearrange(x, draw, labels), rearrange(x.cuda(), draw, labels.cuda())
    assert all(torch.equal(p, q.cpu()) for p, q in zip(a, b, strict=True))  # type: ignore[union-attr]
