"""LARS: SGD with momentum and a rate for each matrix, for batches of thousands of images."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

TRUST = 0.001  # norm of an update at a rate of 1 and without momentum, relative to the norm of the matrix


class LARS(torch.optim.SGD):
    r"""SGD whose rate for a matrix follows from the norms of the matrix and of its update.

    .. math:: u = g + \lambda w, \qquad v \leftarrow \mu v + \eta \frac{\|w\|}{\|u\|} u, \qquad
              w \leftarrow w - \text{lr} \, v,

    with the gradient g, weight decay lambda, momentum mu and eta = :data:`TRUST`. The factor of u is 1 if a norm is 0,
    and for vectors and scalars.

    Args:
        groups: groups of parameters, each with its "weight_decay".
        options: options of torch.optim.SGD, such as ``lr``, ``momentum`` and ``fused``.

    Example:
        >>> w = torch.nn.Parameter(torch.eye(2))
        >>> (10 * w).sum().backward()
        >>> LARS([{"params": [w], "weight_decay": 0.0}], lr=1000.0).step()
        >>> round((w - torch.eye(2)).norm().item(), 4) == round(2**0.5, 4)  # rate x TRUST x norm of w
        True

    Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017; with the weight decay inside
    the norm, as in BYOL and MoCo v3.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **options: Any) -> None:
        groups = [{**group, "weight_decay": 0.0, "decay": group["weight_decay"]} for group in groups]
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Scale the gradients, in place, and make a step of SGD."""
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None and p.ndim > 1]
            if matrices:
                _scale_gradients(matrices, group["decay"])
        return super().step(closure)


def _scale_gradients(matrices: list[Tensor], decay: float) -> None:
    """Replace the gradient g of each matrix w by TRUST ||w|| / ||u|| u, with u = g + decay w."""
    updates = [p.grad for p in matrices if p.grad is not None]
    torch._foreach_add_(updates, matrices, alpha=decay)
    weight, update = (torch.stack(torch._foreach_norm(x)) for x in (matrices, updates))
    scale = torch.where((weight > 0) & (update > 0), TRUST * weight / update, 1.0)
    torch._foreach_mul_(updates, list(scale.unbind()))
