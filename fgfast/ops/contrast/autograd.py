"""Fake implementations and gradients of a contrast, the same for one process and for the ring over ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fgfast.ops.contrast.operands import Operands
from fgfast.ops.derivatives import gradients, second_derivatives
from fgfast.tensors import accumulation, transformed

POSITIONS = (0, 4, 8, 9)  # of query, key, bank and temperature in the arguments of forward


def cast_gradients(
    grads: list[Tensor | None], query: Tensor, key: Tensor | None, bank: Tensor | None, temperature: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients in the dtypes of their inputs; an empty tensor in place of None."""

    def cast(grad: Tensor | None, like: Tensor | None) -> Tensor:
        like = query if like is None else like
        if grad is None:
            return like.new_empty(0)
        return grad if grad.dtype == like.dtype else grad.to(like.dtype)

    d_query, d_key, d_bank, d_temperature = grads
    return cast(d_query, query), cast(d_key, key), cast(d_bank, bank), cast(d_temperature, temperature)


def forget_zero_vectors(grad: Tensor | None, x: Tensor | None) -> Tensor | None:
    """The gradient of float16 vectors with 0 for those that are zero, as ``unit_vectors`` says; other dtypes as is."""
    if grad is None or x is None or x.dtype != torch.float16:
        return grad
    return grad.masked_fill_((x == 0).all(1, keepdim=True), 0)


def as_function(
    definition: Callable[..., Tensor], arguments: list[Any]
) -> tuple[dict[int, Tensor], Callable[..., Tensor]]:
    """The differentiable arguments of forward by position, and the losses as a function of them."""
    given = {i: arguments[i] for i in POSITIONS if arguments[i] is not None}

    def losses(*inputs: Tensor) -> Tensor:
        replaced = dict(zip(given, inputs, strict=True))
        return definition(Operands.from_flat(*(replaced.get(i, x) for i, x in enumerate(arguments[:14]))))

    return given, losses


def register_autograd(forward: Any, backward: Any, definition: Callable[..., Tensor]) -> None:
    """Register the fake implementations and the gradients of a contrast.

    Derivatives of the gradient are those of the definition, whose memory is that of a few matrices of logits.

    Args:
        forward: custom op of ``Operands.flat()`` and further options, returns loss, lse and count [M].
        backward: custom op of (gradient of the loss, lse, count, which of query, key, bank and temperature need a
            gradient, all arguments of forward), returns these four gradients.
        definition: the losses [M] from the ``Operands`` of forward.
    """

    def forward_fake(query: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss = query.new_empty(query.shape[0], dtype=accumulation(query.dtype))
        return loss, torch.empty_like(loss), torch.empty_like(loss)

    def backward_fake(grad: Tensor, lse: Tensor, count: Tensor, needs: list[bool], *args: Any) -> tuple[Tensor, ...]:
        inputs = [args[0] if args[i] is None else args[i] for i in POSITIONS]
        return tuple(x.new_empty(x.shape if need else (0,)) for need, x in zip(needs, inputs, strict=True))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:10], *output[1:])
        ctx.options = inputs[10:]

    def compute_gradients(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse, count = ctx.saved_tensors
        needed = ctx.needs_input_grad
        needs = [needed[i] for i in POSITIONS]
        input_grads: list[Tensor | None] = [None] * (len(inputs) + len(ctx.options))
        if transformed(grad):
            given, losses = as_function(definition, [*inputs, *ctx.options])
            for position, g in zip(given, gradients(losses, list(given.values()), grad), strict=True):
                input_grads[position] = g
            return tuple(input_grads)
        grads = backward(grad, lse, count, needs, *inputs, *ctx.options)
        for position, need, g in zip(POSITIONS, needs, grads, strict=True):
            input_grads[position] = g if need else None
        return tuple(input_grads)

    def setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        grad, _, _, ctx.needs, *arguments = inputs
        ctx.save_for_backward(grad, *arguments[:10])
        ctx.options = arguments[10:]

    def compute_second(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        grad, *saved = ctx.saved_tensors
        given, losses = as_function(definition, [*saved, *ctx.options])
        wanted = {i: v for i, need, v in zip(POSITIONS, ctx.needs, cotangents, strict=True) if need}
        d_grad, *d_inputs = second_derivatives(losses, list(given.values()), grad, [wanted.get(i) for i in given])
        found = dict(zip(given, d_inputs, strict=True))
        return d_grad, None, None, None, *(found.get(i) for i in range(len(saved) + len(ctx.options)))

    forward.register_fake(forward_fake)
    backward.register_fake(backward_fake)
    forward.register_autograd(compute_gradients, setup_context=setup)
    backward.register_autograd(compute_second, setup_context=setup_second)
