"""The mask sampler's kernel, which nvcc compiles: its machine code, and how often its loops run at the goal's shape.

There is no dialect above the machine code to read trips from. Its loops are told apart by what they contain: those that
read attention (two-byte loads), the selection (barriers and atomics in shared memory, four passes), and those of other
strategies (sums in float64) and of images, which do not run here.
"""

import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.static.capture import Launch
from benchmarks.static.disassembly import Function, Instruction, Loop, Missing
from benchmarks.static.machine import Moved, Piece
from benchmarks.static.units import width

SOURCES = Path(__file__).parents[2] / "csrc"
KERNEL = "pivotal_kernelILi2E"  # for bfloat16
PASSES = 4  # of the radix selection


def cubin(arch: str) -> bytes:
    """The machine code, compiled as setup.py does, kept by a hash of the sources and the compiler.

    Raises:
        Missing: there is no nvcc, or it does not know the architecture.
    """
    from fgfast.kernels.aot import _cache_folder

    compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if compiler is None:
        raise Missing("There is no nvcc: put it on the PATH, or leave out pivotal_mask with --only.")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    texts = [file.read_bytes() for file in sorted(SOURCES.iterdir())]
    key = hashlib.sha256(b"".join([arch.encode(), version, *texts])).hexdigest()
    kept = _cache_folder() / f"pivotal.{key[:32]}.cubin"
    if kept.exists():
        return kept.read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "pivotal.cubin")
        made = subprocess.run(
            [
                compiler, "-std=c++17", "-O3", "--fmad=false", "-DFGFAST_CUDA", f"-arch={arch}", "-cubin",
                str(SOURCES / "pivotal_cuda.cu"), "-o", str(out),
            ],
            capture_output=True, text=True,
        )  # fmt: skip
        if made.returncode:
            raise Missing(f"nvcc does not compile for {arch}: {made.stderr.strip().splitlines()[-1]}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(out.read_bytes())
    return kept.read_bytes()


def launch(arch: str, batch: int, layers: int, heads: int, patches: int) -> Launch:
    """The launch for bfloat16 attention [layers, batch, heads, patches] without images."""
    text = (SOURCES / "pivotal_cuda.cu").read_text()
    threads = int(re.findall(r"kThreads = (\d+)", text)[0])
    known = {"batch": batch, "layers": layers, "heads": heads, "patches": patches, "threads": threads}
    return Launch(KERNEL, batch, threads // 32, 5 * patches, known, cubin(arch), grid=(batch,))


class Loops(NamedTuple):
    """How often each loop runs, by its header, and the blocks that do not run."""

    trips: dict[int, int]
    skipped: set[int]
    moved: dict[int, Moved]


def loops(function: Function, layers: int, heads: int, patches: int, threads: int) -> Loops:
    """The loops of the sampler, from what they contain."""
    tops = [x for x in function.loops if x.depth == 1]
    bodies = {x.header: [i for block in x.blocks for i in function.blocks[block]] for x in function.loops}
    reading = [x for x in tops if _reads(bodies[x.header]) and not any(i.name == "STG" for i in bodies[x.header])]
    wide = max(reading, key=lambda x: max(width(i) for i in _reads(bodies[x.header])))
    run = max(width(i) for i in _reads(bodies[wide.header])) // 2  # patches of a load
    turns = -(-patches // threads)
    others = [x for x in tops if x not in reading and x.header > wide.header and not _leaves_out(bodies[x.header])]
    selection = [x for x in others if any(i.name == "BAR" for i in bodies[x.header])]
    before = [x for x in others if x.header < min(y.header for y in selection) and x not in selection]
    trips = dict.fromkeys((x.header for x in function.loops), 0)
    for top in [*selection, *sorted(before, key=lambda x: -len(bodies[x.header]))[:1]]:
        passes = PASSES if any(i.name == "ATOMS" for i in bodies[top.header]) else turns
        trips |= {x.header: passes if x is top else 1 for x in function.loops if x.blocks <= top.blocks}
    skipped = _read(function, wide, trips, layers, heads, patches, run, threads)
    last = max(x.header for x in selection)
    ends = [b for b, code in enumerate(function.blocks) if b > last and code[-1].name == "EXIT"]
    skipped |= set(range(min(ends) + 1, len(function.blocks)))
    return Loops(trips, skipped, _moved(function, patches * 2 if run == 1 else 2 * run * threads))


def _read(
    function: Function, top: Loop, trips: dict[int, int], layers: int, heads: int, patches: int, run: int, threads: int
) -> set[int]:  # fmt: skip
    """Set the trips of the loops that read attention; the blocks that do not run in them."""
    nest = [x for x in function.loops if x.blocks <= top.blocks]
    inner = [x for x in nest if not any(y.blocks < x.blocks for y in nest)]
    left = heads
    for loop in sorted(inner, key=lambda x: -len(_reads(function.own(x)))):
        size = len(_reads(function.own(loop)))
        trips[loop.header] = left // size if size else 1
        left %= max(1, size)
    turns = -(-patches * layers // run // threads) if run > 1 else layers * -(-patches // threads)
    for loop in (x for x in nest if x not in inner):
        trips[loop.header] = turns if (loop is top) == (run > 1) else 1
    if left:
        return set()
    rest = top.blocks - frozenset[int]().union(*(x.blocks for x in inner))
    return {block for block in rest if _reads(list(function.blocks[block]))}


def _reads(code: Sequence[Instruction]) -> list[Instruction]:
    return [i for i in code if i.name == "LDG"]


def _leaves_out(code: Sequence[Instruction]) -> bool:
    """Whether a loop belongs to another strategy (sums in float64) or to images (loads and stores)."""
    names = {i.name for i in code}
    return bool(names & {"DADD", "DSETP", "DFMA"}) or {"LDG", "STG"} <= names


def _moved(function: Function, size: float) -> dict[int, Moved]:
    """Every read of attention comes from memory; the results are small."""
    made = {}
    for loop in (None, *function.loops):
        code = function.own(loop)
        stores = [Piece(64.0) for i in code if i.name == "STG"]
        made[-1 if loop is None else loop.header] = Moved(
            {"load": [Piece(size, 1.0)] * len(_reads(code)), "store": stores}
        )
    return made


__all__ = ["cubin", "launch", "loops"]
