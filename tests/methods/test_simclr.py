"""The views of SimCLR by name: what each pair holds, errors, and a resumed run."""

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from fgfast.cli import main
from fgfast.data.layouts import open_images
from fgfast.data.loader import make_loader
from fgfast.data.transforms import BlockShuffle, Holes, PasteOnWhite, PatchSwap, TrimBorder
from fgfast.errors import UserError
from fgfast.methods.simclr import SimCLR, SimCLRConfig, transform
from tests.conftest import TINY
from tests.methods.common_checks import check_exact_resume

VIEWS = get_args(get_type_hints(SimCLRConfig)["views"])


def config_for(**values: object) -> SimCLRConfig:
    options = {
        "model": TINY, "size": 32, "batch_size": 6, "epochs": 1, "log_every": 1, "knn_every": 0, "hidden": 16,
        "projection": 8, "device": "cpu", "threads": 1, "amp": "off",
    }  # fmt: skip
    return SimCLRConfig(**(options | values))  # type: ignore[arg-type]


@pytest.mark.parametrize("views", VIEWS)
def test_a_pair_is_an_image_and_its_transform_or_two_transforms(views: str) -> None:
    plain, changed = SimCLR(config_for(views=views)).views().crops
    assert changed == replace(plain, transforms=transform(views))
    assert (changed == plain) == (views == "original")
    assert (plain.scale is None) == (views not in ("original", "gamma"))
    if views != "original":
        assert (plain.flip, plain.jitter, plain.jitter_p, plain.grayscale, plain.blur) == (
            0.5, (0.8, 0.8, 0.8, 0.2), 0.3, 0.2, 0.0,
        )  # fmt: skip
    both = SimCLR(config_for(views=views, pair="symmetric")).views().crops
    assert both == (changed, changed)


def test_lengths_at_512_pixels_are_those_of_the_study() -> None:
    transforms = {v: SimCLR(config_for(views=v, size=512)).views().crops[1].transforms for v in VIEWS}
    assert transforms["coarse-dropout"] == (Holes((5, 20), (10 / 512, 25 / 512)),)
    assert transforms["patch-swap"] == (PatchSwap(200 / 512),)
    assert transforms["cropped-region"] == (PasteOnWhite((200 / 512, 300 / 512)),)
    assert transforms["random-jigsaw"] == (BlockShuffle(4),)
    assert transforms["dcl-jigsaw"] == (TrimBorder(10 / 512), BlockShuffle(7, reach=1))


@pytest.mark.parametrize("size", [16, 17, 33])
def test_every_view_fits_small_images(drawn: Path, size: int) -> None:
    for views in VIEWS:
        loader = make_loader(open_images(drawn), SimCLR(config_for(views=views, size=size)).views(), 4, threads=1)
        try:
            batch = next(iter(loader))
        finally:
            loader.close()
        assert all(view.shape == (4, 3, size, size) and view.isfinite().all() for view in batch.views)


def test_a_grid_larger_than_the_view_is_refused() -> None:
    with pytest.raises(UserError, match=r"--views random-jigsaw does not fit --size 32 and --blocks 33: .*1 to 32"):
        SimCLR(config_for(views="random-jigsaw", blocks=33))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--views", "mosaic"], "invalid choice 'mosaic'"),
        (["--views", "dcl-jigsaw", "--blocks", "40"], "--blocks 40"),
        (["--views", "dcl-jigsaw", "--blocks", "1"], "--blocks 1"),
        (["--blocks", "-1"], "--blocks is -1: give at least 0"),
        (["--pair", "both"], "invalid choice 'both'"),
    ],
)
def test_options_that_do_not_fit_give_one_sentence(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    out = tmp_path / "run"
    common = ["--data", str(drawn), "--out", str(out), "--model", TINY, "--size", "32", "--device", "cpu"]
    assert main(["pretrain", "simclr", *common, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.slow
def test_resumed_run_of_transformed_views_equals_an_uninterrupted_one_and_shows_its_pairs(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(data=str(drawn), views="cropped-region", pair="symmetric")
    run = check_exact_resume("simclr", config, tmp_path, stop_after=2)
    assert main(["pictures", str(run), "--data", str(drawn), "--device", "cpu"]) == 0
    assert "pictures/views.png" in capsys.readouterr().out


def test_paper_preset() -> None:
    """The study of views: 512 pixels, temperature 0.5 and a head of 512-512, for every view."""
    config = SimCLR.paper(None)
    method = SimCLR(replace(config, views="dcl-jigsaw"))
    assert {crop.size for crop in method.views().crops} == {512}
    assert (method.encoder.dim, method.projector(torch.zeros(2, 512)).shape) == (512, (2, 512))
    assert (config.temperature, config.batch_size, config.epochs, config.model) == (0.5, 64, 500, "resnet18")
