"""Clusters of an image: background along the border, and coordinates as features."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.ops.kmeans import kmeans
from fgfast.parts import clustering
from tests.conftest import TINY
from tests.examples import examples


def test_background_is_along_the_border() -> None:
    """As the formula, on random maps; -1 stays -1."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(-1, 5, (6, 9, 11), generator=g)
    labels[3] = 2
    for border in (0.3, 1.0, 4.0):
        found = clustering.remove_background(labels, 5, border)
        for before, after in zip(labels, found, strict=True):
            for k in range(5):
                inside = before == k
                perimeter = inside.sum() - inside[1:-1, 1:-1].sum()
                removed = bool(perimeter > border * inside.sum().sqrt())
                assert torch.equal(after[inside], before[inside] * 0 - 1 if removed else before[inside])
            assert (after[before == -1] == -1).all()
    assert (clustering.remove_background(labels, 5, 100.0) == labels).all()
    assert (clustering.remove_background(labels, 5, 1e-9)[3] == -1).all()


def test_coordinates_are_appended_to_the_features() -> None:
    """Their variance is relative to that of each image; with a large one the clusters are contiguous cells."""
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(3, 5, 8, 6, generator=g) * torch.tensor([1.0, 10.0, 0.1])[:, None, None, None]]
    maps.append(torch.randn(3, 2, 4, 3, generator=g))
    coordinates = clustering.coordinate_map(maps, 0.5)
    assert coordinates.shape == (3, 2, 8, 6)
    expected = sum(m.double().flatten(2).var(2, correction=0).sum(1) for m in maps) / 2
    variance = coordinates.double().flatten(2).var(2, correction=0).sum(1)
    torch.testing.assert_close(variance, expected, rtol=1e-5, atol=0)
    assert (coordinates[:, 0].diff(dim=1) > 0).all()
    assert (coordinates[:, 1].diff(dim=2) > 0).all()
    encoder, images = Backbone(TINY, size=32, args={"output_stride": 8}).eval(), torch.randn(2, 3, 32, 32, generator=g)
    config = clustering.ClusteringConfig(4, position=1e6)
    labels = clustering.cluster_pyramid(encoder, images, config, size=16, seed=1)
    cells = kmeans([clustering.coordinate_map([torch.randn(2, 1, 8, 8)], 1.0)], 4, size=(16, 16), seed=1).labels
    assert (labels == cells).float().mean() > 0.99  # only the coordinates matter


@examples(10)
@given(st.integers(0, 2**31), st.sampled_from(["euclidean", "cosine"]), st.booleans())
def test_the_parts_of_an_image_do_not_depend_on_the_others(seed: int, metric: str, listed: bool) -> None:
    """Nor on its place: one process with eight images and four ranks with two find the same parts."""
    g = torch.Generator().manual_seed(seed)
    maps = [torch.randn(8, d, s, s, generator=g) for d, s in ((6, 3), (4, 7))]

    def cluster(which: list[int]) -> torch.Tensor:
        options: dict[str, Any] = {"n_iter": 10, "metric": metric, "seed": seed}
        if listed:
            return kmeans([m[which] for m in maps], 4, size=(9, 9), **options).labels
        return kmeans(maps[1][which], 4, **options).labels

    together = cluster(list(range(8)))
    for rank in range(4):
        assert torch.equal(cluster([rank, rank + 4]), together[rank::4])
    assert torch.equal(cluster(list(range(7, -1, -1))), together.flip(0))


def test_the_foreground_of_the_first_stage_is_clustered_alone() -> None:
    """Ids of both stages against two calls of k-means; an image with too small a foreground is clustered as a whole."""
    torch.manual_seed(0)
    encoder, images = Backbone(TINY, size=32, args={"output_stride": 8}).eval(), torch.randn(3, 3, 32, 32)
    options: dict[str, Any] = {"size": (16, 16), "n_iter": 20, "seed": 1}
    config = clustering.ClusteringConfig(3, levels=2, border=0.7, first_parts=4)
    with torch.no_grad():
        maps = encoder.pyramid(images, 2)
    first = kmeans(maps, 4, **options).labels
    foreground = clustering.remove_background(first, 4, 0.7) >= 0
    assert 0 < foreground.float().mean() < 1
    foreground |= (foreground.sum((1, 2)) < 3)[:, None, None]
    expected = kmeans(maps, 3, weight=foreground.float(), **options).labels
    labels, vectors = clustering.pyramid_clusters(encoder, images, config, size=16, seed=1)
    assert torch.equal(labels, expected)
    assert torch.equal(labels >= 0, foreground)
    assert torch.equal(clustering.cluster_pyramid(encoder, images, config, size=16, seed=1), labels)
    whole = clustering.ClusteringConfig(3, levels=2, border=1e-9, first_parts=4)
    labels, vectors = clustering.pyramid_clusters(encoder, images, whole, size=16, seed=1)
    assert (labels >= 0).all()
    assert vectors.isfinite().all()


def test_a_first_stage_needs_a_border() -> None:
    """Without it every cluster would be foreground."""
    with pytest.raises(UserError, match="--first-parts needs --border"):
        clustering.ClusteringConfig(3, first_parts=4).check()
