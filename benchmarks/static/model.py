"""Predicted clocks of a launch: those of its programs, of the units of a processor, of L2 and of memory.

A processor runs ``ceil(programs / processors)`` programs of a launch, as many at a time as registers, warps and shared
memory allow (R). Programs are independent: while one waits another runs. Their time is at least

- the clocks of one program alone (:mod:`benchmarks.static.machine`) for each group of R programs, and
- the clocks of the unit that all programs together take longest;

the larger of both is taken, which is a lower bound: R programs that collide take longer. The launch takes no less than
its bytes at the rate of memory, each tensor read or written once, and what a program does outside of its loops once,
because the programs of the first wave start together and those of the last end together. Each launch adds
:data:`LAUNCH_US`.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from benchmarks.static import align, cases, nvcc, tiles, units
from benchmarks.static.capture import Launch
from benchmarks.static.disassembly import Function, Loop, disassemble, parse, tool
from benchmarks.static.machine import Machine, State, number_left
from benchmarks.static.rates import Rates
from benchmarks.static.tiles import Region

LIBRARY = 0.9  # of the limit: a library's product that is part of an operation [assumed]
READS = ("load", "copy", "tma")
CACHED = 64 << 10
SAMPLES, GOLDEN = 32, 0.6180339887  # programs of a launch whose trips are computed, spread evenly
LAUNCH_US = 1.5  # from the end of a launch to the first instruction of the next in a stream [assumed]


class Tile(NamedTuple):
    """One run of the loop with most of a program's work, inner loops included."""

    units: Mapping[str, float] = MappingProxyType({})  # clocks of each unit
    counts: Mapping[str, int] = MappingProxyType({})  # instructions by unit
    clocks: float = 0.0  # of a program alone
    l2_bytes: float = 0.0
    memory_bytes: float = 0.0
    flops: float = 0.0


class Prediction(NamedTuple):
    """A launch: clocks of the device, what binds, and facts of its code."""

    name: str
    clocks: float
    binds: str
    tile: Tile = Tile()
    programs: int = 0  # that a processor holds at a time
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    product: str = ""  # the name of its tensor instructions
    depth: int = 0  # copies left under way where it waits for others
    key: str = ""


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        program = tool().with_name("cuobjdump")
        text = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def resident(registers: int, warps: int, shared: int, rates: Rates) -> int:
    """Programs that a processor holds at a time.

    Example:
        >>> from benchmarks.static.rates import RATES
        >>> resident(128, 8, 100_000, RATES["sm_90"])
        2
    """
    by_registers = rates.registers // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = rates.shared_kib * 1024 // (shared + 1024)
    return max(1, min(by_registers, by_shared, rates.warps // warps, rates.programs))


def tensors(arguments: dict[str, Any]) -> int:
    """Bytes of the different tensors among the arguments of a launch."""
    sizes: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, tuple | list):
            for x in value:
                add(x)
        elif hasattr(value, "block_shape"):
            add(value.base)
        elif isinstance(value, torch.Tensor):
            key = value.untyped_storage()._cdata
            sizes[key] = max(sizes.get(key, 0), value.numel() * value.element_size())

    for value in arguments.values():
        add(value)
    return sum(sizes.values())


def kind_of(function: Function, default: str) -> str:
    """The kind of a function's products: that of its tensor instructions."""
    for block in function.blocks:
        for instruction in block:
            if units.unit(instruction) == "tensor":
                return (
                    "tf32"
                    if "TF32" in instruction.opcode
                    or ".1684" in instruction.opcode
                    or (
                        ".1688" in instruction.opcode
                        and "F16" not in instruction.opcode
                        and "BF16" not in instruction.opcode
                    )
                    else "bf16"
                )
    return default


def predict(launch: Launch, rates: Rates, flops: int) -> Prediction:
    """A launch; ``flops``: of all its products, where its loops depend on data."""
    if not launch.cubin:
        return library(launch, rates)
    functions = parse(disassemble(launch.cubin))
    function = next(f for name, f in functions.items() if launch.name in name or len(functions) == 1)
    registers, spilled = resources(launch.cubin)
    held = resident(registers, launch.warps, launch.shared, rates)
    runs = list(_runs(launch, function, rates, flops))
    mean = sum(weight * state.clock for weight, state, _ in runs)
    busy: defaultdict[str, float] = defaultdict(float)
    for weight, state, _ in runs:
        for name, value in state.busy.items():
            busy[name] += weight * value
    programs = -(-launch.programs // rates.processors)
    held = min(held, programs)
    memory = min(tensors(launch.arguments) or math.inf, busy["l2"] * rates.l2 * launch.programs)
    for name in ("memory", "port"):
        busy.pop(name, None)
    serial = math.ceil(programs / held) * mean
    unit, most = max(busy.items(), key=lambda item: item[1]) if busy else ("issue", 0.0)
    floor = memory / rates.memory / rates.processors
    floor += sum(weight * _around(state) for weight, state, machine in runs)
    clocks = max(serial, programs * most, floor)
    top = sorted(busy, key=lambda name: -busy[name])[:2]
    binds = "memory" if clocks == floor else unit if clocks == programs * most else f"waits ({', '.join(top)})"
    clocks += LAUNCH_US * 1e3 * rates.ghz
    _, _, machine = max(runs, key=lambda run: run[0] * run[1].clock)
    return Prediction(
        launch.name, clocks, binds, _tile(machine), held, registers, spilled, launch.shared, *_facts(function, machine),
        launch.key,
    )  # fmt: skip


def library(launch: Launch, rates: Rates) -> Prediction:
    """A call of PyTorch: a copy of its bytes, or a product at :data:`LIBRARY` of the limit."""
    moved = launch.bytes / rates.memory / rates.processors
    kind = "tf32" if launch.dtype == torch.float32 else "bf16"
    product = launch.flops / (LIBRARY * rates.limit(kind)) / rates.processors
    clocks = max(moved, product) + LAUNCH_US * 1e3 * rates.ghz
    return Prediction(launch.name, clocks, "tensor" if product > moved else "memory")


def _runs(launch: Launch, function: Function, rates: Rates, flops: int) -> Iterator[tuple[float, State, Machine]]:
    """The programs of a launch in groups with the same trips: fraction of the programs, state, machine."""
    if not launch.dialect:
        sizes = {name: size for name, size in launch.arguments.items() if name != "batch"}
        known = nvcc.loops(function, **sizes)
        machine = Machine(function, launch.warps, rates, known.trips, known.moved, "bf16")
        machine.skipped |= known.skipped
        yield 1.0, machine.run(), machine
        return
    wide = (*launch.grid, 1, 1)[:3]
    number = math.prod(wide)
    chosen = sorted({int(i * GOLDEN % 1 * number) for i in range(SAMPLES)})
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for place in chosen:
        program = (place % wide[0], place // wide[0] % wide[1], place // wide[0] // wide[1])
        whole = tiles.read(launch.dialect, launch.arguments, program, wide)
        cases.assume(launch, whole, flops // number)
        found = align.match(function, launch.warps, whole)
        trips = align.trips(found)
        groups.setdefault(tuple(sorted(trips.items())), [0, whole, found, trips])[0] += 1
    arguments = tiles.flatten(launch.arguments)
    readers: Counter[str] = Counter()  # of the chosen programs, that read an argument
    for times, whole, *_ in groups.values():
        readers.update(dict.fromkeys({a.argument for a, n in whole.accesses() if n and a.kind in READS}, times))
    parts = {name: number * times / len(chosen) for name, times in readers.items()}
    for times, whole, found, trips in groups.values():
        moved = align.moved(function, whole, found, _levels(whole, arguments, parts))
        machine = Machine(function, launch.warps, rates, trips, moved, kind_of(function, "bf16"))
        yield times / len(chosen), machine.run(), machine


def _around(state: State) -> float:
    """Clocks of a program before its first loop and after its last, in which a wave of programs leaves memory idle."""
    return state.clock - state.in_loops


def _levels(whole: Region, arguments: dict[str, Any], programs: dict[str, float]) -> dict[int, tuple[float, float]]:
    """Where the bytes of each read come from: fraction from memory, and from the processor's own cache.

    ``programs``: those that read an argument. Of the bytes that all of them read from a tensor, as many as it has come
    from memory, those read first. A tensor of at most :data:`CACHED` bytes is in the processor's cache after that, and
    others are in L2.
    """
    left: dict[str, float] = {}
    found = {}
    for access, times in whole.accesses():
        if access.kind not in READS or not times:
            continue
        size = tensors({"": arguments.get(access.argument)})
        rest = left.setdefault(access.argument, size / programs[access.argument])
        read = access.bytes * times
        first = min(rest, read)
        left[access.argument] = rest - first
        fraction = first / read if read else 0.0
        found[id(access)] = (fraction, 1 - fraction if 0 < size <= CACHED else 0.0)
    return found


def _facts(function: Function, machine: Machine) -> tuple[str, int]:
    """The name of the tensor instructions of the loops that run, and how many copies they leave under way at a wait."""
    runs = [x for x in function.loops if machine.trips.get(x.header, 1)]
    code = [i for x in runs for block in x.blocks if block not in machine.skipped for i in function.blocks[block]]
    products = Counter(i.name for i in code if units.unit(i) == "tensor")
    waits = [number_left(i) for i in code if i.name == "DEPBAR" and "SB0" in i.operands]
    phases = len({i.operands for i in code if i.name == "UTMALDG"})
    return (products.most_common(1)[0][0] if products else ""), max([*waits, phases], default=0)


def _tile(machine: Machine) -> Tile:
    """The loop with most of the work: where an outer one adds to it, that one; without a loop the whole program."""
    function, trips = machine.function, machine.trips

    def runs(loop: Loop) -> int:
        return math.prod(trips.get(x.header, 1) for x in function.loops if loop.blocks <= x.blocks)

    loops = [x for x in function.loops if runs(x)]
    best = max(loops, key=lambda x: runs(x) * len(function.own(x)), default=None)
    while best is not None and trips[best.header] <= 64:
        around = min((x for x in loops if best.blocks < x.blocks), key=lambda x: len(x.blocks), default=None)
        if around is None or len(function.own(around)) < 0.05 * trips[best.header] * len(function.own(best)):
            break
        best = around
    clock, clocks = machine.iterations[best.header] if best else (machine.state.clock, dict(machine.state.busy))
    counts: Counter[str] = Counter()
    for loop in [best, *(x for x in function.loops if best and x.blocks < best.blocks)]:
        times = runs(loop) // max(1, runs(best)) if loop and best else 1
        for name, n in units.count(function.own(loop)).items():
            counts[name] += n * times
    rates = machine.rates
    size, from_memory = clocks.get("l2", 0.0) * rates.l2, clocks.get("memory", 0.0) * rates.memory
    flops = clocks.get("tensor", 0.0) * rates.tensor[machine.kind]
    return Tile(clocks, dict(counts), clock, size, from_memory, flops)
