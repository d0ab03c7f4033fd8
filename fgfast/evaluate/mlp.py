"""An MLP classifier on frozen features, and class weights for cross-entropy."""

import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from fgfast.errors import UserError
from fgfast.evaluate.checks import check_split

ClassWeights = Literal["none", "inverse", "frequency"]


def class_weights(targets: np.ndarray, classes: tuple[str, ...], kind: ClassWeights) -> Tensor | None:
    """Weights of the classes in a cross-entropy, from their frequencies in the training set.

    With n_c of N images in class c of C: "inverse" is N / (C n_c), which gives every class the same total weight;
    "frequency" is n_c / N, as in the release of Al Breiki et al., which favours common classes against its purpose;
    "none" is no weights.

    Args:
        targets: classes of the training images, int64 [N], 0..C-1.
        classes: C names.
        kind: one of the three.

    Returns:
        float32 [C], or None.

    Raises:
        UserError: a class has no training image.

    Example:
        >>> class_weights(np.array([0, 0, 0, 1]), ("a", "b"), "inverse").tolist()
        [0.6666666865348816, 2.0]
    """
    counts = np.bincount(targets, minlength=len(classes))
    if (counts == 0).any():
        name = classes[int((counts == 0).argmax())]
        raise UserError(f"Class {name} has no training image: add images, or drop the class from the set.")
    if kind == "none":
        return None
    frequency = counts / counts.sum()
    return torch.from_numpy(1 / (len(classes) * frequency) if kind == "inverse" else frequency).float()


@dataclass(frozen=True)
class MLPOptions:
    """Options of :func:`mlp_probe`; the defaults are those of Al Breiki et al."""

    hidden: int = 256
    """Width of the hidden layer."""
    epochs: int = 100
    """Largest number of epochs."""
    patience: int = 5
    """Epochs without improvement on the held-out tenth after which training stops."""
    lr: float = 3e-4
    """Learning rate of Adam."""
    weight_decay: float = 0.0
    """Weight decay of Adam."""
    batch_size: int = 16
    """Rows per step."""
    class_weights: ClassWeights = "none"
    """Weights of the classes: none, inverse to their frequency, or proportional to it (as released)."""
    seed: int = 0
    """Seed of the weights, the order and the held-out tenth."""


def mlp_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, classes: tuple[str, ...], options: MLPOptions | None = None
) -> Tensor:
    """A classifier with one hidden layer on frozen features: D -> hidden -> C, Adam, early stopping.

    A tenth of the rows of each class (at least one of two or more) is held out; the weights of the epoch with the
    smallest loss on them predict. Features are standardised as in :func:`fgfast.evaluate.linear.linear_probe`.

    Args:
        train_x: float [N, D].
        train_y: int64 [N], 0..C-1.
        test_x: float [M, D].
        classes: C names.
        options: see ``MLPOptions``.

    Returns:
        Predicted classes int64 [M], on the CPU.

    Raises:
        UserError: a class has no row.
        TypeError: the features are no tensors, or the labels are no integers.
        ValueError: wrong shapes, or a feature that is not finite.

    Source: the downstream classifier of Al Breiki, Ridzuan and Grandhe, "Self-Supervised Learning for Fine-Grained
    Image Classification", 2021. Differences: the release's encoder is in training mode in the first epoch, in which
    its BatchNorm statistics drift; here the split is by class, stopping by the loss, and features are standardised.
    """
    check_split(train_x, train_y, test_x)
    o = options or MLPOptions()
    y = train_y.cpu()
    weight = class_weights(y.numpy(), classes, o.class_weights)
    mean, spread = train_x.float().mean(0), train_x.float().std(0, correction=0)
    spread = torch.where(spread < 1e-6 * mean.abs().clamp(min=1), 1, spread)
    x, test = (((t.float() - mean) / spread).cpu() for t in (train_x, test_x))
    held = torch.from_numpy(part_of_each_class(y.numpy(), o.seed))
    with torch.random.fork_rng():
        torch.manual_seed(o.seed)
        net = nn.Sequential(nn.Linear(x.shape[1], o.hidden), nn.ReLU(), nn.Linear(o.hidden, len(classes)))
        optimizer = torch.optim.Adam(net.parameters(), lr=o.lr, weight_decay=o.weight_decay, fused=True)
        criterion = nn.CrossEntropyLoss(weight)
        best_loss, best_weights, waited = float("inf"), copy.deepcopy(net.state_dict()), 0
        rows = (~held).nonzero().flatten()
        for _ in range(o.epochs):
            for batch in rows[torch.randperm(len(rows))].split(o.batch_size):
                optimizer.zero_grad()
                criterion(net(x[batch]), y[batch]).backward()
                optimizer.step()
            with torch.no_grad():
                scored = held if held.any() else ~held
                loss = float(criterion(net(x[scored]), y[scored]))
            waited += 1
            if loss < best_loss:
                best_loss, best_weights, waited = loss, copy.deepcopy(net.state_dict()), 0
            if waited >= o.patience:
                break
    net.load_state_dict(best_weights)
    with torch.no_grad():
        return net(test).argmax(1)


def part_of_each_class(targets: np.ndarray, seed: int, fraction: float = 0.1) -> np.ndarray:
    """Mask of a random part of the rows of each class, at least one of two or more and never all, bool [N]."""
    held = np.zeros(len(targets), bool)
    order = np.random.default_rng(seed).permutation(len(targets))
    for c in np.unique(targets):
        members = order[targets[order] == c]
        held[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return held
