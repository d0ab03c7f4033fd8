"""Stop signals, collected so that training can end after a complete step."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fgfast.interrupt import STOPS

ECHO = 0.5
"""Seconds within which a second SIGINT is the same Ctrl-C: the terminal sends one, and torchrun another."""


class StopSignals(list[int]):
    """The stop signals that have come."""

    at_once = False

    @contextmanager
    def raised(self, at_once: bool) -> Iterator[None]:
        """Raise KeyboardInterrupt at a signal within the block, and at its start if one has come, if ``at_once``."""
        if at_once and self:
            raise KeyboardInterrupt
        self.at_once = at_once
        try:
            yield
        finally:
            self.at_once = False


@contextmanager
def collect_stop_signals() -> Iterator[StopSignals]:
    """Collect SIGINT, SIGTERM and SIGUSR1; a second Ctrl-C raises KeyboardInterrupt at once.

    Schedulers send SIGUSR1 (preemption, the end of the time) and SIGTERM, both perhaps more than once: they never cut
    a checkpoint short. A signal that is ignored stays so. Outside the main thread, where no handler can be set, the
    list stays empty.

    Raises:
        KeyboardInterrupt: at the end of a block that raises nothing, if a signal came.
    """
    caught, interrupted = StopSignals(), math.inf

    def handle(number: int, _frame: object) -> None:
        nonlocal interrupted
        caught.append(number)
        again = number == signal.SIGINT and time.monotonic() > interrupted + ECHO
        if number == signal.SIGINT and interrupted == math.inf:
            interrupted = time.monotonic()
        if again or caught.at_once:
            raise KeyboardInterrupt

    try:
        numbers = [s for s in STOPS if signal.getsignal(s) is not signal.SIG_IGN]
        before = {s: signal.signal(s, handle) for s in numbers}
    except ValueError:
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt
