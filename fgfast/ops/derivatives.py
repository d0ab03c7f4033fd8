"""Derivatives that an operation takes from its definition: forward mode, torch.func and second derivatives.

The operations of this package know their gradient and nothing else. Where PyTorch asks for more, the plain PyTorch of
the definition answers, at every size, so that a derivative never depends on the backend.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fgfast.tensors import transformed


def needs_definition(op: str, backend: str | None, *tensors: Tensor | None) -> bool:
    """Whether ``op`` must run by its definition: a tensor has a tangent or belongs to a transform of torch.func.

    Raises:
        RuntimeError: it must, and the call asks for kernels.
    """
    if not transformed(*tensors):
        return False
    if backend in ("triton", "native"):
        raise RuntimeError(
            f"{op} with backend {backend!r} has no forward-mode derivative and does not work inside torch.func: "
            "choose 'auto'."
        )
    return True


def _as_views(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views with a gradient, at which gradients stop although one tensor may depend on another."""
    return [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in tensors]


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """The gradient of <grad, function(inputs)>: for a ``grad`` that has a tangent or belongs to a transform."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        xs = _as_views(inputs)
        value = function(*xs)
    return list(torch.autograd.grad(value, xs, grad, create_graph=again, allow_unused=True))


def second_derivatives(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Derivatives of sum_i <cotangent_i, d<grad, function(inputs)>/d input_i> with respect to grad and the inputs.

    A cotangent None leaves its input out. The result can itself be differentiated.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        g, *xs = _as_views([grad, *inputs])
        chosen = [i for i, v in enumerate(cotangents) if v is not None]
        first = torch.autograd.grad(function(*xs), [xs[i] for i in chosen], g, create_graph=True)
    found = torch.autograd.grad(first, [g, *xs], [cotangents[i] for i in chosen], create_graph=again, allow_unused=True)
    return list(found)
