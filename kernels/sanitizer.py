"""Memory checks of Triton kernels without a GPU: accesses are counted and verified in Triton's interpreter.

Under TRITON_INTERPRET=1 every load, store and atomic passes its addresses through one Python object, which
:func:`checked` hooks. It counts traffic by a fixed model and raises :class:`MemoryFault` on an access outside the
tensors, and on unordered accesses of two programs to one address.

The model of traffic, per program (programs have separate caches): memory moves in sectors of 32 bytes; a program has a
cache of 128 KiB for the sectors it used last; a load costs a sector unless it is in the cache, a store costs a sector
unless the cache already holds a store to it, an atomic always costs both. Without that cache (``requested``), every
access costs its sectors: the most that L2 and processors exchange where the compiled code keeps no tile between loads.
"""

import inspect
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SECTOR = 32  # bytes
ON_CHIP = 128 * 1024 // SECTOR  # sectors

Program = tuple[int, int, int]


class MemoryFault(AssertionError):
    """An access outside the tensors, or a race between programs.

    Example:
        >>> issubclass(MemoryFault, AssertionError)
        True
    """


@dataclass
class Traffic:
    """Bytes loaded and stored, numbers of launches and programs, and the bytes of all accesses without a cache.

    Example:
        >>> Traffic(loads=64, stores=32).bytes
        96
    """

    loads: int = 0
    stores: int = 0
    launches: int = 0
    programs: int = 0
    requested: int = 0

    @property
    def bytes(self) -> int:
        """Loads plus stores."""
        return self.loads + self.stores


def fewest(*tensors: Tensor | None) -> int:
    """The bytes of reading or writing each tensor once: those of its distinct elements.

    Example:
        >>> fewest(torch.zeros(3, 4), torch.zeros(1, dtype=torch.int64).expand(9), None)
        56
    """
    total = 0
    for x in tensors:
        if x is not None:
            shape = (n if stride else 1 for n, stride in zip(x.shape, x.stride(), strict=True))
            total += int(np.prod([*shape, x.element_size()])) if x.numel() else 0
    return total


class _LastAccess:
    """For one kind of access, the last program that accessed each byte of a storage, and when."""

    def __init__(self, size: int, verb: str) -> None:
        self.verb = verb
        self.by = np.zeros(size, np.int32)  # programs count from 1; 0: none, -1: several unordered programs
        self.at = np.zeros(size, np.int64)


class _Memory:
    """One storage during one launch: the bytes that may be accessed, and the programs that accessed them."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.start, self.size, self.names = storage.data_ptr(), storage.nbytes(), list[str]()
        self.allowed = np.zeros(self.size, bool)
        self.read, self.written, self.updated = (_LastAccess(self.size, v) for v in ("read", "wrote", "updated"))

    def allow(self, name: str, x: Tensor) -> None:
        """Permit access to the elements of x, but not to gaps between them."""
        self.names.append(name)
        first, size = x.storage_offset() * x.element_size(), x.element_size()
        view = np.lib.stride_tricks.as_strided(
            self.allowed[first:], (*x.shape, size), (*(stride * size for stride in x.stride()), 1)
        )
        view[...] = True


class _Access(NamedTuple):
    addresses: NDArray[np.uint64]
    size: int
    loads: bool
    stores: bool
    atomic: bool

    @property
    def verb(self) -> str:
        return "updates" if self.atomic else "loads" if self.loads else "stores"


@dataclass
class _Monitor:
    """The state while launches run; time is counted in accesses."""

    given: tuple[Tensor, ...]
    traffic: Traffic = field(default_factory=Traffic)
    kernel: str = ""
    program: Program = (0, 0, 0)
    number: int = 0
    time: int = 0
    memories: list[_Memory] = field(default_factory=list)
    on_chip: OrderedDict[int, bool] = field(default_factory=OrderedDict)  # sector -> whether it was stored to
    programs: dict[int, Program] = field(default_factory=dict)
    # Ordering by atomics: up to which time the current program sees each other one, and what each address passes on.
    seen: dict[int, int] = field(default_factory=dict)
    released: dict[int, dict[int, int]] = field(default_factory=dict)

    def launch(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel, self.number, self.time = kernel, 0, 0
        self.traffic.launches += 1
        self.released.clear()
        self.programs.clear()
        given = {x.untyped_storage().data_ptr() for x in self.given}
        tensors = [(f"given tensor {i}", x) for i, x in enumerate(self.given)]
        tensors += [
            (name, x)
            for name, value in arguments.items()
            for x in map(_described, value if isinstance(value, tuple) else (value,))
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given
        ]
        memories: dict[int, _Memory] = {}
        for name, x in tensors:
            if x.device.type != "cpu":
                raise ValueError(f"{name} is on {x.device}: the checker takes only CPU tensors.")
            if x.numel():
                storage = x.untyped_storage()
                memory = memories.setdefault(storage.data_ptr(), _Memory(storage))
                memory.allow(name, x)
        self.memories = [memories[start] for start in sorted(memories)]

    def start_program(self, program: Program) -> None:
        self.program, self.number = program, self.number + 1
        self.programs[self.number] = program
        self.traffic.programs += 1
        self.on_chip.clear()
        self.seen = {}

    def access(
        self, addresses: NDArray[np.uint64], mask: NDArray[np.bool_], size: int, kind: str, orders: bool = False
    ) -> None:
        """One load, store or atomic; with ``orders`` it sees, and passes on, what came before it at its address."""
        lanes = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))
        lanes = np.unique(lanes[np.broadcast_to(mask, lanes.shape)])
        if not len(lanes):
            return
        self.time += 1
        access = _Access(lanes, size, kind != "store", kind != "load", kind == "atomic")
        releases = [self.released.setdefault(lane, {}) for lane in lanes.tolist()] if orders else []
        for program, time in (item for known in releases for item in known.items()):
            self.seen[program] = max(time, self.seen.get(program, 0))
        for memory, offsets in self._locate(access):
            self._check_races(memory, offsets, access)
        for known in releases:
            known.update({**self.seen, self.number: self.time})
        self._count(access)

    def _locate(self, access: _Access) -> Iterator[tuple[_Memory, NDArray[np.int64]]]:
        """Each accessed storage with the offsets of the bytes; a byte outside every element is a fault."""
        starts = np.array([m.start for m in self.memories], np.int64)
        lanes = access.addresses.astype(np.int64)
        which = np.searchsorted(starts, lanes, side="right") - 1
        for i in np.unique(which).tolist():
            chosen = lanes[which == i]
            memory = self.memories[max(i, 0)] if self.memories else None
            if memory is None or i < 0:
                raise MemoryFault(f"{self._who(access)} {len(chosen)} addresses outside every tensor of the launch.")
            offsets = (chosen[:, None] - memory.start + np.arange(access.size)).ravel()
            outside = (offsets < 0) | (offsets >= memory.size)
            outside[~outside] = ~memory.allowed[offsets[~outside]]
            if outside.any():
                raise MemoryFault(
                    f"{self._who(access)} bytes outside the elements of a tensor: the first is at offset "
                    f"{offsets[outside][0]} of the {memory.size} bytes of {', '.join(memory.names)}."
                )
            yield memory, offsets

    def _check_races(self, memory: _Memory, offsets: NDArray[np.int64], access: _Access) -> None:
        """Raise if an unordered access of another program reached these bytes and either writes; record this one."""
        against = [memory.written]
        against += [] if access.atomic else [memory.updated]
        against += [memory.read] if access.stores else []
        for touched in against:
            for other, _ in self._unordered(touched, offsets):
                who = "more than one program" if other < 0 else f"program {self.programs[other]}"
                raise MemoryFault(
                    f"{self._who(access)} bytes of {', '.join(memory.names)} that {who} {touched.verb} in the same "
                    "launch, and no atomic orders the two."
                )
        mine = memory.updated if access.atomic else memory.written if access.stores else memory.read
        unordered = [common for _, common in self._unordered(mine, offsets)]
        mine.by[offsets], mine.at[offsets] = self.number, self.time
        for common in unordered:
            mine.by[common] = -1

    def _unordered(self, touched: _LastAccess, offsets: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """The other programs whose accesses to these bytes are not ordered before now, and the bytes."""
        by = touched.by[offsets]
        for other in np.unique(by[(by != 0) & (by != self.number)]).tolist():
            common = offsets[by == other]
            if other < 0 or self.seen.get(other, 0) < int(touched.at[common].max()):
                yield other, common

    def _count(self, access: _Access) -> None:
        ends = access.addresses + np.uint64(access.size - 1)
        touched = np.concatenate([access.addresses, ends]) // np.uint64(SECTOR)
        sectors, chip = np.unique(touched).tolist(), self.on_chip
        self.traffic.requested += SECTOR * len(sectors) * (access.loads + access.stores)
        for sector in sectors:
            known = chip.pop(sector, None)
            self.traffic.loads += SECTOR * (access.atomic or (access.loads and known is None))
            self.traffic.stores += SECTOR * (access.atomic or (access.stores and not known))
            chip[sector] = access.stores or bool(known)
            if len(chip) > ON_CHIP:
                chip.popitem(last=False)

    def _who(self, access: _Access) -> str:
        return f"{self.kernel}: program {self.program} {access.verb}"


@contextmanager
def checked(*tensors: Tensor) -> Iterator[Traffic]:
    """Count and verify the memory accesses of every Triton kernel launched within the context, in the interpreter.

    A launch may access the elements of the given tensors, but not gaps between elements of a slice, and the elements of
    its tensor arguments in other storages. Two programs of a launch may not access the same byte if one of them writes
    it, unless both use atomics or an atomic that is not relaxed orders them.

    Args:
        tensors: the tensors that launches may access, on the CPU; without any, the arguments of each launch.

    Yields:
        Traffic: loads, stores and bytes so far, by the model of this module; launches and programs.

    Raises:
        MemoryFault: an access outside the tensors, which is not made, or a race.
        RuntimeError: TRITON_INTERPRET=1 was not set before triton was imported.

    Example:
        >>> with checked(features, labels) as traffic:  # doctest: +SKIP
        ...     fgfast.part_pool(features, labels, 15, backend="triton")
        >>> assert traffic.bytes <= 1.1 * fewest(features, labels)  # doctest: +SKIP
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("Triton does not interpret kernels: set TRITON_INTERPRET=1 before triton is imported.")
    from triton.runtime import interpreter

    monitor = _Monitor(tensors)
    builder = interpreter.InterpreterBuilder
    relaxed = interpreter._ir.MEM_SEMANTIC.RELAXED

    def size(pointer: Any) -> int:
        return max(1, pointer.get_element_ty().primitive_bitwidth // 8)

    def start(inner: Callable[..., Any], self: Any, x: int, y: int, z: int) -> Any:
        monitor.start_program((x, y, z))
        return inner(self, x, y, z)

    def load(inner: Callable[..., Any], self: Any, pointer: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        monitor.access(pointer.data, mask.data, size(pointer), "load")
        return inner(self, pointer, mask, *rest, **named)

    def store(inner: Callable[..., Any], self: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        monitor.access(pointer.data, mask.data, size(pointer), "store")
        return inner(self, pointer, value, mask, *rest)

    def update(inner: Callable[..., Any], self: Any, op: Any, pointer: Any, value: Any, mask: Any, *rest: Any) -> Any:
        monitor.access(pointer.data, mask.data, size(pointer), "atomic", orders=rest[0] != relaxed)
        return inner(self, op, pointer, value, mask, *rest)

    def swap(inner: Callable[..., Any], self: Any, pointer: Any, *rest: Any) -> Any:
        everywhere = np.ones(pointer.data.shape, bool)
        monitor.access(pointer.data, everywhere, size(pointer), "atomic", orders=rest[2] != relaxed)
        return inner(self, pointer, *rest)

    def run(inner: Callable[..., Any], self: Any, *args: Any, **named: Any) -> Any:
        known = {k: v for k, v in named.items() if k in inspect.signature(self.fn).parameters}
        monitor.launch(self.fn.__name__, inspect.signature(self.fn).bind(*args, **known).arguments)
        try:
            return inner(self, *args, **named)
        except Exception as error:
            if isinstance(error.__cause__, MemoryFault):  # the interpreter wraps exceptions of a kernel
                raise error.__cause__ from None
            raise

    hooks: list[tuple[Any, str, Callable[..., Any]]] = [
        (builder, "set_grid_idx", start),
        (builder, "create_masked_load", load),
        (builder, "create_masked_store", store),
        (builder, "create_atomic_rmw", update),
        (builder, "create_atomic_cas", swap),
        (interpreter.GridExecutor, "__call__", run),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in hooks]
    try:
        for owner, name, hook in hooks:
            setattr(owner, name, _wrap(getattr(owner, name), hook))
        yield monitor.traffic
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


def _described(argument: Any) -> Any:
    """The tensor of a tensor descriptor; other arguments as they are."""
    return getattr(argument, "base", argument)


def _wrap(inner: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **named: Any) -> Any:
        return hook(inner, self, *args, **named)

    return method
