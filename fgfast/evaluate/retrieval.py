"""Leave-one-out retrieval: every image of a set is a query for all the others."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Retrieval(NamedTuple):
    """Results of N queries."""

    nearest: Tensor  # int64 [N]: class of the most similar other image
    rank5: Tensor  # bool [N]: one of the five most similar images has the class of the query
    precision: Tensor  # float64 [N]: average precision over the complete ranking
    has_match: Tensor  # bool [N]: another image has the class of the query; the scores of others mean nothing


@torch.no_grad()
def retrieve(x: Tensor, y: Tensor, *, chunk: int = 256) -> Retrieval:
    """Leave-one-out retrieval by cosine similarity.

    With R other images of the query's class at ranks k_1 < ... < k_R (from 1) of the N - 1 others, the average
    precision is (1 / R) sum_r r / k_r. Images of equal similarity are ranked in the order of the set.

    Args:
        x: float [N, D], N >= 2.
        y: classes, int64 [N].
        chunk: queries per block, which bounds the memory to chunk x N similarities.

    Raises:
        ValueError: fewer than two rows, or wrong shapes.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> retrieve(x, torch.tensor([0, 0, 1, 0])).nearest.tolist()
        [0, 0, 0, 1]

    Source: the evaluation of Shi et al., "LoDisc: Learning Global-Local Discriminative Features for Self-Supervised
    Fine-Grained Visual Recognition", 2024, which uses the output of the predictor as ``x``.
    """
    if x.ndim != 2 or len(x) < 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f"x and y: expected shapes [N, D] and [N] with N >= 2, got {list(x.shape)} and {list(y.shape)}."
        )
    x, y = F.normalize(x.float(), dim=1), y.to(x.device)
    nearest, rank5, precision, has_match = [], [], [], []
    for start in range(0, len(x), chunk):
        rows = torch.arange(start, min(start + chunk, len(x)), device=x.device)
        similarity = x[rows] @ x.T
        similarity.scatter_(1, rows[:, None], -torch.inf)  # ranks the query itself last, which is dropped
        classes = y[similarity.sort(dim=1, descending=True, stable=True).indices[:, :-1]]  # [m, N - 1]
        hit = classes == y[rows, None]
        count = hit.sum(1)
        rank = torch.arange(1, len(x), device=x.device, dtype=torch.float64)
        precisions = (hit.cumsum(1) / rank * hit).sum(1)
        nearest.append(classes[:, 0])
        rank5.append(hit[:, :5].any(1))
        precision.append(precisions / count.clamp(min=1))
        has_match.append(count > 0)
    return Retrieval(*(torch.cat(blocks).cpu() for blocks in (nearest, rank5, precision, has_match)))
