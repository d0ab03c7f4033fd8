"""LARS: SGD with momentum and a rate for each matrix, for batches of thousands of images."""

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

    Parameters and options are those of torch.optim.SGD.

    Example:
        >>> w = torch.nn.Parameter(torch.eye(2))
        >>> (10 * w).sum().backward()
        >>> LARS([w], lr=1000.0).step()
        >>> round((w - torch.eye(2)).norm().item(), 4) == round(2**0.5, 4)  # rate x TRUST x norm of w
        True

    Source: You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017; with the weight decay inside
    the norm, as in BYOL and MoCo v3.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Scale the gradients, in place, and make a step of SGD."""
        loss = None
        if closure is not None:  # not by SGD: its gradients would replace the scaled ones
            with torch.enable_grad():
                loss = closure()
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            _scale_gradients([p for p in group["params"] if p.grad is not None], decay)
            group["weight_decay"] = 0.0  # it is in the gradients
        try:
            super().step()
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        return loss


def _scale_gradients(params: list[Tensor], decay: float) -> None:
    """Replace the gradient g of each parameter w by u = g + decay w, that of a matrix by TRUST ||w|| / ||u|| u."""
    if params and decay:
        torch._foreach_add_([p.grad for p in params if p.grad is not None], params, alpha=decay)
    matrices = [p for p in params if p.ndim > 1]
    if not matrices:
        return
    updates = [p.grad for p in matrices if p.grad is not None]
    weight, update = (torch.stack(torch._foreach_norm(x)) for x in (matrices, updates))
    scale = torch.where((weight > 0) & (update > 0), TRUST * weight / update, 1.0)
    torch._foreach_mul_(updates, list(scale.unbind()))
