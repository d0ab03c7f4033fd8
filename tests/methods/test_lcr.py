"""LCR: target, rationale loss, and features that the attention weights in evaluation but not in training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fgfast.config import validate
from fgfast.data.layouts import open_images
from fgfast.data.views import Batch
from fgfast.errors import UserError
from fgfast.evaluate.features import extract
from fgfast.evaluate.protocols import evaluate
from fgfast.methods.base import method_class
from fgfast.methods.lcr import LCR, LCRConfig, kl_over_positions
from fgfast.methods.run_folder import load_run_encoder
from fgfast.models.backbone import Backbone
from fgfast.models.rationale import RationaleEncoder, scale_to_unit
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.methods.common_checks import check_exact_resume, check_padding

CPU = torch.device("cpu")


def config_for(**values: object) -> LCRConfig:
    return replace(
        LCRConfig(
            model=TINY, model_args="output_stride=8", size=32, batch_size=6, epochs=2, log_every=1, knn_every=0,
            hidden=16, projection=8, queue=10, channels=4, device="cpu", threads=1, amp="off",
        ),
        **values,  # type: ignore[arg-type]
    )  # fmt: skip


def method_for(**values: object) -> LCR:
    torch.manual_seed(0)
    return LCR(config_for(**values))


def batch_of(n: int = 6) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(
        views=[torch.randn(n, 3, 32, 32, generator=g) for _ in range(2)], index=torch.arange(n),
        target=torch.zeros(n, dtype=torch.int64), valid=torch.ones(n, dtype=torch.bool),
    )  # fmt: skip


def to_float64(method: LCR, batch: Batch) -> None:
    method.eval().double()
    batch.views = [view.double() for view in batch.views]


def own_losses(method: LCR, maps: Tensor, batch: Batch) -> Tensor:
    """The contrast of each image [B], written as its formula, as a function of the maps of its online views."""
    base: Any = method.base
    z = base.projector(maps.mean((2, 3)))
    if method.config.base == "byol":
        p1, p2 = base.predictor(z).chunk(2)
        t1, t2 = (base.target_projector(base.target(view)) for view in batch.views)
        return 4 - 2 * F.cosine_similarity(p1, t2) - 2 * F.cosine_similarity(p2, t1)
    assert method.queue is not None
    query, key = F.normalize(z), F.normalize(base.target_projector(base.target(batch.views[1])))
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ method.queue.keys.T], 1) / 0.2
    return logits.logsumexp(1) - logits[:, 0]


@pytest.mark.parametrize("base", ["moco", "byol"])
def test_the_target_is_the_slope_of_the_contrast(base: str) -> None:
    """Sum over channels of F dL/dF is the slope of an image's own loss as its features at a position grow."""
    method, batch = method_for(base=base, target="raw"), batch_of(4)
    for module in method.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0
    method.train()(batch)  # statistics with which maps differ between positions and images
    to_float64(method, batch)
    loss, first, target = method.contrast(batch, batch.valid.sum())
    with torch.no_grad():
        maps = method.encoder.features(torch.cat(batch.views[: method.base.n_online_views]))
        torch.testing.assert_close(loss.detach(), own_losses(method, maps, batch).mean(), rtol=1e-7, atol=0)
        expected, step = torch.empty_like(target, dtype=torch.float64), 1e-4
        for y in range(4):
            for x in range(4):
                ends = []
                for sign in (1, -1):
                    moved = maps.clone()
                    moved[:4, :, y, x] *= 1 + sign * step
                    ends.append(own_losses(method, moved, batch))
                expected[:, y, x] = (ends[0] - ends[1]) / (2 * step)
    assert first.shape == (4, method.encoder.map_dim, 4, 4)
    assert (expected > 0).any(), "no position with a positive slope"
    assert (expected < 0).any(), "no position to cut off"
    torch.testing.assert_close(target.double(), expected.relu(), rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_the_target_does_not_depend_on_the_batch() -> None:
    """That of an image is the same beside others, and among padding."""
    method, batch = method_for(target="raw").eval(), batch_of()
    _, _, target = method.contrast(batch, batch.valid.sum())
    batch.valid[2:] = False
    _, _, of_two = method.contrast(batch, batch.valid.sum())
    torch.testing.assert_close(of_two[:2], target[:2], rtol=1e-4, atol=1e-7)
    assert not of_two[2:].any()


@pytest.mark.parametrize("target", ["scaled", "raw"])
def test_the_loss_is_its_formula(target: str) -> None:
    """The contrast, and 0.01 times PyTorch's KL of softmax over all positions at 0.4, summed over valid images."""
    method, batch = method_for(target=target), batch_of()
    to_float64(method, batch)
    batch.valid[5] = False
    contrast, maps, goal = method.contrast(batch, batch.valid.sum())
    attention = method.encoder.attention(maps)
    if target == "scaled":
        assert (goal.amin((1, 2)) == 0)[:5].all()
        assert (goal.amax((1, 2)) == 1)[:5].all()
    p, q = (torch.softmax(m[:5].double().flatten(1) / 0.4, 1) for m in (goal, attention))
    expected = contrast + 0.01 * F.kl_div(q.log(), p, reduction="sum")
    out = method(batch)
    torch.testing.assert_close(out["loss"], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out["contrast"] + 0.01 * 5 * out["rationale"], out["loss"], check_dtype=False)


def test_the_rationale_loss_is_zero_where_the_attention_is_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither value nor gradient; else the gradient reaches the attention and through it the network."""
    method, batch = method_for(rationale_weight=1.0).eval(), batch_of()
    _, _, target = method.contrast(batch, batch.valid.sum())
    with monkeypatch.context() as patch:
        patch.setattr(method.encoder, "attention", lambda _: target.requires_grad_())
        out = method(batch)
    assert abs(float(out["rationale"])) < 1e-6
    (slope,) = torch.autograd.grad(out["loss"], target)
    assert slope.abs().max() < 1e-6
    out = method(batch)
    assert out["rationale"] > 1e-3
    rest = out["loss"] - method.contrast(batch, batch.valid.sum())[0]
    slopes = torch.autograd.grad(rest, [method.encoder.rationale[0].weight, method.encoder.net.conv1[0].weight])
    assert all(slope.abs().max() > 0 for slope in slopes)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**16))
def test_kl_is_that_of_pytorch_and_scaled_maps_fill_the_unit_interval(n: int, h: int, w: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, h, w, generator=g, dtype=torch.float64) for _ in range(2))
    p, q = ((x.flatten(1) / 0.4).softmax(1) for x in (a, b))
    ours = kl_over_positions(a, b, 0.4)
    torch.testing.assert_close(ours, F.kl_div(q.log(), p, reduction="none").sum(1), rtol=1e-9, atol=1e-12)
    scaled = scale_to_unit(a)
    if h * w == 1:
        assert (scaled == 1).all()
    else:
        assert (scaled.amin((1, 2)) == 0).all()
        assert (scaled.amax((1, 2)) == 1).all()


def test_a_constant_map_has_no_gradient_and_no_nan() -> None:
    maps = torch.zeros(2, 3, 3, requires_grad=True)
    scale_to_unit(maps).sum().backward()
    assert maps.grad is not None
    assert not maps.grad.any()


def test_features_are_weighted_in_evaluation_only() -> None:
    """They are the mean of A F of each image alone; the contrast and the momentum encoder take the plain mean."""
    method, batch = method_for().eval(), batch_of()
    x = batch.views[0]
    with torch.no_grad():
        maps = method.encoder.features(x)
        raw = method.encoder.rationale[1](method.encoder.rationale[0](maps)).relu().amax(1)
        low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
        weighted = (maps * ((raw - low) / (high - low))[:, None]).mean((2, 3))
        torch.testing.assert_close(method.encoder(x), weighted)
        torch.testing.assert_close(method.encoder(x[2:3]), weighted[2:3], rtol=1e-4, atol=1e-5)
        plain = maps.mean((2, 3))
        base: Any = method.base
        torch.testing.assert_close(base.target(x), plain)
        assert (weighted - plain).abs().max() > 0.01
        torch.testing.assert_close(LCR(config_for(pooling="mean")).encoder.weighted, False)


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the drawn images."""
    return pretrain("lcr", config_for(data=str(drawn), out=str(tmp_path_factory.mktemp("lcr") / "run"), epochs=1))


def features(encoder: Backbone, drawn: Path) -> Tensor:
    return extract(encoder, open_images(drawn).test_set(), 32, threads=1)[0]


@pytest.mark.slow
def test_a_run_is_evaluated_with_its_attention(run: Path, drawn: Path) -> None:
    """The encoder of a checkpoint is that of the method; --set pooling=mean takes the plain average."""
    encoder, config = load_run_encoder(run, "last", CPU)
    mean, _ = load_run_encoder(run, "last", CPU, {"pooling": "mean"})
    assert isinstance(encoder, RationaleEncoder)
    state = torch.load(run / "last.pt", weights_only=True)["method"]
    own = {k: v for k, v in state.items() if k.startswith("encoder.rationale.")}
    assert {"encoder.rationale.0.weight", "encoder.rationale.1.running_mean"} <= own.keys()
    torch.testing.assert_close({f"encoder.{k}": v for k, v in encoder.state_dict().items()}, {
        k: v for k, v in state.items() if k.startswith("encoder.")
    }, rtol=0, atol=0)  # fmt: skip
    bare = Backbone(config.model, size=32, args={"output_stride": 8})
    bare.net.load_state_dict(load_file(run / "encoder.safetensors"))
    torch.testing.assert_close(features(mean, drawn), features(bare.eval(), drawn))
    assert (features(encoder, drawn) - features(mean, drawn)).abs().max() > 0.01
    rows = [evaluate(run, "knn", drawn, device=CPU, settings=s).row() for s in (None, {"pooling": "mean"})]
    assert all(0 <= row["top1"] <= 1 for row in rows)


@pytest.mark.slow
def test_the_exported_network_is_the_plain_one(run: Path) -> None:
    """Timm loads it without knowing of the attention, and so does another method."""
    net = timm.create_model(TINY, num_classes=0, output_stride=8)
    net.load_state_dict(load_file(run / "encoder.safetensors"))
    other = method_class("mocov2")(method_class("mocov2").Config(
        model=TINY, model_args="output_stride=8", size=32, init=str(run)
    ))  # fmt: skip
    torch.testing.assert_close(dict(other.encoder.net.state_dict()), dict(net.state_dict()), rtol=0, atol=0)


@pytest.mark.slow
def test_the_attention_learns_the_target(drawn: Path, tmp_path: Path) -> None:
    """The rationale loss falls when only it is trained."""
    config = config_for(data=str(drawn), out=str(tmp_path / "run"), epochs=30, lr=0.03, queue=64, rationale_weight=1.0)
    rows, _ = read_metrics(pretrain("lcr", config) / "metrics.jsonl")
    losses = torch.tensor([row["rationale"] for row in rows])
    assert losses[-10:].mean() < losses[:10].mean()


@pytest.mark.slow
@pytest.mark.parametrize("base", ["moco", "byol"])
def test_a_resumed_run_equals_an_uninterrupted_one(base: str, drawn: Path, tmp_path: Path) -> None:
    check_exact_resume("lcr", config_for(base=base, data=str(drawn), amp="bf16"), tmp_path, stop_after=2)


@pytest.mark.parametrize("base", ["moco", "byol"])
def test_padded_images_have_no_effect(base: str) -> None:
    check_padding(method_for(base=base, rationale_weight=1.0), batch_of())


def test_pictures_show_the_target_and_the_attention() -> None:
    """Of view 1, under no_grad as in a report."""
    method = method_for().eval()
    with torch.no_grad():
        found = method.pictures(batch_of())
    assert [p.caption for p in found["attention"][0]] == 2 * ["view", "target", "attention"]
    assert {p.image.shape for row in found["attention"] for p in row} == {(32, 32, 3)}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "test_vit", "model_args": ""}, "test_vit pools no feature map, .* choose a CNN"),
        ({"model": "resnet18", "model_args": ""}, "--size 32 has one position, .* give a larger --size"),
    ],
)
def test_a_network_without_a_map_to_weight_is_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LCR(config_for(**values))


def test_paper_preset() -> None:
    """The released settings are valid."""
    config = LCR.paper(None)
    validate(replace(config, data="data", out="run"))
    assert (config.model, config.projection, config.queue, config.batch_size) == ("resnet50", 256, 65_536, 128)
    assert (config.channels, config.rationale_weight, config.rationale_temperature) == (32, 0.01, 0.4)
