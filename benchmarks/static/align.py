"""Loops of the machine code matched with those of Triton's dialect: trips, and bytes of each instruction."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from benchmarks.static.disassembly import Function, Loop
from benchmarks.static.machine import Moved, Piece
from benchmarks.static.tiles import Access, Region
from benchmarks.static.units import TENSOR, flops, unit, width

KINDS = {
    "load": ("LDG", "LD"),
    "copy": ("LDGSTS",),
    "tma": ("UTMALDG", "UBLKCP"),
    "store": ("STG", "ST", "UTMASTG", "UTMAREDG"),
    "atomic": ("RED", "REDG", "ATOMG", "ATOM"),
}
Found = dict[int, tuple[Region, int]]  # by the header of a loop: what it is in the dialect, and how often unrolled


def children(function: Function, loop: Loop | None) -> list[Loop]:
    """The loops directly in a loop, in order of their first instruction."""
    within = [x for x in function.loops if loop is None or x.blocks < loop.blocks]
    direct = [x for x in within if not any(x.blocks < other.blocks for other in within)]
    return sorted(direct, key=lambda x: x.header)


def plain(region: Region) -> list[Region]:
    """The loops directly in a region, with those of branches in it."""
    found = []
    for inner in region.inner:
        if not inner.branch:
            found.append(inner)
        elif inner.trips != 0:
            found += plain(inner)
        else:
            found += [_never(x) for x in plain(inner)]
    return found


def _never(region: Region) -> Region:
    """A loop in a branch that is not taken."""
    return Region(0, region.steps, region.flops)


def work(function: Function, loop: Loop, warps: int) -> tuple[int, int]:
    """Flops of the tensor instructions of a loop and its inner ones, each once, and their number."""
    code = [i for block in loop.blocks for i in function.blocks[block] if unit(i) == "tensor"]
    return sum(flops(i, warps) for i in code), len(code)


def match(
    function: Function, warps: int, region: Region, loop: Loop | None = None, found: Found | None = None
) -> Found:  # fmt: skip
    """For each loop of the machine code, by its header, the loop of the dialect that it is, and how often unrolled.

    Loops correspond in order; where their numbers differ (short loops are unrolled; a remainder follows an unrolled
    one), the pairing that agrees most on products and accesses is taken, and unpaired loops do not run.
    """
    found = {} if found is None else found
    machine, dialect = children(function, loop), plain(region)
    for one, other in _pairs(function, warps, machine, dialect):
        found[one.header] = (other, 1)
        match(function, warps, other, one, found)
    _remainders(function, machine, found)
    return found


def _pairs(
    function: Function, warps: int, machine: Sequence[Loop], dialect: Sequence[Region]
) -> list[tuple[Loop, Region]]:  # fmt: skip
    """Pairs in order with the largest total agreement."""
    best: list[list[tuple[float, list[tuple[Loop, Region]]]]] = [[(0.0, [])] * (len(dialect) + 1)]
    for loop in machine:
        row = [(0.0, list[tuple[Loop, Region]]())]
        for j, region in enumerate(dialect):
            score, pairs = best[-1][j]
            together = (score + _agreement(function, warps, loop, region), [*pairs, (loop, region)])
            row.append(max(best[-1][j + 1], row[j], together, key=lambda item: item[0]))
        best.append(row)
    return best[-1][-1][1]


def _agreement(function: Function, warps: int, loop: Loop, region: Region) -> float:
    done, number = work(function, loop, warps)
    wanted = _once(region)
    if (number > 0) != (wanted > 0) and not region.scalar:
        return 0.1
    kinds = sum(
        bool(_issued(function, loop, kind)) == any(a.kind == kind for a, _ in region.accesses()) for kind in KINDS
    ) / len(KINDS)
    return 1.0 + kinds + (0.0 if not done else min(done, wanted) / max(done, wanted))


def _once(region: Region) -> int:
    return region.flops + sum(_once(x) for x in region.inner)


def _issued(function: Function, loop: Loop | None, kind: str, own: bool = False) -> int:
    """Bytes that a thread moves in instructions of a kind; 1 for each whose name has no size."""
    code = function.own(loop) if own or loop is None else [i for b in loop.blocks for i in function.blocks[b]]
    return sum(width(i) for i in code if i.name in KINDS[kind])


def _remainders(function: Function, machine: Sequence[Loop], found: Found) -> None:
    """Unpaired loops that do the last iterations of an unrolled one before them."""
    for before, loop in pairwise(machine):
        if before.header not in found or loop.header in found:
            continue
        sizes = [_issued(function, x, "load") + _issued(function, x, "copy") for x in (before, loop)]
        region, _ = found[before.header]
        factor = sizes[0] // max(1, sizes[1])
        rest = (region.trips or 0) % factor if factor > 1 and sizes[0] % max(1, sizes[1]) == 0 else 0
        if factor > 1 and sizes[0] % max(1, sizes[1]) == 0:
            found[before.header] = (region, factor)
        found[loop.header] = (Region(rest, region.steps, region.flops), 1)


def trips(found: Found) -> dict[int, int]:
    """Trips of each loop of the machine code."""
    return {header: region.times // factor for header, (region, factor) in found.items()}


def moved(
    function: Function, region: Region, found: Found, memory: Mapping[int, tuple[float, float]]
) -> dict[int, Moved]:  # fmt: skip
    """What the instructions of each loop move: the accesses of the dialect's loop, in order, dealt to its instructions.

    Loops of the dialect without one in the machine code are unrolled into the loop around them. ``memory``: for an
    access (its id) the fractions of its bytes that come from memory and from the processor's own cache.
    """
    paired = {id(r) for r, _ in found.values()}

    def own(one: Region) -> tuple[list[Access], int, bool]:
        accesses: list[Access] = []
        flops, scalar = one.flops, one.scalar
        for step in one.steps:
            if isinstance(step, Access):
                accesses.append(step)
            elif step.branch or (id(step) not in paired and not any(id(x) in paired for x in step.all())):
                inner, more, other = own(step)
                accesses += inner * step.times
                flops, scalar = flops + more * step.times, scalar or other
        return accesses, flops, scalar

    result = {}
    for loop, one in [(None, region), *((x, found[x.header][0]) for x in function.loops if x.header in found)]:
        code = function.own(loop)
        accesses, flops_, scalar = own(one)
        factor = 1 if loop is None else found[loop.header][1]
        made = Moved(scalar=scalar)
        for kind, names in KINDS.items():
            of_kind = [a for a in accesses if a.kind == kind] * factor
            number = sum(1 for i in code if i.name in names)
            made.accesses[kind] = _deal(of_kind, number, memory)
        tensor = sum(1 for i in code if i.name in TENSOR)
        made.flops = flops_ / tensor if tensor else 0.0
        result[-1 if loop is None else loop.header] = made
    return result


def _deal(accesses: list[Access], number: int, memory: Mapping[int, tuple[float, float]]) -> list[Piece]:
    """The bytes of each of so many instructions, in order."""
    if not number or not accesses:
        return []
    total = sum(max(a.bytes, 512) for a in accesses)
    pieces = [[0.0, 0.0, 0.0] for _ in range(number)]
    at = 0.0
    for access in accesses:
        first, at = at, at + max(access.bytes, 512) * number / total
        low, high = int(first), min(number, max(int(first) + 1, round(at)))
        from_memory, cached = memory.get(id(access), (0.0, 0.0))
        for piece in pieces[low:high]:
            size = access.bytes / (high - low)
            piece[0] += size * (1 - cached)
            piece[1] += size * from_memory
            piece[2] += size
    return [Piece(p[0], p[1] / p[2] if p[2] else 0.0, p[2] > 0 and p[0] < p[2] / 2) for p in pieces]


__all__: Sequence[str] = ("children", "match", "moved", "trips")
