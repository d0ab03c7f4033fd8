"""The loops of one kernel for a reader: instructions by unit, and the order of issues and waits."""

import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.static import units
from benchmarks.static.disassembly import Function, Loop, Missing, disassemble, parse, tool


def of_case(case: str, arch: str) -> tuple[bytes, int]:
    """The machine code and warps of an ahead-of-time case, whose name or a part of it is given.

    Raises:
        Missing: no case or several have such a name.
    """
    from fgfast.kernels import aot

    names = {name: module for module in aot.modules() for name in aot.cases(module)}
    matching = [case] if case in names else [name for name in names if case in name]
    if len(matching) != 1:
        raise Missing(f"{len(matching)} cases have {case!r} in their name: give the name of one, as aot prints it.")
    compiled = aot.compiled_case((names[matching[0]], matching[0], arch))
    return compiled.asm["cubin"], compiled.metadata.num_warps


def show(cubin: bytes, warps: int, sass: bool = False) -> None:
    """Print the loops of every function; ``sass``: the machine code too."""
    text = disassemble(cubin)
    if sass:
        print(text)
    print(_resources(cubin))
    for function in parse(text).values():
        print(f"== {function.name}")
        for loop in (*function.loops, None):
            print("\n".join(_lines(function, loop, warps)))


def _resources(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        program = tool().with_name("cuobjdump")
        text = subprocess.run([program, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return "; ".join(line.strip() for line in text.splitlines() if "REG:" in line)


def _lines(function: Function, loop: Loop | None, warps: int) -> list[str]:
    """A loop's own instructions, or those outside of loops."""
    code = function.own(loop)
    name = "outside of loops"
    if loop is not None:
        last = max(function.blocks[block][-1].address for block in loop.blocks)
        name = f"loop {function.blocks[loop.header][0].address:#x}-{last:#x}, depth {loop.depth}"
    counts = units.count(code)
    flops = sum(units.flops(i, warps) for i in code if units.unit(i) == "tensor")
    lines = [
        f"{name}: {len(code)} instructions, {len(code) * warps / 4:,.0f} clocks of issue, {flops:,} flops",
        "  " + ", ".join(f"{unit} {counts[unit]}" for unit in units.UNITS if counts[unit]),
    ]
    for kind in ("global", "async", "shared", "local"):
        sizes = Counter(f"{i.name} {8 * units.width(i)}" for i in code if units.unit(i) == kind)
        if sizes:
            lines.append(f"  {kind}: " + ", ".join(f"{n} x {text}" for text, n in sizes.items()))
    if loop is not None:
        lines.append("  " + " | ".join(event + f" x{n}" * (n > 1) for event, n in units.skeleton(code)))
    return lines
