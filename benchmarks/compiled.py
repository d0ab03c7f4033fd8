"""What the compiler made of the kernels, from the cache of ``python -m fgfast.kernels.aot``: nothing is compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def cached() -> tuple[list[Row], int]:
    """A row for each report in the cache that belongs to a kernel as it is now, and how many have none."""
    from fgfast.kernels import aot

    path = aot._folder() / "reports.json"  # the cache is aot's own; its key says whether a report is still true
    known = json.loads(path.read_text()) if path.exists() else {}
    found, missing = [], 0
    for job in aot.jobs(aot.ARCHITECTURES, False):
        report = known.get(aot._key(job)) if known else None
        if report is None:
            missing += 1
            continue
        registers, spilled, shared = report[:3]
        found.append({"case": job[1], "arch": job[2], "registers": registers, "spilled": spilled, "shared": shared})
    return found, missing


def rows() -> tuple[list[Row], int]:
    """As :func:`cached`, from a process in which Triton does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "benchmarks.compiled"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"The compile reports could not be read: {done.stderr[-2000:]}")
    found, missing = json.loads(done.stdout.splitlines()[-1])
    return found, missing


if __name__ == "__main__":
    print(json.dumps(cached()))
