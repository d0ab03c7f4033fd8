"""Shards that are needed next are read from start to end, so that single images are found in the page cache.

Images are read one by one, in random order within a shard: quick from memory, slow from a disk or an object store,
where one long read costs little more than a short one.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from queue import SimpleQueue

import numpy as np

from fgfast.data.plan import BatchPlan

BATCHES = 4
"""Batches whose shards are read ahead."""
_CHUNK = 2**22


class ReadAhead:
    """Reads shards ahead of the batches of a loader, in a thread that starts with the first one.

    Args:
        plan: the plan; without shards, or in the order of the files, which needs no help, nothing is done.
    """

    def __init__(self, plan: BatchPlan) -> None:
        self._plan = plan
        self._slices = plan.records.images.slices if plan.shards is not None else None
        self._asked: set[int] = set()
        self._epoch = -1
        self._files: SimpleQueue[str | None] = SimpleQueue()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def ask(self, epoch: int, batch: int) -> None:
        """Read the shards of the next batches from ``batch`` on, each once an epoch."""
        if self._slices is None:
            return
        if epoch != self._epoch:
            self._epoch, self._asked = epoch, set()
        last = min(batch + BATCHES, len(self._plan))
        for at in range(batch, last):
            rows, _ = self._plan.batch_rows(epoch, at)
            for shard in np.unique(self._slices.which[self._plan.records.index[rows]]).tolist():
                if shard >= 0 and shard not in self._asked:
                    self._asked.add(shard)
                    self._files.put(self._slices.files[shard][0])
        if self._thread is None and last > batch:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._ended.set()
            self._files.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (file := self._files.get()) is not None:
            if not self._ended.is_set():
                read_through(file)


def read_through(file: str) -> None:
    """Read a file from start to end and drop it; whoever needs it reports an error."""
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            while os.read(descriptor, _CHUNK):
                pass
        finally:
            os.close(descriptor)
