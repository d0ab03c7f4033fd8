"""The figure of the README."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fgfast.report.overview import HEIGHT, WIDTH


@pytest.mark.slow
def test_the_command_writes_a_small_png(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "fgfast.report.overview", str(tmp_path / "overview.png")]
    subprocess.run(command, check=True)
    with Image.open(tmp_path / "overview.png") as image:
        assert image.size == (WIDTH, HEIGHT)
        assert len(image.getcolors(1 << 24)) > 20
    assert (tmp_path / "overview.png").stat().st_size < 200_000
