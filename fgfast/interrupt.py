"""Ctrl-C in the command ``fgfast``: one line and exit status 130 at any moment, the imports included.

An import may swallow KeyboardInterrupt or turn it into an ImportError. So none is raised within one: before the command
has begun its work the process ends at once, and later the interrupt waits until the import is done.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

RETRY = 0.05  # seconds
_PACKAGE = os.path.join(os.path.dirname(__file__), "")
_COMMAND_LINE = os.path.join(_PACKAGE, "cli", "")
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
"""Signals that end a command: of a person, of the system and of a scheduler whose time is nearly up."""
_SIGNALS = [*STOPS, *(getattr(signal, name) for name in ("SIGALRM",) if hasattr(signal, name))]


def handle(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; within an import end the process instead, or try again shortly if it is at work."""
    importing = working = False
    while frame is not None:
        code = frame.f_code
        importing |= code.co_filename.startswith("<frozen importlib")
        in_package = code.co_filename.startswith(_PACKAGE) and not code.co_filename.startswith(_COMMAND_LINE)
        working |= in_package and code.co_name != "<module>"
        frame = frame.f_back
    if not importing:
        raise KeyboardInterrupt
    if working and hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, RETRY)
        return
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, b"fgfast: interrupted.\n")
    os._exit(130)


@contextlib.contextmanager
def interruptible(*, last: bool) -> Iterator[None]:
    """Handle the stop signals by :func:`handle`; possible only in the main thread, elsewhere nothing changes.

    A signal that is ignored stays so: a job that a script starts in the background survives a Ctrl-C.

    Args:
        last: the process ends afterwards, and ignores further interrupts while it does.
    """
    try:
        before = _take_signals()
    except ValueError:
        yield
        return
    if last:
        sys.unraisablehook = _retry_lost_interrupt
        before[signal.SIGINT] = signal.SIG_IGN
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def shielding_children() -> Iterator[None]:
    """Start processes that do not get the SIGINT of Ctrl-C, from their first moment on: this process reports it.

    Nor do they get the SIGUSR1 that a scheduler sends to every process of a job.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})  # a child inherits the mask
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_alone() -> None:
    """In a process that works for another one: leave the stop signals that a whole job gets to the parent.

    A SIGTERM that the parent itself sends still ends the process.
    """
    if not hasattr(signal, "sigwaitinfo"):
        return

    def obey() -> None:
        while True:
            sent = signal.sigwaitinfo(STOPS)
            if sent.si_signo == signal.SIGTERM and sent.si_pid == os.getppid():
                os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # the thread inherits it
    threading.Thread(target=obey, daemon=True).start()


def _retry_lost_interrupt(lost: Any) -> None:
    """Repeat an interrupt that Python could not raise, as in a destructor, instead of printing its traceback."""
    if issubclass(lost.exc_type, KeyboardInterrupt) and hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, RETRY)
    else:
        sys.__unraisablehook__(lost)


def _take_signals() -> dict[int, Any]:
    """Set :func:`handle` for the signals that are not ignored, and return their handlers before."""
    numbers = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handle) for number in numbers}


def _is_the_command() -> bool:
    """Whether this process was started as ``fgfast`` or ``python -m fgfast``."""
    if sys.argv[:1] == ["-m"]:  # until Python has found the module
        return ("-m", "fgfast") in itertools.pairwise(sys.orig_argv)
    return os.path.basename((sys.argv or [""])[0]) in ("fgfast", "fgfast.exe")


# The package imports this module first and torch next.
if _is_the_command() and "--multiprocessing-fork" not in sys.orig_argv:
    # torch prints its C++ stack for every rank that has gone, which the command says in one sentence
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with contextlib.suppress(ValueError):  # not the main thread
        _take_signals()
