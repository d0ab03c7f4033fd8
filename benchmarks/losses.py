"""Loss modules at small and middle sizes on one CPU thread: ``python -m benchmarks.losses [NAME ...]``.

Prints how many times as fast as the plain formula, lightly and pytorch-metric-learning ours is, forward and backward;
above 1 ours is faster. All run in turns, and processor time is counted, so that a busy machine disturbs all alike; the
first number compares medians, the second the fastest runs.
"""

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.cases.contrast import small_losses
from benchmarks.timing import Clock, faults, measure

PEERS = ("eager", "lightly", "pytorch-metric-learning")


class ProcessClock(Clock):
    """The processor time of this process."""

    def mark(self) -> float:
        return time.process_time()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.losses", description="Measure small losses on a CPU.")
    parser.add_argument("names", nargs="*", default=[""], metavar="NAME", help="part of the name of a case, as ntxent")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"{'':<22}{'ms':>9}" + "".join(f"{peer:>25}" for peer in PEERS))
    wrong: list[str] = []
    for case in small_losses(torch.device("cpu")):
        if not any(name in case.shape for name in chosen.names):
            continue
        own, *others = measure(case, ProcessClock(), budget_ms=1e3 * chosen.seconds)
        wrong += faults([own, *others])
        found = {r.variant: r for r in others if r.times}
        cells = [
            f"{found[peer].quantile(0.5) / own.quantile(0.5):.2f} {found[peer].times[0] / own.times[0]:.2f}"
            if peer in found and own.times else "" for peer in PEERS
        ]  # fmt: skip
        median = f"{own.quantile(0.5):.3f}" if own.times else own.skipped
        print(f"{case.shape:<22}{median:>9}" + "".join(f"{cell:>25}" for cell in cells), flush=True)
    print(*wrong, sep="\n", end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
