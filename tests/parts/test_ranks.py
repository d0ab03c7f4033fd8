"""Two ranks share discovery, features, scores and the prior of the colours, and end together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fgfast.data.layouts import open_images
from fgfast.errors import UserError
from fgfast.evaluate import protocols
from fgfast.evaluate.features import extract
from fgfast.evaluate.health import online_health
from fgfast.methods.base import method_class
from fgfast.models.backbone import Backbone
from fgfast.parts import discover as module
from fgfast.parts.clustering import ClusteringConfig
from fgfast.parts.discover import DiscoveryConfig, discover, write_maps
from fgfast.parts.keypoints import KeyPoints, count_points
from fgfast.parts.saliency import Saliency
from fgfast.parts.segments import Segments
from fgfast.ranks import OtherRankError
from tests import ranks
from tests.conftest import TINY

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
METHODS: dict[str, dict[str, Any]] = {
    "color": {"hidden": 16}, "jigsaw": {"size": 64}, "srgan": {"model": "srgan", "width": 4, "blocks": 1}
}  # fmt: skip


def work(data: Path, folder: Path, group: Any = None) -> dict[str, Any]:
    """All that ranks share."""
    images, found = open_images(data), {}
    for name in (TINY, "test_vit"):
        torch.manual_seed(0)
        encoder = Backbone(name, size=32)
        config = DiscoveryConfig(image_size=64, map_size=16, run="a test", threads=1)
        discover(encoder, images, folder / name, ClusteringConfig(4), config, group=group)
        if name == TINY:
            discover(encoder, images, folder / "shared", ClusteringConfig(4), config, shared=True, group=group)
            write_maps(Saliency(encoder, config), images, folder / "saliency", group=group)
    write_maps(Segments(9, config), images, folder / "segments", group=group)
    write_maps(KeyPoints(count_points(images), config), images, folder / "points", group=group)
    features, targets = extract(encoder, images, 32, batch_size=5, threads=1, group=group)
    found = {"features": features.tolist(), "targets": targets.tolist()}
    for name, values in METHODS.items():
        torch.manual_seed(0)
        options = {"data": str(data), "model": TINY, "size": 32, "batch_size": 4, "threads": 1, "amp": "off"}
        method = method_class(name)(method_class(name).Config(**options | values))
        method.set_group(group)
        method.prepare(images.train_set(), folder, 0)
        state = torch.get_rng_state()
        found[name] = method.scores(CPU)
        assert torch.equal(torch.get_rng_state(), state)
    found["knn"] = protocols.online_knn(encoder, method.config, CPU, group)
    found["health"] = online_health(encoder, method.config, CPU, group)
    return found


def _share(rank: int, port: int, data: str, folder: str) -> None:
    ranks.join(rank, 2, port)
    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    found = work(Path(data), Path(folder), group)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))

    def fail(*_: object) -> Any:
        raise UserError("this image is lost")

    patch = pytest.MonkeyPatch()
    if rank == 1:
        patch.setattr(module, "save_maps", fail)
        patch.setattr(protocols, "labelled_splits", fail)
    encoder, images = Backbone(TINY, size=32), open_images(Path(data))
    config = DiscoveryConfig(image_size=64, map_size=16, run="a test", threads=1)
    with pytest.raises(UserError, match="this image is lost") as caught:
        discover(encoder, images, Path(folder, "failed"), ClusteringConfig(4), config, group=group)
    assert isinstance(caught.value, OtherRankError) == (rank == 1)
    method = method_class("color")(method_class("color").Config(data=data, model=TINY, size=32))
    assert protocols.online_knn(encoder, method.config, CPU, group) is None
    if rank == 1:
        patch.setattr("fgfast.evaluate.health.pretext_images", fail)
    assert online_health(encoder, method.config, CPU, group) == {}
    torch.distributed.destroy_process_group()


def test_two_ranks_find_what_one_process_finds(drawn: Path, tmp_path: Path) -> None:
    """Maps are equal byte by byte, features and scores to rounding; both ranks have all, and an error ends both."""
    ranks.start(_share, ranks.free_port(), str(drawn), str(tmp_path / "two"), ranks=2)
    alone = work(drawn, tmp_path / "one")
    first, second = (json.loads((tmp_path / "two" / f"rank{r}.json").read_text()) for r in (0, 1))
    assert first == second
    for name in (TINY, "test_vit", "shared", "saliency", "segments", "points"):
        one, two = (
            {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
            for folder in (tmp_path / "one" / name, tmp_path / "two" / name)
        )
        assert len(one) == 37 + (name == "shared")
        assert one == two
    assert first["targets"] == alone["targets"]
    torch.testing.assert_close(torch.tensor(first["features"]), torch.tensor(alone["features"]), rtol=0, atol=1e-6)
    one, two = (json.loads((tmp_path / n / "colours.json").read_text())["prior"] for n in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-12)
    assert first["knn"] == alone["knn"]
    assert first["health"] == pytest.approx(alone["health"], rel=1e-5)
    assert first["color"].keys() == alone["color"].keys() == {"held_out_accuracy"}
    assert first["srgan"].keys() == alone["srgan"].keys()
    assert not (tmp_path / "two" / "failed" / "maps.json").exists()
