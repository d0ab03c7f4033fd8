"""The set of quadrants that the tests of segmentation share."""

from pathlib import Path

import pytest

from tests.evaluate.quadrants import draw


@pytest.fixture(scope="session")
def quadrants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images, half of them for training."""
    return draw(tmp_path_factory.mktemp("quadrants"))
