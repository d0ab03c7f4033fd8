"""Ids that mean the same in every image of a set."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score

from fgfast.cli.main import main
from fgfast.data.layouts import open_images
from fgfast.data.maps import map_path, read_map
from fgfast.errors import UserError
from fgfast.methods.particle import PARTICLE, PARTICLEConfig
from fgfast.models.backbone import Backbone
from fgfast.parts import clusters, discover
from fgfast.parts.clustering import ClusteringConfig
from fgfast.parts.clusters import Clusters, replace_ids
from fgfast.parts.discover import write_maps
from fgfast.parts.folder import CENTROIDS, read_centroids
from fgfast.parts.sources import DiscoveryConfig
from fgfast.report.draw import draw_run
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.methods.common_checks import check_exact_resume

CONFIG = DiscoveryConfig(image_size=64, map_size=16, run="a test", threads=1)
NETWORKS = (TINY, "test_vit")


def source(name: str = TINY, *, shared: bool = True, border: float = 0.0) -> Clusters:
    torch.manual_seed(0)
    encoder = Backbone(name, size=32, args={} if "vit" in name else {"output_stride": 8})
    return Clusters(encoder, ClusteringConfig(5, border=border), CONFIG, shared=shared)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def labels_of(made: Clusters, data: Path) -> np.ndarray:
    images = open_images(data)
    return np.concatenate([labels.numpy() for _, labels in made.label(images, np.arange(len(images)))])


@pytest.mark.parametrize("name", NETWORKS)
def test_ids_of_the_set_agree_better_with_true_parts(drawn: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """By normalised mutual information over all pixels of the set that have a true part; of a ViT in groups of two."""
    monkeypatch.setattr(clusters, "GROUP", 2)
    images, made = open_images(drawn), source(name)
    made.fit(images)
    shared, own = labels_of(made, drawn), labels_of(source(name, shared=False), drawn)
    assert images.masks is not None
    side = shared.shape[-1]
    place = np.arange(side) * 48 // side
    true = np.stack([read_map(images.masks, rel)[place][:, place] for rel in images.paths])
    on_part = true != 255
    scores = [normalized_mutual_info_score(true[on_part], found[on_part]) for found in (shared, own)]
    assert scores[0] > 2 * scores[1]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("border", [0.0, 1.0])
def test_parts_take_the_nearest_centroid_and_keep_their_pixels(drawn: Path, name: str, border: float) -> None:
    """Parts may become one, never two; what is no part, or the background of a ViT, stays so."""
    images, made = open_images(drawn), source(name, border=border)
    made.fit(images)
    assert made.centroids is not None
    first = int(made.encoder.is_vit)
    for _, labels, vectors in made.cluster(images, np.arange(len(images))):
        ids, cosine = made.nearest(vectors)
        found = replace_ids(labels, ids)
        for b in range(len(labels)):
            assert torch.equal(found[b] == -1, labels[b] == -1)
            for k in labels[b][labels[b] >= first].unique().tolist():
                expected = torch.nn.functional.cosine_similarity(vectors[b, k][None], made.centroids)
                assert found[b][labels[b] == k].unique().tolist() == [int(expected.argmax()) + first]
                torch.testing.assert_close(cosine[b, k], expected.max())
            if first:
                assert torch.equal(found[b] == 0, labels[b] == 0)


def test_the_vector_of_a_part_is_its_mean_hypercolumn_less_that_of_the_image(drawn: Path) -> None:
    """Built here, by resizing every level; k-means has converged to a centroid that is the mean of its pixels."""
    made = source(shared=False)
    images = open_images(drawn).subset(range(3))
    (_, labels, vectors), = made.cluster(images, np.arange(3))  # fmt: skip
    from fgfast.parts.sources import read_blocks

    ((_, whole),) = read_blocks(images, np.arange(3), 32, CONFIG, made.device, made.stats)
    made.encoder.eval()
    with torch.no_grad():
        levels = [
            torch.nn.functional.interpolate(m, size=(16, 16), mode="bilinear") for m in made.encoder.pyramid(whole, 4)
        ]
    full = torch.cat(levels, 1)  # [B, D, 16, 16]
    cosines = []
    for b in range(3):
        for k in labels[b].unique().tolist():
            mean = full[b][:, labels[b] == k].mean(1) - full[b].mean((1, 2))
            cosines.append(torch.nn.functional.cosine_similarity(mean, vectors[b, k], dim=0))
    assert torch.stack(cosines).min() > 0.999


def test_the_same_ids_come_from_any_sample_order_and_a_resumed_folder(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the centroids, and after the maps: the end is that of one go, and nothing is learned twice."""
    images = open_images(drawn)
    whole = content(write_maps(source(), images, tmp_path / "whole"))
    fits: list[int] = []
    real = Clusters.fit

    def fit(self: Clusters, *args: object) -> None:
        fits.append(1)
        real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Clusters, "fit", fit)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("save_maps", "close_maps"):
        with monkeypatch.context() as patch:
            patch.setattr(discover, name, stop)
            with pytest.raises(KeyboardInterrupt):
                write_maps(source(), images, tmp_path / "stopped")
    out = write_maps(source(), images, tmp_path / "stopped")
    assert content(out) == whole
    assert len(fits) == 1


def test_lost_maps_take_the_centroids_that_are_kept(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them all maps are made again, so that ids of two clusterings never meet; complete maps stay."""
    images = open_images(drawn)
    out = write_maps(source(), images, tmp_path / "maps")
    before, lost = content(out), map_path(out, images.paths[4])
    lost.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Clusters, "fit", lambda *_: pytest.fail("learned again"))
        assert content(write_maps(source(), images, out)) == before
        (out / CENTROIDS).unlink()
        assert content(write_maps(source(), images, out)) == before
    lost.unlink()
    stale = map_path(out, images.paths[0])
    stale.write_bytes(map_path(out, images.paths[1]).read_bytes())
    assert content(write_maps(source(), images, out)) == before
    origin = source().origin(images)
    assert read_centroids(out, origin.digest) is not None
    content_of = (out / CENTROIDS).read_bytes()
    (out / CENTROIDS).write_bytes(content_of[:-9])
    assert read_centroids(out, origin.digest) is None


def test_a_set_of_background_alone_is_refused(drawn: Path, tmp_path: Path) -> None:
    """As both halves of an image are on its border."""
    halves = ClusteringConfig(2, border=1e-9, position=1e6)
    made = Clusters(source().encoder, halves, CONFIG, shared=True)
    with pytest.raises(UserError, match=r"^No image has a part that is not background: give a larger --border, or 0"):
        write_maps(made, open_images(drawn).subset(range(3)), tmp_path / "maps")
    assert not content(tmp_path / "maps")


def test_shared_ids_have_another_origin(drawn: Path, tmp_path: Path) -> None:
    images = open_images(drawn)
    assert source().origin(images).digest != source(shared=False).origin(images).digest
    write_maps(source(shared=False), images, tmp_path / "maps")
    with pytest.raises(UserError, match="already holds maps"):
        write_maps(source(), images, tmp_path / "maps")


def test_the_sample_is_bounded(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of eight images of 40 parts at most; the passes that are counted are those that are made."""
    images, made = open_images(drawn), source()
    monkeypatch.setattr(clusters, "SAMPLED", 40)
    made.block = 8
    seen: list[int] = []
    real = Clusters.cluster

    def cluster(self: Clusters, images: object, rows: np.ndarray) -> object:
        seen.append(len(rows))
        return real(self, images, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(Clusters, "cluster", cluster)
    made.fit(images)
    assert seen in ([8], [4])
    assert made.passes(len(images)) == pytest.approx(1 + 8 / 36)
    assert source(shared=False).passes(len(images)) == 1


def config_for(data: Path, out: Path) -> PARTICLEConfig:
    return PARTICLEConfig(
        data=str(data), out=str(out), model=TINY, model_args="output_stride=8", size=32, batch_size=9, epochs=2,
        rounds=2, log_every=1, knn_every=0, n_parts=4, max_parts=3, map_size=16, hidden=16, projection=8, ids="set",
        device="cpu", threads=1, amp="off",
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_with_shared_ids_resumes_and_shows_the_best_examples(drawn: Path, tmp_path: Path) -> None:
    """Every round learns its own ids; the figure is of those that the run trained on, and is left out without them."""
    run = check_exact_resume("particle", config_for(drawn, tmp_path), tmp_path, 3)
    digests = [json.loads((run / f"parts_{r}" / "maps.json").read_text())["digest"] for r in (0, 1)]
    first, second = (read_centroids(run / f"parts_{r}", d) for r, d in enumerate(digests))
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)
    assert read_centroids(run / "parts_0", digests[1]) is None
    cpu = torch.device("cpu")
    written = [path.name for path in draw_run(run, drawn, device=cpu)]
    assert written == ["parts.png", "views.png", "part-examples.png", "pca.png", "neighbours.png"]
    draw_run(run, drawn, checkpoint="init", device=cpu)
    assert (run / "pictures" / "part-examples-init.png").is_file()
    (run / "parts_1" / CENTROIDS).unlink()
    assert "part-examples.png" not in [path.name for path in draw_run(run, drawn, device=cpu)]
    assert "centroids" in json.loads((run / "pictures" / "left-out.json").read_text())[0]


def test_the_best_examples_of_a_part_are_the_nearest_to_its_centroid(drawn: Path, tmp_path: Path) -> None:
    """By all images; each image stands once in a row, and the captions fall."""
    method = PARTICLE(config_for(drawn, tmp_path / "run"))
    images, made = open_images(drawn).train_set(), method.rounds.make(method.encoder, method.rounds.config)
    assert isinstance(made, Clusters)
    made.fit(images)
    from fgfast.methods.part_pictures import EXAMPLES, best_examples

    best: dict[int, list[float]] = {}
    for _, _, vectors in made.cluster(images, np.arange(len(images))):
        ids, cosine = made.nearest(vectors)
        for b in range(len(ids)):
            for part in ids[b].unique().tolist():
                value = cosine[b][ids[b] == part].max().item()
                best.setdefault(part, []).append(value)
    rows = best_examples(made, images)
    assert len(rows) == len(best)
    for row, (part, values) in zip(rows, sorted(best.items()), strict=True):
        expected = [f"part {part}, cosine {value:.2f}" for value in sorted(values, reverse=True)[:EXAMPLES]]
        assert [panel.caption for panel in row] == expected


@pytest.mark.slow
def test_discover_writes_shared_ids(drawn: Path, tmp_path: Path) -> None:
    """With --ids set, which a run with the option needs not be given; --ids image overrides it."""
    config = config_for(drawn, tmp_path / "run")
    run = pretrain("particle", config, train=False)
    common = ["discover", str(run), "--data", str(drawn), "--map-size", "16", "--checkpoint", "init", "--device", "cpu"]
    for name, more in (("of_run", []), ("set", ["--ids", "set"]), ("image", ["--ids", "image"])):
        assert main([*common, "--out", str(tmp_path / name), *more]) == 0
    of_run, with_set, of_image = (content(tmp_path / name) for name in ("of_run", "set", "image"))
    assert of_run == with_set
    assert of_run != of_image
    assert (tmp_path / "set" / CENTROIDS).is_file()
    assert not (tmp_path / "image" / CENTROIDS).exists()
