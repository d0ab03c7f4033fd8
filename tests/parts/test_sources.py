"""Sources of parts other than clusters: cells of key points, segments of even colour, saliency."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.maps import read_map, read_maps_info
from fgfast.errors import UserError
from fgfast.methods.part_sources import Parts
from fgfast.methods.particle import PARTICLE, PARTICLEConfig
from fgfast.models.backbone import Backbone
from fgfast.parts import sources
from fgfast.parts.discover import write_maps
from fgfast.parts.keypoints import KeyPoints, cells, check_points, count_points
from fgfast.parts.saliency import Saliency, foreground, saliency_of
from fgfast.parts.segments import Segments, most_segments, segment
from fgfast.parts.sources import DiscoveryConfig, Source
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.data.trees import nabirds
from tests.examples import examples

CONFIG = DiscoveryConfig(image_size=64, map_size=16, run="a test", threads=1)


def image_set(root: Path, sizes: list[tuple[int, int]], orientation: int = 1, banner: int = 0) -> ImageSet:
    """Images of noise of (stored) sizes (width, height)."""
    rng, names = np.random.default_rng(0), []
    exif = Image.Exif()
    exif[0x0112] = orientation
    root.mkdir(parents=True, exist_ok=True)
    for i, (width, height) in enumerate(sizes):
        names.append(f"{i}.jpg")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / names[-1], exif=exif)
    n = len(names)
    return ImageSet(root, tuple(names), np.zeros(n, np.int64), ("one",), np.ones(n, bool), banner=banner)


def label(source: Source, images: ImageSet) -> np.ndarray:
    return np.concatenate([labels.cpu().numpy() for _, labels in source.label(images, np.arange(len(images)))])


@examples(50)
@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 12), st.booleans())
def test_a_pixel_has_the_nearest_visible_point_in_the_box(seed: int, n: int, side: int, boxed: bool) -> None:
    """Pixel by pixel, by the definition."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(5, 40, 2)
    points = np.column_stack([rng.uniform(-3, width + 3, n), rng.uniform(-3, height + 3, n), rng.integers(0, 2, n)])
    x, y, w, h = box = np.array([rng.uniform(-5, width), rng.uniform(-5, height), *rng.uniform(0, 40, 2)])
    found = cells(points, box if boxed else None, np.array([height, width]), side)
    for i in range(side):
        for j in range(side):
            cx, cy = (j + 0.5) * width / side, (i + 0.5) * height / side
            distances = {k: float(np.hypot(cx - px, cy - py)) for k, (px, py, v) in enumerate(points) if v}
            outside = boxed and not (x <= cx < x + w and y <= cy < y + h)
            if outside or not distances:
                assert found[i, j] == -1
            else:
                assert distances[found[i, j]] <= min(distances.values()) + 1e-9


def test_points_are_in_pixels_of_the_upright_image_without_its_banner(tmp_path: Path) -> None:
    """A photograph stored on its side, 40 pixels high when upright, of which the last 8 are a banner."""
    images = image_set(tmp_path, [(40, 20)], orientation=6, banner=8)
    points = np.array([[[10.0, 2.0, 1], [10.0, 30.0, 1], [3.0, 3.0, 0]]], np.float32)
    box = np.array([[4.0, 0.0, 8.0, 50.0]], np.float32)
    found = label(KeyPoints(3, CONFIG), replace(images, keypoints=points, boxes=box))[0]
    inside = (np.arange(16) + 0.5) * 20 / 16
    inside = (inside >= 4) & (inside < 12)
    rows = (np.arange(16) + 0.5) * 32 / 16
    assert (found[:, ~inside] == -1).all()
    np.testing.assert_array_equal(found[:, inside], np.where(rows < 16, 0, 1)[:, None].repeat(inside.sum(), 1))


def test_an_image_without_a_visible_point_has_no_parts(tmp_path: Path) -> None:
    """And one without a box has parts everywhere."""
    images = image_set(tmp_path, [(30, 20)] * 2)
    points = np.array([[[5, 5, 0], [9, 9, 0]], [[5, 5, 0], [9, 9, 1]]], np.float32)
    boxes = np.array([[0, 0, 9, 9], [np.nan] * 4], np.float32)
    found = label(KeyPoints(2, CONFIG), replace(images, keypoints=points, boxes=boxes))
    assert (found[0] == -1).all()
    assert (found[1] == 1).all()
    assert (label(KeyPoints(2, CONFIG), replace(images, keypoints=points))[1] == 1).all()


def test_key_points_of_cub_are_in_their_own_cells(photographs: ImageSet, tmp_path: Path) -> None:
    """Unless the centre of the pixel is nearer to another visible point; outside the box there is no part."""
    images = photographs.subset(np.arange(0, len(photographs), 60))
    assert images.keypoints is not None
    assert images.boxes is not None
    out = write_maps(KeyPoints(count_points(images), CONFIG._replace(map_size=64)), images, tmp_path / "maps")
    own = total = 0
    for rel, file, points, (x, y, w, h) in zip(
        images.paths, images.files(), images.keypoints, images.boxes, strict=True
    ):
        ids = read_map(out, rel).astype(int)
        width, height = Image.open(file).size
        for k, (px, py, visible) in enumerate(points):
            if not visible or not (x < px < x + w and y < py < y + h) or not (0 <= px < width and 0 <= py < height):
                continue
            i, j = int(py / height * 64), int(px / width * 64)
            centre = np.array([(j + 0.5) / 64 * width, (i + 0.5) / 64 * height])
            if ids[i, j] == 255:  # the pixel is on the edge of the box
                assert not (x <= centre[0] < x + w and y <= centre[1] < y + h)
                continue
            total, own = total + 1, own + (ids[i, j] == k)
            there = points[ids[i, j]]
            assert there[2]
            assert np.hypot(*(there[:2] - centre)) <= np.hypot(*(points[k, :2] - centre)) + 1e-3
        columns = (np.arange(64) + 0.5) / 64 * width
        assert (ids[:, (columns < x) | (columns >= x + w)] == 255).all()
    assert total > 300
    assert own / total > 0.95


def test_parts_of_nabirds_are_cells_of_its_points(tmp_path: Path) -> None:
    images = open_images(nabirds(tmp_path / "set"))
    out = write_maps(KeyPoints(count_points(images), CONFIG), images, tmp_path / "maps")
    assert read_maps_info(out)["n_parts"] == 2
    assert set(np.unique(read_map(out, images.paths[0]))) == {0, 255}


def test_segments_go_from_the_largest_to_the_smallest() -> None:
    """The partition is scikit-image's with DetCon's settings at 224 pixels, scaled by the area; none is smaller."""
    from skimage.segmentation import felzenszwalb

    g = torch.Generator().manual_seed(0)
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 7, 7, generator=g), size=(112, 112), mode="nearest")[0]
    found = segment(image, 254, scale=400.0)
    expected = felzenszwalb(image.permute(1, 2, 0).double().numpy(), scale=100, min_size=100)
    pairs = set(zip(found.ravel().tolist(), expected.ravel().tolist(), strict=True))
    assert len(pairs) == expected.max() + 1 == found.max() + 1 > 10
    sizes = np.bincount(found.ravel())
    assert (np.diff(sizes) <= 0).all()
    assert sizes.min() >= 100
    few = segment(image, 3, scale=400.0)
    np.testing.assert_array_equal(few, np.where(found < 3, found, -1))


@examples(30)
@given(st.integers(0, 2**31), st.integers(16, 80), st.sampled_from([200.0, 1000.0, 5000.0]))
def test_no_image_has_more_segments_than_are_counted_on(seed: int, side: int, scale: float) -> None:
    image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))
    assert segment(image, 254, scale).max() < most_segments(scale) <= 254


def test_segments_do_not_depend_on_the_loader_statistics(tmp_path: Path) -> None:
    """The pixels are those of the file: two colours make two segments whose border is where the colours meet."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :40] = 250, 40, 10
    Image.fromarray(pixels).save(tmp_path / "a.png")
    images = replace(image_set(tmp_path / "b", [(8, 8)]), root=tmp_path, paths=("a.png",))
    found = label(Segments(10, CONFIG), images)[0]
    np.testing.assert_array_equal(found, np.where(np.arange(16) < 10, 0, 1)[None].repeat(16, 0))


@pytest.mark.parametrize("name", [TINY, "test_vit"])
def test_saliency_is_what_the_last_layer_attends_to(name: str) -> None:
    """The mean of all heads of CLS in the last block of a ViT; the norm of the final map of a CNN."""
    torch.manual_seed(0)
    encoder, x = Backbone(name, size=64).eval(), torch.randn(2, 3, 64, 64)
    found = saliency_of(encoder, x)
    if name == TINY:
        expected = encoder.features(x).norm(dim=1)
        expected = expected / expected.sum((1, 2), keepdim=True)
    else:
        expected = encoder.keys(x).attention.mean(1)
    torch.testing.assert_close(found, expected.detach())


@examples(20)
@given(st.integers(0, 2**31))
def test_the_foreground_has_the_best_threshold(seed: int) -> None:
    """The centre of the bin, of 256, after which two classes of bins have the largest variance between them."""
    g = torch.Generator().manual_seed(seed)
    saliency = torch.rand(1, 9, 9, generator=g) ** 3
    saliency[0, 2:5, 3:7] += 1
    values, above = saliency[0].flatten().double(), foreground(saliency, 9)[0].flatten().bool()
    low, width = values.min(), (values.max() - values.min()) / 256
    bins = ((values - low) / width).floor().clamp(max=255)

    def between(split: torch.Tensor) -> float:
        fraction = split.double().mean()
        return float(fraction * (1 - fraction) * (bins[split].mean() - bins[~split].mean()) ** 2)

    scores = [between(bins > i) for i in range(255)]
    best = [i for i, score in enumerate(scores) if score >= max(scores) * (1 - 1e-9)]  # several before an empty bin
    assert any(torch.equal(above, values > low + (i + 0.5) * width) for i in best)
    assert values[above].min() > values[~above].max()


def test_an_even_image_is_all_background() -> None:
    assert (foreground(torch.ones(1, 4, 4), 8) == 0).all()


def test_whatever_changes_a_map_changes_its_origin(tmp_path: Path) -> None:
    images = image_set(tmp_path, [(20, 20)] * 2)
    points = np.ones((2, 3, 3), np.float32)
    images = replace(images, keypoints=points, boxes=np.ones((2, 4), np.float32))
    torch.manual_seed(0)
    one, two = Backbone(TINY, size=32), Backbone(TINY, size=32)
    other = CONFIG._replace(map_size=8)
    origins = [
        KeyPoints(3, CONFIG).origin(images),
        KeyPoints(3, other).origin(images),
        KeyPoints(3, CONFIG).origin(replace(images, keypoints=points + 1)),
        KeyPoints(3, CONFIG).origin(replace(images, boxes=None)),
        KeyPoints(3, CONFIG).origin(images.subset([1, 0])),
        Segments(5, CONFIG).origin(images),
        Segments(6, CONFIG).origin(images),
        Segments(5, CONFIG, 500.0).origin(images),
        Segments(5, CONFIG._replace(image_size=32)).origin(images),
        Saliency(one, CONFIG).origin(images),
        Saliency(two, CONFIG).origin(images),
        Saliency(one, CONFIG._replace(image_size=32)).origin(images),
    ]
    assert len({origin.digest for origin in origins}) == len(origins)
    assert KeyPoints(3, CONFIG._replace(run="b", threads=4)).origin(images).digest == origins[0].digest


@pytest.mark.parametrize(
    "make", [lambda e: KeyPoints(3, CONFIG), lambda e: Segments(9, CONFIG), lambda e: Saliency(e, CONFIG)]
)
def test_lost_maps_are_made_again_alone(tmp_path: Path, make: Callable[[Backbone], Source]) -> None:
    images = image_set(tmp_path / "set", [(40, 30)] * 5)
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.uniform(0, 30, (5, 3, 2)), np.ones((5, 3, 1))], 2).astype(np.float32)
    images = replace(images, keypoints=points)
    torch.manual_seed(0)
    source = make(Backbone(TINY, size=32))
    out = write_maps(source, images, tmp_path / "maps")
    files = sorted(out.glob("*.png"))
    before = [(f.read_bytes(), f.stat().st_mtime_ns) for f in files]
    files[2].unlink()
    write_maps(source, images, out)
    after = [(f.read_bytes(), f.stat().st_mtime_ns) for f in files]
    assert [a[0] for a in after] == [b[0] for b in before]
    assert [i for i in range(5) if after[i][1] != before[i][1]] == [2]
    with pytest.raises(UserError, match="already holds maps"):
        write_maps(source, images.subset(range(3)), out)


def with_points(images: ImageSet, points: np.ndarray | None) -> ImageSet:
    return replace(images, keypoints=points, source="a set")


def test_sets_that_cannot_have_cells_are_refused(tmp_path: Path) -> None:
    images = image_set(tmp_path, [(20, 20)] * 2)
    with pytest.raises(UserError, match=r"^a set has no key points: choose another --parts than keypoints\.$"):
        count_points(with_points(images, None))
    many = np.ones((2, 255, 3), np.float32)
    with pytest.raises(UserError, match=r"^a set has 255 key points, more than the 254 parts of an id map: leave some"):
        count_points(with_points(images, many))
    assert count_points(with_points(images, many[:, 1:])) == 254
    with pytest.raises(UserError, match=r"^No key point of any training image of a set is visible: restore the file"):
        check_points(with_points(images, np.zeros((2, 3, 3), np.float32)))


def particle(data: Path, out: Path, **values: Any) -> PARTICLEConfig:
    return PARTICLEConfig(
        data=str(data), out=str(out), model=TINY, size=32, batch_size=6, epochs=1, hidden=16, projection=8, threads=1,
        device="cpu", amp="off", knn_every=0, **values,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": "keypoints", "maps": "m"}, "--maps needs --parts discovered, not keypoints"),
        ({"parts": "felzenszwalb", "maps": "m"}, "--maps needs --parts discovered, not felzenszwalb"),
        ({"parts": "saliency", "maps": "m"}, "--maps needs --parts discovered, not saliency"),
        ({"parts": "felzenszwalb", "ids": "set"}, "--ids set is for parts that are discovered, not for --parts felz"),
        ({"ids": "set", "maps": "m"}, "--ids set is for parts that are discovered, not for --maps"),
    ],
)
def test_options_that_exclude_each_other_are_refused(drawn: Path, tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PARTICLE(particle(drawn, tmp_path, **values))


def test_passes_before_training_are_those_of_the_network(drawn: Path, tmp_path: Path) -> None:
    """Key points and segments need none; saliency one over the full image, of four times the area of a view."""
    images, found = open_images(drawn).train_set(), {}
    for parts in ("keypoints", "felzenszwalb", "saliency", "discovered"):
        method = PARTICLE(particle(drawn, tmp_path, parts=parts, n_parts=4))
        found[parts] = method.passes_before_round(len(images)) / len(images)
    assert found == {"keypoints": 0, "felzenszwalb": 0, "saliency": 4, "discovered": 4}
    shared = PARTICLE(particle(drawn, tmp_path, ids="set", n_parts=4))
    assert shared.passes_before_round(18) == 2 * 18 * 4  # all of 18 images are sampled
    assert shared.passes_before_round(16_384) == (16_384 + 4096) * 4  # a quarter, with the parts that are wanted


def test_a_set_without_boxes_has_cells_everywhere_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = with_points(image_set(tmp_path, [(20, 20)] * 2), np.ones((2, 3, 3), np.float32))
    check_points(images)
    assert caplog.messages == ["a set has no boxes: the cells of its key points cover the full images."]


@pytest.mark.slow
@pytest.mark.parametrize("parts", ["keypoints", "felzenszwalb"])
def test_maps_that_no_network_makes_serve_all_rounds(drawn: Path, tmp_path: Path, parts: str) -> None:
    """And the figures, which make no others."""
    config = particle(drawn, tmp_path / "run", parts=parts, n_parts=6, rounds=2)
    run = pretrain("particle", replace(config, epochs=2))
    assert [path.name for path in run.glob("parts_*")] == ["parts_0"]
    images = open_images(drawn).train_set()
    method = PARTICLE(config)
    assert method.figure_maps(images.subset(range(4)), run, tmp_path / "scratch") == run / "parts_0"
    assert not (tmp_path / "scratch").exists()


def test_a_file_of_hidden_points_ends_a_run_before_it_writes(drawn: Path, tmp_path: Path) -> None:
    shutil.copytree(drawn, tmp_path / "set")
    points = tmp_path / "set" / "parts" / "part_locs.txt"
    points.write_text("".join(f"{line.rsplit(' ', 1)[0]} 0\n" for line in points.read_text().splitlines()))
    with pytest.raises(UserError, match=r"^No key point of any training image of CUB-200-2011 in .* is visible"):
        pretrain("particle", particle(tmp_path / "set", tmp_path / "run", parts="keypoints"))
    assert not (tmp_path / "run").exists()


def test_the_readme_describes_every_source() -> None:
    file = Path(sources.__file__).with_name("README.md")
    text = file.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?) \|", text, re.M)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(get_args(Parts))
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    assert [target for target in targets if not (file.parent / target).exists()] == []
    assert [line for line in text.splitlines() if len(line) > 120] == []
