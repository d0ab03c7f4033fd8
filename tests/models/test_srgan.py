"""SRGAN's networks: shapes at any size, the paper's parameter counts, and encoders from their first blocks."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from fgfast.data.normalise import IMAGENET_MEAN, IMAGENET_STD
from fgfast.errors import UserError
from fgfast.models.srgan import Discriminator, Generator, SRGANEncoder


@pytest.mark.parametrize("size", [(24, 24), (5, 7), (1, 1)])  # the paper's, odd sides, the smallest
def test_generator_enlarges_by_four(size: tuple[int, int]) -> None:
    assert Generator(4, 2)(torch.zeros(2, 3, *size)).shape == (2, 3, 4 * size[0], 4 * size[1])


@pytest.mark.parametrize("size", [(96, 96), (81, 90), (40, 33), (130, 20), (1, 1)])
def test_discriminator_takes_any_size(size: tuple[int, int]) -> None:
    assert Discriminator(2).eval()(torch.zeros(2, 3, *size)).shape == (2, 1)


@pytest.mark.parametrize("size", [81, 88, 96])
def test_averaging_equals_the_fixed_flatten_at_its_sizes(size: int) -> None:
    """Both give the same logits from the same weights; outside 81 to 96 the fixed one names this range."""
    torch.manual_seed(0)
    free, fixed = Discriminator(2).eval(), Discriminator(2, fixed=True).eval()
    fixed.load_state_dict(free.state_dict())
    x = torch.rand(2, 3, size, size)
    maps = free.blocks(x)
    assert maps.shape[-2:] == (6, 6)
    flat = nn.Sequential(*free.head[1:])(maps)
    torch.testing.assert_close(free(x), flat)
    torch.testing.assert_close(fixed(x), flat)
    for wrong in (80, 97):
        with pytest.raises(UserError, match=f"81 to 96 pixels, not {wrong}"):
            fixed(torch.zeros(1, 3, wrong, wrong))


def test_paper_sizes() -> None:
    """Numbers of parameters of the paper's networks, counted by hand from its layers."""
    wide = Generator()
    block = 2 * (9 * 64 * 64 + 2 * 64) + 1
    neck = 9 * 64 * 64 + 2 * 64
    up = 2 * (9 * 64 * 256 + 256 + 1)
    ends = 81 * 3 * 64 + 64 + 1 + 81 * 64 * 3 + 3
    assert sum(p.numel() for p in wide.parameters()) == 16 * block + neck + up + ends
    judge = Discriminator()
    widths = [64, 64, 128, 128, 256, 256, 512, 512]
    convs = 27 * 64 + 64 + sum(9 * a * b + 2 * b for a, b in pairwise(widths))
    assert sum(p.numel() for p in judge.parameters()) == convs + 512 * 36 * 1024 + 1024 + 1024 + 1


def test_reach_is_the_radius_of_the_receptive_field() -> None:
    """Gradients are zero beyond the reach, and the reach is at most 2 pixels too large."""
    torch.manual_seed(0)
    net = Generator(4, 2).double().eval()
    x = torch.rand(1, 3, 1, 61, dtype=torch.float64).requires_grad_()
    net(x)[0, :, :, 4 * 30 : 4 * 31].sum().backward()
    assert x.grad is not None
    touched = x.grad.abs().amax((0, 1, 2)).nonzero().flatten()
    spread = int((touched - 30).abs().max())
    assert net.reach - 2 <= spread <= net.reach


@pytest.mark.parametrize(
    ("network", "drop", "dim", "cell"),
    [
        (Generator(4, 3), 0, 4, 1),
        (Generator(4, 3), 2, 4, 1),
        (Discriminator(2), 0, 16, 16),
        (Discriminator(2), 1, 16, 8),
        (Discriminator(2), 3, 8, 4),
        (Discriminator(2), 7, 2, 1),
    ],
)
def test_encoder_keeps_the_first_blocks(network: nn.Module, drop: int, dim: int, cell: int) -> None:
    """Features are the mean of the map after the remaining blocks, of an image with values in [0, 1]."""
    encoder = SRGANEncoder(network, drop).eval()  # type: ignore[arg-type]
    x = torch.rand(2, 3, 37, 50)
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = network.head(x) if isinstance(network, Generator) else x
    for block in network.blocks[: len(network.blocks) - drop]:  # type: ignore[index]
        expected = block(expected)
    maps = encoder.features((x - mean) / std)
    assert (encoder.dim, maps.shape[2]) == (dim, -(-37 // cell))
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(encoder((x - mean) / std), expected.mean((2, 3)), rtol=1e-3, atol=1e-4)
    pyramid = encoder.pyramid(x, 2)
    torch.testing.assert_close(pyramid[0], encoder.features(x))
    with pytest.raises(UserError, match="--drop is"):
        SRGANEncoder(network, len(network.blocks))  # type: ignore[arg-type]
