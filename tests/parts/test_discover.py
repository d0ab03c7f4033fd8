"""Id maps of a set: an interrupted discovery resumes, and maps of other settings are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fgfast.data.layouts import open_images
from fgfast.data.maps import read_map
from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.parts import clusters, discover
from fgfast.parts.clustering import ClusteringConfig
from tests.conftest import TINY


def test_interrupted_discovery_resumes(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Existing maps are kept, the others are as without the interruption; other settings need another folder."""
    torch.manual_seed(0)
    encoder, images = Backbone(TINY, size=32, args={"output_stride": 8}), open_images(drawn)
    real, sizes = clusters.pyramid_clusters, []

    def stop_at_second_batch(encoder: object, batch: torch.Tensor, config: object, **options: object) -> object:
        if sizes == [32]:
            sizes.append(0)
            raise KeyboardInterrupt
        sizes.append(len(batch))
        return real(encoder, batch, config, **options)  # type: ignore[arg-type]

    def run(name: str, n_parts: int = 4) -> Path:
        config = discover.DiscoveryConfig(image_size=64, map_size=16, run="a test", threads=1)
        return discover.discover(encoder, images, tmp_path / name, ClusteringConfig(n_parts), config)

    monkeypatch.setattr(clusters, "pyramid_clusters", stop_at_second_batch)
    with pytest.raises(KeyboardInterrupt):
        run("stopped")
    assert not (tmp_path / "stopped" / "maps.json").exists()
    run("stopped")
    run("stopped")
    run("complete")
    assert sizes == [32, 0, 4, 32, 4]
    for rel in images.paths:
        np.testing.assert_array_equal(read_map(tmp_path / "stopped", rel), read_map(tmp_path / "complete", rel))
    with pytest.raises(UserError, match="already holds maps of a test"):
        run("stopped", n_parts=3)
