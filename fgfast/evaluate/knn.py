"""Weighted nearest-neighbour classification on frozen features."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fgfast.evaluate.checks import check_split


@torch.no_grad()
def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    n_classes: int | None = None,
    chunk: int = 1024,
) -> Tensor:
    """The class with the largest weighted vote of the k nearest training rows.

    With cosine similarity s_j to training row j, class c gets the sum of exp(s_j / temperature) over its rows among the
    k rows with the largest s_j.

    Args:
        train_x: float [N, D].
        train_y: int64 [N], classes 0..n_classes-1.
        test_x: float [M, D].
        k: number of neighbours; at most N are used.
        temperature: above 0; the smaller, the more weight the nearest rows have.
        n_classes: number of classes; None takes the largest of ``train_y`` plus one.
        chunk: test rows per block, which bounds the memory to chunk x N similarities.

    Returns:
        Predicted classes int64 [M] on the device of ``test_x``.

    Raises:
        TypeError: the features are no tensors, or the labels are no integers.
        ValueError: wrong shapes, a feature that is not finite, no training row, k < 1 or temperature <= 0.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> knn_predict(x, torch.tensor([0, 1]), torch.tensor([[2.0, 0.1]]), k=1)
        tensor([0])

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021 (their eval_knn).
    """
    check_split(train_x, train_y, test_x)
    if not len(train_x):
        raise ValueError("train_x has no rows: give at least one.")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k is {k} and temperature {temperature}: give k >= 1 and a temperature above 0.")
    device = test_x.device
    train = F.normalize(train_x.to(device).float(), dim=1)
    labels = train_y.to(device)
    n_classes = int(train_y.max()) + 1 if n_classes is None else n_classes
    predictions = [torch.empty(0, dtype=torch.int64, device=device)]
    for rows in F.normalize(test_x.float(), dim=1).split(chunk):
        similarity, neighbour = (rows @ train.T).topk(min(k, len(train)), dim=1)  # [m, k]
        # The largest similarity of a row is subtracted: the order of the votes stays, and exp cannot overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(rows), n_classes).scatter_add_(1, labels[neighbour], weight)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)
