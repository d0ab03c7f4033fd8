"""Leave-one-out retrieval: every image of a set is a query for all the others."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fgfast.evaluate.checks import check_finite
from fgfast.tensors import check_integers, check_tensor

BLOCK = 1 << 26  # similarities of a block of queries; each entry of the tables of their classes counts as 16
COLUMNS = 1 << 12  # columns whose keys are made at once


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

    Ranks are counted, not sorted: the rank of an image of the query's class is that among those of its class, plus the
    number of images of other classes that precede it. Memory beyond ``x`` and its normalised copy is that of a block of
    queries: about 300 MiB for up to 256 of them, or that of one query, 4 N bytes and 64 per image of its class, if this
    is more.

    Args:
        x: float [N, D], N >= 2.
        y: classes, int64 [N].
        chunk: largest number of queries per block; there are fewer if N or the classes are large.

    Raises:
        TypeError: ``x`` is no tensor, or ``y`` holds no integers.
        ValueError: fewer than two rows, wrong shapes, or a feature that is not finite.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
        >>> retrieve(x, torch.tensor([0, 0, 1, 0])).nearest.tolist()
        [0, 0, 0, 1]

    Source: the evaluation of Shi et al., "LoDisc: Learning Global-Local Discriminative Features for Self-Supervised
    Fine-Grained Visual Recognition", 2024, which uses the output of the predictor as ``x``.
    """
    check_tensor("x", x)
    check_integers("y", y)
    if x.ndim != 2 or len(x) < 2 or y.shape != x.shape[:1]:
        raise ValueError(
            f"x and y: expected shapes [N, D] and [N] with N >= 2, got {list(x.shape)} and {list(y.shape)}."
        )
    x, y = x.float(), y.to(x.device)
    check_finite(x=x)
    x = F.normalize(x, dim=1)
    _, label, size = y.unique(return_inverse=True, return_counts=True)
    by_class = label.argsort(stable=True)  # the images class by class, in the order of the set
    start = size.cumsum(0) - size
    size_of = size[label]
    queries = size_of.argsort(stable=True)  # of small classes first: the tables of a block are as wide as its largest
    sizes = size_of[queries].tolist()
    nearest, first, precision = torch.empty_like(y), torch.zeros_like(y), y.new_zeros(len(y), dtype=torch.float64)
    begin = 0
    while begin < len(x):
        end = begin + _count_queries(sizes, begin, chunk)
        rows = queries[begin:end]
        offset = torch.arange(sizes[end - 1], device=x.device)
        inside = offset < size_of[rows, None]
        members = by_class[(start[label[rows], None] + offset).clamp_(max=len(x) - 1)]  # [m, R + 1], self included
        nearest[rows], first[rows], precision[rows] = _rank(x, y, rows, members, inside)
        begin = end
    has_match = size_of > 1
    rank5 = has_match & (first <= 5)
    return Retrieval(*(v.cpu() for v in (nearest, rank5, precision, has_match)))


def _count_queries(sizes: list[int], begin: int, chunk: int) -> int:
    """Number of queries from ``begin`` on that fit in a block; the ``sizes`` of their classes ascend."""

    def count(size: int) -> int:
        return max(1, min(chunk, len(sizes) - begin, BLOCK // (len(sizes) + 16 * size)))

    return count(sizes[begin + count(sizes[begin]) - 1])


def _rank(x: Tensor, y: Tensor, rows: Tensor, members: Tensor, inside: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class of the nearest image, rank of the first image of the query's class, and average precision of m queries.

    Args:
        x: normalised features [N, D].
        y: classes [N].
        rows: the queries [m].
        members: the images of their classes, themselves included, [m, R + 1].
        inside: which of these there are, bool [m, R + 1].
    """
    n, bounds = len(x), torch.iinfo(torch.int64)
    similarity = x[rows] @ x.T  # [m, N]
    matching = _keys(similarity.gather(1, members), members, n)
    matching = torch.where(inside & (members != rows[:, None]), matching, bounds.max).sort(1).values
    n_matching = (matching < bounds.max).sum(1, keepdim=True)
    # For every image of another class, of how many images of the query's class it is ranked ahead.
    ahead, one = torch.zeros_like(matching), matching.new_ones(1, 1)
    similarity.scatter_(1, rows[:, None], -torch.inf)
    top = torch.full_like(rows, bounds.min)
    for begin in range(0, n, COLUMNS):
        columns = torch.arange(begin, min(begin + COLUMNS, n), device=x.device)
        keys = _keys(similarity[:, begin : begin + COLUMNS], columns, n)
        top = torch.maximum(top, keys.max(1).values)
        keys.masked_fill_(y[columns] == y[rows, None], bounds.min)
        place = torch.searchsorted(matching, keys)
        ahead.scatter_add_(1, place, one.expand(place.shape))
    others = n - ahead.cumsum(1)  # of other classes, ahead of each image of the query's class, from the last one
    among = n_matching - torch.arange(matching.shape[1], device=x.device)  # rank among those of its class
    precision = torch.where(among > 0, among.double() / (among + others).clamp(min=1), 0)
    last = (n_matching - 1).clamp(min=0)
    first = (among + others).gather(1, last)[:, 0]
    return y[_column(top, n)], first, precision.sum(1) / n_matching[:, 0].clamp(min=1)


def _keys(similarity: Tensor, columns: Tensor, n: int) -> Tensor:
    """Distinct int64 keys in the order of the ranking: by the similarity, then from the last column to the first."""
    bits = (similarity + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    return ordered.long() * (1 << 32) + (n - 1 - columns)


def _column(keys: Tensor, n: int) -> Tensor:
    """The columns of keys."""
    return n - 1 - (keys & 0xFFFFFFFF)
