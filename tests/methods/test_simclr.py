"""SimCLR's views by name: what each pair holds, what does not fit, and a run that goes on exactly."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

from fgfast.cli import main
from fgfast.data.layouts import open_images
from fgfast.data.loader import make_loader
from fgfast.errors import UserError
from fgfast.methods.simclr import SimCLR, SimCLRConfig, transform
from fgfast.train import loop
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests.conftest import TINY

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
    assert changed == replace(plain, **transform(views))
    assert (changed == plain) == (views == "original")
    assert (plain.scale is None) == (views not in ("original", "gamma"))
    if views != "original":
        assert (plain.flip, plain.jitter, plain.jitter_p, plain.grayscale, plain.blur) == (
            0.5, (0.8, 0.8, 0.8, 0.2), 0.3, 0.2, 0.0,
        )  # fmt: skip
    both = SimCLR(config_for(views=views, pair="symmetric")).views().crops
    assert both == (changed, changed)


def test_lengths_are_those_of_512_pixels_at_that_size() -> None:
    crops = {v: SimCLR(config_for(views=v, size=512)).views().crops[1] for v in VIEWS}
    assert [crops["coarse-dropout"].pixels(s) for s in crops["coarse-dropout"].hole_size] == [10, 25]
    assert crops["coarse-dropout"].holes == (5, 20)
    assert crops["patch-swap"].pixels(crops["patch-swap"].swap) == 200
    assert [crops["cropped-region"].pixels(s) for s in crops["cropped-region"].paste or ()] == [200, 300]
    assert crops["dcl-jigsaw"].pixels(crops["dcl-jigsaw"].border) == 10
    assert (crops["random-jigsaw"].grid, crops["dcl-jigsaw"].grid) == (4, 7)


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
    with pytest.raises(UserError, match=r"--views random-jigsaw does not fit --size 32 and --blocks 33: .*0 to 32"):
        SimCLR(config_for(views="random-jigsaw", blocks=33))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--views", "mosaic"], "invalid choice 'mosaic'"),
        (["--views", "dcl-jigsaw", "--blocks", "40"], "--blocks 40"),
        (["--views", "dcl-jigsaw", "--blocks", "1"], "--blocks 1"),
        (["--blocks", "-1"], "--blocks is -1: give at least 0"),
        (["--pair", "both"], "invalid choice 'both'"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    out = tmp_path / "run"
    common = ["--data", str(drawn), "--out", str(out), "--model", TINY, "--size", "32", "--device", "cpu"]
    assert main(["pretrain", "simclr", *common, *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


@pytest.mark.slow
def test_a_stopped_run_of_moved_views_goes_on_exactly_and_shows_its_pairs(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = loop.learning_rate

    def stopping(step: int, total: int, config: SimCLRConfig) -> float:
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return real(step, total, config)

    config = config_for(data=str(drawn), out=str(tmp_path / "whole"), views="cropped-region", pair="symmetric")
    pretrain("simclr", config)
    parts = replace(config, out=str(tmp_path / "parts"))
    monkeypatch.setattr(loop, "learning_rate", stopping)
    with pytest.raises(KeyboardInterrupt):
        pretrain("simclr", parts)
    monkeypatch.setattr(loop, "learning_rate", real)
    pretrain("simclr", replace(parts, resume=True))
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / run / "metrics.jsonl")[0] if "loss" in row]
        for run in ("whole", "parts")
    ]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]
    a, b = (torch.load(tmp_path / run / "last.pt", weights_only=True)["method"] for run in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert main(["pictures", str(tmp_path / "whole"), "--data", str(drawn), "--device", "cpu"]) == 0
    assert "pictures/views.png" in capsys.readouterr().out


def test_paper_preset() -> None:
    """The study of views: 512 pixels, temperature 0.5 and a head of 512-512, whichever view is asked for."""
    config = SimCLR.paper(None)
    method = SimCLR(replace(config, views="dcl-jigsaw"))
    assert {crop.size for crop in method.views().crops} == {512}
    assert (method.encoder.dim, method.projector(torch.zeros(2, 512)).shape) == (512, (2, 512))
    assert (config.temperature, config.batch_size, config.epochs, config.model) == (0.5, 64, 500, "resnet18")
