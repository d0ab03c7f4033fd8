"""A thread that prepares batches ahead of the training without competing for its cores."""

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
    """Runs an iterator of batches in a thread, a few ahead of the consumer.

    Args:
        items: the iterator.
        start: (epoch, batch) of its first item.
        length: batches per epoch.
        depth: maximum number of waiting items.

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
        _use_one_thread()
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
        """The next item; an error of the iterator is raised here."""
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.next = (-1, -1)  # the thread has ended: the next iteration starts another
            raise item
        epoch, batch = self.next
        self.next = (epoch, batch + 1) if batch + 1 < self._length else (epoch + 1, 0)
        return item

    def close(self) -> None:
        """End the thread and discard the waiting items."""
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.01)  # wakes a thread that waits for room
            except queue.Empty:
                continue


@atexit.register
def _stop_all() -> None:
    """Stop the threads before the interpreter exits: one that is still inside DALI would abort the process."""
    for producer in list(_running):
        producer.close()


def _use_one_thread() -> None:
    """Keep torch's operations of this thread on one core; the OpenMP threads are left to the training.

    omp_set_num_threads affects only the calling thread, torch.set_num_threads the full process.
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
