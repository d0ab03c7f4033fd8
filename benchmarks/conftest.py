"""What every benchmark shares: the device, a gate in front of every speed, contenders timed in turns."""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

Run = Callable[[], Sequence[Tensor]]


class Race(Protocol):
    def __call__(
        self, contenders: dict[str, Run], reference: str, *, rounds: int = 5, rtol: float = 1e-4, warm: int = 0
    ) -> dict[str, float]: ...


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU when there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check(name: str, got: Sequence[Tensor], expected: Sequence[Tensor], rtol: float) -> None:
    """Raise unless every tensor is within rtol of the largest entry of the expected one."""
    if len(got) != len(expected):
        raise AssertionError(f"{name} returns {len(got)} tensors, not {len(expected)}: no speed for a wrong answer.")
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        error = (x.double() - y.double()).abs().max().item() if y.numel() else 0.0
        bound = rtol * max(y.double().abs().max().item(), 1e-30) if y.numel() else 0.0
        if not error <= bound:
            raise AssertionError(
                f"{name} is off by {error:.3g} > {bound:.3g} in tensor {i}: no speed for a wrong answer."
            )


def seconds(run: Run) -> float:
    """Wall time of one run, device included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quantile(values: Sequence[float], q: float) -> float:
    """The value under which the share q lies."""
    return sorted(values)[int(q * (len(values) - 1))]


@pytest.fixture
def race(benchmark: Any) -> Race:
    """Check the contenders, time them in turns, record medians and quartiles; the first contender is ours.

    ``race(contenders, reference)`` holds every answer against that of the one named reference and returns the median
    seconds of each; in ``extra_info`` stand the medians, the 20th and
    80th percentiles, how many times faster the first one is than each other one, the device, versions and threads.
    ``warm`` calls, not timed, go before each timed one: with none, a contender finds the caches as the last one left
    them.
    """

    def run(
        contenders: dict[str, Run], reference: str, *, rounds: int = 5, rtol: float = 1e-4, warm: int = 0
    ) -> dict[str, float]:
        expected = contenders[reference]()
        for name, contender in contenders.items():  # this is the warm-up, too
            if name != reference:
                check(name, contender(), expected, rtol)
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, contender in contenders.items():
                for _ in range(warm):
                    contender()
                times[name].append(seconds(contender))
        ours, *others = contenders
        medians = {name: statistics.median(t) for name, t in times.items()}
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
        benchmark.extra_info.update(
            device=gpu, threads=torch.get_num_threads(), torch=torch.__version__,
            seconds={name: round(m, 5) for name, m in medians.items()},
            spread={name: [round(quantile(t, q), 5) for q in (0.2, 0.8)] for name, t in times.items()},
            times_faster={name: round(medians[name] / medians[ours], 2) for name in others},
        )  # fmt: skip
        benchmark.pedantic(contenders[ours], rounds=1)
        return medians

    return run
