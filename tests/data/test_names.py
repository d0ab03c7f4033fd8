"""Names of images that are no UTF-8, or hold characters that separate lines and columns."""

import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fgfast.cli.commands import COMMANDS
from fgfast.cli.main import main
from fgfast.data.layouts import open_images
from fgfast.data.manifest import check_images
from fgfast.data.maps import save_maps, write_maps_info
from fgfast.data.views import Crop, ViewSpec

from .conftest import named_images
from .loading import VARIANTS, loading

NAMES = [b"caf\xe9.jpg", b"line\nbreak.png", b"tab\t'quotes\" .jpg", "\u2028\u00e9.tif".encode()]


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """Images of such names, in a folder and a class folder of such names."""
    return named_images(tmp_path, NAMES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_of_any_name_are_read(named: Path, tmp_path: Path, variant: str) -> None:
    images = open_images(named)
    save_maps(tmp_path / "maps", images.paths, np.zeros((len(NAMES), 4, 4), np.uint8))
    write_maps_info(tmp_path / "maps", 1, (4, 4), "test")
    with loading(images, ViewSpec(crops=(Crop(size=8),), masks=True), 2, variant, maps=tmp_path / "maps") as loader:
        index = torch.cat([batch.index[batch.valid] for batch in loader])
        assert loader.skipped == []
    assert sorted(index.tolist()) == list(range(len(NAMES)))


def test_verdicts_of_any_name_are_kept(named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = check_images(open_images(named))
    monkeypatch.setattr(Image, "open", None)  # nothing is decoded again
    again = check_images(open_images(named))
    assert again.files == first.files
    assert len(again) == len(NAMES)


def test_a_path_that_is_no_utf8_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "utf-8"))
    monkeypatch.setitem(COMMANDS, "info", lambda words: print(os.fsdecode(b"caf\xe9"), flush=True))
    assert main(["info"]) == 0
    assert printed.getvalue() == b"caf\\udce9\n"
