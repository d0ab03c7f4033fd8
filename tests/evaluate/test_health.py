"""Effective rank, uniformity and alignment by their definitions in NumPy, and during training."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fgfast.evaluate import health
from fgfast.evaluate.health import alignment, effective_rank, online_health, uniformity
from fgfast.methods.simclr import SimCLRConfig
from fgfast.models.backbone import Backbone
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.examples import examples

CPU = torch.device("cpu")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@examples(25)
@given(n=st.integers(2, 30), d=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_the_scores_equal_their_definitions(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, d)) + 0.5
    singular = np.linalg.svd(x, compute_uv=False)
    p = singular / singular.sum()
    p = p[p > 0]
    assert effective_rank(torch.from_numpy(x)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), abs=1e-6)
    u, v = unit(x), unit(y)
    pairs = [np.exp(-2 * ((u[i] - u[j]) ** 2).sum()) for i in range(n) for j in range(i)]
    assert uniformity(torch.from_numpy(x)) == pytest.approx(np.log(np.mean(pairs)), abs=1e-6)
    found = alignment(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(((u - v) ** 2).sum(1).mean(), abs=1e-6)


def test_pairs_of_all_blocks_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))
    expected = uniformity(x)
    monkeypatch.setattr(health, "CHUNK", 4)
    assert uniformity(x) == pytest.approx(expected, abs=1e-12)


def test_collapsed_features_have_rank_one_and_no_spread() -> None:
    """Also if their lengths differ; without collapse both are far from it."""
    scale = torch.rand(50, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    x = scale * torch.randn(1, 8, generator=torch.Generator().manual_seed(1))
    assert effective_rank(x) == pytest.approx(1, abs=1e-5)
    assert uniformity(x) == pytest.approx(0, abs=1e-6)
    assert uniformity(x) > health.COLLAPSED
    spread = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    assert effective_rank(spread) > 7
    assert uniformity(spread) < -2


@pytest.mark.parametrize("score", [effective_rank, uniformity, lambda x: alignment(x, x)])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[0.0, 1.0], [torch.inf, 0.0]]), "x is not finite in row 1"),
        (torch.zeros(3), r"x: expected shape \[N, D\]"),
        (torch.zeros(0, 3), r"x: expected shape \[N, D\]"),
    ],
)
def test_features_that_cannot_be_scored_are_refused(
    score: Callable[[torch.Tensor], float], x: torch.Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(x)


def test_one_row_has_no_pair_and_two_views_have_one_shape() -> None:
    with pytest.raises(ValueError, match="N >= 2"):
        uniformity(torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"y: expected shape \[1, 3\], got \[2, 3\]"):
        alignment(torch.ones(1, 3), torch.ones(2, 3))


@pytest.fixture
def unlabelled(drawn: Path, tmp_path: Path) -> Path:
    """A folder of images without labels."""
    folder = tmp_path / "images"
    folder.mkdir()
    for path in sorted((drawn / "images").rglob("*.jpg"))[:12]:
        shutil.copy(path, folder)
    return folder


def test_a_run_without_labels_logs_its_health_and_no_knn(unlabelled: Path, tmp_path: Path) -> None:
    config = SimCLRConfig(
        data=str(unlabelled), out=str(tmp_path / "run"), model=TINY, size=32, batch_size=6, epochs=1, knn_every=1,
        hidden=16, projection=8, device="cpu", threads=1, loader="torchvision", amp="off",
    )  # fmt: skip
    rows, _ = read_metrics(pretrain("simclr", config) / "metrics.jsonl")
    (row,) = [row for row in rows if "effective_rank" in row]
    assert "knn" not in row
    assert 1 <= row["effective_rank"] <= 12
    assert -8 <= row["uniformity"] < 0
    assert 0 < row["alignment"] < 4
    assert "effective rank" in (tmp_path / "run/log.txt").read_text()


def test_a_collapsed_network_is_seen(
    drawn: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same features for all images: effective rank 1, uniformity and alignment 0, and one warning."""
    torch.manual_seed(0)
    encoder = Backbone(TINY, size=32).train()
    encoder.net.layer1.eval()  # a part that is frozen
    config = SimCLRConfig(data=str(drawn), out="run", model=TINY, size=32, threads=1, loader="torchvision")
    health.warn_of_collapse.cache_clear()
    with caplog.at_level(logging.WARNING, "fgfast"):
        healthy = online_health(encoder, config, CPU)
        assert healthy["effective_rank"] > 1.01
        assert not caplog.records
        with torch.no_grad():
            last = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
            for norm in last:
                norm.weight.zero_()
                norm.bias.fill_(0.3)
        scores = [online_health(encoder, config, CPU) for _ in range(2)]
    assert scores[0] == scores[1]
    assert scores[0]["effective_rank"] == pytest.approx(1, abs=1e-5)
    assert scores[0]["uniformity"] == pytest.approx(0, abs=1e-6)
    assert scores[0]["alignment"] == pytest.approx(0, abs=1e-6)
    assert [r.getMessage() for r in caplog.records] == [
        "The features of all images of run have one direction (uniformity 0): lower --lr, or check the images."
    ]
    assert encoder.training
    assert not encoder.net.layer1.training


def test_images_that_cannot_be_read_leave_the_health_out(tmp_path: Path) -> None:
    config = SimCLRConfig(data=str(tmp_path / "none"), model=TINY, size=32, threads=1)
    assert online_health(Backbone(TINY, size=32), replace(config), CPU) == {}
