"""Fixtures that several tests of operations share."""

import pytest

from fgfast.ops.contrast import dense, sides


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 4, so that a field of 30 has inner, ragged, shared and skipped tiles."""
    monkeypatch.setitem(sides.LOGIT_TILE, "cpu", 4)
    monkeypatch.setattr(dense, "KEPT", -1)


@pytest.fixture(params=[-1, 1 << 20], ids=["tiles", "in memory"])
def tiles_and_kept(small_tiles: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The test by tiles, and again with all logits in memory."""
    monkeypatch.setattr(dense, "KEPT", request.param)
