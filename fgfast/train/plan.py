"""The memory of a training step, from shapes alone: a step on tensors without values, of which those alive are counted.

The step is the trainer's own (:class:`fgfast.train.step.Step`, guard and optimiser), on fake tensors and, for several
ranks, in a process group that moves nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._pytree import tree_map

from fgfast.config import TrainConfig
from fgfast.data.views import Batch, ViewSpec
from fgfast.errors import UserError
from fgfast.methods.base import Method, Progress
from fgfast.methods.chunked import ChunkedMethod
from fgfast.methods.refining import with_refinement
from fgfast.models.sync_bn import synchronise_batch_norm
from fgfast.ranks import Ranks
from fgfast.train.average import WeightAverage
from fgfast.train.memory import Memory, Owners, Plan
from fgfast.train.optim import FiniteGuard
from fgfast.train.step import Step, check_step


def plan_step(kind: type[Method], config: TrainConfig, world: int = 1) -> Plan:
    """The memory of a step of a method, on each of ``world`` ranks.

    It is that of the last step of a run, in which training in stages has all its networks. What kernels and libraries
    allocate inside an operation, the context of CUDA, what the allocator cannot use and the batches that a loader keeps
    ready are not in it. Unless the device is "cpu", norms give float32 under autocast, as they do on a GPU.

    Args:
        kind: the method.
        config: its options, with the images of a rank as batch size; no initial weights are read.
        world: number of ranks.

    Raises:
        UserError: the method or its networks cannot do what the options say, or the step depends on values.

    Example:
        >>> from fgfast.methods.simclr import SimCLR, SimCLRConfig
        >>> config = SimCLRConfig(model="test_resnet", size=32, batch_size=8, device="cpu", amp="off")
        >>> small, large = (plan_step(SimCLR, replace(config, batch_size=n)) for n in (8, 16))
        >>> small.most["parameters"] == large.most["parameters"], large.most["images"] / small.most["images"]
        (True, 2.0)
    """
    if config.compile:
        raise UserError("--compile decides itself what it keeps for the backward pass: plan without it.")
    if config.shard == "fsdp" and world == 1:
        raise UserError("--shard fsdp divides a network among GPUs: give --gpus 2 or more, or leave it out.")
    method = _build(kind, replace(with_refinement(config), init="none"))
    check_step(method)
    method.to(memory_format=torch.channels_last).train()
    try:
        with _process_group(world) as mesh, FakeTensorMode():
            return _run(method, world, mesh)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(f"A step of {kind.name} depends on the values of its tensors: it cannot be planned.") from error


def largest_batch(peak: Callable[[int], int], least: int, start: int, capacity: int) -> int:
    """The largest batch whose peak is within a capacity, up to one per cent, or 0 if the least one's is not.

    Peaks grow with the batch, in straight lines while the same moment of the step is the peak.

    Args:
        peak: gives the bytes of a batch.
        least: the smallest batch.
        start: the batch to begin with, at least ``least``.
        capacity: bytes.

    Example:
        >>> [largest_batch(lambda n: 100 + 7 * n, 2, start, 1000) for start in (2, 50, 4000)]
        [128, 128, 128]
        >>> largest_batch(lambda n: 100 + 7 * n, 2, 2, 110)
        0
    """
    known: dict[int, int] = {}
    n = start
    while True:
        known[n] = peak(n)
        fits = max((n for n, size in known.items() if size <= capacity), default=0)
        above = min((n for n, size in known.items() if size > capacity), default=0)
        close = fits + max(1, fits // 100)
        if above and (above <= least or close >= above):
            return fits
        if not fits:
            n = max(least, above // 2)
        elif len(known) == 1:
            n = 2 * fits
        else:
            low, high = (fits, above) if above else sorted(known)[-2:]
            on_line = low + (capacity - known[low]) * (high - low) // max(1, known[high] - known[low])
            tries = (on_line, close, (fits + above) // 2)  # in turns: only straight lines end at the first
            n = max(close, min(tries[len(known) % 3], above - 1)) if above else max(close, min(on_line, 16 * fits))


def _build(kind: type[Method], config: TrainConfig) -> Method:
    """The method without memory for its weights."""
    try:
        with torch.device("meta"):
            return kind(config)
    except RuntimeError:  # a few compute with values, which this device does not have; mistakes are raised again
        return kind(config)


@contextmanager
def _process_group(world: int) -> Iterator[DeviceMesh | None]:
    """A default process group of ``world`` ranks of which this is the first, and which moves nothing."""
    if world == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise UserError("Several ranks are planned by one process, and this one has a process group: start another.")
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def _run(method: Method, world: int, mesh: DeviceMesh | None) -> Plan:
    """Run the last step of a training, under FakeTensorMode."""
    config = method.config
    memory = Memory()
    with memory:
        empty_tensors(method)
        if config.grad_checkpoint:
            method.checkpoint_activations()
        if config.device != "cpu":
            cast_norms(method)
        if world > 1:
            method.set_group(dist.group.WORLD)  # random numbers are drawn for this rank alone: a seed would be read
            if config.sync_bn and config.device == "cpu":  # that of a GPU keeps what a plain batch norm keeps
                synchronise_batch_norm(method, dist.group.WORLD)
        step = Step(method, Ranks(0, world) if config.shard == "fsdp" else Ranks(), mesh)
        optimizer = step.make_optimizer()
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.empty_like(p)
        optimizer.step()  # makes its state
        optimizer.zero_grad(set_to_none=True)
        guard = FiniteGuard(method, optimizer)
        average = WeightAverage(method.encoder.net, config.average) if config.average else None
        batch = make_batch(method.views(), config.batch_size)
        method.after_step(Progress(998, 1000))  # some methods learn here that a stage begins
        memory.owners = Owners(method, step, optimizer, batch)
        if isinstance(method, ChunkedMethod):
            memory.owners.watch(method)
            if config.micro_batch:
                _skip_repeats(method, -(-config.batch_size // config.micro_batch))
        if world > 1 and config.shard == "none":  # DistributedDataParallel, which takes no fake tensors
            memory.fixed["gradient buckets"] = sum(p.nbytes for p in method.parameters() if p.requires_grad)
        last = Progress(999, 1000)
        method.before_step(last)
        terms = step(batch)
        memory.classify()
        norm = step.clip()
        guard.step(terms["loss"], norm, batch.index, last.step)
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update()
        method.after_step(last)
        guard.mark()
        return memory.plan()


def empty_tensors(net: nn.Module, device: str = "cpu") -> None:
    """Replace all tensors of a network, also those that are neither parameters nor buffers, by ones without values."""
    made: dict[int, Tensor] = {}  # tensors may have several names

    def empty(x: Tensor) -> Tensor:
        if id(x) not in made:
            like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
            made[id(x)] = nn.Parameter(like, x.requires_grad) if isinstance(x, nn.Parameter) else like
        return made[id(x)]

    for module in net.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for tensors in places:
            for name, value in list(tensors.items()):
                if isinstance(value, Tensor):
                    tensors[name] = empty(value)


def cast_norms(net: nn.Module) -> None:
    """Let norms compute in float32, as autocast has it on a GPU but not on a CPU."""
    for module in net.modules():
        if isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:]))


def make_batch(spec: ViewSpec, n: int) -> Batch:
    """A batch of n images as a loader gives it, without values."""

    def image(side: int) -> Tensor:
        return torch.empty(n, 3, side, side, memory_format=torch.channels_last)

    def ids(*side: int) -> Tensor:
        return torch.empty(n, *side, *side, dtype=torch.int64)

    return Batch(
        views=[image(crop.size) for crop in spec.crops],
        boxes=torch.empty(n, len(spec.crops), 5),
        labels=[ids(crop.size) for crop in spec.crops] if spec.masks else [],
        whole=None if spec.whole is None else image(spec.whole),
        whole_labels=ids(spec.whole) if spec.whole is not None and spec.whole_masks else None,
        target=ids(), index=ids(), valid=torch.empty(n, dtype=torch.bool),
        patch=None if spec.patch is None else image(spec.patch.size),
        reduced=None if spec.patch is None else image(spec.patch.size // spec.patch.reduce),
    )  # fmt: skip


def _skip_repeats(method: ChunkedMethod, n_chunks: int) -> None:
    """Let encoders run for the first two chunks and the last: those between have the memory of the second."""

    def thin(encode: Callable[[Batch], Any]) -> Callable[[Batch], Any]:
        calls, made = {True: 0, False: 0}, None

        def call(batch: Batch) -> Any:
            nonlocal made
            number = calls[torch.is_grad_enabled()]
            calls[torch.is_grad_enabled()] += 1
            if 2 <= number < n_chunks - 1:
                return tree_map(lambda make: make(), made)
            out = encode(batch)
            if number == 0:
                made = tree_map(lambda x: partial(torch.empty, x.shape, dtype=x.dtype), out)
            return out

        return call

    for name in ("represent", "represent_targets"):
        setattr(method, name, thin(getattr(method, name)))
