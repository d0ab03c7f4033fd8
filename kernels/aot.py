"""Compile every kernel without a GPU: ``python -m fgfast.kernels.aot [--arch sm_90 ...] [--default-only]``.

Every :class:`~fgfast.kernels.common.AotCase` of the package is compiled for each architecture, and a table of
registers, spilled bytes and shared memory is printed. The exit status is 1 if a case of a default row spills or any
case needs more shared memory than its row or architecture allows. Reports are cached by a hash of everything they
depend on, including the version of Triton; ``--recorded FILE`` also reads reports with such hashes from a CSV file.
"""

import argparse
import ast
import contextlib
import csv
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
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from fgfast.kernels.common import AotCase, launch_options
from fgfast.kernels.configs import SHARED

HERE = Path(__file__).parent
ARCHITECTURES = tuple(SHARED)

Job = tuple[str, str, str]  # module, name of the case, architecture


class Report(NamedTuple):
    """Resources of a compiled case: registers and spilled bytes per thread, bytes of shared memory per program."""

    registers: int
    spilled: int
    shared: int
    error: str = ""  # if the case does not compile


MEASURED = Report._fields[:3]  # the numbers


def modules() -> Iterator[str]:
    """Names of the modules with ``aot_cases()``."""
    for module in pkgutil.walk_packages([str(HERE)], "fgfast.kernels."):
        if hasattr(importlib.import_module(module.name), "aot_cases"):
            yield module.name


@cache
def cases(module: str) -> dict[str, AotCase]:
    """The cases of a module by name."""
    found = list(importlib.import_module(module).aot_cases())
    for loaded in [m for name, m in sys.modules.items() if name.startswith("fgfast.kernels.")]:
        for function in vars(loaded).values():
            if hasattr(function, "starting_line_number"):
                function.starting_line_number = 0  # part of Triton's key, but without effect on the compiled code
    by_name = {case.name: case for case in found}
    assert len(by_name) == len(found), f"two cases of {module} have the same name"
    return by_name


def jobs(architectures: Sequence[str], default_only: bool, only: str = "") -> list[Job]:
    """The compilations to make, of cases whose name contains ``only``."""
    return [
        (module, case.name, arch)
        for module in modules()
        for case in cases(module).values()
        if only in case.name and not (default_only and (case.rare or case.tuned))
        for arch in architectures
        if not case.archs or arch in case.archs
    ]


def compile_case(job: Job) -> Report:
    """Compile one case for one architecture."""
    try:
        return _compile(*job)
    except Exception as error:  # the table reports compiler errors of any kind
        return Report(0, 0, 0, f"{type(error).__name__}: {error}")


def _leaves(kind: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """The types within a type that may be a tuple, each with its position."""
    if isinstance(kind, str):
        yield path, kind
    else:
        for i, inner in enumerate(kind):
            yield from _leaves(inner, (*path, i))


def _triton_type(kind: Any) -> Any:
    """The type of a signature without ":16" and "=1".

    Example:
        >>> _triton_type(("*fp32:16", ("i32", "constexpr=1")))
        ('*fp32', ('i32', 'constexpr'))
    """
    return re.split("[:=]", kind)[0] if isinstance(kind, str) else tuple(map(_triton_type, kind))


def _compile(module: str, name: str, arch: str) -> Report:
    compiled = compiled_case((module, name, arch))
    return _amd(compiled) if arch.startswith("gfx") else _nvidia(compiled)


def compiled_case(job: Job) -> Any:
    """What Triton makes of a case: ``asm`` has the machine code, ``metadata`` the shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name, arch = job
    case = cases(module)[name]
    signature = {name: case.signature.get(name, "constexpr") for name in case.kernel.arg_names}
    leaves = {path: kind for i, full in enumerate(signature.values()) for path, kind in _leaves(full, (i,))}
    source = ASTSource(
        fn=case.kernel,
        signature={name: _triton_type(kind) for name, kind in signature.items()},
        constexprs=case.constexprs | {path: int(kind[10:]) for path, kind in leaves.items() if "=" in kind},
        attrs={path: [["tt.divisibility", int(kind[-2:])]] for path, kind in leaves.items() if ":" in kind},
    )
    is_amd = arch.startswith("gfx")
    target = GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = launch_options(case.num_warps, case.num_stages, 0 if is_amd else case.registers)
    return triton.compile(source, target=target, options=options)


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


def _cache_folder() -> Path:
    chosen = os.environ.get("FGFAST_CACHE")
    base = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fgfast"
    return base / "aot"


@cache
def _source(kernel: Any) -> str:
    """The source of a kernel and of all that it calls, and its constants; not where in a file they stand."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    functions, constants, waiting = {}, {}, [kernel]
    while waiting:
        function = waiting.pop()
        functions[function.fn.__module__, function.fn.__qualname__] = function.src
        for node in ast.walk(ast.parse(function.src)):
            value = function.fn.__globals__.get(node.id) if isinstance(node, ast.Name) else None
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                value = getattr(function.fn.__globals__.get(node.value.id), node.attr, None)
            if isinstance(value, JITFunction) and value.fn.__module__.startswith("fgfast."):
                if (value.fn.__module__, value.fn.__qualname__) not in functions:
                    waiting.append(value)
            elif isinstance(value, tl.constexpr):
                constants[ast.unparse(node)] = value.value
    return repr((sorted(functions.values()), sorted(constants.items())))


def _key(job: Job) -> str:
    """A hash of Triton's version, the source of the kernel and of all it calls, types, constants and target."""
    import triton

    module, name, arch = job
    case = cases(module)[name]
    kinds = sorted(case.signature.items())
    constants = sorted(case.constexprs.items())
    launch = (case.num_warps, case.num_stages, case.registers)
    parts = (triton.__version__, _source(case.kernel), arch, kinds, constants, launch)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _workers(number: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(number, mp_context=get_context("spawn"))  # a fork is unsafe with the threads of torch


def _compile_all(missing: dict[str, Job], workers: int) -> Iterator[tuple[str, Report]]:
    """The report of each job with its key, in order of completion."""
    left = dict(missing)
    try:
        with _workers(workers) as pool:
            futures = {pool.submit(compile_case, job): key for key, job in left.items()}
            for future in as_completed(futures):
                yield futures[future], future.result()
                del left[futures[future]]
    except BrokenProcessPool:  # the compiler aborted on one of the jobs left: compile each in its own process
        for key, job in left.items():
            with _workers(1) as pool:
                try:
                    yield key, pool.submit(compile_case, job).result()
                except BrokenProcessPool:
                    yield key, Report(0, 0, 0, "the compiler aborted its process")


def _read_record(file: Path) -> dict[str, tuple[int, ...]]:
    """Registers, spilled bytes and shared bytes by key, from a CSV file."""
    with file.open(newline="") as lines:
        return {row["key"]: tuple(int(row[name]) for name in MEASURED) for row in csv.DictReader(lines)}


def rows(found: dict[Job, Report]) -> list[dict[str, Any]]:
    """Reports as rows of a table, each with its cache key."""
    import triton

    known = {"triton": triton.__version__}
    return [
        known | {"kernel": kernel_of(job), "case": job[1], "arch": job[2]}
        | {name: getattr(report, name) for name in MEASURED} | {"key": _key(job)}
        for job, report in found.items()
    ]  # fmt: skip


def kernel_of(job: Job) -> str:
    """Operation (folder or file) and kernel of a job, such as "contrast forward"."""
    module, name, _ = job
    return f"{module.split('.')[2]} {cases(module)[name].kernel.__name__.removesuffix('_kernel')}"


def reports(wanted: list[Job], workers: int = 2, recorded: Path | None = None) -> dict[Job, Report]:
    """The report of each job, from the cache, from the record or compiled now, in the given order."""
    path = _cache_folder() / "reports.json"
    known: dict[str, Any] = {**_read_record(recorded)} if recorded else {}
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # a damaged cache can be made again
        known |= json.loads(path.read_text())
    keys = {job: _key(job) for job in wanted}
    missing = {key: job for job, key in keys.items() if key not in known}  # rows may have the same compilation
    for key, report in _compile_all(missing, workers):
        known[key] = report
        _store_reports({key: report for key, report in known.items() if not Report(*report).error}, path)
    return {job: Report(*known[keys[job]]) for job in wanted}


def _store_reports(known: dict[str, Report], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(known))
    partial.replace(path)


def faults(found: dict[Job, Report]) -> list[str]:
    """The faults of the reports, one sentence each.

    Example:
        >>> faults({("fgfast.kernels.kmeans.cases", "kmeans reduce", "sm_90"): Report(255, 8, 1024)})
        ['kmeans reduce spills 8 bytes per thread on sm_90']
    """
    wrong = []
    for (module, name, arch), report in found.items():
        if report.error:
            wrong.append(f"{name} does not compile for {arch}: {report.error}")
        case = cases(module)[name]
        if report.spilled and not case.tuned:
            wrong.append(f"{name} spills {report.spilled} bytes per thread on {arch}")
        most = min(SHARED[arch], case.shared or SHARED[arch])
        if report.shared > most * 1024:
            wrong.append(
                f"{name} needs {report.shared} bytes of shared memory on {arch}, more than the {most} KiB allowed"
            )
    return wrong


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m fgfast.kernels.aot", description="Compile the kernels, no GPU.")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--default-only", action="store_true", help="leave out measured rows and rare variants")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this text in their name")
    parser.add_argument(
        "--recorded", type=Path, metavar="FILE", help="a CSV file of reports, used where they are still valid"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the reports to this file")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET is 1, and an interpreted kernel cannot be compiled: unset it.", file=sys.stderr)
        return 2
    found = reports(jobs(chosen.arch, chosen.default_only, chosen.only), recorded=chosen.recorded)
    if chosen.csv and found:
        table = rows(found)
        with chosen.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(table)
    width = max((len(name) for _, name, _ in found), default=4)
    print(f"{'case':<{width}} {'arch':>7} {'registers':>9} {'spilled':>8} {'shared':>8}")
    for (_, name, arch), report in found.items():
        print(f"{name:<{width}} {arch:>7} {report.registers:>9} {report.spilled:>8} {report.shared:>8}")
    wrong = faults(found)
    print(*wrong, sep="\n", file=sys.stderr, end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
