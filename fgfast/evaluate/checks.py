"""Checks of features and labels that every score makes."""

from torch import Tensor

from fgfast.tensors import check_integers, check_tensor, shape_error


def check_finite(**features: Tensor) -> None:
    """Raise unless all features are finite; the keywords are the names that users know.

    Args:
        features: [N, D] each.

    Raises:
        TypeError: one is no tensor.
        ValueError: one holds a number that is not finite.

    Example:
        >>> import torch
        >>> check_finite(x=torch.tensor([[0.0], [torch.nan]]))
        Traceback (most recent call last):
        ...
        ValueError: x is not finite in row 1 (1 of 2 rows): leave such rows out, or use weights that have not diverged.
    """
    for name, x in features.items():
        check_tensor(name, x)
        finite = x.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = (~finite).nonzero().flatten()
            raise ValueError(
                f"{name} is not finite in row {int(bad[0])} ({len(bad)} of {len(x)} rows): leave such rows out, or use "
                "weights that have not diverged."
            )


def check_split(train_x: Tensor, train_y: Tensor, test_x: Tensor) -> None:
    """Raise unless these are finite features and labels of training rows, and finite features of test rows.

    Args:
        train_x: [N, D].
        train_y: integers [N].
        test_x: [M, D].

    Raises:
        TypeError: the features are no tensors, or the labels are no integers.
        ValueError: shapes that do not fit, or a feature that is not finite.
    """
    check_tensor("train_x", train_x)
    check_tensor("test_x", test_x)
    check_integers("train_y", train_y)
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            f"train_x and test_x: expected shapes [N, D] and [M, D], got {list(train_x.shape)} and "
            f"{list(test_x.shape)}."
        )
    if train_y.shape != train_x.shape[:1]:
        raise shape_error("train_y", f"[{len(train_x)}]", train_y)
    check_finite(train_x=train_x, test_x=test_x)
