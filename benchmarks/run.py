"""Measure everything: ``python -m benchmarks.run [--record] [--quick] [--only OP] [--tiny]``.

On a GPU: both ceilings, then each case of each operation against eager PyTorch, torch.compile and the peers that are
installed. Every answer is judged before it is timed. ``--record`` appends to results/results.csv and draws the plots
again. Without a GPU: traffic over the fewest bytes from the interpreter; ``--record`` writes results/traffic.csv. The
exit status is 1 when fgfast gave a wrong answer or failed.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from benchmarks import ceilings, record, traffic
from benchmarks.cases import OPERATIONS, planned
from benchmarks.timing import Case, Clock, CudaClock, Measured, WallClock, measure

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
WIDTHS = (30, 9, 17, 9, 7, 8)


def per_second(value: float, unit: str) -> str:
    """A rate for people.

    Example:
        >>> per_second(4.21e12, "B")
        '4.21 TB/s'
    """
    scale, letter = next(((s, u) for s, u in UNITS if value >= s), (1.0, ""))
    return f"{value / scale:.3g} {letter}{unit}/s"


def _line(*cells: str) -> str:
    name, *rest = cells
    return f"  {name:<{WIDTHS[0]}}" + "".join(f" {cell:>{w}}" for cell, w in zip(rest, WIDTHS[1:], strict=False))


def as_text(results: Sequence[Measured], found: ceilings.Ceilings) -> str:
    """The results of one case as a table: a line a variant, and under it what else there is to say."""
    case = results[0].case
    limit = found.limit_ms(case.bytes, case.operations, case.dtype)
    lines = [
        f"{case.op}  {case.shape}  {case.dtype}: {case.bytes / 2**20:.3g} MiB, {case.operations / 1e9:.3g} Gop, "
        f"at best {limit:.4g} ms"
    ]
    ours = results[0].quantile(0.5) if results[0].times else None
    for r in results:
        if not r.times:
            lines.append(_line(r.variant, "-") + f"  {r.skipped}")
            continue
        low, middle, high = (r.quantile(q) for q in (0.2, 0.5, 0.8))
        share = ceilings.share(r, found) or 0.0
        peak = "" if r.peak is None else f"{r.peak / 2**20:.0f} MiB"
        ratio = "" if ours is None else f"{middle / ours:.2f}x"
        cells = (f"{middle:.4g}", f"({low:.4g}-{high:.4g})", peak, f"{100 * share:.1f}%", ratio)
        lines.append(_line(r.variant, *cells) + f"  error {r.error:.1e}" + (f"; {r.note}" if r.note else ""))
    return "\n".join(lines)


def measured(
    cases: Iterable[Case],
    device: torch.device,
    clock: Clock,
    found: ceilings.Ceilings,
    *,
    keep: Callable[[list[record.Row]], None] = lambda rows: None,
    budget_ms: float = 2000.0,
    without: Sequence[str] = (),
) -> list[str]:
    """Measure the cases, print a table of each and hand its rows to ``keep`` at once.

    Returns:
        what fgfast got wrong, a sentence each.
    """
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    faults: list[str] = []
    print(_line("", "ms", "20%-80%", "peak", "limit", "to ours"))
    for case in cases:
        try:
            results = measure(case, clock, budget_ms=budget_ms, cache=cache, without=without)
        except torch.OutOfMemoryError:
            print(f"{case.op}  {case.shape}  {case.dtype}: inputs or reference are out of memory", flush=True)
            continue
        if not results:
            continue
        print(as_text(results, found), flush=True)
        keep([record.of_result(r, found) for r in results])
        faults += [
            f"{r.variant} {case.op} {case.shape} {case.dtype}: {r.skipped}"
            for r in results
            if r.variant.startswith("fgfast") and r.skipped
        ]
    return faults


def on_device(device: torch.device, clock: Clock, chosen: argparse.Namespace) -> int:
    """Ceilings, then all cases; 1 when fgfast was wrong."""
    found = ceilings.measured(device, clock, small=chosen.tiny)
    here = record.setting(device)
    print(f"{here['device']}, driver {here['driver'] or 'none'}, {here['versions']}, commit {here['commit']}")
    print(f"copy {per_second(found.bandwidth, 'B')}; products", end=" ")
    print(", ".join(f"{dtype} {per_second(rate, 'op')}" for dtype, rate in found.rates.items()))
    cases = planned(device, chosen.only, chosen.quick, chosen.tiny)
    budget = 10.0 if chosen.tiny else 500.0 if chosen.quick else 2000.0
    path = chosen.results / "results.csv"

    def keep(rows: list[record.Row]) -> None:
        if chosen.record:
            record.append(rows, here, path)

    keep(record.of_ceilings(found))
    faults = measured(cases, device, clock, found, keep=keep, budget_ms=budget, without=chosen.without)
    if chosen.record:
        from benchmarks import plots

        drawn = plots.draw(record.read(path), here["device"], chosen.results)
        print("Recorded in", path, *drawn)
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return 1 if faults else 0


def without_device(chosen: argparse.Namespace) -> int:
    """Traffic, for the record: the tests hold the kernels to their goals."""
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
    parser.add_argument("--record", action="store_true", help="keep the results and draw the plots again")
    parser.add_argument("--quick", action="store_true", help="the cases that a goal belongs to, fewer rounds")
    parser.add_argument("--only", default="", choices=("", *OPERATIONS), metavar="OP", help=", ".join(OPERATIONS))
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="leave out variants by part of name")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: whether all this works")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="FOLDER", help="where records are kept")
    chosen = parser.parse_args(arguments)
    if torch.cuda.is_available():
        return on_device(torch.device("cuda", torch.cuda.current_device()), CudaClock(), chosen)
    if chosen.tiny:
        return on_device(torch.device("cpu"), WallClock(), chosen)
    return without_device(chosen)


if __name__ == "__main__":
    sys.exit(main())
