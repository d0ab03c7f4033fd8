"""Stop signals, collected so that training can end after a complete step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collect_stop_signals() -> Iterator[list[int]]:
    """Append SIGINT and SIGTERM to the list that is returned; a second signal raises KeyboardInterrupt at once.

    A signal that is ignored stays so. Outside the main thread, where no handler can be set, the list stays empty.
    """
    caught: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        numbers = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]
        before = {s: signal.signal(s, handle) for s in numbers}
    except ValueError:
        before = {}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
