"""Tables of tile sizes, the compile check and the tuner."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from fgfast.kernels import aot, configs, tune


def run(module, *arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"fgfast.kernels.{module}", *arguments],
        env={**clean, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_default_rows_compile_for_two_generations(request):
    """Kept between runs: only what has changed is compiled again."""
    cache = request.config.cache.mkdir("fgfast_kernels")
    done = run("aot", "--default-only", "--arch", "sm_80", "sm_90", "--only", "part_pool row", FGFAST_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[1:]]
    assert {line[-4] for line in lines} == {"sm_80", "sm_90"}
    assert all(int(line[-3]) > 0 for line in lines)
    assert {line[1] for line in lines} == {f"row{i}" for i in range(len(configs.DEFAULTS["part_pool"]))}


def test_every_case_has_its_own_name():
    names = [job[:2] for job in aot.jobs(("gfx942",), default_only=False)]
    assert names
    assert len(set(names)) == len(names)


def test_what_a_compilation_may_not_do_is_named():
    case = ("module", "pool row0", "sm_86")
    assert aot.faults({case: aot.Report(100, 0, 99 * 1024)}) == []
    assert "spills 4 bytes" in aot.faults({case: aot.Report(255, 4, 0)})[0]
    assert "99 KiB" in aot.faults({case: aot.Report(100, 0, 99 * 1024 + 1)})[0]
    assert "does not compile" in aot.faults({case: aot.Report(0, 0, 0, "Error: no")})[0]
    assert aot.faults({("module", "pool tuned sm_86 row0", "sm_86"): aot.Report(255, 4, 0)}) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shared", [227, 99, 64, 48])
def test_an_unknown_device_gets_a_row_that_fits(dtype, shared, monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_999")
    monkeypatch.setattr(configs, "shared_memory", lambda device: shared)
    row = configs.config.__wrapped__("part_pool", torch.device("cuda"), dtype)
    assert row.shared <= shared
    assert row.bits == dtype.itemsize * 8


def test_no_row_that_fits_is_an_error(monkeypatch):
    monkeypatch.setattr(configs, "shared_memory", lambda device: 1)
    with pytest.raises(RuntimeError, match="part_pool"):
        configs.config.__wrapped__("part_pool", torch.device("cpu"), torch.float32)


def test_a_measured_row_comes_first(monkeypatch):
    measured = (32, {"BLOCK_D": 128, "BLOCK_P": 128}, 8, 4, 200)
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    monkeypatch.setitem(configs.TUNED, ("part_pool", "sm_90"), [measured])
    assert configs.config.__wrapped__("part_pool", torch.device("cpu"), torch.float32) == measured
    assert "part_pool tuned sm_90 row0" in dict(configs.table("part_pool"))


def test_the_tuner_writes_what_is_read():
    tuned = {("part_pool", "sm_90"): [(32, {"BLOCK_D": 128, "BLOCK_P": 128}, 8, 4, 200)] * 3}
    scope = {}
    exec(tune.text(tuned), scope)
    assert scope["TUNED"] == tuned


def test_the_tuner_says_that_it_needs_a_gpu():
    done = run("tune", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "GPU" in done.stderr
