"""SRGAN: stages, separate gradients, scores, features of either network, resuming, and ``fgfast upscale``."""

import json
import math
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
from fgfast.methods.run_folder import load_run_encoder
from fgfast.methods.srgan import SRGAN, SRGANConfig, bicubic, load_perceptual_network, perceptual_map
from fgfast.models.backbone import Backbone
from fgfast.run import save_encoder
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from fgfast.train.optim import make_optimizer
from fgfast.upscale import enlarge
from tests.conftest import TINY
from tests.methods.common_checks import check_exact_resume, poisoned

CPU = torch.device("cpu")


def config_for(data: object = "", out: object = "", **values: object) -> SRGANConfig:
    return replace(
        SRGANConfig(
            data=str(data), out=str(out), size=32, width=4, blocks=2, batch_size=6, epochs=2, gan_share=0.5,
            log_every=1, knn_every=0, save_every="1", device="cpu", threads=1, amp="off",
        ),
        **values,  # type: ignore[arg-type]
    )  # fmt: skip


def batch_of(n: int = 4, side: int = 32) -> Batch:
    """Flat colours with hard edges, which bicubic interpolation cannot reproduce."""
    g = torch.Generator().manual_seed(0)
    patch = F.interpolate(torch.rand(n, 3, 8, 8, generator=g), size=(side, side)) * 0.8
    reduced = F.interpolate(patch, size=(side // 4, side // 4), mode="bicubic", antialias=True)
    zero = torch.zeros(n, dtype=torch.int64)
    valid = torch.ones(n, dtype=torch.bool)
    return Batch(patch=patch, reduced=reduced, target=zero, index=torch.arange(n), valid=valid)


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps in each stage, in bfloat16, scored at the end."""
    return pretrain(
        "srgan", config_for(drawn, tmp_path_factory.mktemp("srgan") / "run", amp="bf16", knn_every=2, lr=1e-2)
    )


def test_run_logs_its_terms_and_scores(run: Path, drawn: Path) -> None:
    """The second stage adds adversarial terms; PSNR and SSIM are logged with those of bicubic and kNN."""
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
    """The checkpoint gives the logged scores again, and bicubic enlargement equals PIL's."""
    method = SRGAN(config_for(drawn))
    method.load_state_dict(torch.load(run / "last.pt", weights_only=True)["method"])
    scores = method.scores(CPU)
    assert method.training
    (logged,) = [r for r in read_metrics(run / "metrics.jsonl")[0] if "psnr" in r]
    for key, value in scores.items():
        assert value == pytest.approx(logged[key], rel=1e-4)
    small = (
        torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0)) * 100 + 80
    ).round() / 255  # PIL clips twice
    pil = Image.fromarray(to_pixels(small)).resize((28, 36), Image.Resampling.BICUBIC)
    difference = to_pixels(bicubic(small[None])[0]).astype(int) - np.asarray(pil).astype(int)
    assert np.abs(difference).max() <= 1


def test_a_flat_image_does_not_make_the_scores_infinite(tmp_path: Path) -> None:
    """Bicubic reproduces a flat window exactly; its PSNR is limited to 60 dB."""
    for i in range(12):
        path = tmp_path / f"{'train' if i % 2 else 'test'}/{'ab'[i // 6]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "white").save(path)
    scores = SRGAN(config_for(tmp_path)).scores(CPU)
    assert scores["psnr_bicubic"] == 60.0
    assert scores["psnr"] < 60


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
    """The summed loss has, for each network, only the gradient of its own loss, as with two optimisers."""
    torch.manual_seed(0)
    method, batch = SRGAN(config_for(adversarial_weight=0.3)), batch_of()
    assert batch.reduced is not None
    assert batch.patch is not None
    method.adversarial = True
    method(batch)["loss"].backward()
    g, d = method.generator, method.discriminator
    generated = g(batch.reduced)
    fooled = F.binary_cross_entropy_with_logits(d(generated), torch.ones(4, 1))
    loss_g = F.mse_loss(generated, batch.patch) + 0.3 * fooled
    loss_d = F.binary_cross_entropy_with_logits(d(batch.patch), torch.ones(4, 1))
    loss_d = loss_d + F.binary_cross_entropy_with_logits(d(generated.detach()), torch.zeros(4, 1))
    for network, loss in ((g, loss_g), (d, loss_d)):
        for p, expected in zip(
            network.parameters(), torch.autograd.grad(loss, list(network.parameters()), retain_graph=True), strict=True
        ):
            torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)


def test_the_first_stage_does_not_change_the_discriminator(drawn: Path, tmp_path: Path) -> None:
    """Its weights and statistics stay those of step 0, and the optimiser has no state for it."""
    out = pretrain("srgan", config_for(drawn, tmp_path / "run", epochs=1, gan_share=0.0, weight_decay=0.1))
    init, last = (torch.load(out / f"{n}.pt", weights_only=True) for n in ("init", "last"))
    for key, value in init["method"].items():
        assert torch.equal(value, last["method"][key]) == (key.startswith("discriminator.")), key
    assert len(last["optimizer"]["state"]) == len(list(SRGAN(config_for()).generator.parameters()))


def test_padded_images_have_no_effect() -> None:
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
def test_resumed_run_equals_an_uninterrupted_one(drawn: Path, tmp_path: Path, stop_after: int) -> None:
    check_exact_resume("srgan", config_for(drawn), tmp_path, stop_after)


def test_non_finite_batch_of_the_second_stage_has_no_effect(drawn: Path, tmp_path: Path) -> None:
    """A NaN image in step 5 is skipped: weights and the statistics of both networks stay finite."""
    out = pretrain(poisoned("srgan", step=5), config_for(drawn, tmp_path / "run"))
    assert read_metrics(out / "metrics.jsonl")[0][-1]["skipped"] == 1
    state = torch.load(out / "last.pt", weights_only=True)["method"]
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())


def test_schedules() -> None:
    """Each stage has a warm-up and ends near 0; the paper's is constant, with a step to a tenth."""
    config = SRGANConfig(lr=1.0, gan_lr=0.5, gan_share=0.25, warmup=0.1)
    assert config.first_adversarial(400) == 300
    rates = [config.learning_rate(s, 400) for s in range(400)]
    assert max(rates[:300]) == rates[29] == 1.0
    assert max(rates[300:]) == rates[309] == 0.5
    assert rates[299] < 1e-4 < rates[300] < 0.06
    paper = SRGAN.paper(None)
    assert (paper.first_adversarial(216), paper.batch_size, paper.width, paper.blocks) == (180, 16, 64, 16)
    rates = [paper.learning_rate(s, 216) for s in range(216)]
    assert rates[:198] == [1e-4] * 198
    assert rates[198:] == pytest.approx([1e-5] * 18)


def test_the_first_stage_can_be_left_out(drawn: Path, tmp_path: Path) -> None:
    out = pretrain("srgan", config_for(drawn, tmp_path / "run", gan_share=1.0, epochs=1))
    assert ["discriminator" in r for r in read_metrics(out / "metrics.jsonl")[0]] == [True] * 3


@pytest.mark.slow
def test_features_of_either_network_are_scored(run: Path, drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run is evaluated as generator or discriminator, with blocks left out, and each score is stored."""
    common = ["eval", "knn", str(run), "--data", str(drawn), "--device", "cpu", "--json"]
    assert main(common) == 0
    assert main([*common, "--set", "features=discriminator", "--set", "drop=3"]) == 0
    assert main([*common, "--set", "drop=1"]) == 0
    assert main([*common, "--set", "drop=1"]) == 0
    assert all(0 <= json.loads(line)["top1"] <= 1 for line in capsys.readouterr().out.splitlines())
    stored = [r.get("set") for r in json.loads((run / "eval.json").read_text())]
    assert stored == [None, "drop=3,features=discriminator", "drop=1"]
    assert load_run_encoder(run, "last", CPU, {"features": "discriminator", "drop": "3"})[0].dim == 16
    for words, message in ((["drop=2"], "--drop is 2"), (["drop"], "name=value"), (["nosuch=1"], "nosuch")):
        assert main([*common, "--set", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_run_gives_initial_weights(run: Path, drawn: Path) -> None:
    """--init RUN loads the blocks of the encoder exactly and leaves the rest random."""
    torch.manual_seed(1)
    first = SRGAN(config_for(init=str(run)))
    stored, _ = load_run_encoder(run, "last", CPU)
    loaded, random = first.encoder.net.state_dict(), SRGAN(config_for()).encoder.net.state_dict()
    for key, value in stored.net.state_dict().items():
        assert torch.equal(loaded[key], value), key
    assert any(not torch.equal(random[k], v) for k, v in loaded.items())


def test_initial_weights_of_another_srgan_are_refused_with_its_options(run: Path) -> None:
    """The sentence names tensors that fit but for their shape, and options that srgan has."""
    remedy = "give (its|their) --width, --blocks, --features and --drop"
    for options, reason in (
        ({"width": 8}, r"are of another network .* of srgan's generator: \d+ of another shape, such as 'layers\.0"),
        (
            {"features": "discriminator"},
            r"in no layout that is known for srgan's discriminator .*; \d of another shape, such as 'layers\.0\.",
        ),
    ):
        with pytest.raises(UserError, match=rf"{reason}.* instead of \[.*\]\): {remedy}\.$"):
            SRGAN(config_for(init=str(run), **options))


def test_perceptual_loss(run: Path, drawn: Path, tmp_path: Path) -> None:
    """The squared distance of final maps, of a timm network with a file of weights or of a run, or no such term."""
    torch.manual_seed(0)
    network = Backbone(TINY, size=32).eval()
    save_encoder(tmp_path / "w.safetensors", network.net, TINY)
    batch = batch_of()
    config = config_for(drawn, perceptual=f"{TINY}={tmp_path / 'w.safetensors'}", perceptual_weight=2.0)
    method = SRGAN(config).eval()
    plain = SRGAN(replace(config, perceptual="none")).eval()
    plain.load_state_dict(method.state_dict())  # which does not contain the perceptual network
    method.adversarial = plain.adversarial = True
    out, without = method(batch), plain(batch)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        generated = method.generator(batch.reduced)
        a, b = (network.features((x - mean) / std) for x in (generated, batch.patch))
    torch.testing.assert_close(out["perceptual"], F.mse_loss(a, b), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out["loss"], without["loss"] + 2 * out["perceptual"], rtol=1e-4, atol=1e-6)
    assert "perceptual" not in without
    out["loss"].backward()
    assert all(p.grad is None for p in method.perceptual_network.parameters())  # type: ignore[union-attr]
    assert load_perceptual_network(str(run), 32).name == "srgan"


def test_perceptual_network_of_a_vgg_ends_before_its_last_pooling() -> None:
    network = Backbone("vgg11", size=32, args={"mlp_ratio": 0.01}).eval()
    x = torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = network.net.features[:-1]((x - mean) / std)
        assert torch.equal(perceptual_map(network, x), expected)
    assert expected.shape == (1, 512, 2, 2)


@pytest.mark.slow
def test_pictures_show_input_and_output(run: Path, drawn: Path) -> None:
    rows = SRGAN(config_for()).pictures(batch_of())["super-resolution"]
    assert [p.caption.split(",")[0] for p in rows[0]] == ["input", "bicubic", "generated", "truth"]
    assert [p.image.shape[0] for p in rows[0]] == [8, 32, 32, 32]
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
        ({"perceptual": __file__}, "give its network"),
    ],
)
def test_impossible_options_are_refused_before_training(
    drawn: Path, tmp_path: Path, values: dict, message: str
) -> None:
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
    """Images of every kind and shape, and a broken one."""
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


def test_upscale_takes_every_kind_and_skips_broken_images(
    run: Path, odd_images: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each image becomes a PNG of four times its sides, equal to the output of the generator for the full image."""
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
    """An image enlarged in pieces equals the one enlarged at once."""
    method = SRGAN(config_for())
    method.load_state_dict(torch.load(run / "last.pt", weights_only=True)["method"])
    generator = method.generator.eval()
    pixels = np.random.default_rng(0).integers(0, 256, (23, 41, 3), dtype=np.uint8)
    at_once, pieces = (enlarge(generator, pixels, tile).astype(int) for tile in (64, 6))
    assert np.abs(at_once - pieces).max() <= 1
    assert at_once.std() > 1


def test_upscale_refuses_wrong_arguments(
    run: Path, odd_images: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a readable image, with two of one name, a file for a folder, ...: exit 2, and nothing is written."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.toml").write_text('method = "simclr"\n')
    (tmp_path / "twin").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "twin/rgb.png")
    first, broken = str(odd_images[0]), str(odd_images[-1])
    for words, message in (
        ([str(run), broken, "/no/such.png", "--out", "OUT"], "None of the 2 images"),
        ([str(run), first, str(tmp_path / "twin/rgb.png"), "--out", "OUT"], "Two images would be written to rgb.png"),
        ([str(run), first, "--out", first], "is a file"),
        ([str(run), first, "--out", str(tmp_path)], "would be overwritten"),
        ([str(tmp_path / "other"), first, "--out", "OUT"], "simclr, which has no generator"),
        (["/no/run", first, "--out", "OUT"], "/no/run is not a run folder"),
        ([str(run), "--out", "OUT"], "needs images"),
    ):
        assert main(["upscale", *[str(tmp_path / "out") if w == "OUT" else w for w in words]]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
