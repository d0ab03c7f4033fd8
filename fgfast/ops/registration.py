"""Operations that PyTorch traces as one node, and that run without its dispatcher where nothing is traced.

A call of a custom op of `torch.library` costs tens of microseconds more than the same Python, and the first one imports
torch._dynamo, which takes a second. So a custom op is called only where something looks at it: a trace, a mode, a
transform or a subclass of Tensor. Elsewhere the same functions run in a plain torch.autograd.Function.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fgfast.tensors import in_func

PLAIN = (Tensor, nn.Parameter)  # tensors of exactly these types have no behaviour of their own
SIMPLE = (type(None), int, str, bool, float)  # types of the other arguments, beside lists of tensors


# A private name of torch; where a release lacks it, a test of batched gradients fails.
is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda _: False)


def _any_observed(arguments: Sequence[Any]) -> bool:
    for x in arguments:
        kind = type(x)
        if kind in PLAIN:  # with no more than a shape, or in a batch of torch.autograd.grad(is_grads_batched=True)
            if x.is_meta or is_batched(x):
                return True
        elif kind not in SIMPLE and (_any_observed(x) if kind is list else isinstance(x, Tensor)):
            return True
    return False


def observed(arguments: tuple[Any, ...]) -> bool:
    """Whether torch.compile, a trace, a mode, a transform or a special tensor must see a call of an operation.

    Example:
        >>> observed((torch.ones(1), 3)), observed((torch.ones(1, device="meta"), 3))
        (False, True)
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or in_func()
        or _any_observed(arguments)
    )


class Operation:
    """A custom op of torch.library and the same functions without it; calls give every argument, by position."""

    def __init__(self, name: str, run: Callable[..., Any]):
        self.run = run
        self.op: Any = torch.library.custom_op(f"fgfast::{name}", run, mutates_args=())
        self.function: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """The outputs of the function that was registered."""
        if observed(arguments):
            return self.op(*arguments)
        if self.function is not None and torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return self.function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self.run(*arguments)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """As CustomOpDef.register_fake: outputs without values, of inputs without values."""
        self.op.register_fake(fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """As CustomOpDef.register_autograd, but outside traces the gradient of an unused output is None, not zeros."""
        self.op.register_autograd(backward, setup_context=setup_context)
        operation = self

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> Any:
                ctx.set_materialize_grads(False)
                with torch._C._AutoDispatchBelowAutograd():
                    output = operation.run(*arguments)
                    setup_context(ctx, arguments, output)
                return output

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                if all(g is None for g in grads):
                    return (None,) * len(ctx.needs_input_grad)
                return backward(ctx, *grads)

        self.function = Function

    def loop_in_vmap(self) -> None:
        """Let torch.func.vmap run the operation, which returns a tensor or several, example by example."""

        def run(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            if not info.batch_size:  # only a call tells the shapes of the outputs
                raise ValueError("torch.func.vmap got an empty batch: give at least one example.")
            each = [
                self(*(_select(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)
            ]
            if isinstance(each[0], Tensor):
                return torch.stack(each), 0
            return tuple(torch.stack(outs) for outs in zip(*each, strict=True)), (0,) * len(each[0])

        self.op.register_vmap(run)


def _select(value: Any, dim: Any, i: int) -> Any:
    """Example i of an argument of a batched operation."""
    if dim is None:
        return value
    if isinstance(value, list):
        return [_select(v, d, i) for v, d in zip(value, dim, strict=True)]
    return value.select(dim, i)


def operation(name: str) -> Callable[[Callable[..., Any]], Operation]:
    """Register a function of tensors, numbers and strings as ``torch.ops.fgfast.<name>``."""
    return lambda run: Operation(name, run)
