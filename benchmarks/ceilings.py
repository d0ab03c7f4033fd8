"""The two ceilings of a device, measured: bytes copied per second, operations of a matrix product per second."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.timing import Clock, Measurement
from fgfast.tensors import exact

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


class Ceilings(NamedTuple):
    """Bytes per second of a copy (read plus written) and operations per second of a product, by name of the dtype."""

    bandwidth: float
    rates: dict[str, float]

    def limit_ms(self, moved: int, operations: int, dtype: str) -> float:
        """The least time: the longer of the two floors.

        Example:
            >>> Ceilings(1e9, {"bf16": 1e12}).limit_ms(10**9, 10**9, "bf16")
            1000.0
        """
        return max(moved / self.bandwidth, operations / self.rates[dtype]) * 1e3


def median_ms(runs: Sequence[Callable[[], object]], clock: Clock, rounds: int) -> float:
    """The median time of the runs, taken in turns, after two more."""
    marks = []
    for i in range(rounds + 2):
        start = clock.mark()
        runs[i % len(runs)]()
        marks.append((start, clock.mark()))
    clock.wait()
    times = sorted(clock.ms(a, b) for a, b in marks[2:])  # the first two load libraries
    return max(times[len(times) // 2], 1e-6)


def bandwidth(device: torch.device, clock: Clock, sizes: tuple[int, ...], rounds: int) -> float:
    """Bytes per second of the best copy of random numbers between two buffers, over tensor sizes in bytes."""
    best = 0.0
    for size in sizes:
        pairs = [(torch.rand(size // 4, device=device), torch.empty(size // 4, device=device)) for _ in range(2)]
        best = max(best, 2 * size / median_ms([partial(y.copy_, x) for x, y in pairs], clock, rounds) * 1e3)
    return best


def rate(device: torch.device, clock: Clock, dtype: str, sizes: tuple[int, ...], rounds: int) -> float:
    """Operations per second of the best product of two random square matrices, over matrix sizes."""
    best = 0.0
    for n in sizes:
        a, b = (torch.randn(n, n, device=device).to(DTYPES[dtype]) for _ in range(2))
        out = torch.empty_like(a)
        with exact(device, "tf32" if dtype == "tf32" else "ieee"):
            ms = median_ms([partial(torch.mm, a, b, out=out)], clock, rounds)
        best = max(best, 2 * n**3 / ms * 1e3)
    return best


def measure(device: torch.device, clock: Clock, small: bool = False) -> Ceilings:
    """Both ceilings of the device; ``small`` takes sizes for tests, whose values mean nothing."""
    copies, sides = ((1 << 20,), (64,)) if small else ((1 << 30, 4 << 30), (4096, 8192, 16384))
    rounds = 3 if small else 20
    return Ceilings(
        bandwidth(device, clock, copies, rounds), {d: rate(device, clock, d, sides, rounds) for d in DTYPES}
    )


def rows(found: Ceilings) -> list[tuple[str, str, float]]:
    """(variant, dtype, per second) of each ceiling, for the record."""
    return [("copy", "", found.bandwidth), *(("matrix product", dtype, r) for dtype, r in found.rates.items())]


def fraction_of_limit(result: Measurement, found: Ceilings) -> float | None:
    """Least time over the median; None without a time or without a limit."""
    case = result.case
    if not result.times or not case.bytes or case.host:
        return None
    return found.limit_ms(case.bytes, case.operations, case.dtype) / max(result.quantile(0.5), 1e-9)
