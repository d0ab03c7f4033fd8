"""Every case on this device: each answer is compared with the reference, then all variants are timed in turns."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from benchmarks.cases import OPERATIONS, SURROUNDINGS
from benchmarks.peak import weigh
from benchmarks.timing import Case, Clock, CudaClock, Measurement, faults, measure

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compare(case: Case) -> list[Measurement]:
    """On a CPU torch.compile is left out: compiling takes longer than everything else."""
    if DEVICE.type == "cpu" or case.host:
        results = measure(case, Clock(), budget_ms=3000.0, least=0, without=("torch.compile",))
        weigh(results)
        return results
    return measure(case, CudaClock(), cache=torch.cuda.get_device_properties(DEVICE).L2_cache_size)


@pytest.mark.parametrize(
    "case",
    [case for cases in (*OPERATIONS.values(), *SURROUNDINGS.values()) for case in cases(DEVICE)],
    ids=lambda case: case.name,
)
def test_case(case: Case, benchmark: Any, report: Callable[[Sequence[Measurement]], None]) -> None:
    """Fails when ours is wrong, fails or takes too much memory; the table has what was measured all the same."""
    results = benchmark.pedantic(compare, (case,), rounds=1)
    report(results)
    benchmark.stats.stats.data[:] = [ms / 1e3 for ms in results[0].times]
    benchmark.extra_info["ms"] = {r.variant: r.quantile(0.5) if r.times else r.skipped for r in results}
    assert faults(results) == []
    if not results[0].times:
        pytest.skip(results[0].skipped)
