"""SRGAN: stages, separate gradients, scores, features of either network, exact resume, and ``fgfast upscale``."""

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fgfast.cli import main
from fgfast.config import validate
from fgfast.data.layouts import open_images
from fgfast.data.panels import to_pixels
from fgfast.data.views import Batch
from fgfast.errors import UserError
from fgfast.methods.srgan import SRGAN, SRGANConfig, bicubic, perceptual_network
from fgfast.methods.stored import load_encoder_of
from fgfast.models.backbone import Backbone
from fgfast.run import save_encoder
from fgfast.train import loop
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from fgfast.train.optim import learning_rate, make_optimizer
from fgfast.upscale import enlarge
from tests.conftest import TINY

CPU = torch.device("cpu")


def config_for(data: object = "", out: object = "", **values: object) -> SRGANConfig:
    return replace(
        SRGANConfig(
            data=str(data), out=str(out), size=32, width=4, blocks=2, batch_size=6, epochs=2, gan_share=0.5,
            log_every=1, knn_every=0, save_every=1, device="cpu", threads=1, amp="off",
        ),
        **values,  # type: ignore[arg-type]
    )  # fmt: skip


def batch_of(n: int = 4, side: int = 32) -> Batch:
    """Smooth colours with hard edges, which bicubic cannot follow."""
    g = torch.Generator().manual_seed(0)
    patch = F.interpolate(torch.rand(n, 3, 8, 8, generator=g), size=(side, side)) * 0.8
    reduced = F.interpolate(patch, size=(side // 4, side // 4), mode="bicubic", antialias=True)
    zero = torch.zeros(n, dtype=torch.int64)
    valid = torch.ones(n, dtype=torch.bool)
    return Batch(patch=patch, reduced=reduced, target=zero, index=torch.arange(n), valid=valid)


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of each stage, in bfloat16, scored at the end."""
    return pretrain(
        "srgan", config_for(drawn, tmp_path_factory.mktemp("srgan") / "run", amp="bf16", knn_every=2, lr=1e-2)
    )


def test_run_logs_its_terms_and_scores(run: Path, drawn: Path) -> None:
    """Squared error alone, then the adversary besides; PSNR and SSIM stand beside bicubic's and kNN."""
    rows, _ = read_metrics(run / "metrics.jsonl")
    steps = [r for r in rows if "loss" in r]
    assert ["discriminator" in r for r in steps] == [False] * 3 + [True] * 3
    assert all(math.isfinite(r["loss"]) for r in steps)
    assert steps[0]["loss"] == steps[0]["pixel"]
    (scores,) = [r for r in rows if "psnr" in r]
    assert scores["step"] == 6
    assert 0 <= scores["knn"] <= 1
    assert 15 < scores["psnr_bicubic"] < 35
    assert -1 <= scores["ssim"] <= 1


def test_scores_are_those_of_pil_and_the_generator(run: Path, drawn: Path) -> None:
    """The written scores come back from the checkpoint, and bicubic's is that of PIL's enlargement."""
    method = SRGAN(config_for(drawn))
    method.load_state_dict(torch.load(run / "last.pt", weights_only=True)["method"])
    found = method.scores(CPU)
    assert method.training
    (written,) = [r for r in read_metrics(run / "metrics.jsonl")[0] if "psnr" in r]
    for key, value in found.items():
        assert value == pytest.approx(written[key], rel=1e-4)
    small = (
        torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0)) * 100 + 80
    ).round() / 255  # PIL clips twice
    pil = Image.fromarray(to_pixels(small)).resize((28, 36), Image.Resampling.BICUBIC)
    off = to_pixels(bicubic(small[None])[0]).astype(int) - np.asarray(pil).astype(int)
    assert np.abs(off).max() <= 1


def test_a_flat_image_does_not_make_the_scores_infinite(tmp_path: Path) -> None:
    """Bicubic meets a flat window exactly; its PSNR counts as 60 dB."""
    for i in range(12):
        path = tmp_path / f"{'train' if i % 2 else 'test'}/{'ab'[i // 6]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "white").save(path)
    found = SRGAN(config_for(tmp_path)).scores(CPU)
    assert found["psnr_bicubic"] == 60.0
    assert found["psnr"] < 60


@pytest.mark.parametrize(("adversarial", "falling"), [(False, ["loss"]), (True, ["loss", "pixel", "discriminator"])])
def test_each_stage_lowers_its_losses(adversarial: bool, falling: list[str]) -> None:
    torch.manual_seed(0)
    method, batch = SRGAN(config_for()), batch_of()
    method.adversarial = adversarial
    optimizer = make_optimizer(method, replace(method.config, lr=5e-3))
    rows = []
    for _ in range(25):
        rows.append(method(batch))
        rows[-1]["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    for key in falling:
        assert rows[-1][key] < 0.5 * rows[0][key], key


def test_each_network_gets_the_gradient_of_its_own_loss() -> None:
    """The summed loss has, for each network, the gradient of that network's loss alone, as two optimisers would see."""
    torch.manual_seed(0)
    method, batch = SRGAN(config_for(adversarial_weight=0.3)), batch_of()
    assert batch.reduced is not None
    assert batch.patch is not None
    method.adversarial = True
    method(batch)["loss"].backward()
    g, d = method.generator, method.discriminator
    made = g(batch.reduced)
    loss_g = F.mse_loss(made, batch.patch) + 0.3 * F.binary_cross_entropy_with_logits(d(made), torch.ones(4, 1))
    loss_d = F.binary_cross_entropy_with_logits(d(batch.patch), torch.ones(4, 1))
    loss_d = loss_d + F.binary_cross_entropy_with_logits(d(made.detach()), torch.zeros(4, 1))
    for network, loss in ((g, loss_g), (d, loss_d)):
        for p, expected in zip(
            network.parameters(), torch.autograd.grad(loss, list(network.parameters()), retain_graph=True), strict=True
        ):
            torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)


def test_the_first_stage_leaves_the_discriminator_alone(drawn: Path, tmp_path: Path) -> None:
    """Its weights and statistics are those of step 0, and it has no moments in the optimiser."""
    out = pretrain("srgan", config_for(drawn, tmp_path / "run", epochs=1, gan_share=0.0, weight_decay=0.1))
    init, last = (torch.load(out / f"{n}.pt", weights_only=True) for n in ("init", "last"))
    for key, value in init["method"].items():
        assert torch.equal(value, last["method"][key]) == (key.startswith("discriminator.")), key
    assert len(last["optimizer"]["state"]) == len(list(SRGAN(config_for()).generator.parameters()))


def test_padded_images_change_nothing() -> None:
    torch.manual_seed(0)
    method, batch = SRGAN(config_for()).eval(), batch_of()
    method.adversarial = True
    batch.valid[2] = False
    losses = []
    for fill in (0.0, 9.0):
        batch.patch[2] = batch.reduced[2] = fill  # type: ignore[index]
        losses.append(method(batch)["loss"])
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("stop_after", [2, 4])  # in the first stage, in the second
def test_stopped_run_goes_on_exactly(
    drawn: Path, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.learning_rate
    config = config_for(drawn, tmp_path / "whole")
    whole = pretrain("srgan", config)

    def stopping(step: int, total: int, config: SRGANConfig) -> float:
        if step == stop_after - 1:
            signal.raise_signal(signal.SIGINT)
        return real(step, total, config)

    monkeypatch.setattr(loop, "learning_rate", stopping)
    config = replace(config, out=str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        pretrain("srgan", config)
    monkeypatch.setattr(loop, "learning_rate", real)
    again = pretrain("srgan", replace(config, resume=True))
    rows = [[(r["step"], r["lr"], r["loss"]) for r in read_metrics(p / "metrics.jsonl")[0]] for p in (whole, again)]
    assert rows[0] == rows[1]
    a, b = (torch.load(p / "last.pt", weights_only=True) for p in (whole, again))
    assert all(torch.equal(a["method"][k], b["method"][k]) for k in a["method"])
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(state[k], b["optimizer"]["state"][i][k]) for k in state)


def test_non_finite_batch_of_the_second_stage_leaves_no_trace(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN image in step 5 is skipped: weights and the statistics of both networks stay finite."""
    real: Callable = SRGAN.forward
    calls = []

    def poisoned(self: SRGAN, batch: Batch) -> dict[str, torch.Tensor]:
        calls.append(0)
        if len(calls) == 5:
            batch.patch[0] = float("nan")  # type: ignore[index]
        return real(self, batch)

    monkeypatch.setattr(SRGAN, "forward", poisoned)
    out = pretrain("srgan", config_for(drawn, tmp_path / "run"))
    assert read_metrics(out / "metrics.jsonl")[0][-1]["skipped"] == 1
    state = torch.load(out / "last.pt", weights_only=True)["method"]
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())


def test_schedules() -> None:
    """Each stage warms up and ends near 0 at its own peak; the paper's is constant, a tenth from its middle on."""
    config = SRGANConfig(lr=1.0, gan_lr=0.5, gan_share=0.25, warmup=0.1)
    assert config.first_adversarial(400) == 300
    rates = [learning_rate(s, 400, config) for s in range(400)]
    assert max(rates[:300]) == rates[29] == 1.0
    assert max(rates[300:]) == rates[309] == 0.5
    assert rates[299] < 1e-4 < rates[300] < 0.06
    paper = SRGAN.paper(None)
    assert (paper.first_adversarial(216), paper.batch_size, paper.width, paper.blocks) == (180, 16, 64, 16)
    rates = [learning_rate(s, 216, paper) for s in range(216)]
    assert rates[:198] == [1e-4] * 198
    assert rates[198:] == pytest.approx([1e-5] * 18)


def test_the_second_stage_alone(drawn: Path, tmp_path: Path) -> None:
    out = pretrain("srgan", config_for(drawn, tmp_path / "run", gan_share=1.0, epochs=1))
    assert ["discriminator" in r for r in read_metrics(out / "metrics.jsonl")[0]] == [True] * 3


@pytest.mark.slow
def test_features_of_either_network_are_scored(run: Path, drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run is read as generator or discriminator, with blocks dropped, and each score is kept."""
    common = ["eval", "knn", str(run), "--data", str(drawn), "--device", "cpu", "--json"]
    assert main(common) == 0
    assert main([*common, "--set", "features=discriminator", "--set", "drop=3"]) == 0
    assert main([*common, "--set", "drop=1"]) == 0
    assert main([*common, "--set", "drop=1"]) == 0
    assert all(0 <= json.loads(line)["top1"] <= 1 for line in capsys.readouterr().out.splitlines())
    noted = [r.get("set") for r in json.loads((run / "eval.json").read_text())]
    assert noted == [None, "drop=3,features=discriminator", "drop=1"]
    assert load_encoder_of(run, "last", CPU, {"features": "discriminator", "drop": "3"})[0].dim == 16
    for words, message in ((["drop=2"], "--drop is 2"), (["drop"], "name=value"), (["nosuch=1"], "nosuch")):
        assert main([*common, "--set", *words]) == 2
        assert message in capsys.readouterr().err


def test_encoder_file_loads_back(run: Path, drawn: Path) -> None:
    """--init RUN takes the encoder's blocks, bit for bit, and leaves the rest random."""
    torch.manual_seed(1)
    first = SRGAN(config_for(init=str(run)))
    stored, _ = load_encoder_of(run, "last", CPU)
    loaded, random = first.encoder.net.state_dict(), SRGAN(config_for()).encoder.net.state_dict()
    for key, value in stored.net.state_dict().items():
        assert torch.equal(loaded[key], value), key
    assert any(not torch.equal(random[k], v) for k, v in loaded.items())
    with pytest.raises(UserError, match="another network"):
        SRGAN(config_for(init=str(run), width=8))
    with pytest.raises(UserError, match="another network"):
        SRGAN(config_for(init=str(run), features="discriminator"))


def test_perceptual_loss(run: Path, drawn: Path, tmp_path: Path) -> None:
    """The squared distance of last maps, of a timm network with a file of weights or of a run; absent without one."""
    torch.manual_seed(0)
    judge = Backbone(TINY, size=32).eval()
    save_encoder(tmp_path / "w.safetensors", judge.net, TINY)
    batch = batch_of()
    config = config_for(drawn, perceptual=f"{TINY}={tmp_path / 'w.safetensors'}", perceptual_weight=2.0)
    method = SRGAN(config).eval()
    plain = SRGAN(replace(config, perceptual="none")).eval()
    plain.load_state_dict(method.state_dict())  # the perceptual network is no part of it
    method.adversarial = plain.adversarial = True
    out, without = method(batch), plain(batch)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        made = method.generator(batch.reduced)
        a, b = (judge.features((x - mean) / std) for x in (made, batch.patch))
    torch.testing.assert_close(out["perceptual"], F.mse_loss(a, b), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out["loss"], without["loss"] + 2 * out["perceptual"], rtol=1e-4, atol=1e-6)
    assert "perceptual" not in without
    out["loss"].backward()
    assert all(p.grad is None for p in method.judge.parameters())  # type: ignore[union-attr]
    assert perceptual_network(str(run), 32).name == "srgan"


def test_perceptual_network_of_a_vgg_ends_before_its_last_pooling() -> None:
    from fgfast.methods.srgan import _last_map

    network = Backbone("vgg11", size=32, args={"mlp_ratio": 0.01}).eval()
    x = torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = network.net.features[:-1]((x - mean) / std)
        assert torch.equal(_last_map(network, x), expected)
    assert expected.shape == (1, 512, 2, 2)


@pytest.mark.slow
def test_images_show_what_goes_in_and_comes_out(run: Path, drawn: Path) -> None:
    found = SRGAN(config_for()).pictures(batch_of())["super-resolution"]
    assert [p.caption.split(",")[0] for p in found[0]] == ["input", "bicubic", "generated", "truth"]
    assert [p.image.shape[0] for p in found[0]] == [8, 32, 32, 32]
    assert main(["pictures", str(run), "--data", str(drawn), "--device", "cpu"]) == 0
    assert (run / "pictures/super-resolution.png").is_file()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "resnet18"}, "its own networks"),
        ({"init": "timm"}, "its own networks"),
        ({"compile": True}, "its own networks"),
        ({"size": 30}, "multiple of 4"),
        ({"fixed_flatten": True}, "81 to 96 pixels, not 32"),
        ({"drop": 2}, "--drop is 2: the generator has 2 blocks, give 0 to 1"),
        ({"drop": 8, "features": "discriminator"}, "--drop is 8: the discriminator has 8"),
        ({"gan_share": 1.5}, "--gan-share"),
        ({"width": 0}, "--width"),
        ({"size": 64}, "48 x 48 pixels, smaller than a patch of 64 x 64 .*--size 48"),
        ({"perceptual": "nosuch"}, "no model 'nosuch'"),
        ({"perceptual": "vgg19=/no/such"}, "/no/such"),
        ({"perceptual": __file__}, "name its network"),
    ],
)
def test_what_cannot_be_is_refused_before_training(drawn: Path, tmp_path: Path, values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pretrain("srgan", config_for(drawn, tmp_path / "run", **values))
    assert not (tmp_path / "run/last.pt").exists()


def test_small_images_of_the_test_split_are_refused_before_training(tmp_path: Path) -> None:
    for split, side in (("train", 40), ("test", 20)):
        for i in range(6):
            path = tmp_path / f"set/{split}/{'ab'[i % 2]}/{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (side, side)).save(path)
    with pytest.raises(UserError, match=r"test/a/0\.png is 20 x 20"):
        pretrain("srgan", config_for(tmp_path / "set", tmp_path / "run"))
    assert len(open_images(tmp_path / "set").test_set()) == 6


def test_paper_preset_is_accepted() -> None:
    config = replace(SRGAN.paper(None), data="d", out="o")
    validate(config)
    assert SRGAN(replace(config, blocks=1, width=2)).discriminator.fixed


@pytest.fixture
def odd_images(tmp_path: Path) -> list[Path]:
    """Images of every kind and shape, and one that is none."""
    rng = np.random.default_rng(0)
    kinds = {
        "rgb": Image.fromarray(rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)),
        "grey": Image.fromarray(rng.integers(0, 256, (5, 9), dtype=np.uint8)),
        "cmyk": Image.fromarray(rng.integers(0, 256, (7, 6, 4), dtype=np.uint8), "CMYK"),
        "deep": Image.fromarray(rng.integers(0, 65536, (6, 8), dtype=np.uint16)),
        "dot": Image.new("RGB", (1, 1), "red"),
    }
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}{'.jpg' if name == 'cmyk' else '.png'}")
    (tmp_path / "broken.png").write_bytes(b"no image")
    return [*(p for n in kinds for p in tmp_path.glob(f"{n}.*")), tmp_path / "broken.png"]


def test_upscale_takes_every_kind_and_skips_what_is_none(
    run: Path, odd_images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each image becomes a PNG of four times its sides, which is what the generator makes of the whole image."""
    out = tmp_path / "large"
    assert main(["upscale", str(run), *map(str, odd_images), "--out", str(out), "--device", "cpu"]) == 0
    assert {p.name for p in out.iterdir()} == {f"{p.stem}.png" for p in odd_images[:-1]}
    assert "broken.png" in caplog.text
    for path in odd_images[:-1]:
        with Image.open(path) as small, Image.open(out / f"{path.stem}.png") as large:
            assert (large.width, large.height, large.mode) == (4 * small.width, 4 * small.height, "RGB")
    method = SRGAN(config_for())
    method.load_state_dict(torch.load(run / "last.pt", weights_only=True)["method"])
    with torch.no_grad(), Image.open(odd_images[0]) as image:
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        expected = to_pixels(method.generator.eval()(x)[0])
    assert np.abs(np.asarray(Image.open(out / "rgb.png")).astype(int) - expected).max() <= 1


def test_pieces_leave_no_seams(run: Path) -> None:
    """An image made of many pieces is the one made at once."""
    method = SRGAN(config_for())
    method.load_state_dict(torch.load(run / "last.pt", weights_only=True)["method"])
    generator = method.generator.eval()
    pixels = np.random.default_rng(0).integers(0, 256, (23, 41, 3), dtype=np.uint8)
    whole, pieces = (enlarge(generator, pixels, tile).astype(int) for tile in (64, 6))
    assert np.abs(whole - pieces).max() <= 1
    assert whole.std() > 1


def test_upscale_refuses_in_one_sentence(
    run: Path, odd_images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No readable image, two of one name, a file for a folder, a run without images: exit 2, nothing written."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.toml").write_text('method = "simclr"\n')
    (tmp_path / "twin").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "twin/rgb.png")
    first, broken = str(odd_images[0]), str(odd_images[-1])
    for words, message in (
        ([str(run), broken, "/no/such.png", "--out", "OUT"], "None of the 2 images"),
        ([str(run), first, str(tmp_path / "twin/rgb.png"), "--out", "OUT"], "Two images would become rgb.png"),
        ([str(run), first, "--out", first], "is a file"),
        ([str(run), first, "--out", str(tmp_path)], "would be replaced"),
        ([str(tmp_path / "other"), first, "--out", "OUT"], "simclr, which makes no images"),
        (["/no/run", first, "--out", "OUT"], "/no/run is no run folder"),
        ([str(run), "--out", "OUT"], "needs images"),
    ):
        assert main(["upscale", *[str(tmp_path / "out") if w == "OUT" else w for w in words]]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
