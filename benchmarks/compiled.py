"""Kernel by compiler: ``python -m benchmarks.compiled OLDEST.csv LOCKED.csv NEWEST.csv`` joins reports into one table.

The files are those of ``python -m fgfast.kernels.aot --default-only --csv FILE``, one per version of Triton. A row of
results/compilers.csv has one kernel on one architecture: how many of its cases a compiler was given, the most registers
a thread of one takes, and the most bytes that one spills.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

Row = dict[str, Any]


def join_reports(reports: Sequence[Row]) -> list[Row]:
    """Reports of several compilers as a row a kernel and architecture, three columns a compiler.

    Example:
        >>> report = {"triton": "3.8.0", "kernel": "contrast join", "arch": "sm_90", "registers": 40, "spilled": 0}
        >>> join_reports([report, report | {"registers": 64}])
        [{'kernel': 'contrast join', 'arch': 'sm_90', '3.8.0 cases': 2, '3.8.0 registers': 64, '3.8.0 spilled': 0}]
    """
    grouped: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for report in reports:
        grouped[report["kernel"], report["arch"]][report["triton"]].append(report)
    compilers = sorted({report["triton"] for report in reports})
    made = []
    for (kernel, arch), by_compiler in grouped.items():
        row: Row = {"kernel": kernel, "arch": arch}
        for compiler in compilers:
            its = by_compiler[compiler]
            row[f"{compiler} cases"] = len(its)
            row |= {
                f"{compiler} {name}": max((int(r[name]) for r in its), default=0) for name in ("registers", "spilled")
            }
        made.append(row)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description="Compare compilers by kernel.")
    parser.add_argument("files", nargs="+", type=Path, help="what fgfast.kernels.aot --csv wrote, one per compiler")
    try:
        made = join_reports([report for file in parser.parse_args(arguments).files for report in record.read(file)])
    except OSError as error:
        parser.error(f"{error.filename} cannot be read ({error.strerror}): write it with fgfast.kernels.aot --csv.")
    record.overwrite(made, record.RESULTS / "compilers.csv")
    spilled = sum(int(value) > 0 for row in made for name, value in row.items() if name.endswith("spilled"))
    print(f"{len(made)} rows of kernel and architecture in {record.RESULTS / 'compilers.csv'}; {spilled} with spills")
    return 0


if __name__ == "__main__":
    sys.exit(main())
