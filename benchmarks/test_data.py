"""Two views of each image, in images a second: DALI against torchvision v2 on the same cores.

CUB-200-2011 photographs (short side 192) where FGFAST_TEST_DATA names a folder that holds CUB_200_2011_first50, drawn
128-pixel JPEGs otherwise. Both loaders apply the same draws; before a speed counts, their views are compared. "kept"
has its decoded images in memory (decoding them happens before the clock starts), "files" reads and decodes them anew.
"""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pytest_benchmark.fixture import BenchmarkFixture

from fgfast.data.base import Loader, default_threads
from fgfast.data.layouts import ImageSet, open_images
from fgfast.data.loader import make_loader
from fgfast.data.views import Crop, ViewSpec

PICTURES, BATCH = 512, 32
SIZES = {64: 512, 224: 128}  # pixels: images
VARIANTS = {"dali_kept": ("dali", 4096), "dali_files": ("dali", 0), "torchvision": ("torchvision", 0)}


def views(size: int) -> ViewSpec:
    """SimCLR's colours and half of its images blurred."""
    crop = Crop(size=size, grayscale=0.2, blur=0.5)
    return ViewSpec(crops=(crop, crop))


def drawn(root: Path) -> ImageSet:
    """Ellipses on noise, as JPEGs of 128 pixels."""
    rng = np.random.default_rng(0)
    root.mkdir()
    for i in range(PICTURES):
        noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize((128, 128), Image.Resampling.BICUBIC)
        pen = ImageDraw.Draw(image)
        for _ in range(8):
            x, y, w, h = rng.integers(0, 100, 4).tolist()
            pen.ellipse((x, y, x + w, y + h), fill=tuple(rng.integers(0, 256, 3).tolist()))
        image.save(root / f"{i:04d}.jpg", quality=90)
    return open_images(root)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """The images, with a manifest cache of their own."""
    folder = tmp_path_factory.mktemp("data")
    os.environ["FGFAST_CACHE"] = str(folder / "cache")
    photographs = Path(os.environ.get("FGFAST_TEST_DATA", "/nowhere")) / "CUB_200_2011_first50"
    if photographs.is_dir():
        return open_images(photographs).subset(range(0, 5 * PICTURES, 5))
    return drawn(folder / "drawn")


def loader(images: ImageSet, size: int, variant: str, exact: bool = False) -> Loader:
    """One of the loaders, on every usable core."""
    backend, memory_mb = VARIANTS[variant]
    pytest.importorskip("nvidia.dali" if backend == "dali" else "torchvision")
    spec = ViewSpec(crops=(Crop(size=size, jitter=(0.4, 0.4, 0.2, 0.0)),)) if exact else views(size)
    return make_loader(images, spec, BATCH, drop_last=True, backend=backend, memory_mb=memory_mb)


def check(images: ImageSet, size: int, variant: str) -> None:
    """No speed for wrong views: they must be torchvision's but for rounding (hue left out: its formula differs)."""
    few, found = images.subset(range(BATCH)), []
    for name in (variant, "torchvision"):
        one = loader(few, size, name, exact=True)
        found.append(next(iter(one)))
        one.close()
    assert torch.equal(found[0].index, found[1].index)
    assert torch.equal(found[0].boxes, found[1].boxes)
    assert (found[0].views[0] - found[1].views[0]).abs().mean() < 0.06  # 2.5% of the range of a normalised image


@pytest.mark.benchmark(group="data: two views")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_views(benchmark: BenchmarkFixture, images: ImageSet, size: int, variant: str) -> None:
    pytest.importorskip("torchvision")
    check(images, size, variant)
    images = images.subset(range(SIZES[size]))
    one = loader(images, size, variant)
    for _ in one:  # processes, threads and kept images are there before the clock starts
        pass

    rounds, start = 3, os.times()

    def epoch() -> int:
        return sum(len(batch) for batch in one)

    try:
        count = benchmark.pedantic(epoch, rounds=rounds)
    finally:
        one.close()
    end = os.times()  # the time of worker processes is known when they have ended, and holds the first epoch too
    own, workers = end[0] + end[1] - start[0] - start[1], end[2] + end[3] - start[2] - start[3]
    benchmark.extra_info.update(
        {
            "images_per_s": round(count / benchmark.stats.stats.median),
            "cpu_us_a_image": round(1e6 * (own / rounds + workers / (rounds + 1)) / count),
            "threads": default_threads(None),
            "pictures": f"{len(images)} of {images.root}",
        }
    )


def test_the_wait_while_training(benchmark: BenchmarkFixture, images: ImageSet) -> None:
    """The share of a step that waits for data, with a step that keeps one core busy for 60 ms."""
    pytest.importorskip("nvidia.dali")
    one = loader(images, 64, "dali_kept")
    for _ in one:
        pass
    waits: list[float] = []

    def train() -> None:
        waited, start = 0.0, time.perf_counter()
        source = iter(one)
        while True:
            asked = time.perf_counter()
            if next(source, None) is None:
                break
            waited += (got := time.perf_counter()) - asked
            while time.perf_counter() - got < 0.06:
                torch.ones(64, 64).sum()
        waits.append(waited / (time.perf_counter() - start))

    try:
        benchmark.pedantic(train, rounds=3)
    finally:
        one.close()
    benchmark.extra_info["data_wait"] = round(min(waits), 4)
