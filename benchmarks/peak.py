"""Peak memory of one variant in a fresh process: what a run adds to the baseline after imports and inputs.

On a CPU the peak is that of the resident set (the kernel's high-water mark, reset before the run), on a GPU that of
PyTorch's allocator.
"""

import ctypes
import gc
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases
from benchmarks.timing import Case, CudaClock, Measurement, Variant

ROOT = Path(__file__).resolve().parent.parent


def peak_memory(case: Case, variant: str) -> int:
    """Bytes that a variant adds to its baseline at its peak, measured in a fresh process.

    Raises:
        RuntimeError: the process failed; the message ends with its output.
    """
    command = [sys.executable, "-m", "benchmarks.peak", case.name, variant]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"The peak of {variant} in {case.name} could not be measured: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def weigh(results: Sequence[Measurement]) -> None:
    """Fill in the peak memory of the timed variants of a case that asks for it."""
    for result in results:
        if result.case.weigh and result.times and result.peak is None:
            result.peak = peak_memory(result.case, result.variant)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux.")


def of_cpu(run: Any) -> int:
    """Bytes that a call adds to the resident set of this process at its peak."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # memory that the set-up freed, and that glibc keeps, must not hide what the run allocates
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    except OSError:  # not permitted in some containers: then only a peak above that of the set-up shows
        baseline = _resident("VmRSS")
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - baseline
    baseline = _resident("VmRSS")
    run()
    return _resident("VmHWM") - baseline


def _run_small(case: Case, variant: str, device: torch.device) -> None:
    """Import what is imported late and let libraries allocate their workspace."""
    x = torch.randn(256, 256, device=device, requires_grad=True)
    (x @ x).logsumexp(1).sum().backward()
    for small in (cases.OPERATIONS | cases.SURROUNDINGS)[case.op](device, True):
        for other in small.variants:
            if other.name == variant:
                other.make()(small.make(0))


def main(name: str, variant: str) -> None:
    """Measure one variant of one case and print its bytes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = cases.find(device, name)
    chosen: Variant = next(v for v in case.variants if v.name == variant)
    _run_small(case, variant, device)
    inputs, run = case.make(0), chosen.make()
    print(CudaClock().peak(lambda: run(inputs)) if device.type == "cuda" else of_cpu(lambda: run(inputs)))


if __name__ == "__main__":
    main(*sys.argv[1:])
