"""Measure tile sizes on this machine's GPU and write them: ``python -m fgfast.kernels.tune [--only TEXT]``.

The cases of every module with ``tune_cases()`` are timed with each of their candidate rows; the fastest row of a case
is written to ``tuned.py`` under the architecture of the device, replacing earlier rows. There is no tuning at run time.
"""

import argparse
import importlib
import pkgutil
import pprint
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fgfast.kernels.configs import Row, architecture, force_row, shared_memory
from fgfast.kernels.tuned import TUNED

HERE = Path(__file__).parent
HEADER = '''"""Rows measured on a device, written by ``python -m fgfast.kernels.tune``: (op, architecture) -> rows."""

TUNED: dict[tuple[str, str], list[tuple[str, dict[str, int], int, int, int, int, int]]] = '''


class TuneCase(NamedTuple):
    """``run()`` is timed with each of ``rows``, on tensors of the size that the row is meant for."""

    op: str
    rows: Sequence[Row]
    run: Callable[[], Any]


def cases() -> Iterator[TuneCase]:
    """The cases of every module."""
    for module in pkgutil.walk_packages([str(HERE)], "fgfast.kernels."):
        if module.name != __name__:
            yield from getattr(importlib.import_module(module.name), "tune_cases", lambda: ())()


def fastest(case: TuneCase) -> tuple[Row, float]:
    """The row with the lowest median time, and that time in ms; rows that exceed the device's resources are skipped."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    times: dict[int, float] = {}
    for i, row in enumerate(case.rows):
        try:
            with force_row(case.op, row):
                times[i] = do_bench(case.run, return_mode="median")
        except OutOfResources:
            continue
    best = min(times, key=lambda i: times[i])
    return case.rows[best], times[best]


def text(tuned: dict[tuple[str, str], list[tuple[Any, ...]]]) -> str:
    """The source of ``tuned.py``.

    Example:
        >>> text({}).splitlines()[-1]
        'TUNED: dict[tuple[str, str], list[tuple[str, dict[str, int], int, int, int, int, int]]] = {}'
    """
    return HEADER + pprint.pformat(tuned, width=110, sort_dicts=True) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fgfast.kernels.tune", description="Measure tile sizes on a GPU.")
    parser.add_argument("--only", default="", metavar="TEXT", help="the operations with this text in their name")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("No GPU was found: run this on a machine with the GPU to tune for.", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    arch = architecture(device)
    found: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
    for case in cases():
        if chosen.only in case.op:
            row, ms = fastest(case)
            row = row._replace(shared=shared_memory(device))  # the case has just run on it
            print(f"{case.op} {arch} {row.kind}: {row} {ms:.3f} ms")
            found.setdefault((case.op, arch), []).append(tuple(row))
    path = HERE / "tuned.py"
    path.write_text(text({**TUNED, **found}))
    print(f"Written to {path}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
