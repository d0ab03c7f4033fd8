"""Predict the kernels at the shapes of the goals from their machine code, without a GPU.

``python -m benchmarks.static [--arch sm_90 ...] [--only TEXT] [--csv [FILE]]`` compiles what each operation launches,
disassembles it, and prints instructions of a tile, bytes, clocks by unit, what binds, the predicted share of the limit.
``--csv`` writes results/static.csv (or FILE; rows of other architectures and versions of Triton are kept) and draws
static.svg beside it. ``--case NAME`` and ``--cubin FILE`` show the loops of one kernel instead.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.static import table, view
from benchmarks.static.capture import check_arch
from benchmarks.static.disassembly import Missing, tool


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["sm_90"], metavar="ARCH", help="architectures (sm_90)")
    parser.add_argument("--only", default="", metavar="TEXT", help="goals with this text in operation, shape and dtype")
    parser.add_argument("--csv", nargs="?", type=Path, const=table.PATH, metavar="FILE", help="write rows and a plot")
    parser.add_argument("--case", metavar="NAME", help="show the loops of one ahead-of-time case")
    parser.add_argument("--cubin", type=Path, metavar="FILE", help="show the loops of a file of machine code")
    parser.add_argument("--warps", type=int, default=8, help="warps of a program, for --cubin (8)")
    parser.add_argument("--sass", action="store_true", help="with --case or --cubin: print the machine code too")
    chosen = parser.parse_args(arguments)
    try:
        tool()
        for arch in chosen.arch:
            check_arch(arch)
        if chosen.case or chosen.cubin:
            if chosen.case:
                view.show(*view.of_case(chosen.case, chosen.arch[0]), chosen.sass)
            else:
                view.show(chosen.cubin.read_bytes(), chosen.warps, chosen.sass)
            return 0
        found = []
        for arch in chosen.arch:
            for row in table.rows(arch, chosen.only):
                print(table.text(row), flush=True)
                found.append(row)
    except (Missing, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if not found:
        print(f"No goal has {chosen.only!r} in operation, shape and dtype.", file=sys.stderr)
        return 2
    if chosen.csv:
        table.write(found, chosen.csv)
        drawn: list[Path] = []
        if importlib.util.find_spec("matplotlib"):
            from benchmarks.static import plot

            drawn = [plot.draw(table.read(chosen.csv), chosen.csv)]
        print("Recorded in", chosen.csv, *drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
