"""Projection heads, the momentum copy of a network, and the head of DINO."""

import copy
import itertools
import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

M = TypeVar("M", bound=nn.Module)


class MLP(nn.Module):
    """Linear, norm, ReLU, ..., Linear on vectors [M, D].

    Args:
        dims: widths from input to output, at least two.
        norm: "batch" (SimCLR, BYOL, DeepMind's DetCon), "layer" (PARTICLE) or "none" (MoCo v2).
        bias: whether the linear layers have biases.
        dropout: probability of zeroing an entry after each hidden layer.
        last_norm: end with a BatchNorm without affine parameters (MoCo v3).

    Example:
        >>> MLP((512, 1024, 128))(torch.zeros(4, 512)).shape
        torch.Size([4, 128])
    """

    def __init__(
        self, dims: tuple[int, ...], norm: str = "batch", *, bias: bool = True, dropout: float = 0.0,
        last_norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        layers: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(dims)):
            layers.append(nn.Linear(before, after, bias=bias))
            if i < len(dims) - 2:
                if norm != "none":
                    layers.append(nn.BatchNorm1d(after) if norm == "batch" else nn.LayerNorm(after))
                layers.append(nn.ReLU(inplace=True))
                if dropout:
                    layers.append(nn.Dropout(dropout))
        if last_norm:
            layers.append(nn.BatchNorm1d(dims[-1], affine=False))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map [M, dims[0]] to [M, dims[-1]]."""
        return self.layers(x)


class DINOHead(nn.Module):
    """The head of DINO: three-layer GELU MLP, L2 normalisation, weight-normalised prototypes.

    Args:
        dim: width of the features.
        prototypes: outputs (65,536 in the paper).
        hidden: width of the MLP.
        bottleneck: width before the prototypes.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021.
    """

    def __init__(self, dim: int, prototypes: int = 65_536, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.last = weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
        self.last.parametrizations.weight.original0.data.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [M, D] to logits [M, prototypes]."""
        return self.last(nn.functional.normalize(self.mlp(x), dim=-1))


def momentum_copy(module: M) -> M:
    """A frozen deep copy for :func:`update_momentum`."""
    return copy.deepcopy(module).requires_grad_(False)


def cosine_momentum(base: float, progress: float) -> float:
    """The decay of a momentum copy after the fraction ``progress`` of the steps: a half cosine from ``base`` to 1.

    Example:
        >>> [round(cosine_momentum(0.9, t), 3) for t in (0.0, 0.5, 1.0)]
        [0.9, 0.95, 1.0]
    """
    return 1 - (1 - base) * (math.cos(math.pi * progress) + 1) / 2


@torch.no_grad()
def update_momentum(target: nn.Module, online: nn.Module, momentum: float) -> None:
    """Update the parameters of ``target``: t <- momentum * t + (1 - momentum) * o; its buffers are unchanged."""
    targets: list[Tensor] = list(target.parameters())
    sources: list[Tensor] = list(online.parameters())
    torch._foreach_lerp_(targets, sources, 1.0 - momentum)
