"""Fixtures of several folders, Triton interpreted without a GPU, parts of the sweeps, no skips for lack of a package.

FGFAST_PART=3/8 keeps the third of eight parts of the tests, by a hash of their names. With FGFAST_ALL_PACKAGES=1 a run
fails when it skipped a test for any other reason than a GPU or photographs that are not there.
"""

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported; there is no device for its kernels

TINY = "test_resnet"  # timm's smallest residual network: 0.3 M weights
# In the reason of a skip that no package would have prevented; the last is an example of a docstring that is not run.
ALLOWED = re.compile(r"CUDA|GPU|FGFAST_TEST_DATA|\+SKIP option")
skipped: dict[str, str] = {}  # reasons of the others, by test


def in_part(name: str, part: str) -> bool:
    """Whether a test belongs to a part, "3/8"."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if not match or int(match[1]) > int(match[2]):
        raise pytest.UsageError(f"FGFAST_PART is {part!r}: name a part as 3/8, from 1/8 to 8/8.")
    return zlib.crc32(name.encode()) % int(match[2]) == int(match[1]) - 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not of the part asked for."""
    part = os.environ.get("FGFAST_PART")
    if part:
        config.hook.pytest_deselected(items=[item for item in items if not in_part(item.nodeid, part)])
        items[:] = [item for item in items if in_part(item.nodeid, part)]


def _note_skip(report: pytest.CollectReport | pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not ALLOWED.search(reason):
            skipped[report.nodeid] = reason


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note a skipped test."""
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Note a skipped file."""
    _note_skip(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where something was skipped that the lock would have brought."""
    if os.environ.get("FGFAST_ALL_PACKAGES") == "1" and skipped and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was skipped for lack of something."""
    if os.environ.get("FGFAST_ALL_PACKAGES") == "1" and skipped:
        terminalreporter.section("skipped for lack of a package")
        for name, reason in skipped.items():
            terminalreporter.line(f"{name}: {reason}")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the manifest of checked files out of the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FGFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic set of 3 classes and 36 images of 48 px."""
    from fgfast.data.synthetic import generate

    return Path(generate(tmp_path_factory.mktemp("drawn") / "set", classes=3, images=36, size=48, seed=0, workers=1))
