"""The bytes of the tensors that are alive in a training step, by what they belong to."""

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fgfast.data.views import Batch
from fgfast.methods.base import Method
from fgfast.methods.chunked import ChunkedMethod
from fgfast.train.step import Step

KINDS = (
    "parameters", "gathered parameters", "gradients", "gradient buckets", "optimiser", "momentum copies, buffers",
    "images", "representations", "ring blocks", "activations",
)  # fmt: skip
RING = 0  # stands for the address of what the contrast over ranks allocates


@dataclass(frozen=True)
class Plan:
    """The memory of a step on one rank, in bytes.

    Args:
        peak: the most that lives at a time.
        at_peak: of it, by kind (:data:`KINDS`).
        most: the most of each kind at any time.
    """

    peak: int
    at_peak: dict[str, int]
    most: dict[str, int]


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _local(x: Tensor) -> Tensor:
    return x._local_tensor if isinstance(x, DTensor) else x


class Owners:
    """Tells what storages belong to."""

    def __init__(self, method: Method, step: Step, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
        self.method, self.sharded, self.optimizer = method, step.sharded is not None, optimizer
        self.images = {_storage(x): "images" for x in tree_leaves(list(vars(batch).values())) if isinstance(x, Tensor)}
        self.held: set[int] = set()  # storages of representations

    def watch(self, method: ChunkedMethod) -> None:
        """Learn which tensors are representations, or their gradients."""

        def hold(x: Tensor | None) -> None:
            if x is not None:
                self.held.add(_storage(x))
                weakref.finalize(x.untyped_storage(), self.held.discard, _storage(x))

        compare = method.compare

        def watched(online: Any, targets: Any, batch: Batch) -> dict[str, Tensor]:
            for x in tree_leaves((online, targets)):
                hold(x)
                if x.is_leaf and x.requires_grad:
                    x.register_post_accumulate_grad_hook(lambda x: hold(x.grad))
            return compare(online, targets, batch)

        vars(method)["compare"] = watched

    def kinds(self) -> dict[int, str]:
        """The kinds of storages by their addresses; all others are activations."""
        found = self.images | {RING: "ring blocks"}
        found |= dict.fromkeys(self.held, "representations")
        for p in self.method.parameters():
            whole = "gathered parameters" if self.sharded and not isinstance(p, DTensor) else "parameters"
            found[_storage(_local(p))] = whole if p.requires_grad else "momentum copies, buffers"
            if p.grad is not None:
                found[_storage(_local(p.grad))] = "gradients"
        for buffer in self.method.buffers():
            found[_storage(buffer)] = "momentum copies, buffers"
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                found[_storage(p)] = "parameters"
                if p.grad is not None:
                    found[_storage(p.grad)] = "gradients"
        for values in self.optimizer.state.values():
            found |= {_storage(x): "optimiser" for x in values.values() if isinstance(x, Tensor)}
        return found


class Memory(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive after each operation.

    Attributes:
        owners: tells the kinds of tensors; the peak is that since it was set.
        fixed: bytes of kinds that no operation shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.owners: Owners | None = None
        self.fixed: dict[str, int] = {}
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.sizes: dict[int, int] = {}
        self.resized: set[int] = set()  # storages that FSDP frees and allocates, and keeps
        self.total = self.peak = 0
        self.pending: dict[int, int] | None = None  # sizes at a new peak whose kinds are not known yet
        self.at_peak, self.most = dict[str, int](), dict.fromkeys(KINDS, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # the operations on its shard are counted
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fsdp":
            self.resized |= {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for key in self.resized & self.alive.keys():
            if (storage := self.alive[key]()) is not None:
                self._set(key, storage.nbytes())
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := _storage(x)) not in self.alive:
                storage = x.untyped_storage()
                self.alive[key] = weakref.ref(storage, partial(self._forget, key))
                self._set(key, storage.nbytes())
        if self.owners is not None:
            self._compare(self.owners, _ring_blocks(func, args))
        return out

    def _set(self, key: int, size: int) -> None:
        self.total += size - self.sizes.get(key, 0)
        self.sizes[key] = size

    def _forget(self, key: int, _: Any) -> None:
        self.total -= self.sizes.pop(key, 0)
        self.alive.pop(key, None)

    def _compare(self, owners: Owners, ring: int) -> None:
        self.most["ring blocks"] = max(self.most["ring blocks"], ring)
        self.most["representations"] = max(self.most["representations"], sum(map(self._size_of, owners.held)))
        if self.total + ring > self.peak:
            self.peak, self.pending = self.total + ring, self.sizes | {RING: ring}
        elif self.pending is not None:
            self.classify()

    def _size_of(self, key: int) -> int:
        return self.sizes.get(key, 0)

    def classify(self) -> None:
        """Note the kinds of what is alive, and of what was at a new peak before the last operation."""
        assert self.owners is not None  # once the step begins
        kinds = self.owners.kinds()

        def by_kind(sizes: dict[int, int]) -> dict[str, int]:
            found = dict.fromkeys(KINDS, 0)
            for key, size in sizes.items():
                found[kinds.get(key, "activations")] += size
            self.most = {kind: max(size, found[kind]) for kind, size in self.most.items()}
            return found

        by_kind(self.sizes)
        if self.pending is not None:
            self.at_peak, self.pending = by_kind(self.pending), None

    def plan(self) -> Plan:
        """What was counted."""
        self.classify()
        return Plan(self.peak + sum(self.fixed.values()), self.at_peak | self.fixed, self.most | self.fixed)


def _ring_blocks(func: Any, args: Any) -> int:
    """Bytes that a contrast over ranks holds beside its inputs and results: see :mod:`fgfast.ops.contrast.ring`."""
    if "ring_contrast" not in func._opname:
        return 0
    key = dict(zip((a.name for a in func._schema.arguments), args, strict=False))["key"]
    blocks = min(2, dist.get_world_size() - 1) * (key.nbytes + 3 * 8 * len(key))  # with three ids per row
    gradients = 2 * 4 * key.numel() if "backward" in func._opname else 0  # the third is a result
    return int(blocks + gradients)
