"""Fake implementations and gradients of a contrast, the same for one process and for the ring over ranks."""

from typing import Any

import torch
from torch import Tensor

from fgfast.tensors import accumulation


def cast_gradients(
    grads: list[Tensor | None], query: Tensor, key: Tensor | None, bank: Tensor | None, temperature: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients in the dtypes of their inputs; an empty tensor in place of None."""

    def cast(grad: Tensor | None, like: Tensor | None) -> Tensor:
        like = query if like is None else like
        return like.new_empty(0) if grad is None else grad.to(like.dtype)

    d_query, d_key, d_bank, d_temperature = grads
    return cast(d_query, query), cast(d_key, key), cast(d_bank, bank), cast(d_temperature, temperature)


def register_autograd(forward: Any, backward: Any) -> None:
    """Register the fake implementations and the gradient of a contrast.

    Args:
        forward: custom op of ``Operands.flat()`` and further options, returns loss, lse and count [M].
        backward: custom op of (gradient of the loss, lse, count, which of query, key, bank and temperature need a
            gradient, all arguments of forward), returns these four gradients.
    """

    def forward_fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss = query.new_empty(query.shape[0], dtype=accumulation(query.dtype))
        return loss, torch.empty_like(loss), torch.empty_like(loss)

    def backward_fake(grad: Tensor, lse: Tensor, count: Tensor, needs: list[bool], *args: Any) -> tuple[Tensor, ...]:
        query, key, bank, temperature = args[0], args[4], args[8], args[9]
        inputs = [query if x is None else x for x in (query, key, bank, temperature)]
        return tuple(x.new_empty(x.shape if need else (0,)) for need, x in zip(needs, inputs, strict=True))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:10], *output[1:])
        ctx.options = inputs[10:]

    def compute_gradients(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse, count = ctx.saved_tensors
        positions = (0, 4, 8, 9)  # of query, key, bank and temperature
        needs = [ctx.needs_input_grad[i] for i in positions]
        input_grads: list[Tensor | None] = [None] * (len(inputs) + len(ctx.options))
        grads = backward(grad, lse, count, needs, *inputs, *ctx.options)
        for position, need, g in zip(positions, needs, grads, strict=True):
            input_grads[position] = g if need else None
        return tuple(input_grads)

    forward.register_fake(forward_fake)
    backward.register_fake(backward_fake)
    forward.register_autograd(compute_gradients, setup_context=setup)
