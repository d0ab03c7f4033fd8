"""Positive and negative pairs, from a miner or from labels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fgfast.tensors import check_integers, shape_error, values_checked

Masks = tuple[Tensor, Tensor]  # positive and negative pairs, bool [M, R] each


def pairs_of_indices(indices_tuple: Sequence[Tensor], rows: int, columns: int, device: torch.device) -> Masks:
    """The pairs of a miner: (anchor, positive, negative), or (anchor, positive, anchor, negative).

    Where reading values costs a device sync, they are not checked; a pair that is positive and negative is positive.

    Raises:
        TypeError: an element is no tensor of integers.
        ValueError: not 3 or 4 tensors [P], another length, an index out of range, or a pair that is both positive and
            negative.
    """
    if not isinstance(indices_tuple, tuple | list) or len(indices_tuple) not in (3, 4):
        raise ValueError("indices_tuple: expected 3 or 4 tensors of indices, as miners return them.")
    masks = []
    for first, second in ((0, 1), (0, 2) if len(indices_tuple) == 3 else (2, 3)):
        index: list[Tensor] = []
        for i, n in ((first, rows), (second, columns)):
            name, x = f"indices_tuple[{i}]", indices_tuple[i]
            check_integers(name, x)
            if x.dim() != 1 or x.shape != indices_tuple[first].shape:
                raise shape_error(name, f"[{len(index[0])}]" if index else "[P]", x)
            x = x.long()  # torch takes uint8 for a mask
            if values_checked(x) and x.numel() and not bool(((x >= 0) & (x < n)).all()):
                raise ValueError(f"{name} holds an index out of range: give indices from 0 to {n - 1}.")
            index.append(x.to(device))
        mask = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        mask[tuple(index)] = True
        masks.append(mask)
    both = masks[0] & masks[1]
    if values_checked(both) and bool(both.any()):
        pair = tuple(both.nonzero()[0].tolist())
        raise ValueError(f"indices_tuple: pair {pair} is both positive and negative.")
    return masks[0], masks[1]


def pairs_of_labels(labels: Tensor, ref_labels: Tensor) -> Masks:
    """Equal labels are positives, others negatives; for one tensor given twice no vector is paired with itself."""
    equal = labels[:, None] == ref_labels
    positive = equal.clone().fill_diagonal_(False) if ref_labels is labels else equal
    return positive, ~equal
