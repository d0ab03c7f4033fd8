"""Fixtures that several tests of operations share."""

import pytest

from fgfast.ops.contrast import sides


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4, so that a field of 30 has inner, ragged, shared and skipped tiles."""
    monkeypatch.setitem(sides.LOGIT_TILE, "cpu", 4)
