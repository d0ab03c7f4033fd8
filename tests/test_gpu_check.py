"""benchmarks/gpu_check.sh with commands that stand for Python and compute-sanitizer."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAMPLER = "sampler-on-the-device"
LOGS = ["device-tests", "kernels-on-the-device", "memcheck", "overflow", "racecheck", SAMPLER, "training"]


def check(folder: Path, python: str, *checks: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with ``python``, lines of bash, in place of Python where it runs pytest."""
    stub, sanitizer = folder / "python", folder / "sanitizer"
    stub.write_text(f'#!/usr/bin/env bash\n[[ $1 == -c ]] && exit "${{NO_GPU:-0}}"\n{python}\n')
    sanitizer.write_text('#!/usr/bin/env bash\nuntil [[ $1 == */python ]]; do shift; done\nexec "$@"\n')
    for file in (stub, sanitizer):
        file.chmod(0o755)
    command = {"PYTHON": str(stub), "SANITIZER": str(sanitizer), "OUT": str(folder / "logs"), "WORKERS": "1"}
    return subprocess.run(
        ["bash", ROOT / "benchmarks/gpu_check.sh", *checks], env={**os.environ, **command, **environment},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_all_checks_run_and_keep_their_output(tmp_path):
    done = check(tmp_path, 'echo "ran $*"; exit 0')
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        0,
        "All passed: tests memcheck overflow racecheck training.",
    )
    assert sorted(log.stem for log in (tmp_path / "logs").iterdir()) == LOGS
    assert "ran -m pytest" in (tmp_path / "logs/racecheck.log").read_text()


def test_a_failure_is_named_and_the_other_checks_run(tmp_path):
    done = check(tmp_path, '[[ $* == *test_mask* ]] && exit 1; [[ $* == *"-m gpu"* ]] && exit 5; exit 0')
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "Failed: sampler on the device (1)")
    assert "== training ended" in done.stdout


@pytest.mark.parametrize(
    ("printed", "status", "outcome"),
    [
        ("....", 3, "Not finished: memcheck (cut short)"),
        ("..F.", 1, "Failed: memcheck (and cut short)"),
        ("FAILED tests/test_x.py::test_y", 1, "Failed: memcheck (and cut short)"),
    ],
)
def test_a_check_ends_with_the_budget_and_those_after_it_do_not_begin(tmp_path, printed, status, outcome):
    done = check(tmp_path, f'echo "{printed}"; exec sleep 30', "memcheck", "overflow", BUDGET="2", LEAST="1")
    assert done.returncode == status
    assert {outcome, "Not finished: overflow (not begun)"} <= set(done.stdout.splitlines())
    assert "All passed" not in done.stdout


def test_without_a_gpu_or_with_an_unknown_name_nothing_runs(tmp_path):
    for done in (check(tmp_path, "exit 0", NO_GPU="1"), check(tmp_path, "exit 0", "memcheck", "wrong")):
        assert done.returncode == 2
        assert "==" not in done.stdout


def test_a_sanitizer_that_is_missing_is_a_failure(tmp_path):
    done = check(tmp_path, "exit 0", "racecheck", SANITIZER=str(tmp_path / "absent"))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "Failed: racecheck (not found)")
