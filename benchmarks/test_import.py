"""Time that ``import fgfast`` adds to ``import torch``: the best of ten fresh interpreters, under 150 ms."""

import json
import subprocess
import sys

from pytest_benchmark.fixture import BenchmarkFixture

RUNS = 10
LIMIT_MS = 150.0

CODE = """
import json, time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import fgfast
print(json.dumps({"torch_ms": 1000 * (middle - start), "fgfast_ms": 1000 * (time.perf_counter() - middle)}))
"""


def one_import() -> dict[str, float]:
    """Milliseconds of ``import torch`` and of ``import fgfast`` after it, in one fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def test_import_adds_little_to_torch(benchmark: BenchmarkFixture) -> None:
    one_import()  # fills the page cache and writes the byte code
    taken = []
    benchmark.pedantic(lambda: taken.append(one_import()), rounds=RUNS, iterations=1)
    best = {name: min(run[name] for run in taken) for name in ("torch_ms", "fgfast_ms")}
    benchmark.extra_info.update(best)
    print(f"import torch {best['torch_ms']:.0f} ms, import fgfast after it {best['fgfast_ms']:.0f} ms (best of {RUNS})")
    assert best["fgfast_ms"] < LIMIT_MS
