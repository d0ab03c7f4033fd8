"""Measure everything: ``python -m benchmarks.run [--record] [--quick] [--only OP] [--tiny]``.

On a GPU: both ceilings, then each case of each operation against eager PyTorch, torch.compile and the installed peers,
with the table of ``pytest benchmarks --benchmark-only``. Every answer is judged before it is timed. ``--record``
appends to results/results.csv, redraws the plots and writes the times of the goals' operations into static.csv. Without
a GPU: traffic over the fewest bytes from the interpreter; ``--record`` writes results/traffic.csv. The exit status is 1
when fgfast gave a wrong answer or failed.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from benchmarks import ceilings, record, table, traffic
from benchmarks.cases import OPERATIONS, planned
from benchmarks.timing import Case, Clock, CudaClock, faults, measure


def measure_cases(
    cases: Iterable[Case],
    device: torch.device,
    clock: Clock,
    found: ceilings.Ceilings,
    *,
    keep: Callable[[list[record.Row]], None] = lambda rows: None,
    budget_ms: float = 2000.0,
    without: Sequence[str] = (),
) -> list[str]:
    """Measure the cases, pass the rows of each to ``keep`` at once, and print the table.

    Returns:
        The faults of fgfast, one sentence each.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    found_faults: list[str] = []
    lines: list[table.Row] = []
    for case in cases:
        try:
            results = measure(case, clock, budget_ms=budget_ms, cache=cache, without=without)
        except torch.OutOfMemoryError:
            print(f"{case.name}: inputs or reference are out of memory", flush=True)
            continue
        if not results:
            continue
        lines.append(table.row(results, found))
        print(lines[-1].summary(), flush=True)
        keep([record.of_result(r, found) for r in results])
        found_faults += faults(results)
    print(table.as_text(lines, width=200, colour=sys.stdout.isatty()))
    return found_faults


def on_device(device: torch.device, clock: Clock, chosen: argparse.Namespace) -> int:
    """Measure ceilings, then all cases; return 1 when fgfast was wrong."""
    found = ceilings.measure(device, clock, small=chosen.tiny)
    here = record.setting(device)
    print(f"{here['device']}, driver {here['driver'] or 'none'}, {here['versions']}, commit {here['commit']}")
    rates = ", ".join(f"{dtype} {rate / 1e12:.3g} Top/s" for dtype, rate in found.rates.items())
    print(f"copy {found.bandwidth / 1e12:.3g} TB/s; products {rates}")
    cases = planned(device, chosen.only, chosen.quick, chosen.tiny)
    budget = 10.0 if chosen.tiny else 500.0 if chosen.quick else 2000.0
    path = chosen.results / "results.csv"

    def keep(rows: list[record.Row]) -> None:
        if chosen.record:
            record.append(rows, here, path)

    keep(record.of_ceilings(found))
    wrong = measure_cases(cases, device, clock, found, keep=keep, budget_ms=budget, without=chosen.without)
    if chosen.record:
        from benchmarks import plots

        drawn = plots.draw(record.read(path), here["device"], chosen.results)
        print("Recorded in", path, *drawn)
        if device.type == "cuda" and not chosen.only:
            beside_predicted(device, clock, chosen.results / "static.csv")
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


def beside_predicted(device: torch.device, clock: Clock, path: Path) -> None:
    """Write the times of the goals' operations beside the predicted ones, where this device's are predicted."""
    from benchmarks.static import cases, rates
    from benchmarks.static import table as predicted

    name = torch.cuda.get_device_name(device)
    for arch, known in rates.RATES.items():
        if known.device in name and path.exists():
            times = predicted.measure(cases.goals(), lambda call: ceilings.median_ms([call], clock, 20))
            predicted.fill(path, arch, importlib.metadata.version("triton"), times)
            print("Measured beside predicted in", path)


def without_device(chosen: argparse.Namespace) -> int:
    """Count traffic, for the record; the tests check the goals of the kernels."""
    print("No GPU was found: no time, rate, bandwidth or peak memory of a device is measured here, and no plot drawn.")
    counts = traffic.rows(chosen.only, chosen.quick)
    form = "{:<43} {:<37} {:<6} {:>8} {:>6} {:>6}"
    print(form.format("traffic / fewest", "", "", "launches", "ratio", "goal"))
    for row in counts:
        over = "  over the goal" if row["goal"] and row["ratio"] > row["goal"] else ""
        print(form.format(*(row[c] for c in ("op", "shape", "dtype", "launches", "ratio", "goal"))) + over)
    print("What the compiler makes of the kernels: python -m fgfast.kernels.aot")
    if chosen.record and counts and not chosen.only:
        setting = {"versions": record.versions(), "commit": record.commit()}
        record.overwrite([{**setting, **row} for row in counts], chosen.results / "traffic.csv")
        print("Recorded in", chosen.results / "traffic.csv")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Measure fgfast and its peers.")
    parser.add_argument("--record", action="store_true", help="append the results and redraw the plots")
    parser.add_argument("--quick", action="store_true", help="the cases that a goal belongs to, fewer rounds")
    parser.add_argument("--only", default="", choices=("", *OPERATIONS), metavar="OP", help=", ".join(OPERATIONS))
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="leave out variants by part of name")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: whether all this works")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="FOLDER", help="folder of the records")
    chosen = parser.parse_args(arguments)
    if torch.cuda.is_available():
        return on_device(torch.device("cuda", torch.cuda.current_device()), CudaClock(), chosen)
    if chosen.tiny:
        return on_device(torch.device("cpu"), Clock(), chosen)
    return without_device(chosen)


if __name__ == "__main__":
    sys.exit(main())
