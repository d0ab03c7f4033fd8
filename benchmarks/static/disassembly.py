"""Machine code as instructions, basic blocks and loops, from the text of nvdisasm."""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L\w*):")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.([\w$]+)")
_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")


class Missing(Exception):
    """A tool that the model needs is not there; the message is one sentence."""


class Instruction(NamedTuple):
    """One instruction: its address, guard ("P0", "!P3" or ""), opcode with modifiers, operands."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


class Loop(NamedTuple):
    """A natural loop: the blocks of its body by index, those of inner loops included, and its depth from 1."""

    header: int
    blocks: frozenset[int]
    depth: int


class Function(NamedTuple):
    """The instructions of a function by basic block, in the order of addresses, and its loops, outer ones first.

    ``dominators``: of each block, those through which every way to it leads; none for a block that is not reached.
    """

    name: str
    blocks: tuple[tuple[Instruction, ...], ...]
    successors: tuple[tuple[int, ...], ...]
    loops: tuple[Loop, ...]
    dominators: tuple[frozenset[int], ...]

    def own(self, loop: Loop | None) -> list[Instruction]:
        """The instructions of a loop (None: of no loop) that are in no inner one."""
        inner: set[int] = set()
        for other in self.loops:
            if loop is None or (other.blocks < loop.blocks):
                inner |= other.blocks
        blocks = range(len(self.blocks)) if loop is None else sorted(loop.blocks)
        return [instruction for block in blocks if block not in inner for instruction in self.blocks[block]]


def tool() -> Path:
    """The disassembler that comes with Triton.

    Raises:
        Missing: it is not there.
    """
    import triton

    path = Path(triton.__path__[0], "backends", "nvidia", "bin", "nvdisasm")
    if not path.exists():
        raise Missing(f"There is no nvdisasm at {path}: install the wheel of triton for Linux.")
    return path


def disassemble(cubin: bytes) -> str:
    """The text of nvdisasm."""
    program = tool()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        made = subprocess.run([program, "-c", file.name], capture_output=True, text=True)
    if made.returncode:
        raise Missing(f"nvdisasm cannot read this cubin: {made.stderr.strip().splitlines()[-1]}.")
    return made.stdout


def parse(text: str) -> dict[str, Function]:
    """The functions of a text of nvdisasm by name."""
    functions: dict[str, Function] = {}
    name, instructions, labels = "", [], {}  # type: str, list[Instruction], dict[str, int]
    for line in [*text.splitlines(), ".section .text.end"]:
        if found := _FUNCTION.match(line):
            if instructions:
                functions[name] = _function(name, instructions, labels)
            name, instructions, labels = found[1], [], {}
        elif found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _LINE.match(line):
            instructions.append(Instruction(int(found[1], 16), found[2] or "", found[3], found[4].strip()))
    return functions


def _function(name: str, code: Sequence[Instruction], labels: dict[str, int]) -> Function:
    jumps = {}
    for i, instruction in enumerate(code):
        target = _TARGET.search(instruction.operands)
        if target and instruction.name in ("BRA", "CALL", "JMP") and target[1] in labels:
            jumps[i] = labels[target[1]]
    ends = {i + 1 for i, instruction in enumerate(code) if i in jumps or instruction.name in _ENDS}
    starts = sorted(({0} | set(jumps.values()) | ends) & set(range(len(code))))
    blocks = [tuple(code[a:b]) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)]
    index = {start: i for i, start in enumerate(starts)}
    following = []
    for i, start in enumerate(starts):
        last = start + len(blocks[i]) - 1
        always = not blocks[i][-1].guard and code[last].name in (*_ENDS, "BRA", "JMP")
        conditional = always and code[last].name == "BRA" and _TARGET.sub("", code[last].operands).strip(" ,")
        next_ones = [index[jumps[last]]] if last in jumps and code[last].name != "CALL" else []
        if (not always or conditional) and i + 1 < len(starts):
            next_ones.append(i + 1)
        following.append(tuple(dict.fromkeys(next_ones)))
    dominators = _dominators(following)
    loops = [loop for loop in _loops(following, dominators) if not _spins(blocks, loop)]
    return Function(name, tuple(blocks), tuple(following), tuple(loops), tuple(dominators))


def _spins(blocks: Sequence[tuple[Instruction, ...]], loop: Loop) -> bool:
    """Whether a loop only waits for a barrier in shared memory."""
    code = [instruction for block in loop.blocks for instruction in blocks[block]]
    return len(code) <= 12 and any("TRYWAIT" in instruction.opcode for instruction in code)


def _before(successors: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """The predecessors of each block, of those that are reached."""
    before: list[list[int]] = [[] for _ in successors]
    reached, waiting = {0}, [0]
    while waiting:
        block = waiting.pop()
        for after in successors[block]:
            before[after].append(block)
            if after not in reached:
                reached.add(after)
                waiting.append(after)
    return before


def _dominators(successors: Sequence[tuple[int, ...]]) -> list[frozenset[int]]:
    before = _before(successors)
    reached = [block for block in range(len(successors)) if block == 0 or before[block]]
    everything = frozenset(reached)
    found = [everything if block in everything else frozenset[int]() for block in range(len(successors))]
    found[0] = frozenset([0])
    changed = True
    while changed:
        changed = False
        for block in reached[1:]:
            new = frozenset.intersection(*(found[b] for b in before[block])) | {block}
            changed |= new != found[block]
            found[block] = new
    return found


def _loops(successors: Sequence[tuple[int, ...]], dominators: Sequence[frozenset[int]]) -> Iterator[Loop]:
    """The natural loops of a graph whose entry is block 0, loops of the same header joined."""
    before = _before(successors)
    reached = [block for block, found in enumerate(dominators) if found]
    bodies: dict[int, set[int]] = {}
    for block in reached:
        for header in successors[block]:
            if header in dominators[block] and (len(successors[block]) > 1 or header != block):  # not "BRA to itself"
                body, waiting = bodies.setdefault(header, {header}), [block]
                while waiting:
                    if (one := waiting.pop()) not in body:
                        body.add(one)
                        waiting += before[one]
    for header, body in sorted(bodies.items()):
        depth = sum(header in other for other in bodies.values())
        yield Loop(header, frozenset(body), depth)
