"""What the static model says, as JSON, from a process in which Triton compiles: ``python -m tests.static_check PART``.

The tests themselves run with Triton's interpreter, for which kernels are not compiled.
"""

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.static import align, cases, disassembly, model, table, tiles
from benchmarks.static.capture import pretend
from benchmarks.static.rates import RATES

BLOCK, D, TILES = 128, 64, 40
H200 = RATES["sm_90"]


@triton.jit
def product_and_exponential(x_ptr, y_ptr, out_ptr, TILES, D: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of 2^(x y) over tiles of y: one product and BLOCK x BLOCK exponentials for each."""
    row, d = tl.arange(0, BLOCK), tl.arange(0, D)
    x = tl.load(x_ptr + row[:, None] * D + d[None, :])
    total = tl.zeros([BLOCK], tl.float32)
    for tile in range(TILES):
        y = tl.load(y_ptr + (tile * BLOCK + row)[None, :] * D + d[:, None])
        total += tl.sum(tl.exp2(tl.dot(x, y)), 1)
    tl.store(out_ptr + row, total)


@triton.jit
def copy_tiles(x_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """A program doubles every BLOCK numbers from its own on."""
    at = tl.arange(0, BLOCK)
    for first in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        tl.store(out_ptr + first + at, tl.load(x_ptr + first + at) * 2.0)


def small() -> dict[str, Any]:
    """The small kernels above, whose instructions are known by hand."""
    with pretend("sm_90", H200.processors, H200.shared_limit) as found:
        x, y = (torch.empty(n, D, dtype=torch.bfloat16, device="cuda") for n in (BLOCK, TILES * BLOCK))
        numbers, out = torch.empty(1 << 20, device="cuda"), torch.empty(BLOCK, device="cuda")
        product_and_exponential[(1,)](x, y, out, TILES, D=D, BLOCK=BLOCK, num_warps=8)
        copy_tiles[(264,)](numbers, torch.empty_like(numbers), 1 << 20, BLOCK=1024, num_warps=4)
    product, copy = (launch for launch in found if launch.cubin)
    (function,) = disassembly.parse(disassembly.disassemble(product.cubin)).values()
    whole = tiles.read(product.dialect, product.arguments)
    first, last = (tiles.read(copy.dialect, copy.arguments, (p, 0, 0), (264, 1, 1)) for p in (0, 263))
    return {
        "product": table.of(model.predict(product, H200, 0), H200),
        "copy": table.of(model.predict(copy, H200, 0), H200),
        "trips": list(align.trips(align.match(function, 8, whole)).values()), "flops": whole.inner[0].flops,
        "copy_trips": [loop.trips for loop in (*first.inner, *last.inner)],
        "copy_reads": [list(access) for access, _ in first.accesses()],
    }  # fmt: skip


def goals() -> list[dict[str, Any]]:
    """The launches of the goals; those whose recorded facts are still valid are not compiled again."""
    rows = table.read(table.PATH)
    found = []
    for arch in ("sm_90", "sm_100"):
        known = {r["key"]: r for r in rows if r["key"] and (r["arch"], r["triton"]) == (arch, triton.__version__)}
        rates = RATES[arch]
        for goal in cases.goals():
            if goal.op == "pivotal_mask":
                continue
            launched = cases.captured(goal, arch, rates, known)
            products = sum(launch.name in cases.PRODUCTS for launch in launched)
            for launch in launched:
                name = {
                    "kernel": goal.op, "shape": goal.shape, "dtype": goal.dtype, "arch": arch, "launch": launch.name
                }  # fmt: skip
                if launch.key in known:
                    found.append(known[launch.key] | name | {"most": None})
                elif launch.cubin:
                    row = table.of(model.predict(launch, rates, goal.done_by(launch, products)), rates)
                    before = [table.instructions(r) for r in known.values() if name.items() <= r.items()]
                    found.append(row | name | {"most": max(before, default=None)})
    return found


if __name__ == "__main__":
    json.dump({"small": small, "goals": goals}[sys.argv[1]](), sys.stdout)
