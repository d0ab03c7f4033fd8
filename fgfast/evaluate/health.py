"""Health of features without labels: effective rank, uniformity and alignment, by which collapse is seen."""

import logging
import math
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from fgfast.config import TrainConfig
from fgfast.data.splits import pretext_images
from fgfast.evaluate.checks import check_finite
from fgfast.evaluate.features import extract
from fgfast.methods.base import scoring
from fgfast.methods.simclr import simclr_views
from fgfast.models.backbone import Backbone
from fgfast.ranks import on_all, ranks_of, share_first
from fgfast.tensors import check_tensor, shape_error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

log = logging.getLogger("fgfast")

MAX_IMAGES = 2000  # images that are scored during training, by three passes each
BATCH = 256  # images of all ranks in a batch: it decides which crops are drawn
CHUNK = 1024  # rows whose distances to all others are taken at once
COLLAPSED = -2 * torch.finfo(torch.bfloat16).eps ** 2
"""Uniformity above which features differ by less than the spacing of bfloat16, in which networks train: collapse."""


def effective_rank(x: Tensor) -> float:
    r"""The effective rank of features, from 1 (all rows are multiples of one vector) to min(N, D) (no direction
    dominates).

    .. math:: \exp\Big(-\sum_k p_k \log p_k\Big), \qquad p_k = \sigma_k / \sum_l \sigma_l

    with the singular values :math:`\sigma` of x, which is not centred; 0 if x is zero.

    Args:
        x: float [N, D], N >= 1.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, or a feature that is not finite.

    Example:
        >>> round(effective_rank(torch.eye(5)), 6), round(effective_rank(torch.ones(5, 5)), 6)
        (5.0, 1.0)

    Source: Garrido et al., "RankMe: Assessing the downstream performance of pretrained self-supervised representations
    by their rank", ICML 2023, who add 1e-7 to every p; Roy and Vetterli, "The effective rank", 2007.
    """
    _check(x=x)
    sigma = torch.linalg.svdvals(x.detach().double())
    if not sigma.any():
        return 0.0
    p = sigma / sigma.sum()
    return math.exp(-float(torch.special.xlogy(p, p).sum()))


@torch.no_grad()
def uniformity(x: Tensor) -> float:
    r"""How evenly features spread over the sphere: 0 if all have one direction, and the smaller the more even.

    .. math:: \log \frac{2}{N (N - 1)} \sum_{i < j} \exp(-2 \|u_i - u_j\|^2), \qquad u = x / \|x\|

    Memory is that of a block of rows, not of all pairs.

    Args:
        x: float [N, D], N >= 2.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, fewer than two rows, or a feature that is not finite.

    Example:
        >>> round(uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])), 6)  # the distance is 2
        -8.0

    Source: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere", ICML 2020, with t = 2.
    """
    _check(x=x)
    if len(x) < 2:
        raise shape_error("x", "[N, D] with N >= 2", x)
    u = F.normalize(x.double(), dim=1)
    square, total = u.square().sum(1), u.new_zeros(())
    for begin in range(0, len(u), CHUNK):
        rows, others = slice(begin, begin + CHUNK), slice(begin, None)
        distance = square[rows, None] + square[others] - 2 * u[rows] @ u[others].T
        total += (-2 * distance).exp().triu(1).sum()
    return math.log(float(total) / (len(u) * (len(u) - 1) / 2))


@torch.no_grad()
def alignment(x: Tensor, y: Tensor) -> float:
    r"""Mean squared distance of two views of the same images, 0 (equal directions) to 4 (opposite ones).

    .. math:: \frac{1}{N} \sum_i \|u_i - v_i\|^2, \qquad u = x / \|x\|, \qquad v = y / \|y\|

    Args:
        x: float [N, D], N >= 1.
        y: the same shape; row i is the other view of image i.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, or a feature that is not finite.

    Example:
        >>> alignment(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        2.0

    Source: Wang and Isola, 2020, as :func:`uniformity`, with alpha = 2.
    """
    _check(x=x, y=y)
    if x.shape != y.shape:
        raise shape_error("y", str(list(x.shape)), y)
    u, v = (F.normalize(z.double(), dim=1) for z in (x, y))
    return float((u - v).square().sum(1).mean())


def _check(**features: Tensor) -> None:
    for name, x in features.items():
        check_tensor(name, x)
        if x.ndim != 2 or not len(x):
            raise shape_error(name, "[N, D] with N >= 1", x)
    check_finite(**features)


def online_health(
    encoder: Backbone, config: TrainConfig, device: torch.device, group: "ProcessGroup | None" = None
) -> dict[str, float]:
    """The three scores during training, of training images with and without labels; none if they cannot be read.

    Effective rank and uniformity are those of at most 2,000 full images, alignment that of two of SimCLR's crops of
    each: the same images and crops for every method and step, and for 1, 2, 4, ... ranks. Features that collapse are
    named in the log, once in a process. There is no other bound, as networks before training are far from even too:
    short of collapse, a fall below the first scores is what tells.

    Args:
        encoder: the network.
        config: options of the run.
        device: where the network runs.
        group: processes that call this at the same time and share the work; all return the same numbers.
    """
    ranks, rows = ranks_of(group, device), torch.empty(0)

    def features(*views: Tensor) -> Tensor:
        return torch.cat([encoder(view) for view in views], 1)

    with scoring(encoder, "The health of the features is left out", ranks):
        images = on_all(ranks, lambda: pretext_images(config))
        rows, _ = extract(
            features, images.sample(MAX_IMAGES), config.size, crops=simclr_views(TrainConfig(size=config.size)).crops,
            batch_size=max(1, BATCH // ranks.world), device=device, threads=config.threads, loader=config.loader,
            group=group, lenient=True, stats=encoder.stats,
        )  # fmt: skip
    if len(rows) < 2:
        return {}

    def score() -> dict[str, float]:
        x, *pair = rows.chunk(3, dim=1)
        return {"effective_rank": effective_rank(x), "uniformity": uniformity(x), "alignment": alignment(*pair)}

    scores = share_first(ranks, score)
    if scores["uniformity"] > COLLAPSED and ranks.first:
        warn_of_collapse(config.out)
    return scores


@cache
def warn_of_collapse(run: str) -> None:
    """Log that the features of a run have collapsed, once."""
    log.warning(
        "The features of all images of %s have one direction (uniformity 0): lower --lr, or check the images.", run
    )
