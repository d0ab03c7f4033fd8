"""A step in chunks: ``--micro-batch`` for methods that contrast over the batch."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fgfast.losses.cached import CachedRuns, RunningStatistics, encode_chunks
from fgfast.methods.base import Method
from fgfast.methods.chunked import ChunkedMethod

if TYPE_CHECKING:
    from fgfast.data.views import Batch


class MicroBatches(nn.Module):
    """The step of a method whose encoders see ``chunk`` images at a time, while heads and loss see all of them.

    The encoders run without a graph; the loss gives the gradients of heads and representations; the online encoder runs
    again, chunk by chunk. All but the last chunk are differentiated at once. What :meth:`forward` returns as "loss" has
    the graph of the last chunk and the gradients of the heads: its ``backward``, which must be called once and without
    a factor, adds these, so that DistributedDataParallel synchronises every gradient with the last chunk alone.

    Args:
        method: the method.
        chunk: images at a time.

    Attributes:
        statistics: those of BatchNorm after the first run, to be restored after ``backward``: the second repeats it.
    """

    statistics: RunningStatistics

    def __init__(self, method: ChunkedMethod, chunk: int) -> None:
        super().__init__()
        self.method, self.chunk = method, chunk

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """The terms of the method for the whole batch."""
        method = self.method
        batch = method.annotate(batch)
        chunks = [vars(chunk) for chunk in split_batch(batch, self.chunk)]
        runs = CachedRuns(lambda chunk: method.represent(type(batch)(**chunk)), chunks)
        online = runs.first()
        targets = encode_chunks(lambda chunk: method.represent_targets(type(batch)(**chunk)), chunks)
        terms = method.compare(online, targets, batch)
        runs.backward(terms["loss"])
        self.statistics = RunningStatistics(method.encoder)
        heads = [p for p in method.parameters() if p.grad is not None]
        grads = [p.grad for p in heads]
        for p in heads:
            p.grad = None  # added in the last backward pass
        for i in range(len(runs) - 1):
            runs.again(i)
        parts, of_parts = runs.outputs(len(runs) - 1)
        loss = _KnownGradients.apply(terms["loss"].detach(), [*of_parts, *grads], *parts, *heads)
        return terms | {"loss": loss}


class _KnownGradients(torch.autograd.Function):
    """A value whose gradients with respect to some tensors are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, grads: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.grads = grads
        return value.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.grads


def split_batch(batch: "Batch", chunk: int) -> list["Batch"]:
    """Chunks of at most ``chunk`` images, which share the memory of the batch."""

    def cut(value: Any, start: int) -> Any:
        if isinstance(value, list):
            return [cut(item, start) for item in value]
        has_rows = isinstance(value, Tensor) and len(value) == len(batch)
        return value[start : start + chunk] if has_rows else value

    starts = range(0, max(1, len(batch)), chunk)
    return [type(batch)(**{name: cut(value, start) for name, value in vars(batch).items()}) for start in starts]


def can_split(kind: type[Method]) -> bool:
    """Whether a method has the forward pass in two parts that :class:`MicroBatches` needs."""
    return issubclass(kind, ChunkedMethod) and kind.forward is ChunkedMethod.forward
