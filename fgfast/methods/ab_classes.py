"""Colours as classes: bins of the ab plane inside the sRGB gamut, soft labels, and weights that favour rare colours."""

import itertools
from functools import lru_cache

import torch
from torch import Tensor, nn

from fgfast.data.lab import rgb_to_lab

NEIGHBOURS = 5
SIGMA = 5.0  # standard deviation of the soft labels and of the smoothing of the prior, in units of ab


@lru_cache(maxsize=4)
def ab_bins(step: int = 10) -> Tensor:
    """The points of a grid over the ab plane that surround the colours of sRGB, float32 [Q, 2], sorted by a, then b.

    The gamut is a solid, so its projection to the ab plane is that of its surface: all 8-bit colours with a channel at
    0 or 255 are converted, and the bins are the corners of the grid cells that contain any of them.

    Example:
        >>> ab_bins().shape
        torch.Size([309, 2])
    """
    axis = torch.arange(256) / 255
    first, second = torch.meshgrid(axis, axis, indexing="ij")
    squares = []
    for fixed, value in itertools.product(range(3), (0.0, 1.0)):
        channels = [first, second]
        channels.insert(fixed, torch.full_like(first, value))
        ab = rgb_to_lab(torch.stack(channels))[1:].flatten(1).T
        squares.append(torch.unique((ab / step).floor().long(), dim=0))
    corners = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    return torch.unique((torch.cat(squares)[:, None] + corners).flatten(0, 1), dim=0).float() * step


def _candidates(centres: Tensor, origin: Tensor, shape: Tensor, step: int) -> Tensor:
    """Indices of the bins that can be among the five nearest to a colour, for each cell of the grid.

    A bin is excluded if five others are nearer to every point of the cell: the smallest distance of the bin to the
    cell is larger than the largest distance of each of those.
    """
    rows, columns = shape.tolist()
    low = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) * step + origin  # [squares, 2]
    below = low[:, None] - centres  # [squares, Q, 2]
    above = -below - step
    nearest = torch.maximum(below, above).clamp(min=0).square().sum(2)
    farthest = torch.maximum(below.abs(), above.abs()).square().sum(2)
    bound = farthest.kthvalue(NEIGHBOURS, dim=1, keepdim=True).values
    width = int((nearest <= bound).sum(1).max())
    return nearest.topk(width, dim=1, largest=False).indices


class AbClasses(nn.Module):
    """Soft classification of colours over the bins of :func:`ab_bins`.

    The label of a colour x has the weights exp(-|x - c|^2 / (2 sigma^2)), sigma = 5, on its five nearest bins c,
    normalised to sum 1.

    Args:
        step: side of a bin in units of ab.

    Attributes:
        centres: the bins, float32 [Q, 2]. Like the other tables it is a constant and not stored in checkpoints.
    """

    centres: Tensor
    _origin: Tensor
    _shape: Tensor
    _table: Tensor
    _a: Tensor
    _b: Tensor

    def __init__(self, step: int = 10) -> None:
        super().__init__()
        self.step = step
        tables = {"centres": ab_bins(step)}
        origin = tables["_origin"] = tables["centres"].min(0).values
        shape = tables["_shape"] = ((tables["centres"].max(0).values - origin) / step).long()
        table = tables["_table"] = _candidates(tables["centres"], origin, shape, step)
        tables["_a"], tables["_b"] = (axis[table] for axis in tables["centres"].unbind(1))
        for name, values in tables.items():
            self.register_buffer(name, values, persistent=False)

    def __len__(self) -> int:
        """Q, the number of bins."""
        return len(self.centres)

    def encode(self, ab: Tensor) -> tuple[Tensor, Tensor]:
        """The soft label of each colour.

        Args:
            ab: colours inside the sRGB gamut, float32 [N, 2].

        Returns:
            Indices of the five nearest bins, nearest first, int64 [N, 5], and their weights, float32 [N, 5].
        """
        row_column = torch.minimum(((ab - self._origin) / self.step).long().clamp(min=0), self._shape - 1)
        cell = row_column[:, 0] * self._shape[1] + row_column[:, 1]
        distance = (ab[:, :1] - self._a[cell]).square() + (ab[:, 1:] - self._b[cell]).square()  # [N, candidates]
        nearest, which = distance.topk(NEIGHBOURS, dim=1, largest=False)
        return self._table[cell].gather(1, which), (-nearest / (2 * SIGMA**2)).softmax(1)

    def histogram(self, ab: Tensor) -> Tensor:
        """Sum of the soft labels of colours [N, 2], as float64 [Q]."""
        index, weight = self.encode(ab)
        total = torch.zeros(len(self), dtype=torch.float64, device=ab.device)
        return total.index_add_(0, index.flatten(), weight.flatten().double())

    def smooth(self, counts: Tensor) -> Tensor:
        """Smooth counts [Q] over the ab plane with the same Gaussian and normalise them to sum 1, float64 [Q]."""
        distance = torch.cdist(self.centres.double(), self.centres.double())
        kernel = (-distance.square() / (2 * SIGMA**2)).exp()
        kernel = kernel / kernel.sum(0, keepdim=True)  # also at the edge of the gamut no mass is lost
        smoothed = kernel @ counts.double()
        return smoothed / smoothed.sum()

    def annealed_mean(self, logits: Tensor, temperature: float = 0.38) -> Tensor:
        """One colour for each distribution: the mean of softmax(logits / T), from [..., Q] to [..., 2]."""
        return (logits.float() / temperature).softmax(-1) @ self.centres


def rebalancing_weights(prior: Tensor, mix: float = 0.5) -> Tensor:
    """Weights 1 / ((1 - mix) p + mix / Q), scaled to expectation 1 under the prior p.

    Args:
        prior: probabilities p, [Q], sum 1.
        mix: weight of the uniform distribution in the mixture, 0 to 1.

    Returns:
        The weights, with the dtype and shape of ``prior``.

    Example:
        >>> rebalancing_weights(torch.tensor([0.5, 0.5]))
        tensor([1., 1.])
    """
    weights = 1 / ((1 - mix) * prior + mix / len(prior))
    return weights / (weights * prior).sum()
