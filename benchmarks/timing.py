"""The timing core: clocks, one gate in front of every speed, variants in turns over rotated input sets.

A clock marks points and reads the time between two of them: events on a GPU, ``perf_counter`` on a CPU. So everything
else here runs on both.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

Inputs = Any  # what one input set of a case is; only the case looks inside
Answer = Sequence[Tensor]
Run = Callable[[Inputs], Answer]


class Unavailable(Exception):
    """Why a variant cannot run here, as half a sentence."""


class Clock(Protocol):
    """Marks points in the work of a device."""

    def mark(self) -> Any:
        """A point after all work given to the device so far."""

    def ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks, after ``wait``."""

    def wait(self) -> None:
        """Return when the device has done all its work."""

    def peak(self, run: Callable[[], object]) -> int | None:
        """Bytes of device memory that a run adds at its peak; None where that is not known."""

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        """The run as a recording that is cheap to start again, where the device has such a thing."""


class WallClock:
    """The clock of a CPU."""

    def mark(self) -> float:
        return time.perf_counter()

    def ms(self, start: float, end: float) -> float:
        return (end - start) * 1e3

    def wait(self) -> None:
        pass

    def peak(self, run: Callable[[], object]) -> int | None:
        run()
        return None

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        return run


class CudaClock:
    """The clock of a GPU: events in the current stream, the peak of PyTorch's allocator, CUDA graphs."""

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))

    def wait(self) -> None:
        torch.cuda.synchronize()

    def peak(self, run: Callable[[], object]) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before

    def captured(self, run: Callable[[], object]) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


@dataclass(frozen=True)
class Variant:
    """One way to compute a case: ``make`` imports what it needs and returns the run, or raises Unavailable.

    ``slack`` multiplies the tolerance of the case: for peers that state less than the case asks.
    """

    name: str
    make: Callable[[], Run]
    slack: float = 1.0


@dataclass(frozen=True)
class Judged:
    """How far an answer is from the reference, and what else there is to say about it."""

    error: float
    note: str = ""


Judge = Callable[[Answer], Judged]


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    ``judge(inputs)`` computes the reference and returns the function that judges an answer; ``bytes`` and
    ``operations`` are the two floors: every input read once and every output written once, and the products that run.
    """

    op: str
    shape: str
    dtype: str  # "fp32", "tf32", "fp16" or "bf16": which matrix rate limits it
    make: Callable[[int], Inputs]
    variants: Sequence[Variant]
    judge: Callable[[Inputs], Judge]
    tolerance: float
    bytes: int
    operations: int
    input_bytes: int
    graph: bool = False  # time the replay of a CUDA graph: for many small launches
    quick: bool = False  # part of a short run


@dataclass
class Measured:
    """What is known about one variant of a case; ``skipped`` says why there is no time."""

    case: Case
    variant: str
    times: list[float] = field(default_factory=list)  # ms, ascending
    error: float | None = None
    note: str = ""
    peak: int | None = None
    skipped: str = ""

    def quantile(self, q: float) -> float:
        """The time that the share q of the runs stays under.

        Example:
            >>> Measured(None, "ours", [1.0, 2.0, 3.0]).quantile(0.5)
            2.0
        """
        return self.times[round(q * (len(self.times) - 1))]


def _error(answer: Tensor, expected: Tensor) -> float:
    difference, size = (answer.double() - expected.double()).norm(), expected.double().norm()
    return float(difference / size.clamp_min(1e-300))


def distance(answer: Answer, expected: Answer) -> float:
    """The largest |answer - expected| / |expected| of the tensors; infinite for NaN or a wrong shape.

    Example:
        >>> distance([torch.ones(4)], [torch.ones(4)]), distance([torch.ones(3)], [torch.ones(4)])
        (0.0, inf)
    """
    if len(answer) != len(expected) or any(a.shape != e.shape for a, e in zip(answer, expected, strict=True)):
        return float("inf")
    errors = [_error(a, e) for a, e in zip(answer, expected, strict=True) if e.numel()]
    return max((e if e == e else float("inf") for e in errors), default=0.0)


def input_sets(case: Case, cache: int, most: int = 12) -> int:
    """How many input sets a rotation needs so that none is left in a cache of so many bytes when its turn comes."""
    return min(most, max(2, -(-2 * cache // max(case.input_bytes, 1)) + 1))


@dataclass
class _Racer:
    """A variant with a right to a time: the run, and the run bound to each input set."""

    result: Measured
    bound: float
    run: Run
    bound_runs: list[Callable[[], object]]


def _prepared(variant: Variant, case: Case, sets: Sequence[Inputs], judge: Judge, clock: Clock) -> Measured | _Racer:
    """The variant made, warmed up, judged and weighed; no racer when it has no right to a time."""
    result, bound = Measured(case, variant.name), case.tolerance * variant.slack
    try:
        run = variant.make()
        judged = judge(run(sets[0]))
        result.error, result.note = judged.error, judged.note
        if not judged.error <= bound:
            result.skipped = f"wrong: an error of {judged.error:.2g} is over {bound:.2g}"
            return result
        result.peak = clock.peak(lambda: run(sets[0]))
        runs: list[Callable[[], object]] = [partial(run, x) for x in sets]
        return _Racer(result, bound, run, [clock.captured(r) for r in runs] if case.graph else runs)
    except Unavailable as reason:
        result.skipped = str(reason)
    except torch.OutOfMemoryError:
        result.skipped = "out of memory"
    except Exception as error:  # a peer may fail in any way; ours failing is seen in the exit status
        first = str(error).strip().partition("\n")[0][:200]
        result.skipped = f"failed: {type(error).__name__}: {first}"
    return result


def measure(
    case: Case,
    clock: Clock,
    *,
    budget_ms: float = 2000.0,
    cache: int = 0,
    without: Sequence[str] = (),
    seed: int = 0,
) -> list[Measured]:
    """Judge every variant, then time those that are right, in turns, each round on the next input set.

    Args:
        case: what is measured.
        clock: of the device that the inputs lie on.
        budget_ms: time for all rounds; there are 5 to 100 of them.
        cache: bytes of the largest cache of the device, which the input sets together outgrow.
        without: parts of names of variants to leave out.
        seed: of the first input set.
    """
    sets = [case.make(seed + i) for i in range(input_sets(case, cache))]
    judge = case.judge(sets[0])
    results: list[Measured] = []
    racers: list[_Racer] = []
    for variant in case.variants:
        if any(name in variant.name for name in without):
            continue
        prepared = _prepared(variant, case, sets, judge, clock)
        results.append(prepared.result if isinstance(prepared, _Racer) else prepared)
        racers += [prepared] if isinstance(prepared, _Racer) else []
        if torch.cuda.is_available():  # what one variant left behind must not push the next one out of memory
            gc.collect()
            torch.cuda.empty_cache()
    if not racers:
        return results
    begun = clock.mark()
    _rounds(racers, len(sets), clock)  # every input set once, to warm up and to learn how long it takes
    ended = clock.mark()
    clock.wait()
    rounds = int(budget_ms * len(sets) / max(clock.ms(begun, ended), 1e-3))
    marks = _rounds(racers, max(5, min(100, rounds)), clock)
    clock.wait()
    for racer, pairs in zip(racers, marks, strict=True):
        racer.result.times = sorted(clock.ms(start, end) for start, end in pairs)
        again = judge(racer.run(sets[0]))  # an answer that has changed is a race
        if not again.error <= racer.bound:
            racer.result.times, racer.result.skipped = [], f"wrong after timing: an error of {again.error:.2g}"
    return results


def _rounds(racers: Sequence[_Racer], count: int, clock: Clock) -> list[list[tuple[Any, Any]]]:
    """Marks around every run. Nothing waits in between: what a variant costs the host counts only where it shows."""
    marks: list[list[tuple[Any, Any]]] = [[] for _ in racers]
    for i in range(count):
        for j in range(len(racers)):
            turn = (i + j) % len(racers)
            runs = racers[turn].bound_runs
            start = clock.mark()
            runs[i % len(runs)]()
            marks[turn].append((start, clock.mark()))
    return marks
