"""DINO on a CNN and a ViT: losses against lightly's classes, crops of two sizes, schedules and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fgfast.data.layouts import open_images
from fgfast.data.loader import make_loader
from fgfast.data.views import Batch
from fgfast.errors import UserError
from fgfast.methods.base import Progress
from fgfast.methods.dino import DINO, DINOConfig
from fgfast.report.pictures import compose_grid
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.losses.peers import lightly
from tests.methods.common_checks import check_exact_resume

NETS = {"cnn": (TINY, "output_stride=8"), "vit": ("test_vit", "")}


def config_for(net: str, **values: object) -> DINOConfig:
    model, args = NETS[net]
    return replace(
        DINOConfig(
            model=model, model_args=args, size=32, batch_size=6, epochs=1, log_every=1, knn_every=0, hidden=16,
            projection=8, prototypes=32, local_crops=3, local_size=16, device="cpu", threads=1,
            loader="torchvision", amp="off",
        ),
        **values,  # type: ignore[arg-type]
    )  # fmt: skip


def batch_of(n: int = 6, local: int = 3) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(
        views=[torch.randn(n, 3, side, side, generator=g) for side in [32, 32, *[16] * local]], index=torch.arange(n),
        target=torch.zeros(n, dtype=torch.int64), valid=torch.ones(n, dtype=torch.bool),
    )  # fmt: skip


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("local", [0, 3])
def test_the_loss_is_that_of_lightly_on_the_outputs_of_both_networks(net: str, local: int) -> None:
    """Each crop alone; the centre follows too."""
    torch.manual_seed(0)
    method, batch = DINO(config_for(net, local_crops=local, koleo=0.3)).eval(), batch_of(local=local)
    with torch.no_grad():
        next(method.target.parameters()).mul_(1.1)
    method.before_step(Progress(0, 10))
    theirs = lightly.DINOLoss(32)
    for _ in range(2):
        found = method(batch)
        teacher = [method.target_head(method.target(v)) for v in batch.views[:2]]
        expected = theirs(teacher, [method.head(method.encoder(v)) for v in batch.views], teacher_temp=0.04)
        koleo = sum(lightly.KoLeoLoss()(method.encoder(v)) for v in batch.views[:2])
        torch.testing.assert_close(found["dino"], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["koleo"], koleo, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["loss"], expected + 0.3 * koleo, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(method.loss.center, theirs.center, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_trains(drawn: Path, tmp_path: Path, net: str, centering: str) -> None:
    """The loss is finite and falls; with a moving mean it first rises, from what equal outputs give, to a maximum."""
    config = config_for(
        net, data=str(drawn), out=str(tmp_path / "run"), centering=centering, epochs=10, lr=3e-3, warmup=0.0
    )
    rows, _ = read_metrics(pretrain("dino", config) / "metrics.jsonl")
    losses = torch.tensor([row["loss"] for row in rows])
    assert losses.isfinite().all()
    first = losses.max() if centering == "mean" else losses[:5].mean()
    assert losses[-5:].mean() < first


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"freeze_last": 0.4, "koleo": 0.1}, {"centering": "sinkhorn"}])
def test_a_resumed_run_equals_an_uninterrupted_one(drawn: Path, tmp_path: Path, options: dict[str, object]) -> None:
    """Also within the steps in which the prototypes are frozen."""
    check_exact_resume("dino", config_for("cnn", data=str(drawn), epochs=2, **options), tmp_path, stop_after=2)


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_padded_images_have_no_effect(centering: str) -> None:
    """On the losses, and on the centre, which every call moves (BatchNorm in evaluation mode)."""
    torch.manual_seed(0)
    method, batch = DINO(config_for("cnn", centering=centering, koleo=0.1)).eval(), batch_of()
    batch.valid[3] = False
    results = []
    for fill in (0.0, 2.0):
        for view in batch.views:
            view[3] = fill
        method.loss.center.zero_()
        results.append(method(batch) | {"center": method.loss.center.clone()})
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_loaders_deliver_crops_of_two_sizes(drawn: Path, loader: str) -> None:
    """Of the fractions of the area that the options say, at the resolution of each; figures show all of them."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    method = DINO(config_for("cnn", local_crops=2, split_scale=0.5, crop_scale=0.1))
    batches = make_loader(open_images(drawn), method.views(), 6, shuffle=False, device="cpu", backend=loader, threads=1)
    try:
        batch = next(iter(batches))
    finally:
        batches.close()
    assert [list(v.shape) for v in batch.views] == [[6, 3, 32, 32]] * 2 + [[6, 3, 16, 16]] * 2
    area = batch.boxes[:, :, 2] * batch.boxes[:, :, 3]
    assert area.shape == (6, 4)
    assert area[:, :2].min() > 0.45  # whole pixels of 48
    assert area[:, 2:].max() < 0.55
    (rows,) = method.pictures(batch).values()
    assert [p.caption for p in rows[0]] == ["global 1", "global 2", "local 3", "local 4"]
    assert compose_grid(rows)[0].ndim == 3


def test_passes_count_local_crops_by_their_area() -> None:
    assert DINO(config_for("cnn")).passes_per_image == 4 + 3 / 4
    assert DINO(config_for("cnn", local_crops=0)).passes_per_image == 4


@pytest.mark.parametrize(
    ("net", "size", "side"), [("cnn", 224, 96), ("vit", 224, 96), ("vit", 64, 32), ("vit", 16, 16)]
)
def test_local_crops_have_three_sevenths_of_the_side(net: str, size: int, side: int) -> None:
    assert DINO(config_for(net, size=size, local_size=0)).local_size == side


def test_the_schedules() -> None:
    """The teacher's temperature goes linearly to its value, and the weight decay as half a cosine."""
    c = config_for("cnn", teacher_start=0.02, teacher_temperature=0.06, teacher_warmup=0.5)
    method = DINO(c)
    found = []
    for step in (0, 2, 5, 9):
        method.before_step(Progress(step, 10))
        found.append(method.teacher_temperature)
    assert found == pytest.approx([0.02, 0.036, 0.06, 0.06])
    assert [c.weight_decay_at(step, 11) for step in (0, 5, 10)] == pytest.approx([0.04, 0.22, 0.4])
    assert c.weight_decay_at(0, 1) == 0.04
    DINO(config_for("cnn", teacher_warmup=0.0)).before_step(Progress(0, 10))


@pytest.mark.slow
def test_the_optimiser_gets_the_weight_decay_of_the_step(drawn: Path, tmp_path: Path) -> None:
    """Of the last step, in the group of matrices alone."""
    run = pretrain("dino", config_for("cnn", data=str(drawn), out=str(tmp_path / "run")))
    groups = torch.load(run / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == pytest.approx([0.4, 0.0])


@pytest.mark.slow
@pytest.mark.parametrize("keep_norms", [True, False])
def test_prototypes_are_trained_after_the_first_steps(drawn: Path, tmp_path: Path, keep_norms: bool) -> None:
    """Until then they are bit by bit what they were; their norms stay 1 unless they are trained too."""
    seen: list[tuple[Tensor, ...]] = []

    class Watched(DINO):
        def after_step(self, progress: Progress) -> None:
            super().after_step(progress)
            last = self.head.last.parametrizations.weight
            seen.append((last.original0.detach().clone(), last.original1.detach().clone()))

    options: dict[str, object] = {"norm_last_layer": keep_norms, "freeze_last": 0.4, "epochs": 2, "warmup": 0.0}
    pretrain(Watched, config_for("cnn", data=str(drawn), out=str(tmp_path / "run"), **options))
    assert len(seen) == 6
    norms, directions = zip(*seen, strict=True)
    for step in range(1, 6):
        trained = step >= 3  # steps 0, 1 and 2 of 6 are in the first 0.4
        assert torch.equal(directions[step], directions[step - 1]) == (not trained)
        assert torch.equal(norms[step], norms[step - 1]) == (keep_norms or not trained)


def test_the_teacher_has_no_drop_path() -> None:
    method = DINO(config_for("vit", model_args="drop_path_rate=0.5"))
    student, teacher = (
        {m.drop_prob for m in net.modules() if hasattr(m, "drop_prob")} for net in (method.encoder, method.target)
    )
    assert max(student) == 0.5
    assert teacher == {0.0}


def test_paper_preset() -> None:
    config = DINO.paper(None)
    assert (config.model, config.local_crops, config.local_size, config.prototypes) == (
        "vit_small_patch16_224", 8, 96, 65_536,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("net", "values", "message"),
    [
        ("vit", {"local_size": 24}, "--local-size is 24: test_vit takes multiples of its patches of 16 pixels"),
        ("cnn", {"local_size": 48}, "--local-size is 48: give at most --size, 32"),
        ("cnn", {"crop_scale": 0.5}, r"--crop-scale is 0\.5: give at most --split-scale, 0\.4"),
        ("vit", {"model_args": "dynamic_img_size=False"}, "test_vit does not take local crops of 16 x 16 pixels"),
    ],
)
def test_crops_that_do_not_fit_are_refused(net: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DINO(config_for(net, **values))
