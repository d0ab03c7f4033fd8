"""The jigsaw: puzzles, learning, resuming, pictures and errors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fgfast.data.layouts import open_images
from fgfast.data.views import Batch
from fgfast.errors import UserError
from fgfast.evaluate.protocols import evaluate
from fgfast.methods.base import Progress
from fgfast.methods.jigsaw import Jigsaw, JigsawConfig
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.methods.common_checks import check_exact_resume, check_padding

NETS = {"cnn": (TINY, "output_stride=8"), "vit": ("test_vit", "patch_size=4")}


def config_for(net: str = "cnn", **values: object) -> JigsawConfig:
    model, args = NETS[net]
    return replace(
        JigsawConfig(
            model=model, model_args=args, size=32, grid=2, n_permutations=4, batch_size=6, epochs=1, log_every=1,
            knn_every=0, device="cpu", threads=1, amp="off",
        ),
        **values,  # type: ignore[arg-type]
    )  # fmt: skip


def batch_of(n: int = 6, side: int = 32) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(
        views=[torch.randn(n, 3, side, side, generator=g)], index=torch.arange(n),
        target=torch.zeros(n, dtype=torch.int64), valid=torch.ones(n, dtype=torch.bool),
    )  # fmt: skip


def test_learns_puzzles(drawn: Path, tmp_path: Path) -> None:
    """The loss falls below that of chance on 18 images, held-out accuracy is logged, and the run is evaluated."""
    run = tmp_path / "run"
    config = config_for(data=str(drawn), out=str(run), epochs=12, lr=0.003, dropout=0.0, knn_every=12, crop_scale=0.9)
    pretrain("jigsaw", config)
    rows, _ = read_metrics(run / "metrics.jsonl")
    losses = [r["loss"] for r in rows if "loss" in r]
    assert np.mean(losses[-6:]) < 0.9 * np.log(4) < np.mean(losses[:6])
    assert 0 <= rows[-1]["held_out_accuracy"] <= 1
    assert "knn" in rows[-1]
    assert 0 <= evaluate(run, "knn", drawn, device=torch.device("cpu")).top1 <= 1


def test_a_vit_learns_a_puzzle(drawn: Path, tmp_path: Path) -> None:
    """A ViT, which has no buffers, trains; steps on one batch lower its loss, with gradients for all its parameters."""
    run = pretrain("jigsaw", config_for("vit", data=str(drawn), out=str(tmp_path / "run")))
    assert 0 <= evaluate(run, "knn", drawn, device=torch.device("cpu")).top1 <= 1
    torch.manual_seed(0)
    method, batch = Jigsaw(config_for("vit", dropout=0.0)).train(), batch_of()
    optimizer = torch.optim.Adam(method.parameters(), 1e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = method(batch)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in method.encoder.parameters())


def test_resumed_run_equals_an_uninterrupted_one(drawn: Path, tmp_path: Path) -> None:
    check_exact_resume("jigsaw", config_for(data=str(drawn), epochs=2), tmp_path, stop_after=2)


def test_puzzles_depend_on_the_step() -> None:
    """Other steps draw other puzzles from the same set; evaluation always draws the same ones."""
    method, batch = Jigsaw(config_for(n_permutations=24)).train(), batch_of(32)
    first = method.puzzles(batch)
    again = method.puzzles(batch)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    method.after_step(Progress(1, 10))
    assert not torch.equal(method.puzzles(batch)[1], first[1])
    method.eval()
    evaluated = method.puzzles(batch)
    method.after_step(Progress(2, 10))
    assert torch.equal(method.puzzles(batch)[0], evaluated[0])


def test_puzzles_of_held_out_images_do_not_depend_on_the_batch() -> None:
    """An image has the same puzzle wherever it stands, so that ranks may share the images."""
    method, batch = Jigsaw(config_for(n_permutations=24)).eval(), batch_of()
    tiles, label = (x.unflatten(0, (6, -1)) for x in method.puzzles(batch))
    part = Batch(
        views=[batch.views[0][3:]], target=batch.target[3:], index=batch.index[3:], valid=batch.valid[3:]
    )  # fmt: skip
    again = (x.unflatten(0, (3, -1)) for x in method.puzzles(part))
    assert all(torch.equal(a[3:], b) for a, b in zip((tiles, label), again, strict=True))


def test_tiles_are_in_the_order_of_the_permutation() -> None:
    """Without jitter each position shows the tile given by the permutation."""
    method, batch = Jigsaw(config_for(tile=16, brightness=0.0)), batch_of()
    tiles, label = method.puzzles(batch)
    cut = batch.views[0].clamp(-2.1, 2.2).unflatten(2, (2, 16)).unflatten(4, (2, 16)).permute(0, 2, 4, 1, 3, 5)
    order = method.permutations[label]
    for b in range(6):
        expected = cut[b].flatten(0, 1)[order[b]]
        inside = (expected > -1.7) & (expected < 2.2)  # values that are not clamped
        torch.testing.assert_close(tiles.view(6, 4, 3, 16, 16)[b][inside], expected[inside])


def test_padded_images_have_no_effect() -> None:
    check_padding(Jigsaw(config_for()), batch_of())


def test_dropout_is_active_only_in_training() -> None:
    """Two passes over the same puzzle differ only in training mode."""
    torch.manual_seed(0)
    method = Jigsaw(config_for()).eval()
    tiles, _ = method.puzzles(batch_of())
    assert torch.equal(method.logits(tiles), method.logits(tiles))
    method.head.train()
    assert not torch.equal(method.logits(tiles), method.logits(tiles))


def test_tiles_count_by_their_area() -> None:
    """Crops of 18 from tiles of 21 pixels cost 9 x 18^2 / 64^2 passes; a ViT takes whole patches."""
    method = Jigsaw(config_for(size=64, grid=3))
    assert method.side == 18
    assert method.passes_per_image == pytest.approx(9 * 18**2 / 64**2)
    assert Jigsaw(config_for("vit", size=64, grid=3)).side == 16


@pytest.mark.parametrize(
    ("net", "values", "match"),
    [
        ("cnn", {"grid": 33}, "no 33 tiles"),
        ("cnn", {"n_permutations": 25}, "24 permutations, not 25"),
        ("cnn", {"tile": 17}, "--tile 17 does not fit tiles of 16"),
        ("cnn", {"cells": 9}, "cells per side"),
        ("vit", {"tile": 14}, "whole patches of 4"),
        ("vit", {"grid": 16}, "whole patches of 4"),
    ],
)
def test_options_that_do_not_fit_are_refused(net: str, values: dict[str, int], match: str) -> None:
    with pytest.raises(UserError, match=match):
        Jigsaw(config_for(net, **values))


def test_networks_of_fixed_image_size_are_refused() -> None:
    """A network that takes only images of one size does not take tiles."""
    with pytest.raises(UserError, match=r"does not take tiles of 14 pixels .* choose another --model"):
        Jigsaw(config_for(model="test_vit", model_args="dynamic_img_size=False,patch_size=2"))


@pytest.mark.parametrize("net", NETS)
def test_pictures_show_puzzles(net: str) -> None:
    """Each row has an image, its tiles, and the tiles in the predicted order, which restores it if it is right."""
    method = Jigsaw(config_for(net, tile=16, brightness=0.0)).train()
    batch = batch_of()
    batch.views[0].clamp_(-1.7, 2.2)
    _, label = method.eval().puzzles(batch)
    method.train()
    method.logits = lambda tiles: torch.nn.functional.one_hot(label, 4).float()  # type: ignore[method-assign]
    rows = method.pictures(batch)["puzzles"]
    assert method.training
    assert [p.caption for p in rows[0]] == ["image", "as the network sees it", "predicted order: 4 of 4 right"]
    assert all(np.array_equal(row[0].image, row[2].image) for row in rows)
    assert not all(np.array_equal(row[0].image, row[1].image) for row in rows)


def test_paper_preset() -> None:
    """The released settings: 75-pixel tiles of a fixed centre, cropped to 64; 2,048 features per tile."""
    config = Jigsaw.paper(None)
    method = Jigsaw(config)
    assert method.head[1].weight.shape == (100, 9 * 2048)
    assert (method.views().whole, method.views().crops) == (225, ())
    assert Batch(whole=torch.zeros(2, 3, 225, 225)).whole is not None
    tiles, _ = method.eval().puzzles(replace(batch_of(2), views=[], whole=torch.zeros(2, 3, 225, 225)))
    assert tiles.shape == (18, 3, 64, 64)


@pytest.mark.parametrize(("amp", "tile", "warned"), [("bf16", 16, True), ("off", 16, False), ("bf16", 18, False)])
def test_tiles_with_wrong_gradients_on_a_cpu_give_a_warning(
    amp: str, tile: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, drawn: Path
) -> None:
    """PyTorch's bfloat16 convolutions of stride 2 on maps of 1 x 1 are wrong; a network of stride 8 has none."""
    method = Jigsaw(config_for(model_args="", size=64, tile=tile, amp=amp))
    method.prepare(open_images(drawn), tmp_path, 0)
    assert ("bfloat16 gradients" in caplog.text) == warned
    caplog.clear()
    Jigsaw(config_for(size=64, tile=tile, amp=amp)).prepare(open_images(drawn), tmp_path, 0)
    assert not caplog.text
