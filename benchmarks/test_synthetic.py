"""Images a second that one core draws and writes, at 128 px."""

import shutil
from pathlib import Path

from pytest_benchmark.fixture import BenchmarkFixture

from fgfast.data.layouts import open_images
from fgfast.data.synthetic import generate

IMAGES = 300


def test_generate(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    root = tmp_path / "birds"
    assert len(open_images(generate(root, images=IMAGES, workers=1))) == IMAGES

    def again() -> None:
        generate(root, images=IMAGES, workers=1)

    benchmark.pedantic(again, setup=lambda: shutil.rmtree(root), rounds=3)
    benchmark.extra_info["images_per_second"] = round(IMAGES / benchmark.stats.stats.median)
