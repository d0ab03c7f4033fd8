"""The decoder: any grid, each image from only its own vector, and it learns to reconstruct."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgfast.errors import UserError
from fgfast.models.decoder import Decoder
from tests.examples import examples


@examples(15)
@given(st.integers(1, 9), st.integers(0, 30), st.sampled_from([3, 20, 64]))
def test_any_grid(grid: int, more: int, dim: int) -> None:
    """Images have the specified side, a multiple of the grid or not."""
    assert Decoder(dim, grid + more, grid, latent=4, width=16)(torch.zeros(2, dim)).shape[2:] == (grid + more,) * 2


def test_a_grid_larger_than_the_image_is_refused() -> None:
    """The error names its size."""
    with pytest.raises(UserError, match="16 x 16"):
        Decoder(8, size=8, grid=16)


def test_an_image_depends_only_on_its_own_features() -> None:
    """The other images of the batch have no effect, also in training mode."""
    torch.manual_seed(0)
    decoder, r = Decoder(8, 16, 4, width=16), torch.randn(3, 8)
    torch.testing.assert_close(decoder(r)[:1], decoder(r[:1]), rtol=1e-4, atol=1e-5)


def test_learns_to_reconstruct() -> None:
    """A few steps on four images halve the error."""
    torch.manual_seed(0)
    decoder, r, x = (
        Decoder(8, 16, 4, width=16, depth=2),
        torch.randn(4, 8),
        torch.randn(4, 3, 1, 1).expand(4, 3, 16, 16),
    )
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = (decoder(r) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
