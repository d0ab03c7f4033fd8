"""Compile every kernel without a GPU: ``python -m fgfast.kernels.aot [--arch sm_90 ...] [--default-only]``.

Every :class:`~fgfast.kernels._common.AotCase` that a file of this folder offers is compiled for each architecture, and
a table of registers, spilled bytes and shared memory is printed. The exit status is 1 when a case of a default row
spills or any case needs more shared memory than the part has. Results are kept by the hash of all kernel sources.

A case whose name holds the name of an architecture is compiled for that one alone; one with the word "tuned" in its
name belongs to a measured row, which may spill if it was fastest all the same.
"""

import argparse
import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import fgfast.kernels
from fgfast.files import write_atomic
from fgfast.kernels.configs import SHARED

ARCHITECTURES = tuple(SHARED)


class Report(NamedTuple):
    """What a compilation needs: registers a thread, spilled bytes a thread, bytes of shared memory a program."""

    registers: int
    spilled: int
    shared: int


def modules() -> Iterator[str]:
    """Names of the kernel files that offer cases."""
    for module in pkgutil.iter_modules(fgfast.kernels.__path__, "fgfast.kernels."):
        if hasattr(importlib.import_module(module.name), "aot_cases"):
            yield module.name


def jobs(architectures: Sequence[str], default_only: bool, only: str = "") -> list[tuple[str, str, str]]:
    """(module, case, architecture) of what is to be compiled; ``only`` is a part of the names wanted."""
    found = []
    for module in modules():
        for case in importlib.import_module(module).aot_cases():
            named = set(case.name.split())
            if only in case.name and not (default_only and "tuned" in named):
                own = [a for a in ARCHITECTURES if a in named]
                found += [(module, case.name, a) for a in architectures if not own or a in own]
    return found


def compile_case(job: tuple[str, str, str]) -> Report:
    """Compile one case for one architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name, arch = job
    case = next(c for c in importlib.import_module(module).aot_cases() if c.name == name)
    types = {argument: kind.partition(":") for argument, kind in case.signature.items()}
    source = ASTSource(
        fn=case.kernel,
        signature={argument: kind for argument, (kind, _, _) in types.items()},
        constexprs=case.constexprs,
        attrs={(i,): [["tt.divisibility", int(n)]] for i, (_, _, n) in enumerate(types.values()) if n},
    )
    amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(
        source, target=target, options={"num_warps": case.num_warps, "num_stages": case.num_stages}
    )
    return _amd(compiled) if amd else _nvidia(compiled)


def _nvidia(compiled: Any) -> Report:
    import triton

    tool = Path(triton.__path__[0], "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Report(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared)


def _amd(compiled: Any) -> Report:
    used = dict(
        re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size): +(\d+)", compiled.asm["amdgcn"])
    )
    spilled = max(4 * int(used["vgpr_spill_count"]), int(used["private_segment_fixed_size"]))
    return Report(int(used["vgpr_count"]), spilled, compiled.metadata.shared)


def _folder() -> Path:
    cache = os.environ.get("FGFAST_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fgfast")
    return Path(cache).expanduser() / "aot"


def _source_hash() -> str:
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(Path(fgfast.kernels.__path__[0]).glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def reports(wanted: list[tuple[str, str, str]], workers: int = 2) -> dict[tuple[str, str, str], Report]:
    """The report of each job, from the cache or compiled now, in the order given."""
    path = _folder() / f"{_source_hash()}.json"
    known = {tuple(job): Report(*report) for job, report in json.loads(path.read_text())} if path.exists() else {}
    missing = [job for job in wanted if job not in known]
    if missing:
        # Fresh processes: a fork would take over torch's threads.
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            known |= dict(zip(missing, pool.map(compile_case, missing), strict=True))
        text = json.dumps([[list(job), list(report)] for job, report in known.items()])
        write_atomic(path, lambda partial: partial.write_text(text))
    return {job: known[job] for job in wanted}


def faults(found: dict[tuple[str, str, str], Report]) -> list[str]:
    """What is wrong with the reports, a sentence each.

    Example:
        >>> faults({("m", "pool", "sm_90"): Report(255, 8, 1024)})
        ['pool spills 8 bytes a thread on sm_90']
    """
    wrong = []
    for (_, name, arch), report in found.items():
        if report.spilled and "tuned" not in name.split():
            wrong.append(f"{name} spills {report.spilled} bytes a thread on {arch}")
        if report.shared > SHARED[arch] * 1024:
            wrong.append(f"{name} needs {report.shared} bytes of shared memory on {arch}, which has {SHARED[arch]} KiB")
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m fgfast.kernels.aot", description="Compile the kernels, no GPU.")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--default-only", action="store_true", help="leave out the rows measured on a device")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases with this text in their name")
    chosen = parser.parse_args(arguments)
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled; triton reads it on import
    found = reports(jobs(chosen.arch, chosen.default_only, chosen.only))
    width = max((len(name) for _, name, _ in found), default=4)
    print(f"{'case':<{width}} {'arch':>7} {'registers':>9} {'spilled':>8} {'shared':>8}")
    for (_, name, arch), report in found.items():
        print(f"{name:<{width}} {arch:>7} {report.registers:>9} {report.spilled:>8} {report.shared:>8}")
    wrong = faults(found)
    print(*wrong, sep="\n", file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
