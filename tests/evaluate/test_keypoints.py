"""Scores of id maps against key points and boxes: plain definitions, perfect parts, scaling, and errors."""

import json
import shutil
import warnings
from dataclasses import replace
from itertools import combinations
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fgfast.cli import main
from fgfast.compare import Comparison
from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.maps import save_maps, write_maps_info
from fgfast.errors import UserError
from fgfast.evaluate import protocols
from fgfast.evaluate.keypoints import (
    KeypointOptions,
    Located,
    box_iou,
    locate,
    nmi_ari_under,
    regression_error,
    score_keypoints,
)
from fgfast.evaluate.protocols import evaluate
from fgfast.methods.particle import PARTICLEConfig
from fgfast.parts.clusters import Clusters
from fgfast.parts.discover import DiscoveryConfig, write_maps
from fgfast.parts.keypoints import KeyPoints
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.data.trees import nabirds
from tests.examples import examples

CPU = torch.device("cpu")


def located(seed: int, n: int = 20, points: int = 4, parts: int = 3, absent: float = 0.0) -> Located:
    """Random parts and key points that follow their centres roughly."""
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(0, 30, (n, 2)), rng.uniform(20, 50, (n, 2))], 1)
    centres = boxes[:, None, :2] + rng.random((n, parts, 2)) * boxes[:, None, 2:]
    centres[rng.random((n, parts)) < absent] = np.nan
    where = np.nan_to_num(centres, nan=40)[:, rng.integers(parts, size=points)] + rng.normal(0, 3, (n, points, 2))
    visible = rng.random((n, points)) < 0.7
    visible[0] = True
    return Located(rng.integers(-1, parts, (n, points)), visible, where, centres, boxes, np.ones((n, 2)))


def nmi_ari_by_definition(truth: list[int], found: list[int]) -> tuple[float, float]:
    """Entropies from counts; pairs of samples counted one by one."""
    n = len(truth)

    def entropy(labels: list) -> float:
        return -sum(c / n * log(c / n) for c in (labels.count(v) for v in set(labels)))

    both = list(zip(truth, found, strict=True))
    mutual = entropy(truth) + entropy(found) - entropy(both)
    mean = (entropy(truth) + entropy(found)) / 2
    pairs = [(truth[i] == truth[j], found[i] == found[j]) for i, j in combinations(range(n), 2)]
    same, a, b = (sum(values) for values in zip(*[(t and f, t, f) for t, f in pairs], strict=True))
    expected, most = a * b / len(pairs), (a + b) / 2
    return mutual / mean if mean else 1.0, (same - expected) / (most - expected) if most != expected else 1.0


@examples(15)
@given(seed=st.integers(0, 2**31))
def test_nmi_and_ari_are_those_of_all_visible_key_points_at_once(seed: int) -> None:
    """Hidden ones do not count; "no part" is one more id."""
    found = located(seed, n=12)
    samples = [(k, found.ids[i, k]) for i in range(12) for k in range(4) if found.visible[i, k]]
    expected = nmi_ari_by_definition(*map(list, zip(*samples, strict=True)))
    assert nmi_ari_under(found) == pytest.approx(expected, abs=1e-6)


@examples(10)
@given(seed=st.integers(0, 2**31), parts=st.integers(1, 5))
def test_the_regression_error_is_that_of_scikit_learn(seed: int, parts: int) -> None:
    """With every part in every image: a pipeline of StandardScaler and LinearRegression with intercept."""
    fit, test = located(seed, n=30, parts=parts), located(seed + 1, n=15, parts=parts)

    def in_box(found: Located, values: np.ndarray) -> np.ndarray:
        return np.stack([(v - b[:2]) / b[2:] for v, b in zip(values, found.boxes, strict=True)])

    distances: list[float] = []
    for k in range(4):
        model = make_pipeline(StandardScaler(), LinearRegression())
        rows, scored = fit.visible[:, k], test.visible[:, k]
        x, y = in_box(fit, fit.centres).reshape(30, -1), in_box(fit, fit.points)[:, k]
        model.fit(x[rows], y[rows])
        predicted = model.predict(in_box(test, test.centres).reshape(15, -1)[scored])
        distances += np.hypot(*(predicted - in_box(test, test.points)[scored, k]).T).tolist()
    assert regression_error(fit, test) == pytest.approx(np.mean(distances), abs=1e-6)


def test_a_part_that_an_image_lacks_stands_at_its_mean() -> None:
    fit, test = located(0, n=40, absent=0.3), located(1, absent=0.3)
    x = (fit.centres - fit.boxes[:, None, :2]) / fit.boxes[:, None, 2:]

    def filled(found: Located, k: int) -> Located:
        """The same with the mean over the training images that show point k and have the part."""
        middle = np.nanmean(x[fit.visible[:, k]], axis=0) * found.boxes[:, None, 2:] + found.boxes[:, None, :2]
        return found._replace(centres=np.where(np.isnan(found.centres), middle, found.centres))

    one = [
        regression_error(
            filled(fit, k)._replace(visible=fit.visible & (np.arange(4) == k)),
            filled(test, k)._replace(visible=test.visible & (np.arange(4) == k)),
        )
        for k in range(4)
    ]
    counts = test.visible.sum(0)
    assert regression_error(fit, test) == pytest.approx(np.average(np.array(one, float), weights=counts), abs=1e-6)


def test_a_part_that_no_training_image_has_changes_nothing() -> None:
    """And is not warned of."""
    fit, test = located(0, n=40), located(1)

    def with_part(found: Located, where: float) -> Located:
        return found._replace(centres=np.concatenate([found.centres, np.full((len(found.ids), 1, 2), where)], 1))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error = regression_error(with_part(fit, np.nan), with_part(test, 5.0))
    assert error == pytest.approx(regression_error(fit, test), abs=1e-9)


def test_images_without_a_box_and_points_that_no_training_image_shows_are_left_out() -> None:
    fit, test = located(0), located(1)
    hidden = fit._replace(visible=fit.visible & (np.arange(4) != 2))
    expected = regression_error(fit, test._replace(visible=test.visible & (np.arange(4) != 2)))
    assert regression_error(hidden, test) == pytest.approx(expected)
    boxes = test.boxes.copy()
    boxes[5:] = np.nan
    assert regression_error(fit, test._replace(boxes=boxes)) == pytest.approx(
        regression_error(fit, Located(*(values[:5] for values in test)))
    )
    assert regression_error(fit, test._replace(boxes=np.full_like(boxes, np.nan))) is None


def draw(folder: Path, ids: list[np.ndarray], sizes: list[tuple[int, int]], n_parts: int) -> tuple[ImageSet, Path]:
    """Grey images of given sizes (H, W) and their id maps; without points and boxes."""
    paths = [f"{i}.png" for i in range(len(ids))]
    for path, (height, width) in zip(paths, sizes, strict=True):
        Image.new("RGB", (width, height)).save(folder / path)
    for path, grid in zip(paths, ids, strict=True):
        save_maps(folder / "maps", [path], np.where(grid < 0, 255, grid)[None].astype(np.uint8))
    write_maps_info(folder / "maps", n_parts, (0, 0), "")
    n = len(ids)
    return ImageSet(folder, (*paths,), np.zeros(n, np.int64), ("a",), np.zeros(n, bool)), folder / "maps"


def test_points_boxes_and_centres_are_in_pixels_of_images_of_any_shape(tmp_path: Path) -> None:
    """A map of 2 x 4 over an image of 20 x 80 pixels: cells of 10 x 20."""
    images, maps = draw(tmp_path, [np.array([[0, 0, 1, -1], [0, 2, 1, -1]])], [(20, 80)], 4)
    points = np.array([[[19.9, 9.9, 1], [20.0, 10.0, 1], [79.0, 19.0, 1], [500.0, -3.0, 1], [41.0, 2.0, 0]]])
    images = replace(images, keypoints=points.astype(np.float32), boxes=np.float32([[0, 0, 40, 10]]))
    found = locate(images, maps)
    assert found.ids.tolist() == [[0, 2, -1, -1, 1]]
    assert found.visible.tolist() == [[True, True, True, True, False]]
    expected = [[(10 + 30 + 10) / 3, (5 + 5 + 15) / 3], [50, 10], [30, 15], [np.nan, np.nan]]
    assert found.centres[0] == pytest.approx(np.array(expected), nan_ok=True)
    assert found.overlap.tolist() == [[2, 6]]  # two cells in the box; six with a part, the box among them
    assert box_iou(found) == pytest.approx(2 / 6)
    assert locate(images, maps, background=0).ids.tolist() == [[-1, 2, -1, -1, 1]]
    assert box_iou(locate(images, maps, background=1)) == pytest.approx(2 / 4)
    assert box_iou(locate(replace(images, boxes=None), maps)) is None


@pytest.fixture(scope="module")
def birds(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn set without its part masks."""
    folder = tmp_path_factory.mktemp("birds") / "set"
    shutil.copytree(drawn, folder, ignore=shutil.ignore_patterns("part_masks"))
    return folder


@pytest.fixture(scope="module")
def run(birds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run before its first step."""
    config = PARTICLEConfig(
        data=str(birds), out=str(tmp_path_factory.mktemp("keypoints") / "run"), model=TINY, size=32, batch_size=6,
        device="cpu", threads=1, amp="off", hidden=16, projection=8, passes=24, knn_every=0, n_parts=4, max_parts=3,
        map_size=16, border=1.0,
    )  # fmt: skip
    return pretrain("particle", config, train=False)


def perfect(images: ImageSet, out: Path, side: int = 64) -> Path:
    """The cells of the nearest visible key point in the box."""
    assert images.keypoints is not None
    return write_maps(KeyPoints(images.keypoints.shape[1], DiscoveryConfig(0, side, "")), images, out)


def test_the_cells_of_the_key_points_score_almost_1(birds: Path, tmp_path: Path) -> None:
    images = open_images(birds)
    maps = perfect(images, tmp_path / "maps", side=128)
    scores = score_keypoints(images.train_set(), images.test_set(), maps)
    noise = np.random.default_rng(0).integers(0, 4, (len(images), 8, 8)).astype(np.uint8)
    save_maps(tmp_path / "noise", images.paths, noise)
    write_maps_info(tmp_path / "noise", 4, (8, 8), "")
    worst = score_keypoints(images.train_set(), images.test_set(), tmp_path / "noise")
    assert min(scores[name] for name in ("nmi", "ari", "box_iou")) > 0.9
    assert scores["keypoint_error"] < worst["keypoint_error"]
    assert max(worst["nmi"], worst["ari"]) < 0.15
    assert images.keypoints is not None
    assert scores["points"] == (images.test_set().keypoints[..., 2] > 0).sum()


def score(run: Path, data: Path, *flags: str) -> int:
    return main(["eval", "parts", str(run), "--data", str(data), "--checkpoint", "init", "--device", "cpu", *flags])


def test_the_scores_of_a_run_are_printed_stored_and_shown(
    run: Path, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(run, birds) == 0
    assert "parts under key points: NMI of" in capsys.readouterr().out
    maps = perfect(open_images(birds), tmp_path / "maps")
    assert score(run, birds, "--maps", str(maps), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["nmi"] > 0.8
    rows = json.loads((run / "eval.json").read_text())
    assert [(r["protocol"], r["options"]) for r in rows] == [("parts", ""), ("parts", f"maps={maps}")]
    for row in rows:
        assert {"nmi", "ari", "keypoint_error", "box_iou"} <= row.keys()
        assert not {"top1", "low", "macro_f1"} & row.keys()
        assert (row["n"], row["n_train"]) == (18, 18)
    text = (run / "report.html").read_text()
    assert "Parts under key points, NMI" in text
    assert f"{100 * printed['ari']:.1f}" in text
    assert not list(run.glob("parts-*"))


def test_the_maps_of_a_run_are_the_same_again_and_those_of_discover(
    run: Path, birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["discover", str(run), "--data", str(birds), "--out", str(tmp_path / "maps"), "--ids", "set",
                 "--map-size", "16", "--checkpoint", "init", "--device", "cpu"]) == 0  # fmt: skip
    capsys.readouterr()
    found = []
    for flags in ((), (), ("--maps", str(tmp_path / "maps"))):
        assert score(run, birds, "--json", *flags) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert {k: found[0][k] for k in ("nmi", "ari", "keypoint_error")} == {
        k: found[2][k] for k in ("nmi", "ari", "keypoint_error")
    }


def test_the_maps_of_a_run_stay_until_its_score_is_stored(
    run: Path, birds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(protocols, "store_score", full)
        with pytest.raises(OSError, match="No space"):
            evaluate(run, "parts", birds, checkpoint="init", device=CPU)
    (folder,) = run.glob("parts-*")
    assert (folder / "maps.json").is_file()
    monkeypatch.setattr(Clusters, "label", lambda *_: pytest.fail("the maps are made again"))
    assert evaluate(run, "parts", birds, checkpoint="init", device=CPU).row()["n"] == 18
    assert not folder.exists()


def rewritten(birds: Path, folder: Path, change: Any) -> Path:
    """A copy whose lines of parts/part_locs.txt, as lists of words, have been changed."""
    shutil.copytree(birds, folder)
    file = folder / "parts" / "part_locs.txt"
    test = [line.split()[1] == "0" for line in (folder / "train_test_split.txt").read_text().splitlines()]
    ids = dict(zip((line.split()[0] for line in (folder / "images.txt").read_text().splitlines()), test, strict=True))
    lines = [line.split() for line in file.read_text().splitlines()]
    file.write_text("\n".join(" ".join(change(line, ids[line[0]])) for line in lines) + "\n")
    return folder


@pytest.mark.parametrize(("hidden", "named"), [(True, "test"), (False, "training")])
def test_no_visible_key_point_gives_one_sentence(
    run: Path, birds: Path, tmp_path: Path, hidden: bool, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def hide(line: list[str], of_test: bool) -> list[str]:
        return [*line[:4], "0"] if of_test is hidden else line

    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    assert score(run, rewritten(birds, tmp_path / "set", hide)) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert f"No key point of any {named} image" in error[0]
    assert before == sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--maps", "/no/such"], "maps.json"),
        (["--background", "0"], "give maps too"),
        (["--background", "300"], "background of fgfast eval parts is 300"),
        (["--epochs", "3"], "'epochs', which KeypointOptions does not have"),
    ],
)
def test_bad_options_give_one_sentence(
    run: Path, birds: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(run, birds, *flags) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_maps_that_lack_an_image_and_maps_for_a_set_with_masks_are_refused(
    run: Path, birds: Path, drawn: Path, tmp_path: Path
) -> None:
    images = open_images(birds)
    maps = perfect(images, tmp_path / "maps")
    (maps / f"{images.test_set().paths[3]}.png").unlink()
    options = KeypointOptions(maps=str(maps))
    with pytest.raises(UserError, match="has no map for"):
        evaluate(run, "parts", birds, checkpoint="init", device=CPU, options=options)
    with pytest.raises(UserError, match="has part masks, which parts takes: leave out maps="):
        evaluate(run, "parts", drawn, checkpoint="init", device=CPU, options=options)


def test_a_comparison_names_what_it_cannot_compare(birds: Path, tmp_path: Path) -> None:
    shared = {"model": TINY, "size": 32, "batch_size": 6, "device": "cpu", "threads": 1, "hidden": 16, "projection": 8}
    comparison = Comparison(tmp_path / "out", [birds], ["random"], [0], shared, protocols=["parts"])
    with pytest.raises(UserError, match="parts gives no top-1 without part masks"):
        comparison.run()
    assert not (tmp_path / "out").exists()


def test_nabirds_is_scored_by_its_points_and_boxes(tmp_path: Path) -> None:
    """One test image, of whose visible point no training image shows the like; the cells fill its box."""
    images = open_images(nabirds(tmp_path / "set"))
    maps = perfect(images, tmp_path / "maps", side=96)  # three columns and four rows a pixel
    scores = score_keypoints(images.train_set(), images.test_set(), maps)
    assert scores == {"nmi": 1, "ari": 1, "keypoint_error": None, "box_iou": 1, "points": 1, "n": 1}


def test_photographs_of_birds(photographs: ImageSet, tmp_path: Path) -> None:
    """The cells of the key points score almost 1, one part does not."""
    train = photographs.train
    images = photographs.subset(np.r_[np.flatnonzero(train)[::5], np.flatnonzero(~train)[::40]])
    scores = score_keypoints(images.train_set(), images.test_set(), perfect(images, tmp_path / "maps", side=128))
    assert scores["n"] == len(images.test_set()) > 10
    assert min(scores["nmi"], scores["ari"], scores["box_iou"]) > 0.9
    one = np.zeros((len(images), 4, 4), np.uint8)
    save_maps(tmp_path / "one", images.paths, one)
    write_maps_info(tmp_path / "one", 1, (4, 4), "")
    plain = score_keypoints(images.train_set(), images.test_set(), tmp_path / "one")
    assert plain["nmi"] == pytest.approx(0, abs=1e-9)
    assert plain["ari"] == pytest.approx(0, abs=1e-9)
    assert 0.05 < plain["box_iou"] < 0.9
    assert scores["keypoint_error"] < plain["keypoint_error"]
