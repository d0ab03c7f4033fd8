"""The images of a few-shot segmentation: classes of masks, the labelled images, and sets that are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fgfast.data.layouts import open_images
from fgfast.data.maps import write_maps_info
from fgfast.errors import UserError
from fgfast.evaluate.few_shot import SegmentationOptions, choose_images, mask_classes
from tests.evaluate.quadrants import count_steps, draw, encoder, score


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
