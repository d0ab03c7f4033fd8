"""A thread that makes batches ahead of the training, and leaves the cores to it."""

from __future__ import annotations

import atexit
import ctypes
import os
import queue
import re
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Producer(Generic[T]):
    """Runs an iterator of batches in a thread, a few ahead of whoever takes them.

    Args:
        items: what to run.
        start: (epoch, batch) of its first item.
        length: batches an epoch.
        depth: how many items may wait.

    Attributes:
        next: (epoch, batch) of the item that ``get`` returns next.
    """

    def __init__(self, items: Iterator[T], start: tuple[int, int], length: int, depth: int) -> None:
        self.next = start
        self._length = length
        self._items = items
        self._queue: queue.Queue = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fgfast-data", daemon=True)
        self._thread.start()
        _running.add(self)

    def _work(self) -> None:
        _one_thread()
        try:
            for item in self._items:
                if not self._put(item):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: object) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def get(self) -> T:
        """The next item; what the iterator raised is raised here."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.next = (-1, -1)  # the thread has ended: the next iteration starts another
            raise item
        epoch, batch = self.next
        self.next = (epoch, batch + 1) if batch + 1 < self._length else (epoch + 1, 0)
        return item

    def close(self) -> None:
        """End the thread and throw away what it has made."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.01)  # wakes a thread that waits for room
            except queue.Empty:
                continue


@atexit.register
def _stop_all() -> None:
    """A thread that is still inside DALI when the interpreter goes away would abort the process."""
    for producer in list(_running):
        producer.close()


def _one_thread() -> None:
    """Keep torch's operations of this thread on one core: the team of OpenMP threads belongs to the training.

    omp_set_num_threads holds for the calling thread alone, while torch.set_num_threads changes the whole process.
    """
    try:
        with open("/proc/self/maps") as maps:
            paths = set(re.findall(r"(/\S*lib[gi]omp\S*\.so\S*)", maps.read()))
    except OSError:
        return
    for path in paths:
        if os.path.exists(path):
            ctypes.CDLL(path).omp_set_num_threads(1)


_running: weakref.WeakSet[Producer] = weakref.WeakSet()
