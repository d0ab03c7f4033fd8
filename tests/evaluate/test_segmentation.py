"""The training of a few-shot segmentation: scores of known answers, seeds, batches, resuming, and the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fgfast.cli import main
from fgfast.data.layouts import open_images
from fgfast.data.normalise import denormalise
from fgfast.errors import UserError
from fgfast.evaluate import protocols, segmentation
from fgfast.evaluate.few_shot import SegmentationOptions
from fgfast.evaluate.options import parse_protocols
from fgfast.evaluate.protocols import evaluate
from fgfast.evaluate.segmentation import segment
from fgfast.methods.simclr import SimCLRConfig
from fgfast.models.backbone import Backbone
from fgfast.train.loop import pretrain
from tests.conftest import TINY, real_data
from tests.evaluate.quadrants import COLOURS, CONFIG, CPU, count_steps, draw, encoder, score


class Oracle(torch.nn.Module):
    """Reads the truth from the colours of the quadrants; ``wrong`` names a class for which it says the next one."""

    wrong: int | None = None
    colours = COLOURS

    def __init__(self, _encoder: Backbone, n_classes: int, size: int) -> None:
        super().__init__()
        self.weight, self.n_classes = torch.nn.Parameter(torch.ones(())), n_classes

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        distance = (denormalise(images)[:, None] - self.colours[None, :, :, None, None]).square().sum(2)
        truth = distance.argmin(1)  # [B, H, W]
        if self.wrong is not None:
            truth = torch.where(truth == self.wrong, (truth + 1) % self.n_classes, truth)
        logits = 30 * torch.nn.functional.one_hot(truth, self.n_classes).permute(0, 3, 1, 2)
        return self.weight * logits


def test_a_network_that_knows_the_truth_scores_1(quadrants: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "Segmenter", Oracle)
    result = score(quadrants, epochs=2)
    assert (result.miou, result.deviation, result.folds) == (1, 0, [1, 1])
    assert result.iou == {"background": 1, "part 0": 1, "part 1": 1, "part 2": 1}
    assert result.chosen == [1, 1]  # the first of equals
    assert (result.n_labelled, result.n_test) == (8, 8)


def test_a_class_taken_for_another_costs_both(quadrants: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The background is called part 0, whose union is then twice its intersection."""
    monkeypatch.setattr(Oracle, "wrong", 0)
    monkeypatch.setattr(segmentation, "Segmenter", Oracle)
    result = score(quadrants)
    assert result.iou == {"background": 0, "part 0": 0.5, "part 1": 1, "part 2": 1}
    assert result.miou == pytest.approx(2.5 / 4)


def test_training_images_are_flipped_with_their_masks(quadrants: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth of every training view is what its colours say; jitter leaves the nearest colour as it is."""
    seen: list[float] = []

    original = segmentation.F.cross_entropy

    def watch(logits: torch.Tensor, truth: torch.Tensor, **more: Any) -> torch.Tensor:
        seen.append(float((logits.argmax(1) == truth).float().mean()))
        return original(logits, truth, **more)

    monkeypatch.setattr(segmentation, "Segmenter", Oracle)
    monkeypatch.setattr(segmentation.F, "cross_entropy", watch)
    score(quadrants, epochs=3)
    assert len(seen) == 6
    assert min(seen) == 1


def test_pixels_without_a_known_part_count_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With "absent": "unknown" the black quadrant is no class, and what is predicted there has no effect."""
    images = draw(tmp_path, parts=["tail", "left wing", "right wing"], absent="unknown")

    monkeypatch.setattr(Oracle, "colours", COLOURS[1:])
    monkeypatch.setattr(segmentation, "Segmenter", Oracle)
    result = score(images)
    assert result.iou == {"tail": 1, "left wing": 1, "right wing": 1}


def test_it_learns(quadrants: Path) -> None:
    """Training on the images that are scored, the network is far above the best constant answer, 1/4 of one class."""
    images = open_images(quadrants)
    images = replace(images, train=np.ones(len(images), bool))
    options = SegmentationOptions(n_labelled=16, folds=2, epochs=30, every=30, lr=1e-2)
    torch.manual_seed(0)
    result = segment(Backbone(TINY, size=64), images, images, CONFIG, options, device=CPU)
    assert result.miou > 0.5


def test_the_seed_decides_the_result(quadrants: Path) -> None:
    assert score(quadrants, n_labelled=4) == score(quadrants, n_labelled=4)
    assert score(quadrants, n_labelled=4) != score(quadrants, n_labelled=4, seed=1)


@pytest.mark.parametrize(("n_labelled", "sizes"), [(8, [4, 4]), (7, [4]), (3, [3])])
def test_an_incomplete_batch_is_left_out_and_few_images_make_one(
    quadrants: Path, n_labelled: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    class Counted(Oracle):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if self.training:
                seen.append(len(images))
            return super().forward(images)

    monkeypatch.setattr(segmentation, "Segmenter", Counted)
    score(quadrants, n_labelled=n_labelled)
    assert seen == sizes


def test_the_last_epoch_is_a_checkpoint_too(quadrants: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 5 epochs, those after 2, 4 and 5 are scored."""
    calls: list[int] = []
    monkeypatch.setattr(segmentation, "Segmenter", Oracle)
    original = segmentation._count
    monkeypatch.setattr(segmentation, "_count", lambda *a: calls.append(1) or original(*a))
    score(quadrants, epochs=5, every=2)
    assert len(calls) == 3


def test_an_interrupted_call_resumes(quadrants: Path, tmp_path: Path) -> None:
    """After an interruption in the third epoch only that one is repeated, with the same scores and weights."""
    state_file, expected_net, net, resumed = tmp_path / "state.pt", *(encoder() for _ in range(3))
    expected = score(quadrants, expected_net, epochs=3)
    count_steps(net, stop=4)
    with pytest.raises(KeyboardInterrupt):
        score(quadrants, net, state_file, epochs=3)
    assert state_file.is_file()
    steps = count_steps(resumed)
    assert score(quadrants, resumed, state_file, epochs=3) == expected
    assert len(steps) == 2
    for key, value in resumed.net.state_dict().items():
        assert torch.equal(value, expected_net.net.state_dict()[key]), key
    steps.clear()
    assert score(quadrants, resumed, state_file, epochs=3) == expected  # the state holds the finished scores too
    assert not steps
    score(quadrants, resumed, state_file, epochs=3, lr=1e-3)  # the state of other options is ignored
    assert len(steps) == 6


def test_broken_images_are_neither_trained_on_nor_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path, n=48)
    for rel in ("train/a/1.png", "test/a/0.png"):
        (tmp_path / rel).write_bytes(b"no image")
    monkeypatch.setattr(segmentation, "Segmenter", Oracle)
    result = score(tmp_path, n_labelled=24)
    assert (result.n_labelled, result.n_test, result.miou) == (23, 23, 1)


def test_weights_that_diverge_are_refused(quadrants: Path) -> None:
    net = encoder()
    torch.nn.init.constant_(next(net.net.parameters()), float("nan"))
    with pytest.raises(UserError, match="not finite after epoch 1 of segmentation: lower --lr"):
        score(quadrants, net)


def test_masks_of_the_synthetic_set_are_its_parts_and_the_background(drawn: Path) -> None:
    parts = {"beak", "crest", "head", "breast", "body", "wing", "tail", "legs"}
    assert set(score(drawn, n_labelled=8).iou) == {"background", *parts}


def test_trimaps_of_pets_are_two_classes_and_their_border_is_ignored() -> None:
    folder = real_data("oxford_pets3")
    images = open_images(folder)
    train, test = np.flatnonzero(images.train)[:6], np.flatnonzero(~images.train)[:6]
    few = images.subset([*train, *test])
    counted: list[torch.Tensor] = []
    original = segmentation._count

    def keep(*args: Any) -> torch.Tensor:
        counted.append(original(*args))
        return counted[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "_count", keep)
        result = score(few, n_labelled=6, lr=1e-3)
    assert set(result.iou) == {"pet", "background"}
    assert 0 < result.miou < 1
    middles = (np.arange(64) + 0.5) / 64
    for row, rel in enumerate(few.test_set().paths):
        trimap = np.array(Image.open(folder / "annotations" / "trimaps" / f"{Path(rel).stem}.png"))
        small = trimap[np.ix_(*((middles * side).astype(int) for side in trimap.shape))]
        assert counted[0][row, 2].tolist() == [(small == 1).sum(), (small == 2).sum()]
        assert (small == 3).any()


@pytest.fixture(scope="module")
def run(quadrants: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run before its first step."""
    config = SimCLRConfig(
        data=str(quadrants), out=str(tmp_path_factory.mktemp("segmentation") / "run"), model=TINY, size=64,
        batch_size=4, device="cpu", threads=1, amp="off", hidden=16, projection=8, passes=8, knn_every=0,
    )  # fmt: skip
    return pretrain("simclr", config, train=False)


def words(run: Path, data: Path, *more: str) -> list[str]:
    return ["eval", "segmentation", str(run), "--data", str(data), "--checkpoint", "init", "--device", "cpu", *more]


def test_the_command_prints_and_stores_its_scores(
    run: Path, quadrants: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--n-labelled", "8", "--folds", "2", "--epochs", "2", "--every", "1", "--lr", "0.01"]
    assert main(words(run, quadrants, *flags, "--json")) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= row["miou"] <= 1
    assert row["miou"] == pytest.approx(np.mean(row["folds"]))
    assert row["deviation"] == pytest.approx(np.std(row["folds"]))
    assert set(row["iou"]) == {"background", "part 0", "part 1", "part 2"}
    assert row["options"] == "n_labelled=8,folds=2,epochs=2,every=1,lr=0.01"
    assert (row["n"], row["n_train"], row["settings"]["batch_size"]) == (8, 8, 8)
    assert "top1" not in row
    stored = json.loads((run / "eval.json").read_text())
    assert [row.items() <= other.items() for other in stored] == [True]
    assert main(words(run, quadrants, *flags)) == 0
    assert f"segmentation mIoU of {run} (init): {row['miou']:.2%} (deviation" in capsys.readouterr().out
    assert not list(run.glob("segmentation-*.pt"))
    page = (run / "report.html").read_text()
    assert "Segmentation, mIoU" in page
    assert f"{100 * row['miou']:.1f}" in page


def test_the_state_stays_until_the_score_is_stored(run: Path, quadrants: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    options = SegmentationOptions(n_labelled=4, folds=2, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(protocols, "store_score", full)
        with pytest.raises(OSError, match="No space"):
            evaluate(run, "segmentation", quadrants, checkpoint="init", device=CPU, options=options)
    assert len(list(run.glob("segmentation-init-*.pt"))) == 1
    evaluate(run, "segmentation", quadrants, checkpoint="init", device=CPU, options=options)
    assert not list(run.glob("segmentation-*.pt"))


def test_a_set_of_one_class_of_images_can_be_segmented(run: Path, tmp_path: Path) -> None:
    draw(tmp_path)
    for folder in (tmp_path, tmp_path / "part_masks"):
        for split in ("train", "test"):
            shutil.rmtree(folder / split / "b")
    options = SegmentationOptions(n_labelled=4, folds=2, epochs=1)
    score = evaluate(run, "segmentation", tmp_path, checkpoint="init", device=CPU, options=options)
    assert (score.more["n"], score.n_train) == (4, 4)
    assert np.isnan(score.top1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "n_labelled is 150 and"), (["--n-labelled", "1"], "n_labelled of fgfast eval segmentation is 1: give at"),
        (["--n-labelled", "8", "--folds", "9"], "folds is 9 and"),
        (["--folds", "1"], "folds of fgfast eval segmentation is 1: give at least 2"),
        (["--every", "0"], "every of fgfast eval segmentation is 0"), (["--stages", "2"], "does not have"),
    ],
)  # fmt: skip
def test_bad_options_end_in_one_sentence_and_leave_nothing(
    run: Path, quadrants: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.stat().st_mtime_ns for file in run.iterdir()}
    assert main(words(run, quadrants, *flags)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {file: file.stat().st_mtime_ns for file in run.iterdir()} == before


def test_a_comparison_refuses_scores_without_top_1() -> None:
    with pytest.raises(UserError, match="segmentation gives no top-1 to compare"):
        parse_protocols(["linear,segmentation:folds=3"])
