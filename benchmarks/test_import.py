"""Time that ``import fgfast`` adds to ``import torch``: the best of ten fresh interpreters, under 150 ms."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.timing import Case, Measurement

RUNS, LIMIT_MS = 10, 150.0
CODE = """
import json, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import fgfast
print(json.dumps([1000 * (middle - start), 1000 * (time.perf_counter() - middle)]))
"""


def import_both() -> list[float]:
    """Milliseconds of ``import torch`` and of ``import fgfast`` after it, in one fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout))


def test_import_adds_little_to_torch(benchmark: Any, report: Callable[[Sequence[Measurement]], None]) -> None:
    import_both()  # fills the page cache and writes the byte code
    runs: list[list[float]] = []
    benchmark.pedantic(lambda: runs.append(import_both()), rounds=RUNS)
    torch_ms, fgfast_ms = (sorted(column) for column in zip(*runs, strict=True))
    case = Case("import", "after import torch", "", int, (), lambda seed: lambda answer: NotImplemented, 0.0)
    remark = f"import torch {torch_ms[0]:.0f} ms; best of {RUNS} {fgfast_ms[0]:.0f} ms, limit {LIMIT_MS:.0f} ms"
    report([Measurement(case, "fgfast", fgfast_ms, note=remark)])
    assert fgfast_ms[0] < LIMIT_MS
