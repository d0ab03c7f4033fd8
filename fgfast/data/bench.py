"""The speed of the data pipeline, stage by stage: reading, decoding, augmenting and copying.

Each stage is timed alone on a sample of the images, with what comes before it done: reading on the files, which
are in the page cache after the first pass; decoding on their contents in memory; augmenting by the loader itself on
decoded images; copying on its batches. "all" is the loader as a run uses it, with its stages at the same time on the
same cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch

from fgfast.data.base import Loader
from fgfast.data.decode import open_image, upright_rgb
from fgfast.data.loader import make_loader
from fgfast.data.manifest import Records, check_images
from fgfast.data.plan import BatchPlan
from fgfast.data.slices import read_file
from fgfast.data.views import Batch, ViewSpec

STAGES = ("reading", "decoding", "augmenting", "copying", "all")
SAMPLE = 512
"""Most images that are kept in memory for decoding and augmenting."""


@dataclass(frozen=True)
class Speeds:
    """Images per second of each of :data:`STAGES` with a number of threads."""

    threads: int
    reading: float
    decoding: float
    augmenting: float
    copying: float
    all: float

    @property
    def slowest(self) -> str:
        """The stage that takes most of the time."""
        return min(STAGES[:-1], key=lambda name: getattr(self, name))

    def verdict(self, needed: float) -> str:
        """Whether a trainer that takes ``needed`` images per second waits, and for which stage.

        Example:
            >>> Speeds(2, 9000, 800, 1500, 20000, 500).verdict(600)
            'starved by decoding'
            >>> Speeds(2, 9000, 800, 1500, 20000, 500).verdict(400)
            'fed'
        """
        return "fed" if self.all >= needed else f"starved by {self.slowest}"


def measure(
    records: Records,
    spec: ViewSpec,
    batch_size: int,
    threads: int,
    *,
    backend: str,
    device: torch.device | str = "cpu",
    seconds: float = 3.0,
) -> Speeds:
    """Time each stage for about ``seconds`` with a number of threads.

    Args:
        records: the usable images, from ``check_images``.
        spec: the views of a batch.
        batch_size: images per batch, at most :data:`SAMPLE`.
        threads: decoding threads, or worker processes of the torchvision loader.
        backend: "dali" or "torchvision".
        device: device of the batches.
        seconds: time for each stage, after a pass to start threads and fill caches.
    """
    device = torch.device(device)
    rows = np.random.default_rng(0).permutation(len(records))[:SAMPLE]
    batch_size = min(batch_size, len(rows))

    def loader(kept: Records, memory_mb: int) -> Loader:
        return make_loader(
            kept.images, spec, batch_size, drop_last=True, threads=threads, backend=backend, device=device,
            records=kept, memory_mb=memory_mb,
        )  # fmt: skip

    with ThreadPoolExecutor(threads) as pool:
        files = [records.files[row] for row in rows]
        reading = _rate(lambda: len(list(pool.map(read_file, files))), seconds)
        contents = list(pool.map(read_file, files))
        decoding = 0.0 if backend == "dali" else _rate(lambda: len(list(pool.map(_decode, contents))), seconds)
    if backend == "dali":
        from fgfast.data.dali_pipeline import Decoder

        decoder = Decoder(contents[:batch_size], threads, device)
        decoding = _rate(decoder.run, seconds)
    sample = check_images(records.images.subset(records.index[rows]), quiet=True)
    in_memory = loader(sample, 2**30)
    if in_memory.backend == "torchvision":
        in_memory.close()
        in_memory = _torchvision_in_memory(in_memory.plan, device, threads)
    augmenting, batches = _loader_rate(in_memory, seconds, keep=4)
    copying = _rate(lambda: sum(_copy(batch, device) for batch in batches), seconds)
    return Speeds(threads, reading, decoding, augmenting, copying, _loader_rate(loader(records, 0), seconds)[0])


@dataclass(frozen=True)
class _Decoded(BatchPlan):
    """A plan whose images are in memory, for the worker processes of the torchvision loader."""

    images: tuple[np.ndarray, ...] = ()

    def pixels(self, row: int) -> np.ndarray:
        """The upright image, uint8 [H, W, 3]."""
        return self.images[row]


def _torchvision_in_memory(plan: BatchPlan, device: torch.device, threads: int) -> Loader:
    from fgfast.data.torchvision_loader import TorchvisionLoader

    images = tuple(plan.pixels(row) for row in range(len(plan.records)))
    return TorchvisionLoader(_Decoded(**vars(plan), images=images), device=device, threads=threads)


def _decode(content: bytes) -> np.ndarray:
    with open_image(BytesIO(content)) as image:
        return upright_rgb(image)


def _loader_rate(loader: Loader, seconds: float, keep: int = 0) -> tuple[float, list[Batch]]:
    """Images per second of a loader after a first epoch, or after ``seconds`` of it; and its first batches."""
    batches = _forever(loader)
    kept: list[Batch] = []
    start = time.perf_counter()
    for n in range(len(loader)):
        batch = next(batches)
        if n < keep:
            kept.append(batch.to("cpu"))
        if n and time.perf_counter() - start > seconds:
            break
    rate = _rate(lambda: len(next(batches)), seconds)
    loader.close()
    return rate, kept


def _forever(loader: Loader) -> Iterator[Batch]:
    while True:
        yield from loader


def _rate(run: Callable[[], int], seconds: float) -> float:
    """Images per second of repeated runs, each of which returns their number."""
    run()
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or not images:
        images += run()
    return images / (time.perf_counter() - start)


def _copy(batch: Batch, device: torch.device) -> int:
    """Copy a batch to a device as a loader does; on the CPU, within its memory."""
    for value in vars(batch).values():
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, torch.Tensor):
                tensor.to(device, non_blocking=True, copy=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return len(batch)
