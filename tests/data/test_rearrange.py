"""Pixels that change places: the batch equals the loop over images, and what is drawn has the promised law."""

import numpy as np
import pytest
import torch

from fgfast.data.rearrange import rearrange
from fgfast.data.sampling import Draw, draw_crop, generator
from fgfast.data.views import Crop
from fgfast.reference import rearrange as reference

SIZES = np.array([[90, 120]])
CHANGES = {
    "holes": {"holes": (0, 9), "hole_size": (0.02, 0.3)},
    "swap": {"swap": 0.39},
    "half": {"swap": 0.5},
    "blocks": {"grid": 4},
    "near": {"grid": 7, "reach": 1},
    "most blocks": {"grid": 16},
    "paste": {"paste": (0.3, 0.6)},
    "whole paste": {"paste": (1.0, 1.0)},
    "all": {"holes": (3, 5), "swap": 0.3, "grid": 5, "reach": 2, "paste": (0.4, 0.9)},
}


def drawn(crop: Crop, n: int, seed: int = 0) -> Draw:
    return draw_crop(crop, SIZES.repeat(n, 0), generator(seed, 0, 0, 0))


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


@pytest.mark.parametrize("size", [16, 21, 64])  # divided by 4 and 16; by 7; by 4 and 16, with larger blocks
@pytest.mark.parametrize("change", CHANGES)
def test_a_batch_is_moved_as_the_loop_moves_each_image(change: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgfast.data.rearrange._CHUNK_BYTES", 2 * 3 * size**2)  # two chunks of the three images
    n = 3
    draw, x = drawn(Crop(size=size, **CHANGES[change]), n), pixels(n, size)
    labels = torch.randint(-1, 9, (n, size, size), generator=torch.Generator().manual_seed(0))
    kept = x.clone(), labels.clone()
    moved, ids = rearrange(x, draw, labels)
    expected, expected_ids = by_loop(x, draw, labels)
    assert torch.equal(moved, expected)
    assert ids is not None
    assert torch.equal(ids, expected_ids)
    assert ids.dtype == labels.dtype
    assert torch.equal(x, kept[0])  # the arguments may be another's memory
    assert torch.equal(labels, kept[1])
    assert torch.equal(rearrange(x.permute(0, 2, 1, 3), draw)[0], by_loop(x.permute(0, 2, 1, 3), draw, labels)[0])


def test_without_a_change_and_without_images_nothing_happens() -> None:
    x = pixels(3, 16)
    assert rearrange(x, drawn(Crop(size=16), 3))[0] is x
    everything = Crop(size=16, **CHANGES["all"])
    assert rearrange(x[:0], drawn(everything, 0), torch.zeros(0, 16, 16))[0].shape == (0, 16, 16, 3)
    none = Crop(size=16, holes=(0, 4))
    few = drawn(none, 40)
    rows = [i for i in range(40) if not few.holes[i, :, 2].any()]
    assert 2 < len(rows) < 20
    assert torch.equal(rearrange(pixels(40, 16), few)[0][rows], pixels(40, 16)[rows])


def test_a_draw_depends_on_the_seed_alone_and_other_views_on_nothing_new() -> None:
    crop = Crop(size=64, gamma=(0.5, 2.5), **CHANGES["all"])
    a, b, c = drawn(crop, 5), drawn(crop, 5), drawn(crop, 5, seed=1)
    assert all(np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
    for name in ("gamma", "patches", "blocks", "holes", "paste"):
        assert not np.array_equal(getattr(a, name), getattr(c, name))
    plain = drawn(Crop(size=64), 5)  # what is drawn for an image does not change with what is done to it besides
    assert np.array_equal(plain.window, a.window)
    assert np.array_equal(plain.colour, a.colour)


def test_numbers_and_sides_of_holes_are_uniform_and_holes_lie_within() -> None:
    crop = Crop(size=512, holes=(5, 20), hole_size=(10 / 512, 25 / 512))
    y, x, side = drawn(crop, 4000).holes.transpose(2, 0, 1)
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
        share = (place / (512 - side))[side > 0]
        assert np.allclose(np.quantile(share, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.01)
    small = drawn(Crop(size=64, holes=(5, 20)), 4000).holes[..., 2]
    assert np.allclose(np.bincount(small[small > 0])[1:] / (small > 0).sum(), 1 / 3, atol=0.01)  # 1, 2, 3 pixels
    assert drawn(Crop(size=16, holes=(5, 5)), 9).holes[..., 2].min() == 1  # less than a pixel is a pixel


def test_patches_lie_anywhere_in_their_half() -> None:
    for size, side in ((512, 200), (65, 25)):  # an odd size: the middle row is of neither half
        upper, lower = drawn(Crop(size=size, swap=200 / 512), 4000).patches.transpose(1, 0, 2)
        assert (np.unique(upper[:, 2]), np.unique(lower[:, 2])) == (side, side)
        assert (upper[:, 0].min(), upper[:, 0].max()) == (0, size // 2 - side)
        assert (lower[:, 0].min(), lower[:, 0].max()) == (size - size // 2, size - side)
        for patch in (upper, lower):
            assert (patch[:, 1].min(), patch[:, 1].max()) == (0, size - side)
            assert abs(patch[:, 1].mean() - (size - side) / 2) < 0.02 * size


def test_every_order_of_blocks_is_as_likely() -> None:
    orders = drawn(Crop(size=4, grid=2), 24_000).blocks.reshape(-1, 4)
    assert (np.sort(orders, 1) == np.arange(4)).all()
    _, count = np.unique(orders, axis=0, return_counts=True)
    assert len(count) == 24
    assert ((count - 1000) ** 2 / 1000).sum() < 55  # chi-square with 23 degrees of freedom: 2e-4
    many = drawn(Crop(size=64, grid=4), 8000).blocks.reshape(-1, 16)
    share = np.stack([(many == block).mean(0) for block in range(16)])
    assert abs(share - 1 / 16).max() < 5 * np.sqrt(15 / 16**2 / 8000)


@pytest.mark.parametrize("reach", [1, 2, 6])
def test_blocks_move_no_farther_than_their_reach(reach: int) -> None:
    blocks = drawn(Crop(size=64, grid=7, reach=reach), 4000).blocks
    assert (np.sort(blocks.reshape(-1, 49), 1) == np.arange(49)).all()
    down, across = blocks // 7 - np.arange(7)[:, None], blocks % 7 - np.arange(7)
    assert abs(down).max() == abs(across).max() == reach
    for move in (down, across):
        assert np.allclose((move > 0).mean(0), (move < 0).mean(0)[::-1, ::-1], atol=0.04)  # no drift to one side
    if reach == 1:  # neighbours exchange where u - u' > 1, each uniform in +-1: 1 / 8; a first pair has no other side
        assert abs((across[:, :, 0] == 1).mean() - 1 / 8) < 0.01
        assert abs((down[:, 0] == 1).mean() - 1 / 8) < 0.01


def test_gamma_is_uniform() -> None:
    gamma = drawn(Crop(gamma=(0.5, 2.5)), 20_000).gamma
    assert 0.5 <= gamma.min() < 0.51
    assert 2.49 < gamma.max() <= 2.5
    steps = np.sort(gamma) - np.linspace(0.5, 2.5, 20_000)
    assert abs(steps).max() / 2 < 1.63 / np.sqrt(20_000)  # Kolmogorov and Smirnov, 1%


def test_the_pasted_region_has_uniform_sides_and_keeps_what_has_edges() -> None:
    sides = drawn(Crop(size=512, paste=(200 / 512, 300 / 512)), 4000).paste
    assert (sides.min(), sides.max()) == (200, 300)
    assert abs(sides.mean(0) - 250).max() < 2.5
    assert abs(np.corrcoef(sides.T)[0, 1]) < 0.06
    view = torch.full((1, 64, 64, 3), 120, dtype=torch.uint8)
    view[0, 40:50, 6:16] = 200  # steps at 40 and 50, 6 and 16: their mean is (44.75, 10.75)
    moved, _ = rearrange(view, drawn(Crop(size=64, paste=(0.5, 0.5)), 1))
    assert (moved[0, :16] == 255).all()
    assert (moved[0, 16:48, :16] == 255).all()
    assert (moved[0, 16:48, 16:48] == view[0, 28:60, :32]).all()  # kept within the view


def test_the_border_is_cut_from_the_window() -> None:
    sizes = np.array([[512, 1024], [3, 1]])
    whole = draw_crop(Crop(scale=None), sizes, generator(0, 0, 0, 0))
    cut = draw_crop(Crop(scale=None, border=10 / 512), sizes, generator(0, 0, 0, 0))
    assert whole.window.tolist() == [[0, 0, 512, 1024], [0, 0, 3, 1]]
    assert cut.window.tolist() == [[10, 20, 492, 984], [0, 0, 3, 1]]
    assert np.array_equal(whole.flip, cut.flip)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("change", CHANGES)
def test_the_gpu_moves_the_same(change: str) -> None:
    draw, x = drawn(Crop(size=64, **CHANGES[change]), 9), pixels(9, 64)
    labels = torch.arange(9 * 64 * 64).reshape(9, 64, 64)
    a, b = rearrange(x, draw, labels), rearrange(x.cuda(), draw, labels.cuda())
    assert all(torch.equal(p, q.cpu()) for p, q in zip(a, b, strict=True))  # type: ignore[union-attr]
