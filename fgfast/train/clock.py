"""Images per second, and the share of the time that training waits for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fgfast.data.views import Batch


class Clock:
    """Images, seconds and seconds of waiting for data since the last reading."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.start, self.waited, self.images = time.perf_counter(), 0.0, 0

    def wait_for(self, batches: "Iterator[Batch]") -> "Batch | None":
        """The next batch, or None at the end of the epoch."""
        start = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - start
        return batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out: evaluation is not training."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def read(self, passes_per_image: float) -> dict[str, float]:
        """The rates since the last reading."""
        seconds = time.perf_counter() - self.start
        rate, waiting = self.images / seconds, self.waited / seconds
        self._reset()
        return {"images_per_s": rate, "passes_per_s": rate * passes_per_image, "data_wait": waiting}
