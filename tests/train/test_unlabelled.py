"""Images without labels: methods that need no labels are trained on them, and they are never scored."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from fgfast.cli import main
from fgfast.compare import Comparison
from fgfast.data.layouts import EXTRA, open_images
from fgfast.data.manifest import check_images
from fgfast.data.maps import map_path
from fgfast.data.splits import pretext_images, scored_images, training_images
from fgfast.data.views import Batch
from fgfast.errors import UserError
from fgfast.evaluate.features import extract
from fgfast.evaluate.knn import knn_predict
from fgfast.evaluate.protocols import evaluate, online_knn
from fgfast.methods.base import build_encoder
from fgfast.methods.particle import PARTICLEConfig
from fgfast.methods.simclr import SimCLR, SimCLRConfig
from fgfast.methods.supervised import SupervisedConfig
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.data import trees

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "model": TINY, "size": 32, "batch_size": 7, "epochs": 1, "log_every": 1, "knn_every": 1, "device": "cpu",
    "threads": 1, "amp": "off",
}  # fmt: skip


def simclr(data: Path, out: Path, **values: object) -> SimCLRConfig:
    return SimCLRConfig(data=str(data), out=str(out), hidden=16, projection=8, **COMMON | values)


@pytest.fixture
def extra(tmp_path: Path) -> Path:
    """Four images in folders, one of them broken, and a text file."""
    trees.write_images(tmp_path / "extra", ["a/1.jpg", "a/b/2.png", "3.jpg"])
    (tmp_path / "extra" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "extra" / "notes.txt").write_text("")
    return tmp_path / "extra"


def test_unlabelled_images_are_trained_on_and_not_scored(
    tmp_path: Path, extra: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run on a set like Cassava uses 8 labelled and 3 unlabelled images and 3 of --unlabelled; scores use 8 and 2."""
    data = trees.cassava(tmp_path / "set")
    config = simclr(data, tmp_path / "run", unlabelled=str(extra), batch_size=7)
    monkeypatch.setattr("fgfast.data.manifest.MAX_BROKEN", 0.2)
    images = pretext_images(config)
    assert images.targets.tolist() == [0] * 4 + [1] * 4 + [-1] * 7
    records = check_images(images)
    assert [rel for rel, _ in records.skipped] == [f"{EXTRA}/broken.jpg"]
    assert len(records) == 14
    assert str(extra / "a" / "b" / "2.png") in records.files
    used: set[int] = set()

    class Recording(SimCLR):
        def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
            used.update(batch.index.tolist())
            return super().forward(batch)

    run = pretrain(Recording, config)
    of_run = json.loads((run / "images.json").read_text())["paths"]
    assert {of_run[i] for i in used} == {images.paths[i] for i in records.index}
    score = evaluate(run, "knn", data, device=CPU)
    assert (score.n_train, len(score.correct)) == (8, 2)
    assert "broken.jpg" in (run / "log.txt").read_text()
    read = f"data: cassava in {data}: 2 classes (cbb, healthy), 8 training images, 2 test images, "
    left_out = "; left out: test/ (1 image, its labels were never published)"
    assert capfd.readouterr().err.count(f"{read}7 without labels{left_out}\n") == 1
    assert (run / "log.txt").read_text().count(f"{read}7 without labels{left_out}\n") == 1
    assert (run / "config.toml").read_text().startswith(f"# {read}7 without labels{left_out}\n")
    assert score.images == f"{read}0 without labels{left_out}, images without labels (3 images, scores need labels)"


def test_online_knn_uses_only_labelled_images(tmp_path: Path) -> None:
    """It equals kNN on the features of the 8 labelled training images and the 2 test images."""
    config = simclr(trees.cassava(tmp_path / "set"), tmp_path / "run")
    encoder = build_encoder(config).eval()
    (train_x, train_y), (test_x, test_y) = (
        extract(encoder, images, config.size) for images in (training_images(config)[0], scored_images(config))
    )
    assert (len(train_x), len(test_x), sorted(set(train_y.tolist()))) == (8, 2, [0, 1])
    expected = (knn_predict(train_x, train_y, test_x) == test_y).float().mean()
    assert online_knn(encoder, config, CPU) == pytest.approx(float(expected))


def test_held_out_images_are_labelled(tmp_path: Path, extra: Path) -> None:
    """The held-out images are labelled, equal with and without --unlabelled, and not trained on."""
    config = simclr(trees.cassava(tmp_path / "set"), tmp_path / "run", holdout=0.25)
    training, held_out = training_images(config)
    more = training_images(replace(config, unlabelled=str(extra)))
    assert (more[0].paths, more[1].paths) == (training.paths, held_out.paths)
    assert held_out.targets.tolist() == [0, 1]
    assert set(pretext_images(config).paths) == set(open_images(config.data).subset([*range(13)]).paths) - {
        *held_out.paths,
        *open_images(config.data).test_set().paths,
    }


def test_a_set_without_unlabelled_images_is_used_in_full(drawn: Path, tmp_path: Path) -> None:
    config = simclr(drawn, tmp_path)
    assert pretext_images(config).paths == training_images(config)[0].paths == open_images(drawn).train_set().paths


def test_part_maps_of_unlabelled_images_are_in_the_run_folder(tmp_path: Path, drawn: Path) -> None:
    trees.write_images(tmp_path / "extra", [f"{i}.jpg" for i in range(3)])
    config = PARTICLEConfig(
        data=str(drawn), out=str(tmp_path / "run"), unlabelled=str(tmp_path / "extra"), parts="discovered", n_parts=3,
        map_size=8, hidden=16, projection=8, **COMMON | {"knn_every": 0},
    )  # fmt: skip
    maps = pretrain("particle", config) / "parts_0"
    assert all(map_path(maps, f"{EXTRA}/{i}.jpg").is_file() for i in range(3))
    assert sorted(p.name for p in (tmp_path / "extra").iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]
    with pytest.raises(UserError, match="--parts truth has no masks"):
        pretrain("particle", replace(config, parts="truth", out=str(tmp_path / "two")))


def test_supervised_training_uses_only_labelled_images(tmp_path: Path, extra: Path) -> None:
    data = trees.cassava(tmp_path / "set")
    config = SupervisedConfig(data=str(data), out=str(tmp_path / "run"), **COMMON | {"knn_every": 0})
    assert (pretext_images(config).targets >= 0).all()
    with pytest.raises(UserError, match="--unlabelled"):
        pretrain("supervised", replace(config, unlabelled=str(extra)))
    assert not (tmp_path / "run").exists()


def test_compare_gives_unlabelled_images_to_methods_that_can_use_them(tmp_path: Path) -> None:
    data = trees.cassava(tmp_path / "set")
    trees.write_images(tmp_path / "extra", ["1.jpg"])
    shared = COMMON | {"unlabelled": str(tmp_path / "extra")}
    c = Comparison(tmp_path / "cmp", [data], ["random", "simclr", "supervised"], [0], shared)
    found = {entry.name: c.run_config(entry, data, 0).unlabelled for entry in c.entries}
    assert found == {"random": shared["unlabelled"], "simclr": shared["unlabelled"], "supervised": ""}
    with pytest.raises(UserError, match="--unlabelled"):
        Comparison(tmp_path / "cmp", [data], ["supervised:unlabelled=x"], [0], COMMON)


@pytest.mark.parametrize(
    ("folder", "message"),
    [("nowhere", "nowhere of --unlabelled does not exist"), ("empty", "holds no image"), ("set", "in --data and in")],
)
def test_a_bad_folder_gives_one_sentence(
    tmp_path: Path, folder: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = trees.cassava(tmp_path / "set")
    (tmp_path / "empty").mkdir()
    words = ["--data", str(data), "--out", str(tmp_path / "run"), "--unlabelled", str(tmp_path / folder)]
    assert main(["pretrain", "simclr", *words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_unlabelled_images_have_no_boxes_and_key_points(tmp_path: Path) -> None:
    images = open_images(trees.nabirds(tmp_path / "set")).with_unlabelled(["x.jpg"])
    assert images.boxes is not None
    assert images.keypoints is not None
    assert np.isnan(images.boxes[3]).all()
    assert not images.keypoints[3].any()
    assert len(images.train_set()) + len(images.test_set()) == 3


def test_equal_file_names_in_another_folder_are_checked_again(tmp_path: Path) -> None:
    """The result of the check of an unlabelled image belongs to its own folder."""
    data = trees.flowers(tmp_path / "set")
    for name, content in (("one", None), ("two", b"broken")):
        trees.write_images(tmp_path / name, ["same.png"])
        if content:
            (tmp_path / name / "same.png").write_bytes(b"x" * (tmp_path / "one" / "same.png").stat().st_size)
    images = open_images(data)
    assert not check_images(images.with_folder(tmp_path / "one")).skipped
    with pytest.raises(UserError, match=r"1 of 7 images"):
        check_images(images.with_folder(tmp_path / "two"))
