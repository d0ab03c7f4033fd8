"""Loops of a compiled kernel above the machine code (Triton's GPU dialect): trip counts, and bytes of a tile.

The machine code does not say how many different bytes a load fetches (lanes may read the same address), nor how often
a loop runs. The dialect has the shape of every tile and the bounds of every loop, which are computed from the
arguments of the launch where they do not depend on data.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

_DEFINED = re.compile(r"^\s*(%[\w$.#-]+)(?::\d+)? = ([\w.]+)\s*(.*)")
_FOR = re.compile(r"scf\.for (%[\w.-]+) = (%[\w.#-]+) to (%[\w.#-]+) step (%[\w.#-]+)")
_TENSOR = re.compile(r"(?:tensor<|memdesc<|-> <|tensordesc<(?:tensor<)?)((?:\d+x)+)(?:!tt\.ptr<)?([a-z]+\d+\w*)")
_BITS = re.compile(r"\d+")
_CONSTANT = re.compile(r"^%c(-?\d+)_i\d+")
LOADS = {
    "tt.load": "load", "ttg.async_copy_global_to_local": "copy", "tt.descriptor_load": "tma",
    "ttng.async_tma_copy_global_to_local": "tma", "tt.store": "store", "tt.descriptor_store": "store",
    "ttng.async_tma_copy_local_to_global": "store", "tt.atomic_rmw": "atomic", "ttng.async_tma_reduce": "atomic",
    "tt.descriptor_gather": "tma",
}  # fmt: skip
_POINTERS = ("tt.addptr", "tt.splat", "tt.broadcast", "tt.expand_dims", "ttg.convert_layout", "tt.reshape", "carried",
             "arith.select", "tt.bitcast", "tt.trans")  # fmt: skip
PRODUCTS = ("tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma")
_OPERATIONS: dict[str, Callable[..., int]] = {
    "addi": lambda a, b: a + b, "subi": lambda a, b: a - b, "muli": lambda a, b: a * b,
    "divsi": lambda a, b: int(a / b) if b else 0, "divui": lambda a, b: a // b if b else 0,
    "remsi": lambda a, b: int(math.fmod(a, b)) if b else 0, "remui": lambda a, b: a % b if b else 0,
    "minsi": min, "maxsi": max, "minui": min, "maxui": max, "andi": lambda a, b: a & b, "ori": lambda a, b: a | b,
    "xori": lambda a, b: a ^ b, "shli": lambda a, b: a << b, "shrsi": lambda a, b: a >> b, "shrui": lambda a, b: a >> b,
    "extsi": int, "extui": int, "trunci": int, "ceildivsi": lambda a, b: -(-a // b),
}  # fmt: skip
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "slt": lambda a, b: a < b, "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b, "sge": lambda a, b: a >= b,
}  # fmt: skip


class Access(NamedTuple):
    """A load or store of a tile: its kind (a value of :data:`LOADS`), its bytes, and the argument that it reads."""

    kind: str
    bytes: int
    argument: str


@dataclass(eq=False)
class Region:
    """A loop of a kernel (the kernel itself: one that runs once), or a branch whose condition may depend on data.

    ``trips``: how often the body runs for each time the loop is reached; None where it depends on data. ``steps``: what
    one run of the body accesses and the regions in it, in order; ``flops``: of its matrix products, which are
    ``scalar`` if the layout says that they take no tensor instruction. ``branch``: "", "then" or "else".
    """

    trips: int | None = 1
    steps: list["Access | Region"] = field(default_factory=list)
    flops: int = 0
    scalar: bool = False
    branch: str = ""

    @property
    def inner(self) -> list["Region"]:
        """The regions directly in this one."""
        return [step for step in self.steps if isinstance(step, Region)]

    def total(self) -> int:
        """Flops of one run of the body and of all that it contains; what is not known runs once."""
        return self.flops + sum(loop.times * loop.total() for loop in self.inner)

    @property
    def times(self) -> int:
        """The trips, 1 if they are not known."""
        return 1 if self.trips is None else self.trips

    def all(self) -> list["Region"]:
        """The regions at any depth, outer ones first, in order."""
        return [found for loop in self.inner for found in (loop, *loop.all())]

    def accesses(self) -> list[tuple[Access, int]]:
        """Every access of one run of the body, inner regions included, in order, and how often it is made."""
        found: list[tuple[Access, int]] = []
        for step in self.steps:
            if isinstance(step, Access):
                found.append((step, 1))
            else:
                found += [(access, n * step.times) for access, n in step.accesses()]
        return found


def flatten(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a launch by the names that the dialect gives them: those of a tuple have its name and a position.

    Example:
        >>> flatten({"n": 3, "sizes": (4, (5, 6))})
        {'n': 3, 'sizes.0': 4, 'sizes.1.0': 5, 'sizes.1.1': 6}
    """
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, tuple | list):
            found |= flatten({f"{name}.{i}": x for i, x in enumerate(value)})
        else:
            found[name] = value
    return found


def _bytes(shape: str, kind: str) -> int:
    bits = int(_BITS.findall(kind)[0]) if not kind.startswith("f8") else 8
    return math.prod(int(n) for n in shape.split("x") if n) * max(8, bits) // 8


class _Values:
    """The scalars of a kernel, computed when asked for."""

    def __init__(self, arguments: Mapping[str, Any], program: tuple[int, int, int], grid: tuple[int, ...]) -> None:
        self.defined: dict[str, tuple[str, str]] = {}
        self.known: dict[str, int | None] = {
            f"%{name}": int(value) for name, value in arguments.items() if isinstance(value, int)
        }
        self.program, self.grid = program, grid
        self.sources: dict[str, str] = {}

    def define(self, name: str, operation: str, rest: str) -> None:
        """A new value; the names of a region may be those of one before."""
        self.defined[name] = (operation, rest)
        self.known.pop(name, None)
        self.sources.pop(name, None)

    def trips(self, loop: str) -> int | None:
        """How often a loop runs."""
        if not (bounds := _FOR.search(loop)):
            return None
        low, high, step = (self.of(name) for name in bounds.groups()[1:])
        return None if low is None or high is None or not step else max(0, -(-(high - low) // step))

    def carry(self, loop: str) -> None:
        """What a loop carries starts from a value before it: the same argument."""
        for name, start in re.findall(r"(%[\w.-]+) = (%[\w.#-]+)", loop.partition("iter_args(")[2]):
            self.define(name, "carried", start)

    def source(self, name: str) -> str:
        """The argument that a pointer points into, "" if that is not found."""
        for _ in range(200):
            if name in self.sources:
                return self.sources[name]
            base = name if name in self.defined else name.partition("#")[0]
            if base not in self.defined:
                return name.removeprefix("%")
            operation, rest = self.defined[base]
            names = re.findall(r"%[\w$.#-]+", rest)
            if operation not in _POINTERS or not names:
                return ""
            name = names[1] if operation == "arith.select" and len(names) > 1 else names[0]
        return ""

    def of(self, name: str) -> int | None:
        if name in self.known:
            return self.known[name]
        self.known[name] = None  # also while it is computed
        if constant := _CONSTANT.match(name):
            self.known[name] = int(constant[1])
        elif name in self.defined:
            self.known[name] = self._compute(*self.defined[name])
        return self.known[name]

    def _compute(self, operation: str, rest: str) -> int | None:
        if operation == "arith.constant":
            found = re.match(r"(-?\d+|true|false)\b", rest)
            return (
                None if not found else {"true": 1, "false": 0}.get(found[1]) if found[1][0] in "tf" else int(found[1])
            )
        if operation == "tt.get_program_id":
            return self.program["xyz".index(rest[0])]
        if operation == "tt.get_num_programs":
            return self.grid["xyz".index(rest[0])]
        operands = [self.of(name) for name in re.findall(r"%[\w$.#-]+", rest.split(" : ")[0])]
        values = [value for value in operands if value is not None]
        if "tensor<" in rest or len(values) < len(operands):
            return None
        name = operation.removeprefix("arith.")
        if name == "cmpi":
            found = re.match(r"(\w+),", rest)
            return int(_COMPARE[found[1]](*values)) if found and found[1] in _COMPARE else None
        if name == "select" and len(values) == 3:
            return values[1] if values[0] else values[2]
        return _OPERATIONS[name](*values) if operation.startswith("arith.") and name in _OPERATIONS else None


def read(
    text: str,
    arguments: Mapping[str, Any],
    program: tuple[int, int, int] = (0, 0, 0),
    grid: tuple[int, ...] = (1, 1, 1),
) -> Region:
    """The loops of a kernel's text in Triton's GPU dialect, for the arguments of a launch and one of its programs."""
    values = _Values(flatten(arguments), program, grid)
    whole = Region()
    stack: list[tuple[Region | None, str]] = []  # open regions; None for other blocks; the names of their results
    for line in text.splitlines():
        body = re.sub(r" loc\(.*$", "", line)
        found = _DEFINED.match(body)
        operation, rest = (found[2], found[3]) if found else ((body.split() or [""])[0], body.strip())
        region = next((r for r, _ in reversed(stack) if r is not None), whole)
        stripped = body.strip()
        if found:
            values.define(found[1], operation, rest)
        if "scf.for" in body or "scf.while" in body:
            loop = Region(values.trips(body))
            region.steps.append(loop)
            stack.append((loop, ""))
            values.carry(rest)
        elif operation == "scf.if":
            condition = values.of(re.findall(r"%[\w$.#-]+", rest)[0])
            branch = Region(None if condition is None else int(bool(condition)), branch="then")
            region.steps.append(branch)
            stack.append((branch, found[1] if found else ""))
        elif stripped.startswith("} else"):
            before, results = stack.pop()
            assert before is not None
            branch = Region(None if before.trips is None else 1 - before.trips, branch="else")
            next((r for r, _ in reversed(stack) if r is not None), whole).steps.append(branch)
            stack.append((branch, results))
        elif stripped.startswith("}"):
            if stack:
                stack.pop()
            if stripped.endswith("{"):
                stack.append((None, ""))
        elif operation == "scf.yield" and stack and stack[-1][0] and stack[-1][0].branch and stack[-1][0].trips == 1:
            for i, name in enumerate(re.findall(r"%[\w$.#-]+", rest.split(" : ")[0])):
                values.known[f"{stack[-1][1]}#{i}"] = values.known[stack[-1][1]] = values.of(name)
                values.sources[f"{stack[-1][1]}#{i}"] = values.source(name)
        elif stripped.endswith("{") and not stripped.startswith(("module", "tt.func")):
            stack.append((None, ""))  # a region of another kind, such as that of a reduction
        elif kind := LOADS.get(operation):
            shapes = _TENSOR.findall(rest)
            if shapes:
                pointer = re.findall(r"%[\w$.#-]+", rest)[0]
                region.steps.append(Access(kind, _bytes(*shapes[-1]), values.source(pointer)))
        elif operation in PRODUCTS:
            region.flops += _product(rest)
            region.scalar |= "parent = #blocked" in rest
    return whole


def _product(rest: str) -> int:
    """2 m n k of a product by the types of its factors."""
    shapes = [tuple(int(n) for n in s.split("x") if n) for s, _ in _TENSOR.findall(rest)]
    (m, k), n = shapes[0][-2:], shapes[1][-1]
    return 2 * m * n * k
