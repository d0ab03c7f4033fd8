"""Measure what a run survives: ``python -m benchmarks.endurance [PART ...] [--quick] [--minutes N] [--record]``.

Exit status 1 if a fault was found. Without --minutes every part takes its own time, about 45 minutes in all on 2 cores.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.endurance import report

PARTS = ("kills", "flips", "images", "fuzz", "soak")
RANKS = [1, 2, 4]
KILLING = 25.0  # minutes of the kills


def measure(name: str, folder: Path, chosen: argparse.Namespace) -> report.Part:
    """Run a part in a folder of its own."""
    folder.mkdir(parents=True)
    if name == "kills":
        from benchmarks.endurance import kills

        minutes = chosen.minutes or (1.5 if chosen.quick else KILLING)
        return kills.measure(
            folder, minutes=minutes, quick=chosen.quick, seed=chosen.seed, only=chosen.only, ranks=chosen.ranks
        )
    if name == "flips":
        from benchmarks.endurance import flips

        return flips.measure(folder, quick=chosen.quick, seed=chosen.seed)
    if name == "images":
        from benchmarks.endurance import images

        return images.measure(folder, quick=chosen.quick)
    if name == "fuzz":
        from benchmarks.endurance import fuzz

        inputs = chosen.inputs or (200 if chosen.quick else 10_000)
        return fuzz.measure(folder, inputs=inputs, seed=chosen.seed, only=chosen.only, first=chosen.first)
    from benchmarks.endurance import soak

    return soak.measure(folder, steps=400 if chosen.quick else 2000)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.endurance", description="Measure what a run survives.")
    parser.add_argument("parts", nargs="*", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="few cases of each part: ten minutes in all")
    parser.add_argument("--minutes", type=float, default=0.0, help="minutes of the kills; each case is killed once")
    parser.add_argument("--record", action="store_true", help="write the tables to RESULTS.md")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments, flips and damages")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="methods (kills), readers (fuzz)")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS, metavar="N", help="numbers of ranks (kills)")
    parser.add_argument("--inputs", type=int, default=0, metavar="N", help="inputs of each reader (fuzz)")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first input (fuzz)")
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    chosen = parser.parse_args(arguments)
    os.environ |= {"OMP_NUM_THREADS": "1"}  # of the processes that are started: on the cores they share
    folder = chosen.keep or Path(tempfile.mkdtemp(prefix="endurance"))
    os.environ["FGFAST_CACHE"] = str(folder / "cache")
    faults: list[str] = []
    try:
        for name in chosen.parts or PARTS:
            began = time.monotonic()
            part = measure(name, folder / name, chosen)
            seconds = time.monotonic() - began
            text = report.block(part, " ".join(["python -m benchmarks.endurance", name, *_flags(chosen)]), seconds)
            print(f"\n{text}\n", flush=True)
            for fault in part.faults:
                print(f"{name}: {fault}", file=sys.stderr, flush=True)
            if chosen.record:
                report.write(name, text)
            faults += part.faults
    finally:
        if not chosen.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return 1 if faults else 0


def _flags(chosen: argparse.Namespace) -> list[str]:
    flags = ["--quick"] * chosen.quick + [f"--minutes {chosen.minutes:g}"] * bool(chosen.minutes)
    flags += [f"--only {' '.join(chosen.only)}"] * bool(chosen.only)
    flags += [f"--ranks {' '.join(map(str, chosen.ranks))}"] * (chosen.ranks != RANKS)
    flags += [f"--inputs {chosen.inputs}"] * bool(chosen.inputs)
    return flags + [f"--seed {chosen.seed}"] * bool(chosen.seed)


if __name__ == "__main__":
    sys.exit(main())
