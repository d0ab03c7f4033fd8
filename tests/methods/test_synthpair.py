"""Contrast of synthesised pairs: objectives, perturbation, warm-up, resuming and two ranks."""

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fgfast.data.views import Batch
from fgfast.errors import UserError
from fgfast.losses import InfoNCELoss, NTXentLoss
from fgfast.methods.base import Progress
from fgfast.methods.objectives import BASES
from fgfast.methods.synthpair import SynthPair, SynthPairConfig
from fgfast.models.statistics import KeyQueue
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests import ranks
from tests.conftest import TINY
from tests.methods.common_checks import check_exact_resume, poisoned, recording


def config_for(**values: object) -> SynthPairConfig:
    return replace(
        SynthPairConfig(
            model=TINY, model_args="output_stride=8", size=32, batch_size=6, epochs=2, log_every=1, knn_every=0,
            hidden=16, projection=8, queue=10, latent=8, decoder_width=16, device="cpu", threads=1, amp="off",
        ),
        **values,  # type: ignore[arg-type]
    )  # fmt: skip


def batch_of(n: int = 6, side: int = 32) -> Batch:
    g = torch.Generator().manual_seed(0)
    low = torch.randn(2 * n, 3, 4, 4, generator=g)
    views = torch.nn.functional.interpolate(low, size=side, mode="bilinear").chunk(2)
    return Batch(
        views=list(views), index=torch.arange(n), target=torch.zeros(n, dtype=torch.int64),
        valid=torch.ones(n, dtype=torch.bool),
    )  # fmt: skip


def ready(**values: object) -> SynthPair:
    """A method after its warm-up."""
    torch.manual_seed(0)
    method = SynthPair(config_for(**values))
    method.progress = Progress(1, 2)
    return method


@pytest.mark.parametrize(("base", "amp"), [("simclr", False), ("moco", True), ("simsiam", True), ("byol", False)])
def test_a_few_steps_lower_every_loss(base: str, amp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contrast and reconstruction fall on one batch, then the contrast of the pairs decoded from it."""
    monkeypatch.setattr(
        KeyQueue, "push", lambda *_: None
    )  # keys of this one batch would be harder negatives in each step
    method, batch = ready(base=base, alpha=1.0, queue=64), batch_of()
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = method.contrast_pair
    method.contrast_pair = lambda *args: pairs.append(args[:2]) or real(*args)  # type: ignore[method-assign,func-returns-value]

    def descend(terms: tuple[str, ...], loss_of: Callable[[], dict[str, torch.Tensor]]) -> None:
        optimizer = torch.optim.Adam(method.parameters(), lr=1e-3)
        rows = []
        for step in range(10):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                out = loss_of()
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
            method.base.after_step(method.encoder, Progress(step, 10))
            rows.append({k: v.item() for k, v in out.items()})
        for term in terms:
            first, last = (sum(r[term] for r in three) / 3 for three in (rows[:3], rows[-3:]))
            assert last < first, term

    descend(("contrast", "reconstruction"), lambda: method(batch))
    decoded, decoded_again = pairs[-1]
    descend(("loss",), lambda: {"loss": real(decoded, decoded_again, batch)})


def test_objectives_are_the_losses_of_their_papers() -> None:
    """They are NT-Xent, InfoNCE with a bank, and the cosines of predictions."""
    batch = batch_of()
    methods = {name: ready(base=name).eval() for name in BASES}
    with torch.no_grad():
        losses, heads = {}, {}
        for name, method in methods.items():
            x = torch.cat(batch.views[: method.base.n_online_views])
            features = method.encoder(x)
            losses[name] = method.base(features, batch, method.queue(0))
            heads[name] = method.base.projector(features)
        torch.testing.assert_close(losses["simclr"], NTXentLoss(0.2)(*heads["simclr"].chunk(2)))
        moco = methods["moco"].base
        key = moco.target_projector(moco.target(batch.views[1]))
        expected = InfoNCELoss(0.2)(heads["moco"], key, methods["moco"].queues[0].keys)
        torch.testing.assert_close(losses["moco"], expected)
        for name, target in (
            ("simsiam", heads["simsiam"]),
            ("byol", heads["byol"]),
        ):  # a new copy gives the same projections
            p1, p2 = methods[name].base.predictor(heads[name]).chunk(2)
            z1, z2 = target.chunk(2)
            cosines = torch.cosine_similarity(p1, z2).mean() + torch.cosine_similarity(p2, z1).mean()
            torch.testing.assert_close(losses[name], -cosines / 2 if name == "simsiam" else 4 - 2 * cosines)


def test_pairs_are_used_after_the_warm_up() -> None:
    """Before its end the reconstruction is trained, and there is neither perturbation nor second contrast."""
    method, batch = ready(synth_warmup=0.5), batch_of()
    method.progress = Progress(4, 10)
    early = method(batch)
    assert "pair" not in early
    torch.testing.assert_close(early["loss"], early["contrast"] + 0.05 * early["reconstruction"])
    method.progress = Progress(5, 10)
    late = method(batch)
    torch.testing.assert_close(
        late["loss"], late["contrast"] + 0.05 * late["reconstruction"] + 0.2 * late["pair"], rtol=1e-5, atol=1e-5
    )


def test_importance_is_the_gradient_of_the_contrast() -> None:
    """The Grad-CAM mask has the smallest |w r|, with w from finite differences of the loss along each channel."""
    method, batch = ready(criterion="gradcam", base="simclr", p_g=0.25).eval().double(), batch_of()
    batch.views = [v.double() for v in batch.views]
    maps = method.encoder.features(torch.cat(batch.views)).detach().requires_grad_()
    r = method.encoder.pool(maps)
    mask = method.perturb_features(r[:6], maps, method.base(r, batch)).mask
    step, dim = 1e-5, maps.shape[1]
    slopes = torch.empty(dim, dtype=torch.float64)
    with torch.no_grad():
        for d in range(dim):
            ends = []
            for sign in (1, -1):
                moved = maps.clone()
                moved[0, d] += sign * step
                ends.append(method.base(method.encoder.pool(moved), batch))
            slopes[d] = (ends[0] - ends[1]) / (2 * step)
    score = (slopes * r[0].detach()).abs()
    chosen = score.argsort()[: int(0.25 * dim)]
    assert mask[0].sum() <= len(chosen)
    assert mask[0][chosen].float().mean() > 0.95  # all but near ties


def test_no_perturbation_gives_equal_images() -> None:
    """With lambda 0 the images of a pair are equal; pairs do not train the decoder or change BatchNorm statistics."""
    method, batch = ready(strength=0.0), batch_of()
    seen = []
    real = method.contrast_pair
    method.contrast_pair = lambda *args: seen.append(args) or real(*args)  # type: ignore[method-assign,func-returns-value]
    before = [m.running_mean.clone() for m in method.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    out = method(batch)
    torch.testing.assert_close(seen[0][0], seen[0][1], rtol=1e-4, atol=1e-5)
    assert not seen[0][0].requires_grad
    after = [m.running_mean for m in method.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    without_pairs = ready(nu=0.0)
    without_pairs(batch)
    expected = [m.running_mean for m in without_pairs.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    (slope,) = torch.autograd.grad(out["loss"], method.decoder.to_rgb.bias, retain_graph=True)
    (expected_slope,) = torch.autograd.grad(without_pairs(batch)["loss"], without_pairs.decoder.to_rgb.bias)
    torch.testing.assert_close(slope, expected_slope, rtol=1e-3, atol=1e-5)


def test_switches() -> None:
    """Criteria, strategies, half of the batch at half the size, --stop-gradient, and the number of passes."""
    batch = batch_of()
    for values in (
        {"criterion": "variance", "strategy": "swap"}, {"criterion": "random", "strategy": "zero"},
        {"combine": "intersection", "importance": "positive", "synth_share": 0.5, "synth_size": 16, "both_views": True},
    ):  # fmt: skip
        assert ready(**values)(batch)["loss"].isfinite()
    frozen = ready(stop_gradient=True, nu=0.0)
    out = frozen(batch)
    gradient = torch.autograd.grad(
        out["loss"] - frozen.base(frozen.encoder(torch.cat(batch.views)), batch), frozen.decoder.code.weight
    )
    assert gradient[0].abs().sum() > 0
    full = SynthPair(config_for(synth_warmup=0.0)).passes_per_image
    assert (full, SynthPair(config_for(base="byol", nu=0.0)).passes_per_image) == (4, 4)
    part = SynthPair(config_for(synth_share=0.5, synth_size=16, synth_warmup=0.2)).passes_per_image
    assert part == pytest.approx(2 + 2 * 0.5 * 0.25 * 0.8)
    with pytest.raises(UserError, match="--synth-size"):
        SynthPair(config_for(synth_size=64))


def test_a_vit_is_trained() -> None:
    """Its features are tokens; the gradient of the contrast is averaged over them."""
    method = ready(model="test_vit", model_args="")
    out = method(batch_of())
    assert out["pair"].isfinite()
    out["loss"].backward()


def test_padded_images_have_no_effect() -> None:
    """The content of a padded slot affects neither loss nor statistics (BatchNorm in evaluation mode)."""
    results = []
    for fill in (0.0, 50.0):
        method, batch = ready(base="moco").eval(), batch_of()
        batch.valid[3] = False
        for view in batch.views:
            view[3] = fill
        out = method(batch)
        results.append((out["loss"], method.variance.variance, *(q.keys for q in method.queues)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_pictures_show_decoded_views() -> None:
    """Each view is beside the images decoded from its features and the perturbed ones, under no_grad as in a report."""
    method = ready().eval()
    with torch.no_grad():
        figures = method.pictures(batch_of())
    assert [p.caption for p in figures["decoded"][0]][:2] == ["view", "decoded"]
    assert "perturbed" in figures["decoded"][0][2].caption


def test_resumed_run_equals_an_uninterrupted_one(drawn: Path, tmp_path: Path) -> None:
    """A run interrupted after the warm-up and resumed has the same metrics, queues, statistics and weights."""
    config = config_for(base="moco", data=str(drawn), synth_warmup=0.3)
    run = check_exact_resume("synthpair", config, tmp_path, stop_after=4)
    assert ["pair" in r for r in read_metrics(run / "metrics.jsonl")[0]] == [False, False, True, True, True, True]
    assert {"variance.moments", "queues.1.keys"} <= set(torch.load(run / "last.pt", weights_only=True)["method"])


def test_a_step_that_is_not_finite_has_no_effect(drawn: Path, tmp_path: Path) -> None:
    """Its update is skipped, and queues and statistics are restored."""
    config = config_for(base="moco", data=str(drawn), out=str(tmp_path / "run"), synth_warmup=0.0)
    run = pretrain(poisoned("synthpair", step=3), config)
    rows, _ = read_metrics(run / "metrics.jsonl")
    assert rows[-1]["skipped"] == 1
    assert torch.tensor(rows[-1]["loss"]).isfinite()
    state = torch.load(run / "last.pt", weights_only=True)["method"]
    assert all(v.isfinite().all() for v in state.values() if isinstance(v, torch.Tensor) and v.is_floating_point())


def _rank(rank: int, port: int, data: str, out: str, base: str) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    method, instances = recording("synthpair")
    config = config_for(base=base, data=data, out=out, batch_size=4, epochs=1, synth_warmup=0.0, synth_share=0.5)
    pretrain(method, config)
    state = dict(instances[0].named_parameters()) | {
        k: v for k, v in instances[0].named_buffers() if "keys" in k or "moments" in k
    }
    torch.save({k: v.detach() for k, v in state.items()}, f"{out}-rank{rank}.pt")


@pytest.mark.slow
def test_two_ranks_agree(drawn: Path, tmp_path: Path) -> None:
    """Weights, queues and the running variance are equal on both ranks after three steps."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    out = tmp_path / "run"
    ranks.start(_rank, port, str(drawn), str(out), "moco", ranks=2)
    first, second = (torch.load(f"{out}-rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert {"variance.moments", "queues.0.keys"} <= set(first)
