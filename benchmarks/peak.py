"""Peak memory of one case in a process of its own: what a run adds to the baseline after imports and inputs.

A case is a function ``module:name`` that takes JSON arguments, makes the inputs and returns what is to be measured as a
function without arguments. On a CPU the peak is that of the resident set (the kernel's high-water mark, set back before
the run), on a GPU that of PyTorch's allocator.
"""

import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def peak_memory(case: str, **arguments: Any) -> int:
    """Bytes that the case adds to its baseline at its peak, measured in a fresh process.

    Args:
        case: "module:function".
        arguments: what the function is called with; JSON values.

    Raises:
        RuntimeError: the process failed; the message ends with what it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.peak", case, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"The peak of {case} {arguments} could not be measured: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: peak memory is measured on Linux.")


def _of_cpu(run: Any) -> int:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    except OSError:  # not permitted in some containers: then only a peak above the one of the set-up shows
        baseline = _resident("VmRSS")
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - baseline
    baseline = _resident("VmRSS")
    run()
    return _resident("VmHWM") - baseline


def _of_gpu(run: Any) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    baseline = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - baseline


def main(case: str, arguments: str) -> None:
    """Measure one case and print its bytes."""
    module, name = case.split(":")
    run = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    x = torch.randn(256, 256, device="cuda" if torch.cuda.is_available() else "cpu", requires_grad=True)
    (x @ x).logsumexp(1).sum().backward()  # libraries allocate their work space
    print((_of_gpu if torch.cuda.is_available() else _of_cpu)(run))


if __name__ == "__main__":
    main(*sys.argv[1:])
