"""Contrast of given pairs, with every similarity in memory: what ``contrastive_loss`` cannot express."""

from collections.abc import Sequence

import torch
from torch import Tensor

Masks = tuple[Tensor, Tensor]  # positive and negative pairs, bool [M, R] each


def pairs_of_indices(indices_tuple: Sequence[Tensor], rows: int, columns: int, device: torch.device) -> Masks:
    """The pairs of a miner: (anchor, positive, negative), or (anchor, positive, anchor, negative).

    Raises:
        ValueError: not 3 or 4 tensors, or a pair that is both positive and negative.
    """
    if not isinstance(indices_tuple, tuple | list) or len(indices_tuple) not in (3, 4):
        raise ValueError("indices_tuple: expected 3 or 4 tensors of indices, as miners return them.")
    anchor, positive, *others = indices_tuple
    lists = ((anchor, positive), (anchor, others[0]) if len(others) == 1 else others)
    masks = []
    for row, column in lists:
        mask = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        mask[row.to(device), column.to(device)] = True
        masks.append(mask)
    both = (masks[0] & masks[1]).nonzero()
    if len(both):
        raise ValueError(f"indices_tuple: pair {tuple(both[0].tolist())} is both positive and negative.")
    return masks[0], masks[1]


def pairs_of_labels(labels: Tensor, ref_labels: Tensor) -> Masks:
    """Equal labels are positives, others negatives; for one tensor given twice no vector is paired with itself."""
    equal = labels[:, None] == ref_labels
    positive = equal.clone().fill_diagonal_(False) if ref_labels is labels else equal
    return positive, ~equal


def contrast_of_pairs(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """The losses [M] of logits [M, R]; 0 for a row without a positive pair.

    Example:
        >>> pair = torch.tensor([[True, False]])
        >>> round(contrast_of_pairs(torch.tensor([[1.0, 0.0]]), pair, ~pair).item(), 4)  # log(e + 1) - 1
        0.3133
    """
    n_positives = positive.sum(1)
    valid = n_positives > 0
    counted = positive | negative | ~valid[:, None]  # no row without a column: its log-sum-exp has no gradient
    lse = logits.masked_fill(~counted, -torch.inf).logsumexp(1)
    mean_positive = logits.masked_fill(~positive, 0).sum(1) / n_positives.clamp(min=1)
    return torch.where(valid, lse - mean_positive, 0)
