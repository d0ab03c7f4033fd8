"""Gradient caching: the contrast of a batch whose activations do not fit, by an encoder that sees it in chunks."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from fgfast.tensors import without_autocast


def cached_contrast(
    encoder: Callable[..., Any], batch: Any, loss: Callable[[Any], Tensor], chunk: int, *,
    batch_norm: Literal["refuse", "chunk"] = "refuse",
) -> Tensor:  # fmt: skip
    r"""Gradients of a loss over a whole batch, with the activations of an encoder for one chunk of it at a time.

    With representations :math:`r_i = f(x_i)` of images i, any loss has

    .. math:: \frac{\partial L(r_1, \dots, r_B)}{\partial \theta}
              = \sum_i \frac{\partial L}{\partial r_i} \frac{\partial f(x_i)}{\partial \theta}.

    The encoder first runs over the chunks without a graph; the loss of all representations gives their gradients, and
    those of its own parameters, such as heads; then the encoder runs again, chunk by chunk, and each is differentiated
    with its part of them. Every chunk starts from the same random state in both runs (the CPU's generator, and those of
    the devices of the batch), so dropout and drop path drop the same again. The gradients are those of the one big
    batch up to rounding. Memory beyond the batch, the representations and their gradients does not depend on B; the
    price is one more forward pass.

    Gradients are added to ``.grad`` of all parameters, as ``backward`` does it: call no ``backward`` afterwards (with a
    GradScaler let ``loss`` return the scaled loss). Under autocast both runs are in its dtype. DistributedDataParallel
    and FSDP2 synchronise the gradients of the encoder with the last chunk alone; a loss over several processes
    (``group=``) and its heads see the whole batch once.

    BatchNorm in training mode normalises by the statistics of a chunk, which is another function than that of the whole
    batch: it is refused unless ``batch_norm="chunk"``. Its running statistics then take each chunk of the first run,
    and none of the second.

    Args:
        encoder: a module, or a method of one: maps a chunk to a tensor [b, ...], or to tuples, lists or dictionaries of
            such tensors, whose rows depend only on the same row of the chunk. Vectors of images, or parts that are
            pooled in each image.
        batch: tensor [B, ...], or tuples, lists or dictionaries of such tensors; the encoder gets the items of a tuple
            as its arguments. None and other values are passed on as they are.
        loss: maps the representations of all B images, in the structure that the encoder gives, to a scalar.
        chunk: images at a time, 1 or more.
        batch_norm: "refuse", or "chunk" to let BatchNorm of the encoder use the statistics of a chunk.

    Returns:
        The value of the loss, a scalar without a graph.

    Raises:
        ValueError: the chunk is below 1, tensors of the batch differ in their number of rows, the encoder has a
            BatchNorm in training mode, or it does not give a row for each row of a chunk.
        TypeError: the encoder is neither a module nor a method of one, or the batch holds no tensor.

    Example:
        >>> import torch
        >>> from fgfast import NTXentLoss, cached_contrast
        >>> encoder, images = torch.nn.Linear(8, 4), torch.randn(6, 2, 8)  # two views of six images
        >>> loss = NTXentLoss()
        >>> value = cached_contrast(encoder, images, lambda r: loss(r[:, 0], r[:, 1]), chunk=2)
        >>> cached = encoder.weight.grad.clone()
        >>> encoder.zero_grad()
        >>> r = encoder(images)  # all at once
        >>> loss(r[:, 0], r[:, 1]).backward()
        >>> torch.allclose(cached, encoder.weight.grad, atol=1e-6)
        True

    Source:
        Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021 (arXiv
        2101.06983).
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}: give 1 or more.")
    module = encoder if isinstance(encoder, nn.Module) else getattr(encoder, "__self__", None)
    if not isinstance(module, nn.Module):
        raise TypeError(f"encoder is a {type(encoder).__name__}: give a module, or a method of one.")
    if batch_norm == "refuse" and (name := training_batch_norm(module)) is not None:
        raise ValueError(
            f"The BatchNorm {name!r} of the encoder would use the statistics of a chunk: give batch_norm='chunk' to "
            "allow it, or replace it by another norm."
        )

    def encode(part: Any) -> Any:
        return encoder(*part) if isinstance(part, tuple) and not hasattr(part, "_fields") else encoder(part)

    runs = CachedRuns(encode, split_rows(batch, chunk))
    value = loss(runs.first())
    runs.backward(value)
    statistics = RunningStatistics(module)
    try:
        for i in range(len(runs)):
            with _synchronising(module, last=i == len(runs) - 1):
                runs.again(i)
    finally:
        statistics.restore()
    return value.detach()


class CachedRuns:
    """The two runs of an encoder over the chunks of a batch: call :meth:`first`, :meth:`backward`, :meth:`again`.

    Args:
        encode: maps a chunk to tensors [b, ...] in any structure.
        chunks: the batch.
    """

    def __init__(self, encode: Callable[[Any], Any], chunks: Sequence[Any]) -> None:
        self.encode, self.chunks = encode, chunks
        self.states: list[RandomStates] = []
        self.rows: list[Tensor] = []
        self.grads: list[Tensor | None] = []

    def __len__(self) -> int:
        """The number of chunks."""
        return len(self.chunks)

    def first(self) -> Any:
        """Representations of the whole batch, in the structure that ``encode`` gives; floats require a gradient."""

        def encode(chunk: Any) -> Any:
            self.states.append(RandomStates(chunk))
            return self.encode(chunk)

        representations = encode_chunks(encode, self.chunks)
        self.rows = tree_flatten(representations)[0]
        for row in self.rows:
            row.requires_grad_(row.is_floating_point())
        return representations

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss of the representations; gradients of its parameters are added to theirs."""
        with without_autocast(loss.device):
            loss.backward()
        self.grads = [row.grad for row in self.rows]
        self.rows = []  # only their gradients are needed from here on

    def outputs(self, i: int) -> tuple[list[Tensor], list[Tensor]]:
        """Run chunk ``i`` with a graph: its representations that have a gradient, and those gradients."""
        now = RandomStates(self.chunks[i])
        self.states[i].restore()
        try:
            parts, _ = tree_flatten(self.encode(self.chunks[i]))
        finally:
            now.restore()
        start = sum(map(_count_rows, self.chunks[:i]))
        pairs = zip(parts, self.grads, strict=True)
        found = [(x, g[start : start + len(x)]) for x, g in pairs if g is not None and x.requires_grad]
        return [x for x, _ in found], [g for _, g in found]

    def again(self, i: int) -> None:
        """Run chunk ``i`` with a graph, and add the gradients of the parameters."""
        parts, grads = self.outputs(i)
        if parts:
            with without_autocast(parts[0].device):
                torch.autograd.backward(parts, grads)
        torch.clear_autocast_cache()  # the graphs of the casts are freed


@torch.no_grad()
def encode_chunks(encode: Callable[[Any], Any], chunks: Sequence[Any]) -> Any:
    """Join what ``encode`` gives for each chunk, without a graph and without holding it twice."""
    total, start = sum(map(_count_rows, chunks)), 0
    rows: list[Tensor] = []
    for chunk in chunks:
        parts, structure = tree_flatten(encode(chunk))
        stop = start + _count_rows(chunk)
        for part in parts:
            if part.shape[:1] != (stop - start,):
                raise ValueError(
                    f"encoder gives shape {list(part.shape)} for {stop - start} rows: give row i for row i of a chunk."
                )
        rows = rows or [part.new_empty(total, *part.shape[1:]) for part in parts]
        for row, part in zip(rows, parts, strict=True):
            row[start:stop] = part
        start = stop
    torch.clear_autocast_cache()  # casts of the weights made here have no graph
    return tree_unflatten(rows, structure)


class RandomStates:
    """The present states of PyTorch's generators on the CPU and on the devices of the tensors in ``batch``."""

    def __init__(self, batch: Any) -> None:
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*_tensors(batch))

    def restore(self) -> None:
        """Set these states again."""
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states)


def split_rows(batch: Any, chunk: int) -> list[Any]:
    """Chunks of at most ``chunk`` rows of tensors [B, ...] in any structure; one chunk of an empty batch.

    Example:
        >>> [x.tolist() for x, _ in split_rows((torch.arange(3), None), 2)]
        [[0, 1], [2]]
    """
    tensors = _tensors(batch)
    if not tensors:
        raise TypeError("batch holds no tensor: give tensors [B, ...].")
    lengths = sorted({len(x) if x.dim() else -1 for x in tensors})
    if len(lengths) > 1 or lengths[0] < 0:
        raise ValueError(f"batch has tensors of shapes {[list(x.shape) for x in tensors]}: give each B rows.")
    starts = range(0, max(lengths[0], 1), chunk)
    return [tree_map(lambda x, s=s: x[s : s + chunk] if isinstance(x, Tensor) else x, batch) for s in starts]


def _tensors(batch: Any) -> list[Tensor]:
    return [x for x in tree_flatten(batch)[0] if isinstance(x, Tensor)]


def _count_rows(chunk: Any) -> int:
    return len(_tensors(chunk)[0])


def training_batch_norm(module: nn.Module) -> str | None:
    """The name of the first batch norm that normalises by the statistics of its batch; None if there is none.

    Example:
        >>> training_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        '1'
    """
    norms = ((name, m) for name, m in module.named_modules() if isinstance(m, _BatchNorm))
    return next((name for name, m in norms if m.training or not m.track_running_stats), None)


class RunningStatistics:
    """The running statistics of the batch norms of a module, to be restored after passes that repeat earlier ones.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> before = RunningStatistics(norm)
        >>> _ = norm(torch.tensor([[1.0], [3.0]]))
        >>> before.restore()
        >>> norm.running_mean.item()
        0.0
    """

    def __init__(self, module: nn.Module) -> None:
        norms = (m for m in module.modules() if isinstance(m, _BatchNorm))
        self.buffers = [b for norm in norms for b in norm.buffers(recurse=False)]
        self.values = [b.clone() for b in self.buffers]

    @torch.no_grad()
    def restore(self) -> None:
        """Set these statistics again, once no graph needs the later ones."""
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.values)


@contextmanager
def _synchronising(module: nn.Module, *, last: bool) -> Iterator[None]:
    """Synchronise gradients over processes only in the last of several backward passes."""
    set_sync = getattr(module, "set_requires_gradient_sync", lambda _: None)  # a method of FSDP2's modules
    set_sync(last)
    try:
        with module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext():
            yield
    finally:
        set_sync(True)
