"""Ctrl-C at any moment: exit status 130 and one line."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from fgfast import interrupt
from fgfast.files import write_atomic
from fgfast.train.signals import collect_stop_signals

pytestmark = pytest.mark.slow

SWALLOWS = """
import os, signal

swallowed = False
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
except KeyboardInterrupt:
    swallowed = True
"""


@pytest.fixture
def swallows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that is interrupted while it is imported, and would swallow a KeyboardInterrupt."""
    (tmp_path / "swallows_interrupts.py").write_text(SWALLOWS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "swallows_interrupts", raising=False)
    return "swallows_interrupts"


@pytest.mark.parametrize("reached", ["fgfast.interrupt", "torch.nn.modules.conv", "tyro.conf"])
def test_an_interrupt_while_modules_are_imported_ends_the_command(reached: str) -> None:
    """Python itself reports what it has imported, so the moment does not depend on the speed of the machine."""
    command = [sys.executable, "-X", "importtime", "-m", "fgfast", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.split("|")[-1].strip() == reached:
                break
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    written = [line for line in rest.splitlines() if not line.startswith("import time:")]
    assert (process.returncode, written) == (130, ["fgfast: interrupted."])


def test_a_command_that_has_ended_ignores_an_interrupt() -> None:
    """Python takes a moment to end; the exit status stays that of the command."""
    code = """
import atexit, sys, time

atexit.register(lambda: (print("ending", flush=True), time.sleep(0.3)))
sys.argv = ["fgfast", "--help"]
from fgfast.cli.main import main

sys.exit(main())
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "ending\n":
            pass
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")


def test_an_interrupt_of_an_import_at_work_waits_until_it_is_done(swallows: str, tmp_path: Path) -> None:
    """The import is complete, then the work ends and its partial file is removed."""

    def work(partial: Path) -> None:
        partial.write_text("part")
        importlib.import_module(swallows)
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt), interrupt.interruptible(last=False):
        write_atomic(tmp_path / "out" / "file", work)
    assert sys.modules[swallows].swallowed is False
    assert not list((tmp_path / "out").iterdir())


def test_an_interrupt_of_an_import_before_the_work_ends_the_process(
    swallows: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit) as caught, interrupt.interruptible(last=False):
        importlib.import_module(swallows)
    assert (caught.value.code, capfd.readouterr().err) == (130, "fgfast: interrupted.\n")


def test_an_interrupt_that_python_drops_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    """A KeyboardInterrupt in a destructor goes nowhere: Python would print its traceback and continue."""

    def wait() -> None:
        interrupt._retry_lost_interrupt(SimpleNamespace(exc_type=KeyboardInterrupt))
        time.sleep(60)

    with pytest.raises(KeyboardInterrupt), interrupt.interruptible(last=False):
        wait()
    assert capsys.readouterr().err == ""


def test_a_child_gets_no_interrupt_from_its_first_moment_on() -> None:
    """One that starts Python would print a traceback of its own; a scheduler's warning would end it."""
    with interrupt.shielding_children():
        child = subprocess.Popen(["sleep", "0.2"])
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGUSR1)
    assert child.wait() == 0
    assert not {signal.SIGINT, signal.SIGUSR1} & signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.parametrize("number", interrupt.STOPS)
def test_every_stop_signal_interrupts_a_command(number: signal.Signals) -> None:
    """Also the one by which a scheduler says that the time is nearly up, which would end the process without a word."""
    with pytest.raises(KeyboardInterrupt), interrupt.interruptible(last=False):
        signal.raise_signal(number)


def test_signals_of_a_scheduler_are_collected_as_often_as_they_come() -> None:
    """They never cut short what a first one has begun, and none is lost that nobody has looked for."""
    with pytest.raises(KeyboardInterrupt), collect_stop_signals() as caught:  # noqa: PT012
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            signal.raise_signal(number)
        assert caught == [signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1]


def test_the_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in interrupt._SIGNALS]
    with interrupt.interruptible(last=False):
        assert {signal.getsignal(number) for number in interrupt._SIGNALS} == {interrupt.handle}
    assert [signal.getsignal(number) for number in interrupt._SIGNALS] == before


@pytest.mark.parametrize("take", [partial(interrupt.interruptible, last=False), collect_stop_signals])
def test_an_ignored_signal_stays_ignored(
    take: Callable[[], AbstractContextManager[object]],
) -> None:
    """A job that a script starts in the background survives a Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with take():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("ignored", [True, False])
def test_a_command_takes_no_ignored_signal_when_it_starts(ignored: bool) -> None:
    code = f"""
import importlib.util, os, signal, sys

if {ignored}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.argv = ["fgfast"]
spec = importlib.util.spec_from_file_location("interrupt", {interrupt.__file__!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))  # without torch, whose import takes seconds
assert os.environ["TORCH_CPP_LOG_LEVEL"]  # or torch prints its C++ stack when a rank has gone
sys.exit(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == ignored


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["/usr/bin/fgfast", "info"], ["python", "/usr/bin/fgfast", "info"], True),
        (["-m", "info"], ["python", "-u", "-m", "fgfast", "info"], True),
        (["-m", "fgfast"], ["python", "-m", "pytest", "fgfast"], False),
        (["train.py", "fgfast"], ["python", "train.py", "fgfast"], False),
        ([""], ["python"], False),
    ],
)
def test_only_the_command_takes_the_signal_when_the_package_is_imported(
    argv: list[str], orig_argv: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that uses the library keeps its handler."""
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert interrupt._is_the_command() == expected
