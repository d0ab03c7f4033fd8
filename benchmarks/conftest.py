"""Collects the measurements of a pytest run, and ends it with one table and the same as a page."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import record, table
from benchmarks.ceilings import Ceilings
from benchmarks.ceilings import measure as measure_ceilings
from benchmarks.timing import CudaClock, Measurement

PAGE = Path(__file__).resolve().parents[1] / "build" / "benchmarks.html"
ROWS = pytest.StashKey[list[table.Row]]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Leave out pytest-benchmark's own table, which knows only our times."""
    config.option.benchmark_quiet = True
    config.stash[ROWS] = []


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of image manifests for this run only."""
    os.environ["FGFAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def ceilings() -> Ceilings | None:
    """The limits of the GPU; None without one."""
    return measure_ceilings(torch.device("cuda"), CudaClock()) if torch.cuda.is_available() else None


@pytest.fixture
def report(request: pytest.FixtureRequest, ceilings: Ceilings | None) -> Callable[[Sequence[Measurement]], None]:
    """Add a line to the table: the measurements of a case, ours first."""
    return lambda results: request.config.stash[ROWS].append(table.row(results, ceilings))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table and write the page."""
    rows = config.stash[ROWS]
    if not rows:
        return
    here = record.setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    setting = f"{here['device']}, {torch.get_num_threads()} threads, {here['versions']}, commit {here['commit']}"
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    terminalreporter.write_sep("=", "benchmarks")
    terminalreporter.write_line(setting)
    terminalreporter.write_line(table.as_text(rows, width, colour=terminalreporter.hasmarkup))
    try:
        terminalreporter.write_line(f"The same with bars: {table.write_page(rows, setting, PAGE)}")
    except ImportError:
        terminalreporter.write_line("Without jinja2 there is no page with bars: pip install jinja2.")
