"""Shared fixtures, Triton's interpreter without a GPU, parts of the sweeps, and failures for missing packages.

FGFAST_PART=3/8 runs the third of eight parts of the tests, by a hash of their names. With FGFAST_ALL_PACKAGES=1 the run
fails if a test is skipped for any other reason than a missing GPU or missing photographs.
"""

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from fgfast.data.imageset import ImageSet

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is imported

TINY = "test_resnet"  # timm's smallest residual network: 0.3 M weights
# Reasons of skips that installing packages cannot prevent; the last is a docstring example that is never run.
ALLOWED = re.compile(r"CUDA|GPU|FGFAST_TEST_DATA|\+SKIP option")
skipped: dict[str, str] = {}  # reasons of all other skips, by test


def in_part(name: str, part: str) -> bool:
    """Whether a test belongs to a part, "3/8"."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if not match or int(match[1]) > int(match[2]):
        raise pytest.UsageError(f"FGFAST_PART is {part!r}: give a part as 3/8, from 1/8 to 8/8.")
    return zlib.crc32(name.encode()) % int(match[2]) == int(match[1]) - 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of other parts than FGFAST_PART."""
    part = os.environ.get("FGFAST_PART")
    if part:
        config.hook.pytest_deselected(items=[item for item in items if not in_part(item.nodeid, part)])
        items[:] = [item for item in items if in_part(item.nodeid, part)]


def _record_skip(report: pytest.CollectReport | pytest.TestReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not ALLOWED.search(reason):
            skipped[report.nodeid] = reason


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record a skipped test."""
    _record_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Record a skipped file."""
    _record_skip(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if tests were skipped for missing packages."""
    if os.environ.get("FGFAST_ALL_PACKAGES") == "1" and skipped and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the tests skipped for missing packages."""
    if os.environ.get("FGFAST_ALL_PACKAGES") == "1" and skipped:
        terminalreporter.section("skipped for missing packages")
        for name, reason in skipped.items():
            terminalreporter.line(f"{name}: {reason}")


@pytest.fixture(scope="session", autouse=True)
def _separate_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the manifests of the tests out of the user's cache."""
    patch = pytest.MonkeyPatch()
    patch.setenv("FGFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set of 3 classes and 36 images of 48 px."""
    from fgfast.data.synthetic import generate

    return Path(generate(tmp_path_factory.mktemp("drawn") / "set", classes=3, images=36, size=48, seed=0, workers=1))


def real_data(name: str) -> Path:
    """A data set in the folder that FGFAST_TEST_DATA names; without it the test is skipped."""
    folder = Path(os.environ.get("FGFAST_TEST_DATA") or "/nowhere") / name
    if not folder.is_dir():
        pytest.skip(f"FGFAST_TEST_DATA names no folder that holds {name}")
    return folder


@pytest.fixture
def photographs() -> "ImageSet":
    """Images of the first 50 species of CUB-200-2011."""
    from fgfast.data.layouts import open_images

    return open_images(real_data("CUB_200_2011_first50"))
