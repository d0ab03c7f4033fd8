"""The test suite's own rules: parts of the sweeps, and failures for skips caused by missing packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import in_part

ROOT = Path(__file__).resolve().parents[1]


def test_every_test_is_in_one_part() -> None:
    names = [f"tests/test_{i}.py::test_{i}" for i in range(200)]
    for parts in (1, 8):
        member = [[in_part(name, f"{part}/{parts}") for part in range(1, parts + 1)] for name in names]
        assert all(sum(row) == 1 for row in member)
        assert all(any(column) for column in zip(*member, strict=True))


@pytest.mark.parametrize("part", ["0/8", "9/8", "3", "a/b", "3/8/1"])
def test_an_invalid_part_is_an_error(part: str) -> None:
    with pytest.raises(pytest.UsageError, match="give a part as 3/8"):
        in_part("tests/test_x.py::test_x", part)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ('import pytest\npytest.importorskip("no_such_package")\ndef test_x(): pass', 1, "could not import"),
        ('import pytest\ndef test_x(): pytest.skip("the package x is not installed")', 1, "x is not installed"),
        ('import pytest\ndef test_x(): pytest.skip("no CUDA device was found")\ndef test_y(): pass', 0, ""),
    ],
)
def test_a_skip_for_a_missing_package_fails_only_if_all_are_required(
    tmp_path: Path, body: str, status: int, message: str
) -> None:
    (tmp_path / "test_it.py").write_text(body)
    options = ["-p", "tests.conftest", "-n", "1", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    for strict in ("1", "0"):
        environment = os.environ | {"FGFAST_ALL_PACKAGES": strict, "FGFAST_PART": ""}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode == 1) == (status == 1 and strict == "1"), done.stdout
        assert message in done.stdout or strict == "0"
