"""Palette, overlays, grids and nearest neighbours."""

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fgfast.data.normalise import IMAGENET_MEAN, IMAGENET_STD
from fgfast.data.palette import _perceived, label_colours
from fgfast.data.panels import Panel, in_rows, overlay, to_pixels, to_uint8
from fgfast.report.pictures import compose_grid, neighbour_panels, write_grid
from tests.examples import examples

MEAN, STD = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)


def grey(height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), 128, dtype=np.uint8)


@pytest.mark.parametrize(("n_parts", "minimum"), [(7, 0.07), (15, 0.07), (25, 0.055)])
def test_colours_differ_with_any_colour_vision(n_parts: int, minimum: float) -> None:
    for lab in _perceived(label_colours(n_parts)):  # 0.02 in Oklab is just noticeable
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + np.eye(n_parts)
        assert distance.min() > minimum


def test_the_colour_of_a_part_does_not_depend_on_the_number_of_parts() -> None:
    np.testing.assert_array_equal(label_colours(255)[:7], label_colours(7))
    assert len(np.unique(label_colours(255), axis=0)) == 255
    assert label_colours(0).shape == (0, 3)


@pytest.mark.parametrize("n_parts", [-1, 256])
def test_more_colours_than_a_map_has_ids_are_refused(n_parts: int) -> None:
    with pytest.raises(ValueError, match="0 to 255"):
        label_colours(n_parts)


@examples(20)
@given(st.integers(0, 2**31), st.sampled_from([(1, 1), (3, 5), (8, 2)]))
def test_normalisation_is_inverted_exactly(seed: int, shape: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    x = (image / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    found = to_uint8(x)
    np.testing.assert_array_equal(found, image.permute(1, 2, 0).numpy())
    np.testing.assert_array_equal(to_uint8(x[None].contiguous(memory_format=torch.channels_last))[0], found)


def test_values_outside_0_to_1_are_clipped() -> None:
    x = torch.tensor([-1e9, float("nan"), 1e9]).view(3, 1, 1)
    assert to_pixels(x).tolist() == [[[0, 0, 255]]]


def test_to_uint8_takes_channels_first_or_last() -> None:
    image = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(to_uint8(torch.from_numpy(image).permute(2, 0, 1)), image)
    np.testing.assert_array_equal(to_uint8(image), image)
    with pytest.raises(ValueError, match="uint8"):
        to_uint8(np.zeros((4, 5)))


def test_overlay_does_not_change_absent_pixels_nor_any_with_alpha_0() -> None:
    labels = torch.tensor([[0, 1], [-1, -1]])
    np.testing.assert_array_equal(overlay(grey(), labels)[4:], grey()[4:])
    np.testing.assert_array_equal(overlay(grey(), labels, alpha=0.0), grey())
    np.testing.assert_array_equal(overlay(grey(), np.full((3, 3), -1)), grey())


def test_overlay_enlarges_labels_without_interpolation() -> None:
    out = overlay(torch.zeros(3, 8, 12), np.array([[0, 1, 2]]), alpha=1.0)
    assert out.shape == (8, 12, 3)
    np.testing.assert_array_equal(out[3, ::4], label_colours(3))
    assert len(np.unique(out.reshape(-1, 3), axis=0)) == 3


def test_overlay_outlines_parts_towards_each_other_and_the_background() -> None:
    row = overlay(grey(1, 6), np.array([[-1, 0, 0, 0, 1, -1]]), alpha=0.2)[0].astype(int)
    strength = np.abs(row - 128).sum(axis=-1)
    assert strength[1] > 2 * strength[2]
    assert strength[4] > 0
    assert strength[0] == strength[5] == 0


def test_overlay_does_not_change_its_input() -> None:
    image = grey()
    overlay(image, np.zeros((8, 8), dtype=np.int64))
    assert (image == 128).all()


@pytest.mark.parametrize(
    ("labels", "kwargs"),
    [
        (np.zeros((2, 2)), {}),  # not integers
        (np.zeros((1, 2, 2), dtype=int), {}),
        (np.array([[3]]), {"n_parts": 3}),
        (np.array([[0]]), {"alpha": 1.5}),
    ],
)
def test_overlay_refuses_an_invalid_id_map(labels: np.ndarray, kwargs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"labels|alpha"):
        overlay(grey(), labels, **kwargs)  # type: ignore[arg-type]


def test_a_grid_has_room_for_every_row_and_caption() -> None:
    panel = Panel(grey())
    one = compose_grid([[panel]], cell=50)[0]
    assert compose_grid([[panel, panel], [panel]], cell=50)[0].shape[0] == 2 * one.shape[0]
    assert compose_grid([[panel, panel]], cell=50)[0].shape[1] == 2 * one.shape[1] - 4
    one_line, two_lines = (compose_grid([[Panel(grey(), text)]], cell=50)[0] for text in ("one", "two\nlines"))
    assert two_lines.shape[0] > one_line.shape[0]
    assert compose_grid([[Panel(grey(), "word " * 500)]], cell=50)[0].shape[0] < 150


def test_images_keep_their_aspect_ratio_in_a_grid() -> None:
    out = compose_grid([[Panel(np.zeros((10, 40, 3), dtype=np.uint8))]], cell=80)[0]
    dark = (out < 100).all(axis=-1)
    assert dark.any(axis=0).sum() == 80
    assert dark.any(axis=1).sum() == 20


def test_the_boxes_of_a_grid_are_its_images(tmp_path: Path) -> None:
    panels = [Panel(np.full((10, 10 * i, 3), 10 * i, dtype=np.uint8), f"é {i}") for i in (1, 2, 3)]
    path = write_grid([panels[:2], panels[2:]], tmp_path / "grid.png", cell=50)
    with Image.open(path) as image:
        image.load()
        boxes, pixels = json.loads(image.info["Boxes"]), np.asarray(image)
    assert [len(row) for row in boxes] == [2, 1]
    for panel, (left, top, width, height, caption) in zip(panels, chain(*boxes), strict=True):
        assert (pixels[top : top + height, left : left + width] == panel.image[0, 0]).all()
        assert (width, caption) == (50, panel.caption)


@pytest.mark.parametrize(("rows", "cell"), [([], 50), ([[]], 50), ([[Panel(np.zeros((2, 2, 3), np.uint8))]], 3)])
def test_an_empty_grid_or_a_tiny_cell_is_an_error(rows: list[list[Panel]], cell: int) -> None:
    with pytest.raises(ValueError, match=r"rows has no panel|at least 16"):
        compose_grid(rows, cell)


def test_a_grid_is_one_file_with_its_description(tmp_path: Path) -> None:
    rows = in_rows([Panel(grey(), "Çiğdem → ✓")] * 3, 2)
    path = write_grid(rows, tmp_path / "new" / "grid.png", description="Grün, 緑")
    with Image.open(path) as image:
        image.load()
        assert image.info["Description"] == "Grün, 緑"
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_neighbours_are_the_nearest_by_cosine_and_never_the_query() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 6, generator=generator)
    images = [np.full((4, 4, 3), i, dtype=np.uint8) for i in range(20)]
    rows = neighbour_panels(images, features * torch.rand(20, 1, generator=generator).add(0.5), 3, queries=[2, 5])
    unit = torch.nn.functional.normalize(features, dim=1)
    for query, row in zip((2, 5), rows, strict=True):
        expected = (unit @ unit[query]).argsort(descending=True)[1:4]
        assert [int(panel.image[0, 0, 0]) for panel in row] == [query, *expected.tolist()]


def test_neighbours_of_another_class_differ_in_caption_and_colour() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.5]])
    row = neighbour_panels(
        torch.zeros(3, 3, 8, 8), features, 2, queries=[0], targets=[0, 0, 1], classes=["001.a_b", "c"]
    )[0]
    assert [panel.caption for panel in row] == ["a b", "✓ a b", "✗ c"]
    assert row[1].image[0, 0].tolist() != row[2].image[0, 0].tolist() != row[0].image[0, 0].tolist()


def test_neighbours_have_eight_queries_by_default() -> None:
    assert len(neighbour_panels(torch.zeros(12, 3, 2, 2), torch.randn(12, 4), 1)) == 8


@pytest.mark.parametrize(("n", "k"), [(3, 3), (3, 0), (1, 1), (4, 1)])
def test_neighbours_refuse_a_k_out_of_range(n: int, k: int) -> None:
    with pytest.raises(ValueError, match="neighbours"):
        neighbour_panels(torch.zeros(3, 3, 2, 2), torch.zeros(n, 2), k)
