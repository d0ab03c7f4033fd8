"""Few-shot segmentation: IoU against scikit-learn, folds against a plain loop, classes of masks, resuming, errors."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import jaccard_score

from fgfast.cli import main
from fgfast.config import TrainConfig
from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.maps import write_maps_info
from fgfast.data.normalise import denormalise
from fgfast.errors import UserError
from fgfast.evaluate import protocols, segmentation
from fgfast.evaluate.few_shot import SegmentationOptions, choose_images, mask_classes
from fgfast.evaluate.iou import count_pixels, cross_validate, iou, mean_iou, split_folds
from fgfast.evaluate.options import parse_protocols
from fgfast.evaluate.protocols import evaluate
from fgfast.evaluate.segmentation import Segmentation, segment
from fgfast.methods.simclr import SimCLRConfig
from fgfast.models.backbone import Backbone
from fgfast.train.loop import pretrain
from tests.conftest import TINY

CPU = torch.device("cpu")
CONFIG = TrainConfig(size=64, threads=1, amp="off")
COLOURS = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # of absent, id 0, 1, 2


def draw(root: Path, n: int = 16, **info: Any) -> Path:
    """Images of 64 px: black, with one red, one green and one blue quadrant; masks have ids 0, 1 and 2 there."""
    rng = np.random.default_rng(0)
    for i in range(n):
        quadrants = rng.permutation([-1, 0, 1, 2]).reshape(2, 2)
        ids = quadrants.repeat(32, 0).repeat(32, 1)
        rel = f"{'train' if i % 2 else 'test'}/{'ab'[i // 2 % 2]}/{i}.png"
        for folder, content in (
            (root, (255 * COLOURS.numpy()[ids + 1]).astype(np.uint8)),
            (root / "part_masks", np.where(ids < 0, 255, ids).astype(np.uint8)),
        ):
            file = folder / (rel if folder == root else f"{rel}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(content).save(file)
    write_maps_info(root / "part_masks", 3, (64, 64), "truth", **info)
    return root


@pytest.fixture(scope="module")
def quadrants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images, half of them for training."""
    return draw(tmp_path_factory.mktemp("quadrants"))


def score(
    data: Path | ImageSet, net: Backbone | None = None, state_file: Path | None = None, **values: Any
) -> Segmentation:
    images = data if isinstance(data, ImageSet) else open_images(data)
    options = SegmentationOptions(
        **{"n_labelled": 8, "folds": 2, "epochs": 1, "every": 1, "lr": 1e-2, "batch_size": 4} | values
    )
    torch.manual_seed(0)
    return segment(
        net or Backbone(TINY, size=64), images.train_set(), images.test_set(), CONFIG, options, device=CPU,
        state_file=state_file, start="one",
    )  # fmt: skip


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


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_iou_equals_that_of_scikit_learn(n_images: int, n_classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(-1, n_classes, (n_images, 3, 5))
    predicted = rng.integers(0, n_classes, truth.shape)
    counts = count_pixels(torch.from_numpy(predicted), torch.from_numpy(truth), n_classes).numpy()
    counted = truth >= 0
    present = [c for c in range(n_classes) if (truth == c).any()]
    expected = jaccard_score(truth[counted], predicted[counted], labels=present, average=None) if present else []
    found = iou(counts)
    assert np.flatnonzero(~np.isnan(found)).tolist() == present
    assert found[present] == pytest.approx(np.asarray(expected), abs=1e-12)
    assert mean_iou(counts) == pytest.approx(np.mean(expected) if present else np.nan, abs=1e-12, nan_ok=True)


@given(st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_cross_validation_equals_a_plain_loop_over_pixels(n_folds: int, seed: int) -> None:
    """Every fold chooses by its images and scores the others, each class over all pixels of these images."""
    rng = np.random.default_rng(seed)
    n_images, n_classes, n_checkpoints = 7, 3, 4
    truth = rng.integers(0, n_classes, (n_images, 4, 4))
    predicted = np.where(
        rng.random((n_checkpoints, n_images, 4, 4)) < 0.5, truth, rng.integers(0, n_classes, truth.shape)
    )
    counts = torch.stack(
        [count_pixels(torch.from_numpy(p), torch.from_numpy(truth), n_classes) for p in predicted]
    ).numpy()

    def plain(images: list[int], checkpoint: int) -> float:
        values = []
        for c in range(n_classes):
            found = {(i, *p) for i in images for p in np.argwhere(predicted[checkpoint, i] == c).tolist()}
            true = {(i, *p) for i in images for p in np.argwhere(truth[i] == c).tolist()}
            values += [len(found & true) / len(found | true)] if true else []
        return sum(values) / len(values)

    folds = split_folds(n_images, n_folds, seed)
    result = cross_validate(counts, folds)
    for k, fold in enumerate(folds):
        selection = [plain(fold.tolist(), e) for e in range(n_checkpoints)]
        best = max(range(n_checkpoints), key=lambda e: selection[e])
        rest = [i for i in range(n_images) if i not in fold]
        assert result.chosen[k] == best
        assert result.scores[k] == pytest.approx(plain(rest, best), abs=1e-12)


@given(st.integers(2, 30), st.integers(2, 6), st.integers(0, 9))
def test_folds_split_the_images_evenly(n: int, folds: int, seed: int) -> None:
    parts = split_folds(n, folds, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_class_that_the_images_do_not_show_is_left_out_though_it_is_predicted() -> None:
    truth, predicted = torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 2, 1, 1]]])
    assert mean_iou(count_pixels(predicted, truth, 3).numpy()) == (1 / 2 + 1) / 2


def test_maps_of_different_shapes_or_without_a_batch_are_refused() -> None:
    one, other = (torch.zeros(1, *side, dtype=torch.int64) for side in ((3, 2), (2, 3)))
    with pytest.raises(ValueError, match=r"^predicted: expected shape \[1, 2, 3\], got \[1, 3, 2\]"):
        count_pixels(one, other, 2)
    with pytest.raises(ValueError, match=r"^truth: expected shape \[B, H, W\], got \[3, 2\]"):
        count_pixels(one[0], one[0], 2)


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


@pytest.mark.parametrize(
    ("parts", "mirrored"),
    [
        (["left eye", "tail", "right eye"], (0, 3, 2, 1)), (["left_wing", "right_wing", "left leg"], (0, 2, 1, 3)),
        (["Left Eye", "Right Eye", "Tail-Right"], (0, 2, 1, 3)),
        (["cleft", "cright", "beak"], (0, 1, 2, 3)),
    ],
)  # fmt: skip
def test_left_and_right_parts_swap_in_flipped_images_alone(
    tmp_path: Path, parts: list[str], mirrored: tuple[int, ...]
) -> None:
    write_maps_info(tmp_path, 3, (0, 0), "truth", parts=parts)
    classes = mask_classes(tmp_path)
    assert classes.mirrored == mirrored
    ids = torch.tensor([[[-1, 0, 1, 2]]]).expand(2, 1, 4)
    assert classes.of(ids, torch.tensor([False, True])).tolist() == [[[0, 1, 2, 3]], [[*mirrored]]]


def test_ignored_pixels_stay_ignored_in_flipped_images(tmp_path: Path) -> None:
    write_maps_info(tmp_path, 2, (0, 0), "truth", parts=["left", "right"], absent="unknown")
    ids = torch.tensor([[[-1, 0, 1]]])
    assert mask_classes(tmp_path).of(ids, torch.tensor([True])).tolist() == [[[-1, 1, 0]]]


@pytest.mark.parametrize("parts", [["a", "a", "b"], ["a", "b"], ["a", "b", "background"]])
def test_names_that_do_not_name_every_id_are_refused(tmp_path: Path, parts: list[str]) -> None:
    write_maps_info(tmp_path, 3, (0, 0), "truth", parts=parts)
    with pytest.raises(UserError, match="give 3 names that differ and are not background"):
        mask_classes(tmp_path)


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


def test_the_labelled_images_are_training_images_and_the_seed_chooses_them(quadrants: Path) -> None:
    images = open_images(quadrants)
    chosen = [
        choose_images(images.train_set(), images.test_set(), SegmentationOptions(n_labelled=4, folds=2, seed=seed))
        for seed in (0, 1)
    ]
    for few in chosen:
        assert len(few.labelled) == 4
        assert set(few.labelled.paths) <= set(images.train_set().paths)
        assert few.test.paths == images.test_set().paths
    assert chosen[0].labelled.paths != chosen[1].labelled.paths


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


def encoder() -> Backbone:
    torch.manual_seed(0)
    return Backbone(TINY, size=64)


def count_steps(net: Backbone, stop: int | None = None) -> list[int]:
    """A list that grows with each training step of the network, which is interrupted at a number of steps."""
    steps: list[int] = []

    def count(*_: object) -> None:
        if torch.is_grad_enabled():
            if len(steps) == stop:
                raise KeyboardInterrupt
            steps.append(1)

    net.net.conv1.register_forward_pre_hook(count)
    return steps


def one_class(root: Path) -> None:
    for file in (root / "part_masks" / "train").rglob("*.png"):
        Image.new("L", (64, 64), 1).save(file)


def no_class(root: Path) -> None:
    write_maps_info(root / "part_masks", 3, (64, 64), "truth", absent="unknown")
    for file in (root / "part_masks" / "test").rglob("*.png"):
        Image.new("L", (64, 64), 255).save(file)


def empty_fold(root: Path) -> None:
    """All but one of the test images get a mask without a known pixel."""
    write_maps_info(root / "part_masks", 3, (64, 64), "truth", absent="unknown")
    for file in sorted((root / "part_masks" / "test").rglob("*.png"))[1:]:
        Image.new("L", (64, 64), 255).save(file)


def other_size(root: Path) -> None:
    write_maps_info(root / "part_masks", 3, (0, 0), "truth")
    Image.new("L", (64, 32), 1).save(root / "part_masks" / "train" / "a" / "1.png.png")


def other_id(root: Path) -> None:
    Image.new("L", (64, 64), 7).save(root / "part_masks" / "test" / "a" / "0.png.png")


def no_mask(root: Path) -> None:
    (root / "part_masks" / "test" / "a" / "0.png.png").unlink()


def no_masks(root: Path) -> None:
    shutil.rmtree(root / "part_masks")


def no_change(_root: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "values", "message"),
    [
        (no_masks, {}, "has no part masks: choose another protocol than segmentation"),
        (no_change, {"n_labelled": 9}, "n_labelled is 9 and .* has 8 training images: give at most as many"),
        (no_change, {"folds": 9}, "folds is 9 and .* has 8 test images: give at most as many"),
        (one_class, {}, r"8 labelled training images of .* show one class \(part 1\): segmentation needs two"),
        (no_class, {}, "8 test images of .* show no class: segmentation needs two or more"),
        (empty_fold, {}, "A fold of the test images of .* has no labelled pixel: give fewer folds"),
        (other_size, {}, "1.png.png is 32 x 64 and its image 64 x 64: give masks of the size of their images"),
        (other_id, {}, "0.png.png has id 7 of 3"),
        (no_mask, {}, "has no map for test/a/0.png"),
    ],
)  # fmt: skip
def test_images_and_masks_that_cannot_be_used_are_refused_before_training(
    tmp_path: Path, change: Callable[[Path], None], values: dict[str, int], message: str
) -> None:
    change(draw(tmp_path))
    net = encoder()
    steps = count_steps(net)
    with pytest.raises(UserError, match=message):
        score(tmp_path, net, **values)
    assert not steps


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


def test_trimaps_of_pets_are_two_classes_and_their_border_is_ignored() -> None:
    folder = Path(os.environ.get("FGFAST_TEST_DATA", "/nowhere")) / "oxford_pets3"
    if not folder.is_dir():
        pytest.skip("FGFAST_TEST_DATA names no folder that holds oxford_pets3")
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
