"""Loading and drawing images on the CPU: two views of each image by DALI and by torchvision v2, and the drawn birds.

CUB-200-2011 photographs (short side 192) where FGFAST_TEST_DATA names a folder with CUB_200_2011_first50, otherwise
drawn birds, JPEGs of 128 pixels. Both loaders apply the same draws; before one is timed, its views are compared with
torchvision's. DALI has its decoded images in memory (decoded before the clock starts); "from files" decodes them in
each epoch.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import torch

from benchmarks.cases.common import peer
from benchmarks.timing import Answer, Case, Judge, Run, Variant, Verdict
from fgfast.data.base import Loader
from fgfast.data.layouts import ImageSet, open_images
from fgfast.data.loader import make_loader
from fgfast.data.synthetic import generate
from fgfast.data.views import Crop, ViewSpec

IMAGES, BATCH = 512, 32
LOADERS = {"fgfast DALI": ("dali", 4096), "fgfast DALI, from files": ("dali", 0), "torchvision": ("torchvision", 0)}


@lru_cache
def images() -> ImageSet:
    """The images of all cases; FGFAST_CACHE is a temporary folder of pytest."""
    photographs = Path(os.environ.get("FGFAST_TEST_DATA", "/nowhere")) / "CUB_200_2011_first50"
    if photographs.is_dir():
        return open_images(photographs).subset(range(0, 5 * IMAGES, 5))
    return open_images(generate(Path(os.environ["FGFAST_CACHE"], "birds"), images=IMAGES))


def make(images: ImageSet, size: int, name: str, exact: bool = False) -> Loader:
    """A loader on every usable core: SimCLR's colours and half of the views blurred, or a view that can be compared."""
    backend, memory_mb = LOADERS[name]
    peer(*(("nvidia.dali", "DALI") if backend == "dali" else ("torchvision", "torchvision")))
    crop = Crop(size=size, grayscale=0.2, blur=0.5)
    spec = ViewSpec(crops=(Crop(size=size, jitter=(0.4, 0.4, 0.2, 0.0)),) if exact else (crop, crop))
    return make_loader(images, spec, BATCH, drop_last=True, backend=backend, memory_mb=memory_mb)


class Epoch:
    """One epoch of a loader, whose first batch is compared beforehand (without hue, whose formula differs)."""

    def __init__(self, size: int, count: int, name: str) -> None:
        few, found = images().subset(range(BATCH)), []
        for other in (name, "torchvision"):
            loader = make(few, size, other, exact=True)
            found.append(next(iter(loader)))
            loader.close()
        assert torch.equal(found[0].index, found[1].index)
        assert torch.equal(found[0].boxes, found[1].boxes)
        assert (found[0].views[0] - found[1].views[0]).abs().mean() < 0.06  # 2.5% of the range of normalised values
        self.loader = make(images().subset(range(count)), size, name)
        self(0)  # starts threads and processes, fills the memory

    def __call__(self, seed: int) -> Answer:
        return [torch.tensor(sum(len(batch) for batch in self.loader))]

    def close(self) -> None:
        self.loader.close()


class Training(Epoch):
    """An epoch of steps that keep one core busy for 60 ms each, and the fraction of it that waited for data."""

    def __call__(self, seed: int) -> Answer:
        waited, batches, start = 0.0, 0, time.perf_counter()
        source = iter(self.loader)
        while True:
            asked = time.perf_counter()
            if next(source, None) is None:
                break
            waited += (got := time.perf_counter()) - asked
            batches += 1
            while time.perf_counter() - got < 0.06:
                torch.ones(64, 64).sum()
        return [torch.tensor(batches * BATCH), torch.tensor(waited / (time.perf_counter() - start))]


def draw_birds(count: int) -> Run:
    def run(seed: int) -> Answer:
        with tempfile.TemporaryDirectory() as folder:
            return [torch.tensor(len(open_images(generate(Path(folder, "birds"), images=count, workers=1))))]

    return run


def _case(name: str, count: int, variants: tuple[Variant, ...]) -> Case:
    def judge(seed: int) -> Judge:
        def verdict(answer: Answer) -> Verdict:
            note = f"{100 * float(answer[1]):.1f}% of the time waits for data" if len(answer) > 1 else ""
            return Verdict(abs(float(answer[0]) - count), note)

        return verdict

    return Case("data", f"{name}, {count} images", "uint8", int, variants, judge, 0.0, host=True)


def cases(device: torch.device, tiny: bool = False) -> Iterator[Case]:
    for size, count in ((64, 32),) if tiny else ((64, 512), (224, 128)):
        loaders = tuple(Variant(name, partial(Epoch, size, count, name)) for name in LOADERS)
        yield _case(f"two {size}-pixel views", count, loaders)
    if not tiny:
        training = Variant("fgfast DALI", partial(Training, 64, 512, "fgfast DALI"))
        yield _case("two 64-pixel views while training", 512, (training,))
    count = 40 if tiny else 300
    yield _case("draw birds on one core", count, (Variant("fgfast", lambda: draw_birds(count)),))
