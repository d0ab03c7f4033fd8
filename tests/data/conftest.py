"""Small data sets for the tests of the loaders; each test has its manifest cache in a temporary folder."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fgfast.data.layouts import ImageSet, open_images
from fgfast.data.maps import save_maps, write_maps_info


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FGFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def coded(height: int, width: int) -> np.ndarray:
    """An image whose red is the column and whose green is the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.full_like(rows, 77)], 2).astype(np.uint8)


def smooth(seed: int, height: int = 96, width: int = 120) -> Image.Image:
    """A coloured image without hard edges, whose statistics JPEG and resizing keep."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


@pytest.fixture
def coded_set(tmp_path: Path) -> ImageSet:
    """Twelve coordinate images of different shapes, lossless, with id maps of 4 x 5 blocks in tmp_path/maps."""
    root = tmp_path / "coded"
    (root / "a").mkdir(parents=True)
    rels = []
    for i, (height, width) in enumerate([(200, 160), (120, 250), (140, 140), (64, 80)] * 3):
        Image.fromarray(coded(height, width)).save(root / "a" / f"{i:02d}.png")
        rels.append(f"a/{i:02d}.png")
    ids = np.arange(20, dtype=np.uint8).reshape(4, 5).repeat(10, 0).repeat(10, 1)  # 40 x 50
    ids[:10, :10] = 255
    save_maps(tmp_path / "maps", rels, np.stack([ids] * len(rels)))
    write_maps_info(tmp_path / "maps", 20, (40, 50), "test")
    return open_images(root)


@pytest.fixture
def smooth_set(tmp_path: Path) -> ImageSet:
    """Two classes of twenty-five small JPEGs."""
    root = tmp_path / "smooth"
    for i in range(50):
        folder = root / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        smooth(i).save(folder / f"{i:03d}.jpg", quality=95)
    return open_images(root)


def named_images(root: Path, names: Sequence[bytes]) -> Path:
    """Images of these names in a folder and a class folder whose names are no UTF-8."""
    folder = os.fsencode(root) + b"/S\xe4tze/V\xf6gel"
    try:
        os.makedirs(folder)
    except OSError:
        pytest.skip("the file system takes only UTF-8")
    for i, name in enumerate(names):
        smooth(i, 24, 32).save(os.fsdecode(folder + b"/" + name))
    return Path(os.fsdecode(os.path.dirname(folder)))
