"""Clusters of an image: background along the border, and coordinates as features."""

import torch

from fgfast.models.backbone import Backbone
from fgfast.ops.kmeans import kmeans
from fgfast.parts import clustering
from tests.conftest import TINY


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
