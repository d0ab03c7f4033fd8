"""Weighted nearest-neighbour classification on frozen features."""

import torch
from torch import Tensor
from torch.nn import functional as F


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
    """The class with the heaviest vote of the k nearest training rows.

    With cosine similarity s_j to training row j, class c gets sum exp(s_j / temperature) over the k rows of largest s_j
    that are of class c.

    Args:
        train_x: float [N, D].
        train_y: int64 [N], classes 0..n_classes-1.
        test_x: float [M, D].
        k: neighbours; at most N are used.
        temperature: above 0; the smaller, the more the nearest count.
        n_classes: number of classes; None = the largest of ``train_y`` plus one.
        chunk: test rows at a time, which bounds the memory to chunk x N similarities.

    Returns:
        int64 [M] on the device of ``test_x``.

    Raises:
        ValueError: no training row, shapes that do not fit, k < 1 or temperature <= 0.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> knn_predict(x, torch.tensor([0, 1]), torch.tensor([[2.0, 0.1]]), k=1)
        tensor([0])

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021 (their eval_knn).
    """
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"train_x is {list(train_x.shape)}, test_x {list(test_x.shape)}: give [N, D] and [M, D].")
    if not len(train_x) or train_y.shape != train_x.shape[:1]:
        raise ValueError(f"train_y is {list(train_y.shape)}: give one class for each of N >= 1 training rows.")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k is {k} and temperature {temperature}: give k >= 1 and a temperature above 0.")
    device = test_x.device
    train = F.normalize(train_x.to(device).float(), dim=1)
    labels = train_y.to(device)
    n_classes = int(train_y.max()) + 1 if n_classes is None else n_classes
    predictions = [torch.empty(0, dtype=torch.int64, device=device)]
    for rows in F.normalize(test_x.float(), dim=1).split(chunk):
        similarity, neighbour = (rows @ train.T).topk(min(k, len(train)), dim=1)  # [m, k]
        # The largest similarity of a row is taken off: the votes keep their order and cannot overflow.
        weight = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weight.new_zeros(len(rows), n_classes).scatter_add_(1, labels[neighbour], weight)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)
