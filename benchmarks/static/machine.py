"""Clocks of one program alone on a processor: its instructions in order, with the units and waits that the code names.

The rule of overlap. Instructions of a program are issued in the order of the code, all warps of it in step: one
instruction takes warps / 4 clocks of the schedulers and its unit as long as the unit's rate says, and waits until the
unit is free. A product of a warp group, a copy into shared memory, a load, a shuffle and an exponential end later than
they are issued; the program goes on until it reaches the instruction that waits for them ("WARPGROUP.DEPBAR", "DEPBAR",
a barrier's phase, the first use of the register). So units overlap only where an instruction of one stands between the
issue and the wait of another; otherwise their clocks add. The clocks of a loop are those of an iteration once they
repeat.
"""

import re
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.static.disassembly import Function, Instruction, Loop
from benchmarks.static.rates import Rates
from benchmarks.static.units import TENSOR, flops, unit, width

BARRIER = 22  # clocks of a barrier of a program (Zhang et al., arXiv 2004.05371, V100) [measured there]
SHUFFLE, EXP2 = 23, 18  # clocks until a result can be used [assumed]
REPEATS = 6  # iterations after which the clocks of a loop repeat
_RESULT = re.compile(r"(?:!?U?P\w+, )*R(\d+)")
_REGISTER = re.compile(r"(?<![\w.])R(\d+)(\.64)?")


class Piece(NamedTuple):
    """What one instruction moves: bytes between L2 and the processor, which fraction of them comes from memory, and
    whether most of it is in the processor's own cache.
    """

    bytes: float = 0.0
    memory: float = 0.0
    cached: bool = False


@dataclass
class Moved:
    """What the instructions of a loop move, by kind of access and in order, from :mod:`benchmarks.static.align`.

    ``flops``: of a tensor instruction whose name has no shape; ``scalar``: products take no tensor instruction.
    """

    accesses: dict[str, list[Piece]] = field(default_factory=dict)
    flops: float = 0.0
    scalar: bool = False


@dataclass
class State:
    """The clock of the program, until when each unit is busy, and what is under way."""

    clock: float = 0.0
    in_loops: float = 0.0  # clocks of the outermost loops
    free: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    busy: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    ready: dict[int, float] = field(default_factory=dict)
    copies: deque[float] = field(default_factory=deque)  # committed groups
    open_copy: float = 0.0
    products: deque[float] = field(default_factory=deque)
    open_product: float = 0.0
    phases: deque[float] = field(default_factory=deque)  # loads that a barrier in shared memory counts
    tensor_phases: deque[float] = field(default_factory=deque)

    def shift(self, clocks: float) -> None:
        """Everything later by so many clocks."""
        self.clock += clocks
        for name in self.free:
            self.free[name] += clocks
        self.ready = {register: at + clocks for register, at in self.ready.items()}
        for queue in (self.copies, self.products, self.phases, self.tensor_phases):
            for i in range(len(queue)):
                queue[i] += clocks
        self.open_copy += clocks
        self.open_product += clocks


class Machine:
    """Runs a program of a function.

    Args:
        function: its code.
        warps: of the program.
        rates: of the architecture.
        trips: of each loop of the function for each time it is reached.
        moved: of each loop, by its header; -1 for code outside of loops.
        kind: of the products, a key of :attr:`Rates.tensor`.
    """

    def __init__(
        self, function: Function, warps: int, rates: Rates, trips: Mapping[int, int], moved: Mapping[int, Moved],
        kind: str,
    ) -> None:  # fmt: skip
        self.function, self.warps, self.rates, self.trips, self.moved = function, warps, rates, trips, moved
        self.kind, self.state = kind, State()
        self.skipped = _not_taken(function, trips)
        self.iterations: dict[int, tuple[float, dict[str, float]]] = {}  # clocks of the last run of each loop's body
        self.made = Counter[str]()  # accesses in this run of a loop's body

    def run(self) -> State:
        """The state after the last instruction and all that was under way."""
        self.body(None)
        state = self.state
        state.clock = max([state.clock, *state.free.values()])
        return state

    def _inner(self, loop: Loop | None) -> dict[int, Loop]:
        """The loops directly in a loop, by the header."""
        within = [x for x in self.function.loops if loop is None or x.blocks < loop.blocks]
        return {x.header: x for x in within if not any(x.blocks < other.blocks for other in within)}

    def body(self, loop: Loop | None) -> None:
        """Run the code of a loop once, inner loops as often as they run; None: the whole function."""
        inner = self._inner(loop)
        inside = {block: x for x in inner.values() for block in x.blocks}
        header = -1 if loop is None else loop.header
        done: set[int] = set()
        self.made.clear()
        blocks = range(len(self.function.blocks)) if loop is None else sorted(loop.blocks)
        for block in blocks:
            if block in inside:
                if (one := inside[block]).header not in done:
                    done.add(one.header)
                    made, start = Counter(self.made), self.state.clock
                    self._loop(one)
                    self.made = made
                    self.state.in_loops += (self.state.clock - start) * (loop is None)
                continue
            if block in self.skipped:
                continue
            code = self.function.blocks[block]
            for i, instruction in enumerate(code):
                self._step(instruction, self.moved.get(header, Moved()), code, i)

    def _loop(self, loop: Loop) -> None:
        state, trips = self.state, self.trips.get(loop.header, 1)
        for i in range(min(trips, REPEATS)):
            start, before = state.clock, dict(state.busy)
            self.body(loop)
            busy = {name: value - before.get(name, 0.0) for name, value in state.busy.items()}
            self.iterations[loop.header] = (state.clock - start, busy)
            if i == REPEATS - 1 and trips > REPEATS:
                for name, value in busy.items():
                    state.busy[name] += value * (trips - REPEATS)
                state.shift((state.clock - start) * (trips - REPEATS))

    def _take(self, name: str, clocks: float, start: float | None = None) -> float:
        """Occupy a unit; when it ends."""
        state = self.state
        begin = max(state.clock if start is None else start, state.free[name])
        state.free[name] = begin + clocks
        state.busy[name] += clocks
        return begin + clocks

    def _piece(self, kind: str, moved: Moved) -> Piece:
        """What the next instruction of a kind moves."""
        pieces, place = moved.accesses.get(kind, []), self.made[kind]
        self.made[kind] += 1
        return pieces[place] if place < len(pieces) else Piece()

    def _fetch(self, piece: Piece) -> float:
        """When bytes have arrived."""
        rates = self.rates
        end = self._take("port", piece.bytes / rates.port)
        self.state.busy["l2"] += piece.bytes / rates.l2
        self.state.busy["memory"] += piece.bytes * piece.memory / rates.memory
        if piece.cached:
            return end + rates.cache_latency
        return end + (rates.memory_latency if piece.memory > 0.5 else rates.l2_latency)

    def _store(self, size: float) -> None:
        self._take("port", size / self.rates.port)
        self.state.busy["l2"] += size / self.rates.l2

    def _step(self, instruction: Instruction, moved: Moved, code: Sequence[Instruction], place: int) -> None:
        state, rates, warps = self.state, self.rates, self.warps
        kind, name = unit(instruction), instruction.name
        registers = _registers(instruction)
        used = [state.ready[r] for r in registers if r in state.ready]
        accumulates = kind == "tensor" and name != "HMMA"
        if used and not accumulates:
            state.clock = max(state.clock, *used)
        issue = max(1.0, warps / 4)
        state.busy["issue"] += issue
        end = state.clock + issue
        lanes = 32 * warps
        if kind in ("exp2", "mufu") or (kind == "convert" and name in ("F2F", "F2I", "I2F", "FRND")):
            end = self._take("exp2", lanes / rates.exp2) + EXP2
        elif kind == "float":
            self._pipe("float", lanes / rates.float32)
        elif kind == "multiply":
            self._pipe("float", lanes / rates.integer)
        elif kind in ("integer", "select", "convert"):
            self._pipe("integer", lanes / rates.integer)
        elif kind == "shuffle":
            end = self._take("shuffle", lanes / rates.shuffle) + SHUFFLE
        elif kind == "shared":
            wavefronts = 1.0 if moved.scalar and name == "LDS" else max(1.0, 32 * width(instruction) / rates.shared)
            end = self._take("shared", warps * wavefronts) + rates.shared_latency
        elif kind == "tensor":
            end = self._product(instruction, moved)
        elif kind == "global" or kind == "local":
            self._take("shared", warps * max(1.0, 32 * width(instruction) / rates.shared))
            if kind == "local":
                end = self._fetch(Piece(width(instruction) * lanes, cached=True))
            elif name in ("LDG", "LD"):
                end = self._fetch(self._piece("load", moved))
            else:
                self._store(self._piece("store" if name in ("STG", "ST") else "atomic", moved).bytes)
        elif kind == "async":
            self._copy(name, moved)
        elif kind == "barrier":
            self._wait(instruction, code, place)
        state.clock += issue
        for register in _written(instruction, kind):
            if kind in ("exp2", "mufu", "shuffle", "shared", "global", "local") or name == "HMMA":
                state.ready[register] = end
            else:
                state.ready.pop(register, None)

    def _pipe(self, name: str, clocks: float) -> None:
        """An arithmetic unit accepts an instruction when it is free."""
        state = self.state
        state.clock = max(state.clock, state.free[name] - clocks)  # one instruction is queued
        self._take(name, clocks)

    def _product(self, instruction: Instruction, moved: Moved) -> float:
        state, rates = self.state, self.rates
        work = flops(instruction, self.warps) or moved.flops
        name = instruction.name
        rate = rates.tensor[self.kind] * (rates.synchronous if name in ("HMMA", "IMMA", "QMMA") else 1.0)
        end = self._take("tensor", work / rate)
        if name in ("HMMA", "IMMA", "QMMA"):
            state.clock = max(state.clock, end - work / rate)
            return end + rates.mma_latency
        state.open_product = max(state.open_product, end)
        if "gsb0" in instruction.operands:
            state.products.append(state.open_product + rates.mma_latency)
            state.open_product = 0.0
        return end

    def _copy(self, name: str, moved: Moved) -> None:
        state = self.state
        if name == "LDGSTS":
            state.open_copy = max(state.open_copy, self._fetch(self._piece("copy", moved)))
        elif name in ("UTMALDG", "UBLKCP"):
            end = self._fetch(self._piece("tma", moved))
            if state.phases:
                state.phases[-1] = max(state.phases[-1], end)
            else:
                state.phases.append(end)
        elif name in ("UTMASTG", "UTMAREDG"):
            self._store(self._piece("store", moved).bytes)

    def _wait(self, instruction: Instruction, code: Sequence[Instruction], place: int) -> None:
        state, name = self.state, instruction.name
        if name == "LDGDEPBAR":
            state.copies.append(state.open_copy)
            state.open_copy = 0.0
        elif name == "DEPBAR" and "SB0" in instruction.operands:
            self._drain(state.copies, number_left(instruction))
        elif name == "WARPGROUP" and "DEPBAR" in instruction.opcode:
            self._drain(state.products, number_left(instruction))
        elif name == "BAR":
            state.clock += BARRIER
        elif name == "UTCBAR":
            state.tensor_phases.append(state.free["tensor"] + self.rates.mma_latency)
        elif name == "SYNCS" and "ARRIVE" in instruction.opcode and "TRANS64" in instruction.opcode:
            state.phases.append(0.0)
        elif name == "SYNCS" and "TRYWAIT" in instruction.opcode:
            after = next((x.name for x in code[place:] if x.name in (*TENSOR, "LDTM")), "LDTM")
            queue = state.phases if after != "LDTM" or not state.tensor_phases else state.tensor_phases
            if queue:
                state.clock = max(state.clock, queue.popleft())

    def _drain(self, queue: deque[float], left: int) -> None:
        while len(queue) > left:
            self.state.clock = max(self.state.clock, queue.popleft())


def _not_taken(function: Function, trips: Mapping[int, int]) -> set[int]:
    """Blocks on the way to loops that do not run, and to nothing else: branches that are not taken.

    And blocks that only a call reaches, such as a division's for denormal numbers.
    """
    ends = [i for i, after in enumerate(function.successors) if not after and function.dominators[i]]
    runs = [x.header for x in function.loops if trips.get(x.header, 1)] + ends
    never = [x.header for x in function.loops if not trips.get(x.header, 1)]
    needed = frozenset[int]().union(*(function.dominators[header] for header in runs))
    roots = frozenset[int]().union(*(function.dominators[header] for header in never)) - needed
    found = {block for block, over in enumerate(function.dominators) if not over or over & roots}
    return found | _retries(function)


def _retries(function: Function) -> set[int]:
    """Blocks that wait again for a barrier in shared memory where a first wait, elsewhere, was not enough."""
    waits = {
        block: {instruction.operands for instruction in code if "TRYWAIT" in instruction.opcode}
        for block, code in enumerate(function.blocks)
    }
    again = {block for block, found in waits.items() if found and block in function.successors[block]}
    first = set().union(*(found for block, found in waits.items() if block not in again))
    return {block for block in again if waits[block] <= first}


def number_left(instruction: Instruction) -> int:
    """The groups that a wait leaves under way."""
    return int(instruction.operands.split(",")[-1].strip().split()[0], 0)


def _registers(instruction: Instruction) -> set[int]:
    """The registers that an instruction names, with those that follow in a pair or quad."""
    found: set[int] = set()
    first = True
    for match in _REGISTER.finditer(instruction.operands):
        size = 2 if match[2] else 1
        if first and match.start() < 5:
            size = max(size, _result(instruction))
        found |= set(range(int(match[1]), int(match[1]) + size))
        first = False
    if instruction.name in ("STG", "STS", "STL", "HMMA"):
        for match in _REGISTER.finditer(instruction.operands):
            found |= set(
                range(
                    int(match[1]),
                    int(match[1]) + (4 if instruction.name == "HMMA" else max(1, width(instruction) // 4)),
                )
            )
    return found


def _result(instruction: Instruction) -> int:
    """Registers that an instruction writes."""
    kind = unit(instruction)
    if kind in ("shared", "global", "local"):
        return max(1, width(instruction) // 4)
    return 4 if instruction.name == "HMMA" else 2 if ".WIDE" in instruction.opcode or ".64" in instruction.opcode else 1


def _written(instruction: Instruction, kind: str) -> range:
    if instruction.name in ("STG", "STS", "STL", "ST", "RED", "LDGSTS", "STSM", "HGMMA") or kind in (
        "barrier",
        "control",
    ):
        return range(0)
    match = _RESULT.match(instruction.operands)
    return range(int(match[1]), int(match[1]) + _result(instruction)) if match else range(0)
