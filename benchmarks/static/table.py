"""The table of predictions: a row for each launch of each goal, and one for the whole operation."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from benchmarks.static import cases
from benchmarks.static.capture import Launch
from benchmarks.static.model import Prediction, predict
from benchmarks.static.rates import RATES, Rates

PATH = RESULTS / "static.csv"
WHOLE = "all"  # the row of an operation
TILE = ("tensor", "exp2", "mufu", "float", "multiply", "integer", "select", "convert", "uniform", "shared", "global",
        "async", "local", "shuffle", "barrier", "control")  # fmt: skip
CLOCKS = ("tensor", "exp2", "issue", "float", "integer", "shared", "shuffle", "l2", "memory")
COLUMNS = (
    "kernel", "shape", "dtype", "arch", "triton", "launch", "calls", *(f"n_{name}" for name in TILE), "tile_flops",
    "tile_l2_bytes", "tile_memory_bytes", "registers", "spilled", "shared", "programs",
    *(f"clocks_{name}" for name in CLOCKS), "clocks_tile", "clocks", "binds", "predicted_ms", "predicted_share", "goal",
    "measured_ms", "product", "depth", "key",
)  # fmt: skip
Row = dict[str, Any]


def rows(arch: str, only: str = "") -> Iterator[Row]:
    """Rows of the goals whose operation, shape and dtype contain ``only``: the launches, then the whole."""
    import triton

    rates = RATES[arch]
    for goal in cases.goals():
        if only not in f"{goal.op} {goal.shape} {goal.dtype}":
            continue
        head = {"kernel": goal.op, "shape": goal.shape, "dtype": goal.dtype, "arch": arch, "triton": triton.__version__}
        found = predictions(goal, arch)
        for one, calls in found:
            yield head | of(one, rates) | {"calls": calls}
        clocks = sum(one.clocks * calls for one, calls in found)
        longest, _ = max(found, key=lambda item: item[0].clocks * item[1])
        share = limit(goal, rates) / clocks
        yield head | {
            "launch": WHOLE, "clocks": round(clocks), "binds": f"{longest.name}: {longest.binds}",
            "predicted_ms": f"{clocks / rates.ghz / 1e6:.4g}", "predicted_share": f"{share:.3f}", "goal": goal.goal,
            "measured_ms": "",
        }  # fmt: skip


def predictions(goal: cases.Goal, arch: str) -> list[tuple[Prediction, int]]:
    """The launches of a goal in order, each with the number of launches that are like it."""
    rates = RATES[arch]
    launches = cases.captured(goal, arch, rates)
    products = sum(launch.name in cases.PRODUCTS for launch in launches)
    alike: dict[object, list[Launch]] = {}
    for launch in launches:
        sizes = {name: value for name, value in launch.arguments.items() if isinstance(value, int)}
        kind = (launch.name, launch.key, launch.grid, launch.flops, launch.bytes, repr(sizes))
        alike.setdefault(kind, []).append(launch)
    return [(predict(group[0], rates, goal.done_by(group[0], products)), len(group)) for group in alike.values()]


def limit(goal: cases.Goal, rates: Rates) -> float:
    """Clocks of the limit of a goal."""
    if goal.flops:
        return goal.flops / rates.limit(goal.kind) / rates.processors
    return goal.bytes / rates.memory / rates.processors


def of(one: Prediction, rates: Rates) -> Row:
    """The columns of a launch."""
    tile = one.tile
    return {
        "launch": one.name, **{f"n_{name}": tile.counts.get(name, 0) for name in TILE}, "tile_flops": round(tile.flops),
        "tile_l2_bytes": round(tile.l2_bytes), "tile_memory_bytes": round(tile.memory_bytes),
        "registers": one.registers, "spilled": one.spilled, "shared": one.shared, "programs": one.programs,
        **{f"clocks_{name}": round(tile.units.get(name, 0)) for name in CLOCKS}, "clocks_tile": round(tile.clocks),
        "clocks": round(one.clocks), "binds": one.binds, "predicted_ms": f"{one.clocks / rates.ghz / 1e6:.4g}",
        "product": one.product, "depth": one.depth, "key": one.key,
    }  # fmt: skip


def instructions(row: Row) -> int:
    """Instructions of a tile."""
    return sum(int(row[f"n_{name}"]) for name in TILE)


def text(row: Row) -> str:
    """A row for a reader."""
    if row["launch"] == WHOLE:
        return (
            f"{row['kernel']:<20} {row['shape']:<40} {row['dtype']:<5} {row['arch']:<7} predicted "
            f"{float(row['predicted_ms']):8.3f} ms, {float(row['predicted_share']):5.1%} of the limit, goal "
            f"{float(row['goal']):.0%}; {row['binds']}"
        )
    if not row["key"] and not row["registers"]:
        return f"  {row['calls']} x {row['launch']}: {row['clocks']:,} clocks, {row['binds']}"
    counts = ", ".join(f"{name} {row[f'n_{name}']}" for name in TILE if row[f"n_{name}"])
    clocks = ", ".join(f"{name} {row[f'clocks_{name}']:,}" for name in CLOCKS if row[f"clocks_{name}"])
    return (
        f"  {row['calls']} x {row['launch']}: {row['clocks']:,} clocks, {row['binds']}; {row['registers']} registers, "
        f"{row['spilled']} spilled, {row['shared']:,} shared, {row['programs']} programs a processor\n"
        f"    a tile: {row['clocks_tile']:,} clocks alone ({clocks}); {counts}; L2 {row['tile_l2_bytes']:,} B, memory "
        f"{row['tile_memory_bytes']:,} B"
    )


def write(found: Sequence[Row], path: Path) -> None:
    """Replace the rows of the same architecture and Triton in a file, and keep the others."""
    new = {(row["kernel"], row["shape"], row["dtype"], row["arch"], row["triton"]) for row in found}
    kept = [row for row in read(path) if tuple(row[c] for c in COLUMNS[:5]) not in new]
    _store([*kept, *found], path)


def read(path: Path) -> list[Row]:
    """The rows of a file, none if there is none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def measure(
    goals: Iterable[cases.Goal], time: Callable[[Callable[[], object]], float]
) -> dict[tuple[str, str, str], float]:
    """Milliseconds of each goal on a GPU by operation, shape and dtype; ``time`` times a call."""
    return {(goal.op, goal.shape, goal.dtype): time(goal.prepare()) for goal in goals}


def fill(path: Path, arch: str, triton: str, times: dict[tuple[str, str, str], float]) -> None:
    """Write measured times into the rows of the operations."""
    found = read(path)
    for row in found:
        ms = times.get((row["kernel"], row["shape"], row["dtype"]))
        if ms is not None and (row["launch"], row["arch"], row["triton"]) == (WHOLE, arch, triton):
            row["measured_ms"] = f"{ms:.4g}"
    _store(found, path)


def _store(found: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(found)
