"""DetCon-B and DetCon-S: the loss against lightly's, the sample of segments, and runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fgfast.data.layouts import open_images
from fgfast.data.maps import read_map, read_maps_info
from fgfast.data.views import Batch
from fgfast.methods.base import Progress
from fgfast.methods.detcon import DetCon, DetConConfig
from fgfast.parts import segments
from fgfast.report.draw import draw_run
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.methods.common_checks import check_exact_resume, check_padding, recording

TARGETS = ("momentum", "self")


def config_for(data: Path, out: Path, **values: Any) -> DetConConfig:
    return replace(
        DetConConfig(
            data=str(data), out=str(out), model=TINY, model_args="output_stride=8", size=32, batch_size=6, epochs=1,
            log_every=1, knn_every=0, masks=4, hidden=16, projection=8, device="cpu", threads=1, amp="off",
        ),
        **values,
    )  # fmt: skip


def batch_of(n: int = 4, side: int = 32, n_ids: int = 5) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(
        views=[torch.randn(n, 3, side, side, generator=g) for _ in range(2)],
        labels=[torch.randint(0, n_ids, (n, 2, 2), generator=g).repeat_interleave(16, 1).repeat_interleave(16, 2)
                for _ in range(2)],
        target=torch.zeros(n, dtype=torch.int64), index=torch.arange(n), valid=torch.ones(n, dtype=torch.bool),
    )  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
def test_loss_equals_that_of_lightly(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same pooled features and the same sample of segments, in float64."""
    from lightly.loss import DetConBLoss, DetConSLoss

    torch.manual_seed(0)
    method, batch = DetCon(config_for(tmp_path, tmp_path, target=target)).double(), batch_of()
    batch.views = [view.double() for view in batch.views]
    sampled: list[torch.Tensor] = []
    sample = method.sample

    def record(area: torch.Tensor) -> torch.Tensor:
        sampled.append(sample(area))
        return sampled[-1]

    monkeypatch.setattr(method, "sample", record)
    loss = method(batch)["loss"]
    ids = sampled[0]

    def rows(encoder: Any, head: Any) -> torch.Tensor:
        """Segments of both views by the definition: cell by cell, then the mean of each id."""
        maps, labels = encoder.features(torch.cat(batch.views)), torch.cat(batch.labels)
        cell = labels.shape[-1] // maps.shape[-1]
        out = torch.stack(
            [
                torch.stack([maps[i][:, labels[i, ::cell, ::cell] == k].mean(1) for k in ids[i].tolist()])
                for i in range(len(ids))
            ]
        )
        result: torch.Tensor = head(out.flatten(0, 1)).view(*ids.shape, -1)
        return result

    online = rows(method.encoder, method.projector)
    if target == "self":
        expected = DetConSLoss(gather_distributed=False)(*online.chunk(2), *ids.chunk(2))
    else:
        assert method.predictor is not None
        predicted = method.predictor(online.flatten(0, 1)).view_as(online)
        with torch.no_grad():
            keys = rows(method.target, method.target_projector)
        expected = DetConBLoss(gather_distributed=False)(*predicted.chunk(2), *keys.chunk(2), *ids.chunk(2))
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-6)
    assert loss > 0


def test_segments_are_sampled_with_replacement_among_those_in_the_view(tmp_path: Path) -> None:
    """All of them equally often; a view without any gives -1."""
    method = DetCon(config_for(tmp_path, tmp_path, masks=4000))
    area = torch.zeros(4, method.n_parts)
    area[0, [3, 7, 40]] = torch.tensor([1.0, 100.0, 0.5])
    area[1, 2] = area[2, :] = 1
    ids = method.sample(area)
    assert ids.shape == (4, 4000)
    found, counts = ids[0].unique(return_counts=True)
    assert found.tolist() == [3, 7, 40]
    assert counts.min() > 4000 / 3 - 5 * (4000 * 2 / 9) ** 0.5
    assert ids[1].unique().tolist() == [2]
    assert ids[2].unique().tolist() == list(range(method.n_parts))
    assert ids[3].unique().tolist() == [-1]


@pytest.mark.parametrize("target", TARGETS)
def test_padded_images_have_no_effect(tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on the loss nor through the mean: it is that of the valid images alone."""
    torch.manual_seed(0)
    method = DetCon(config_for(tmp_path, tmp_path, target=target, masks=4))

    def take_largest(area: torch.Tensor) -> torch.Tensor:
        return torch.where((area > 0).any(1, keepdim=True), area.topk(4).indices, -1)

    monkeypatch.setattr(method, "sample", take_largest)
    check_padding(method, batch_of())
    batch = batch_of()
    batch.valid[2:] = False
    alone = batch_of()
    alone.views, alone.labels = [v[:2] for v in alone.views], [m[:2] for m in alone.labels]
    alone.target, alone.index, alone.valid = alone.target[:2], alone.index[:2], alone.valid[:2]
    torch.testing.assert_close(method(batch)["loss"], method(alone)["loss"])


@pytest.mark.parametrize("target", TARGETS)
def test_a_run_resumes_exactly_and_draws_its_segments(drawn: Path, tmp_path: Path, target: str) -> None:
    """With half of the images held out, which are not segmented."""
    config = config_for(drawn, tmp_path / "run", target=target, holdout=0.5)
    run = check_exact_resume("detcon", config, tmp_path, 1)
    rows = [row for row in read_metrics(run / "metrics.jsonl")[0] if "loss" in row]
    assert all(np.isfinite(row["loss"]) and row["loss"] > 0 for row in rows)
    assert len(list((run / "parts_0").rglob("*.png"))) == 9
    assert read_maps_info(run / "parts_0")["size"] == [64, 64]
    names = [path.name for path in draw_run(run, drawn, device=torch.device("cpu"))]
    assert names == ["views.png", "pca.png", "neighbours.png"]


def test_the_loss_falls(drawn: Path, tmp_path: Path) -> None:
    out = pretrain("detcon", config_for(drawn, tmp_path / "run", epochs=8, lr=3e-3, scale=250.0))
    losses = [row["loss"] for row in read_metrics(out / "metrics.jsonl")[0] if "loss" in row]
    assert np.mean(losses[-6:]) < np.mean(losses[:6])


def test_lost_segments_are_made_again(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those alone, with the same content, when a run resumes; no pass of the network is spent on them."""
    kind, instances = recording("detcon")
    config = config_for(drawn, tmp_path / "run")
    run = pretrain(kind, config)
    assert instances[0].passes_to_prepare == 0
    images = open_images(drawn).train_set()
    before = [read_map(run / "parts_0", rel) for rel in images.paths]
    lost = run / "parts_0" / f"{images.paths[3]}.png"
    lost.unlink()
    calls: list[int] = []
    real = segments.segment
    monkeypatch.setattr(segments, "segment", lambda *args: calls.append(1) or real(*args))
    method = DetCon(config)
    method.prepare(images, run, 0)
    assert len(calls) == 18  # the images of its block
    for rel, labels in zip(images.paths, before, strict=True):
        np.testing.assert_array_equal(read_map(run / "parts_0", rel), labels)
    calls.clear()
    method.prepare(images, run, 1)
    assert not calls


def test_the_momentum_copies_follow_their_networks(tmp_path: Path) -> None:
    method = DetCon(config_for(tmp_path, tmp_path, momentum=0.9))
    assert method.target is not None
    assert method.target_projector is not None
    with torch.no_grad():
        for p in (*method.encoder.parameters(), *method.projector.parameters()):
            p.add_(1.0)
    old = [p.clone() for p in (*method.target.parameters(), *method.target_projector.parameters())]
    method.after_step(Progress(0, 10))
    new = [*method.target.parameters(), *method.target_projector.parameters()]
    for a, b in zip(old, new, strict=True):
        torch.testing.assert_close(b, a + 0.1)


def test_the_paper_preset_has_the_released_settings() -> None:
    config = DetCon.paper(None)
    assert (config.model, config.size, config.batch_size, config.masks) == ("resnet50", 224, 4096, 16)
    assert (config.temperature, config.momentum, config.optimizer) == (0.1, 0.996, "lars")
    assert config.lr == pytest.approx(0.2 * config.batch_size / 256)
