"""Tables of tile sizes, the compile check and the tuner."""

import csv
import importlib.metadata
import os
import re
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fgfast.backend import KERNELS
from fgfast.kernels import aot, configs, tune
from fgfast.kernels.contrast import cases as contrast_cases
from fgfast.kernels.kmeans import cases as kmeans_cases
from fgfast.kernels.kmeans import pyramid_cases
from fgfast.kernels.kmeans.step import tile
from fgfast.kernels.part_pool import cases as part_pool_cases

pytestmark = pytest.mark.slow

# The user's cache: reports are stored by a hash of what they depend on, which is valid in every checkout.
CACHE = os.environ.get("FGFAST_CACHE", "")


def run(module, *arguments, package="fgfast.kernels", **environment):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"{package}.{module}", *arguments],
        env={**clean, **environment}, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_no_default_row_spills(tmp_path):
    """With the installed compiler; only cases that are neither recorded nor in the user's cache are compiled."""
    table = tmp_path / "reports.csv"
    recorded = ("--recorded", "benchmarks/results/compiled.csv")
    done = run("aot", "--default-only", "--arch", "sm_80", "sm_90", "--csv", str(table), *recorded, FGFAST_CACHE=CACHE)
    assert (done.returncode, done.stderr) == (0, "")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"}
    assert {row["triton"] for row in rows} == {importlib.metadata.version("triton")}
    assert all(int(row["registers"]) > 0 == int(row["spilled"]) for row in rows)
    # The path of most batches: a key, and logits bounded by normalised vectors.
    cases = {row["case"] for row in rows if row["arch"] == "sm_90"}
    assert {f"contrast {way} sm_90 bf16 half D256 bounded{side}" for way, side in
            (("forward", ""), ("gradient", " x"), ("gradient", " y"))} <= cases  # fmt: skip


def test_a_recorded_report_is_used_until_its_kernel_changes(monkeypatch, tmp_path):
    jobs = aot.jobs(("sm_80", "sm_90"), default_only=True, only="contrast join")
    compiled = []
    monkeypatch.setenv("FGFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(aot, "_key", lambda job: " ".join(job))
    monkeypatch.setattr(aot, "_compile_all", lambda missing, _: compiled.extend(missing) or ())
    record = tmp_path / "record.csv"
    record.write_text("registers,spilled,shared,key\n" + "".join(f"40,8,16,{' '.join(job)}\n" for job in jobs))
    assert set(aot.reports(jobs, recorded=record).values()) == {aot.Report(40, 8, 16)}
    assert compiled == []
    monkeypatch.setattr(aot, "_key", lambda job: " ".join(job) + " changed")
    with pytest.raises(KeyError):
        aot.reports(jobs, recorded=record)
    assert len(compiled) == len(jobs)


KEYS = """
from fgfast.kernels import aot

(job,) = [job for job in aot.jobs(("sm_90",), default_only=True, only="contrast join bounded")]
kernel = aot.cases(job[0])[job[1]].kernel
names = kernel.fn.__globals__


def key():
    aot._source.cache_clear()
    return aot._key(job)


before = key()
kernel.starting_line_number += 7
assert key() == before
for name, other in (("store_rows", names["indices"]), ("INFINITY", names["LN2"])):
    kept, names[name] = names[name], other
    assert key() != before, name
    names[name] = kept
assert key() == before
"""


def test_the_key_of_a_report_depends_on_what_a_kernel_reads_and_not_on_where_it_stands():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", KEYS], check=True, env=environment)


def test_a_compiler_that_aborts_its_process_fails_only_its_case(monkeypatch):
    class Pool:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False

        def submit(self, _, job):
            future = Future()
            ends = job[1] == "bad" or self.number > 1  # a broken pool fails the other jobs too
            future.set_exception(BrokenProcessPool()) if ends else future.set_result(aot.Report(1, 0, 0))
            return future

    monkeypatch.setattr(aot, "_workers", Pool)
    found = dict(aot._compile_all({name: ("module", name, "sm_90") for name in ("good", "bad", "better")}, 2))
    assert [report.error for report in found.values()] == ["", "the compiler aborted its process", ""]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("case", "sides"),
    [
        (("contrast gradient", "sm_80", "half", 128), {(3, 6): (64, 64), (3, 8): (128, 32), (3, 9): (128, 32)}),
        (("contrast gradient", "sm_90", "bf16 copied", 256), {(3, 6): None, (3, 8): (64, 64), (3, 9): (64, 32)}),
        (("contrast forward", "sm_90", "ieee", 512), {(3, 6): (64, 32), (3, 8): (64, 64), (3, 9): (64, 32)}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_row_that_spills_with_a_compiler_is_not_used_by_it(case, sides, monkeypatch):
    op, arch, kind, channels = case
    for compiler, expected in sides.items():
        monkeypatch.setattr(configs, "COMPILER", compiler)
        row = configs.choose(op, arch, 163, (kind,), channels)
        assert (row and (row.tiles["BLOCK_X"], row.tiles["BLOCK_Y"])) == expected
        compiled = [row for _, _, row in configs.table(op)]
        assert all(row.compiles for row in compiled)
        assert row is None or row in compiled


@pytest.mark.quick
@pytest.mark.parametrize("compiler", [(3, 6), (3, 7), (3, 8), (3, 9), (3, 10)])
def test_every_compiler_has_a_row_for_every_kind(compiler, monkeypatch):
    """Which is compiled ahead of time for the architecture."""
    monkeypatch.setattr(configs, "COMPILER", compiler)
    for op, arch in configs.ROWS:
        kinds = {row.kind for row in configs.ROWS[op, "default"]} if (op, "default") in configs.ROWS else set()
        for kind in kinds - {"half gaps", "fp32 gaps"}:
            most = max(row.channels for row in configs.ROWS[op, "default"] if row.kind == kind)
            wanted = (kind, "half") if kind.startswith("half") else (kind,)
            row = configs.choose(op, arch, configs.SHARED.get(arch, 99), wanted, most)
            assert row, (op, arch, kind)
            listed = [where for where, _, other in configs.table(op) if other == row]
            assert any(arch in ("default", *configs.architectures_for(op, w, row)) for w in listed), (op, arch, kind)


def test_every_kernel_is_launched_as_on_a_gpu():
    """Triton takes the arguments of every launch and compiles for a GPU that is absent; nothing runs."""
    done = run("launches", "sm_90", package="tests.kernels")
    assert done.returncode == 0, done.stderr
    launched = {name for line in done.stdout.splitlines() for name in line.partition(": ")[2].split()}
    kernels = {case.kernel.__name__ for module in aot.modules() for case in aot.cases(module).values()}
    assert launched == kernels


@pytest.mark.quick
def test_every_kernel_and_every_default_row_is_compiled():
    jobs, ways = aot.jobs(("sm_80", "sm_90"), default_only=True), ("forward", "gradient")
    names = [name.split() for _, name, _ in jobs]
    compiled_as = {"kmeans_step": "kmeans", "assign_and_pool": "kmeans"}  # operations without kernels under their name
    assert {compiled_as.get(op, op) for op in KERNELS} <= {words[0] for words in names}
    for op in ("part_pool", "kmeans_pyramid"):
        rows = {name for _, name, _ in configs.table(op) if "tuned" not in name}
        assert rows == {words[1] for words in names if words[0] == op and words[1].startswith("row")}
    steps = [words[2:4] for words in names if words[:2] in (["kmeans", "step"], ["kmeans", "assign"])]
    assert {arch for arch, _ in steps} == {"default", "sm_90"}
    assert {dtype for _, dtype in steps} == {"fp32", "fp16", "bf16"}
    wanted = {
        (way, arch, row.kind, f"D{row.channels}")
        for way in ways for arch, _, row in configs.table(f"contrast {way}") if arch in ("default", "sm_90")
    }  # fmt: skip
    compiled = {re.match(r"contrast (\w+) (\w+) \w+ (.+?) (D\d+)", name) for _, name, _ in jobs}
    assert wanted == {found.groups() for found in compiled if found and found[1] in ways}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_each_architecture_compiles_the_rows_that_it_runs(dtype, arch):
    names = {name for _, name, _ in aot.jobs((arch,), default_only=False)}
    for kernel in ("forward", "gradient"):
        assert any(name.startswith(f"contrast {kernel}") and f" {dtype} " in name for name in names)
    steps = ("kmeans step", "kmeans assign")  # the second where the sums of a typical problem do not fit the registers
    assert any(name.startswith(steps) and f" {dtype} " in name for name in names)


@pytest.mark.quick
def test_every_case_has_its_own_name():
    names = [job[:2] for job in aot.jobs(("gfx942",), default_only=False)]
    assert names
    assert len(set(names)) == len(names)


def test_faults_of_a_compilation_are_named(monkeypatch):
    case = ("fgfast.kernels.part_pool.cases", "part_pool join bf16", "sm_86")
    assert aot.faults({case: aot.Report(100, 0, 99 * 1024)}) == []
    assert "spills 4 bytes per thread" in aot.faults({case: aot.Report(255, 4, 0)})[0]
    assert "99 KiB" in aot.faults({case: aot.Report(100, 0, 99 * 1024 + 1)})[0]
    assert "does not compile" in aot.faults({case: aot.Report(0, 0, 0, "Error: no")})[0]
    row = ("fgfast.kernels.part_pool.cases", "part_pool row1 forward bf16 rows", "sm_90")
    assert "more than the 32 KiB allowed" in aot.faults({row: aot.Report(100, 0, 32 * 1024 + 1)})[0]
    tuned = aot.cases(case[0])[case[1]]._replace(tuned=True)
    monkeypatch.setattr(aot, "cases", lambda module: {case[1]: tuned})
    assert aot.faults({case: aot.Report(255, 4, 0)}) == []


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shared", [227, 99, 64, 48])
def test_an_unknown_device_gets_a_row_that_fits(dtype, shared):
    row = configs.choose("part_pool", "sm_999", shared, (configs.row_kind(dtype),))
    assert row is not None
    assert row.shared <= shared
    assert row.kind == ("fp32" if dtype == torch.float32 else "half")


def test_no_row_that_fits_is_an_error(monkeypatch):
    monkeypatch.setattr(configs, "shared_memory", lambda device: 1)
    monkeypatch.setattr(configs, "_find", configs._find.__wrapped__)
    with pytest.raises(RuntimeError, match="part_pool"):
        configs.config("part_pool", torch.device("cpu"), "fp32")


def test_a_measured_row_comes_first(monkeypatch):
    measured = ("fp32", {"BLOCK_D": 128, "BLOCK_P": 128}, 8, 4, 200, 0, 0)
    monkeypatch.setitem(configs.TUNED, ("part_pool", "sm_90"), [measured])
    assert configs.choose("part_pool", "sm_90", 227, ("fp32",)) == configs.Row(*measured)
    assert configs.choose("part_pool", "sm_90", 163, ("fp32",)) == configs.ROWS["part_pool", "default"][2]
    assert ("sm_90", "tuned sm_90 row0") in [entry[:2] for entry in configs.table("part_pool")]


def test_a_measured_row_hides_no_narrower_kind(monkeypatch):
    """A row measured with bfloat16 is not used for float16, which has separate rows."""
    measured = ("half", configs.ROWS["contrast gradient", "sm_90"][2].tiles, 8, 3, 163, 0, 256)
    monkeypatch.setitem(configs.TUNED, ("contrast gradient", "sm_90"), [measured])
    assert configs.choose("contrast gradient", "sm_90", 227, ("half",), 128) == configs.Row(*measured)
    half = configs.choose("contrast gradient", "sm_90", 227, ("fp16", "half"), 128)
    assert half is not None
    assert half.kind == "fp16"


def test_a_forced_row_is_used_only_by_its_operation():
    device, row = torch.device("cpu"), configs.ROWS["part_pool", "default"][1]
    usual = configs.config("part_pool", device, "half")
    with configs.force_row("part_pool", row):
        assert configs.config("part_pool", device, "half") == row
        assert configs.config("kmeans_step", device, "half") != row
    assert configs.config("part_pool", device, "half") == usual != row


@pytest.mark.parametrize(
    ("kinds", "channels", "wanted"),
    [(("half",), 128, ("half", 128)), (("half",), 129, ("half", 256)), (("half",), 257, ("half", 8192)),
     (("fp16", "half"), 200, ("fp16", 8192)), (("ieee",), 8192, ("ieee", 8192))],
)  # fmt: skip
def test_the_first_row_for_kind_and_channels(kinds, channels, wanted):
    row = configs.choose("contrast gradient", "sm_90", 227, kinds, channels)
    assert row is not None
    assert (row.kind, row.channels) == wanted


def test_the_tuner_writes_rows_that_can_be_read():
    tuned = {("part_pool", "sm_90"): [("fp32", {"BLOCK_D": 128, "BLOCK_P": 128}, 8, 4, 200, 0, 0)] * 3}
    scope = {}
    exec(tune.text(tuned), scope)
    assert scope["TUNED"] == tuned


def test_the_tuner_reports_that_it_needs_a_gpu():
    done = run("tune", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "GPU" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="small cases for the interpreter")
@pytest.mark.parametrize(
    ("module", "size", "ops"),
    [
        (contrast_cases, {"number": 8}, {"contrast forward", "contrast gradient"}),
        (kmeans_cases, {"images": 1, "side": 8}, {"kmeans_step"}),
        (pyramid_cases, {"images": 1, "side": 4, "channels": (16, 32)}, {"kmeans_pyramid"}),
        (part_pool_cases, {"images": 1, "side": 4}, {"part_pool"}),
    ],
    ids=["contrast", "kmeans_step", "kmeans_pyramid", "part_pool"],
)
def test_the_operation_runs_with_the_rows_that_the_tuner_tries(module, size, ops):
    found = list(module.tune_cases("cpu", **size))
    assert {case.op for case in found} == ops
    for case in found:
        assert len(case.rows) == len({str(row) for row in case.rows}) > 1
        with configs.force_row(case.op, case.rows[0]):
            case.run()


def test_a_measured_row_of_the_step_is_compiled_like_its_kind(monkeypatch):
    """A row for aligned float32 pixels is treated as float32, and a measured row may spill."""
    plain = configs.choose("kmeans_step", "sm_80", 163, ("fp32",))
    assert plain is not None
    row = plain._replace(kind="fp32 aligned")
    assert tile(row, 2048, 256) == tile(plain, 2048, 256)
    monkeypatch.setitem(configs.TUNED, ("kmeans_step", "sm_80"), [tuple(row._replace(stages=3))])
    cases = [case for case in kmeans_cases.aot_cases() if " fp32 768x25 maps" in case.name]
    assert {case.archs for case in cases if case.tuned} == {("sm_80",)}
    for case in cases:
        for arch in case.archs:
            chosen = configs.choose("kmeans_step", arch, configs.SHARED[arch], ("fp32 aligned", "fp32"))
            assert chosen is not None
            assert case.shared == chosen.shared
