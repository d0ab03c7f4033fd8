"""The timing core: every variant is compared with the reference, then timed in turns with the others.

A clock marks points and reads the time between two of them: events on a GPU, ``perf_counter`` on a CPU. Everything
else here runs on both.
"""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

Inputs = Any  # one input set of a case, opaque to everything but the case
Answer = Sequence[Tensor]
Run = Callable[[Inputs], Answer]


class Unavailable(Exception):
    """A variant cannot run here; the message is the reason, "NAME is not installed"."""


class Clock:
    """Marks points in the work of a device; this one, of a CPU, by wall time."""

    def mark(self) -> Any:
        """A point after all work submitted to the device so far."""
        return time.perf_counter()

    def ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks, after ``wait``."""
        return float(end - start) * 1e3

    def wait(self) -> None:
        """Return when the device has done all its work."""

    def peak(self, run: Callable[[], object]) -> int | None:
        """Bytes of device memory that a run adds at its peak; None on a CPU, see benchmarks/peak.py."""
        return None

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
        """The run as a CUDA graph on a GPU, else the run itself."""
        return run


class CudaClock(Clock):
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
        kept = run()  # noqa: F841 (the answer counts)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def capture(self, run: Callable[[], object]) -> Callable[[], object]:
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

    ``slack`` multiplies the tolerance of the case, for peers that promise less accuracy. A run with a ``close``
    method is closed after the case.
    """

    name: str
    make: Callable[[], Run]
    slack: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """Distance of an answer from the reference, and a remark for the tables."""

    error: float
    note: str = ""


Judge = Callable[[Answer], Verdict]


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    ``judge(inputs)`` computes the reference and returns the function that judges an answer; ``bytes`` and
    ``operations`` are the two floors: every input read once and every output written once, and the products that run.
    Without them there is no limit to compare with.
    """

    op: str
    shape: str
    dtype: str  # "fp32", "tf32", "fp16" or "bf16" (which matrix rate limits it), or another word without a limit
    make: Callable[[int], Inputs]
    variants: Sequence[Variant]  # the first one is ours
    judge: Callable[[Inputs], Judge]
    tolerance: float
    bytes: int = 0
    operations: int = 0
    input_bytes: int = 0
    graph: bool = False  # time the replay of a CUDA graph: for many small launches
    quick: bool = False  # part of a short run
    weigh: bool = False  # on a CPU, measure peak memory too, in a fresh process for each variant
    most_memory: int | None = None  # peak bytes over which ours is a fault
    host: bool = False  # runs on the CPU whatever the device

    @property
    def name(self) -> str:
        """Operation, shape and dtype."""
        return f"{self.op} {self.shape} {self.dtype}"


@dataclass
class Measurement:
    """What is known about one variant of a case; ``skipped`` is the reason why there is no time."""

    case: Case
    variant: str
    times: list[float] = field(default_factory=list)  # ms, ascending
    error: float | None = None
    note: str = ""
    peak: int | None = None
    skipped: str = ""
    unavailable: bool = False  # skipped because a package or a GPU is missing

    @property
    def is_ours(self) -> bool:
        """Whether fgfast computed it."""
        return self.variant.startswith("fgfast")

    def quantile(self, q: float) -> float:
        """The time below which a fraction q of the runs lies.

        Example:
            >>> Measurement(None, "fgfast", [1.0, 2.0, 3.0]).quantile(0.5)
            2.0
        """
        return self.times[round(q * (len(self.times) - 1))]


def faults(results: Sequence[Measurement]) -> list[str]:
    """What fgfast got wrong in a case, one sentence per variant: a wrong answer, a failure, too much memory."""
    found = [
        f"{r.variant}: {r.case.name}: {r.skipped}." for r in results if r.is_ours and r.skipped and not r.unavailable
    ]
    ours, most = results[0], results[0].case.most_memory
    if most is not None and ours.peak is not None and ours.peak > most:
        found.append(f"{ours.variant}: {ours.case.name}: peak of {ours.peak >> 20} MiB is over {most >> 20} MiB.")
    return found


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
    """How many input sets to rotate so that none is still in a cache of ``cache`` bytes when its turn comes."""
    return min(most, -(-2 * cache // max(case.input_bytes, 1)) + 1)


@dataclass
class _Racer:
    """A variant that gave a right answer: the run, and the run bound to each input set."""

    result: Measurement
    bound: float
    run: Run
    bound_runs: list[Callable[[], object]]


def _prepare(variant: Variant, case: Case, sets: Sequence[Inputs], judge: Judge, clock: Clock) -> Measurement | _Racer:
    """Make, warm up, judge and weigh a variant; only the measurement when it must not be timed."""
    result, bound = Measurement(case, variant.name), case.tolerance * variant.slack
    try:
        run = variant.make()
        verdict = judge(run(sets[0]))
        result.error, result.note = verdict.error, verdict.note
        if not verdict.error <= bound:
            result.skipped = f"wrong: an error of {verdict.error:.2g} is over {bound:.2g}"
            return result
        result.peak = clock.peak(lambda: run(sets[0]))
        runs: list[Callable[[], object]] = [partial(run, x) for x in sets]
        return _Racer(result, bound, run, [clock.capture(r) for r in runs] if case.graph else runs)
    except Unavailable as reason:
        result.skipped, result.unavailable = str(reason), True
    except torch.OutOfMemoryError:
        result.skipped = "out of memory"
    except Exception as error:  # a peer may fail in any way; a failure of ours shows in the exit status
        first = str(error).strip().partition("\n")[0][:200]
        result.skipped = f"failed: {type(error).__name__}: {first}"
    return result


def measure(
    case: Case, clock: Clock, *, budget_ms: float = 2000.0, least: int = 5, cache: int = 0,
    without: Sequence[str] = (), seed: int = 0,
) -> list[Measurement]:  # fmt: skip
    """Judge every variant, then time the right ones in turns, each round on the next input set.

    Args:
        case: what is measured.
        clock: of the device that the inputs are on.
        budget_ms: time for all rounds, at most 100.
        least: fewest rounds; with 0 the warm-up counts as the only round when it exceeds the budget.
        cache: bytes of the largest cache of the device, which the input sets together outgrow.
        without: variants whose names contain one of these are left out.
        seed: of the first input set.
    """
    sets = [case.make(seed + i) for i in range(input_sets(case, cache))]
    judge = case.judge(sets[0])
    results: list[Measurement] = []
    racers: list[_Racer] = []
    for variant in case.variants:
        if any(name in variant.name for name in without):
            continue
        prepared = _prepare(variant, case, sets, judge, clock)
        results.append(prepared.result if isinstance(prepared, _Racer) else prepared)
        racers += [prepared] if isinstance(prepared, _Racer) else []
        if torch.cuda.is_available():  # memory that one variant leaves cached must not fail the next one
            gc.collect()
            torch.cuda.empty_cache()
    if not racers:
        return results
    start = clock.mark()
    marks = _rounds(racers, len(sets), clock)  # every input set once, to warm up and to learn how long it takes
    end = clock.mark()
    clock.wait()
    rounds = max(least, min(100, int(budget_ms * len(sets) / max(clock.ms(start, end), 1e-3))))
    if rounds:
        marks = _rounds(racers, rounds, clock)
        clock.wait()
    for racer, pairs in zip(racers, marks, strict=True):
        racer.result.times = sorted(clock.ms(start, end) for start, end in pairs)
        again = judge(racer.run(sets[0])) if rounds or racer.result.is_ours else Verdict(0.0)
        if not again.error <= racer.bound:  # an answer that has changed is a race
            racer.result.times, racer.result.skipped = [], f"wrong after timing: an error of {again.error:.2g}"
        getattr(racer.run, "close", lambda: None)()
    return results


def _rounds(racers: Sequence[_Racer], count: int, clock: Clock) -> list[list[tuple[Any, Any]]]:
    """Marks around every run. Nothing waits in between, so host overhead counts only where it delays the device."""
    marks: list[list[tuple[Any, Any]]] = [[] for _ in racers]
    for i in range(count):
        for j in range(len(racers)):
            turn = (i + j) % len(racers)
            runs = racers[turn].bound_runs
            start = clock.mark()
            runs[i % len(runs)]()
            marks[turn].append((start, clock.mark()))
    return marks
