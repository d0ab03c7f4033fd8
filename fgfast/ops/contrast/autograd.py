"""Fakes and gradients of a contrast, the same for one process and for the ring over ranks."""

from typing import Any

import torch
from torch import Tensor

from fgfast.tensors import accumulation


def returned(
    grads: list[Tensor | None], query: Tensor, key: Tensor | None, bank: Tensor | None, temperature: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients in the dtypes of the inputs, empty where there is none."""

    def one(grad: Tensor | None, of: Tensor | None) -> Tensor:
        of = query if of is None else of
        return of.new_empty(0) if grad is None else grad.to(of.dtype)

    d_query, d_key, d_bank, d_temperature = grads
    return one(d_query, query), one(d_key, key), one(d_bank, bank), one(d_temperature, temperature)


def register_autograd(forward: Any, backward: Any) -> None:
    """Fakes and the gradient of a contrast.

    Args:
        forward: custom op of (query, its 3 ids, key, its 3 ids, bank, temperature tensor, options ..) that returns
            loss, lse and count [M].
        backward: custom op of (gradient of the loss, lse, count, which of query, key, bank and temperature need a
            gradient, and all that forward was given) that returns these four.
    """

    def forward_fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        row = query.new_empty(query.shape[0], dtype=accumulation(query.dtype))
        return row, torch.empty_like(row), torch.empty_like(row)

    def backward_fake(grad: Tensor, lse: Tensor, count: Tensor, needs: list[bool], *args: Any) -> tuple[Tensor, ...]:
        query, key, bank, temperature = args[0], args[4], args[8], args[9]
        each = [query if x is None else x for x in (query, key, bank, temperature)]
        return tuple(x.new_empty(x.shape if need else (0,)) for need, x in zip(needs, each, strict=True))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:10], *output[1:])
        ctx.options = inputs[10:]

    def gradients(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse, count = ctx.saved_tensors
        places = (0, 4, 8, 9)  # of query, key, bank and temperature
        needs = [ctx.needs_input_grad[i] for i in places]
        of_inputs: list[Tensor | None] = [None] * (len(inputs) + len(ctx.options))
        grads = backward(grad, lse, count, needs, *inputs, *ctx.options)
        for place, need, g in zip(places, needs, grads, strict=True):
            of_inputs[place] = g if need else None
        return tuple(of_inputs)

    forward.register_fake(forward_fake)
    backward.register_fake(backward_fake)
    forward.register_autograd(gradients, setup_context=setup)
