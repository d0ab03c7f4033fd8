"""Exported encoders, loaded by the programs that they are for, give the features of the run."""

import errno
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fgfast.cli import main
from fgfast.config import TrainConfig
from fgfast.config_text import to_toml
from fgfast.data.normalise import normalise
from fgfast.errors import UserError
from fgfast.export import Format, export_run, formats
from fgfast.methods.base import Method, method_class
from fgfast.methods.color import ColorConfig
from fgfast.methods.lcr import LCRConfig
from fgfast.methods.run_folder import load_run_encoder
from fgfast.methods.simclr import SimCLRConfig
from fgfast.methods.srgan import SRGANConfig
from fgfast.models.sync_bn import synchronise_batch_norm
from fgfast.run import save_checkpoint
from tests.conftest import TINY

CNN = SimCLRConfig(
    data="sets/birds", model=TINY, size=32, hidden=16, projection=8, device="cpu", threads=1, freeze_bn="on",
    mean="0.5,0.4,0.6", std="0.2,0.3,0.5", interpolation="bicubic",
)  # fmt: skip
VIT = replace(CNN, model="test_vit", freeze_bn="off", interpolation="bilinear")
SRGAN = SRGANConfig(model="srgan", size=16, width=4, blocks=1, device="cpu", threads=1)
COLOR = ColorConfig(model=TINY, size=32, device="cpu", threads=1)
LCR = LCRConfig(model=TINY, size=64, device="cpu", threads=1)
EXACT = 1e-5  # of the largest value


def write_run(run: Path, name: str, config: TrainConfig, **state: Any) -> Method:
    """A run folder with random weights and statistics of BatchNorm, and its method in evaluation mode."""
    torch.manual_seed(0)
    method = method_class(name)(config)
    for key, buffer in method.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    run.mkdir()
    save_checkpoint(run / "last.pt", {"name": name, "method": method.state_dict(), **state})
    (run / "config.toml").write_text(to_toml(config, name))
    return method.eval()


def batch(n: int, size: int) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n))


def close(got: Any, wanted: Tensor) -> bool:
    """Whether values agree to rounding."""
    got = torch.as_tensor(np.asarray(got.detach() if isinstance(got, Tensor) else got))
    return got.shape == wanted.shape and bool((got - wanted).abs().max() <= EXACT * wanted.abs().max())


def load(to: Format, folder: Path) -> Any:
    """What other programs compute with an export: the features, and the map of a program, of images."""
    if to == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx")
        return lambda x: session.run(None, {"images": x.numpy()})
    if to == "torch-export":
        return torch.export.load(folder / "model.pt2").module()
    if to == "timm":
        import timm

        net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        return lambda x: [net(x)]
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return lambda x: [model(x).pooler_output]


def metadata(to: Format, folder: Path) -> dict[str, str]:
    """The texts in the file of a program."""
    if to == "onnx":
        import onnxruntime

        found: dict[str, str] = onnxruntime.InferenceSession(folder / "model.onnx").get_modelmeta().custom_metadata_map
        return found
    extra: dict[str, Any] = {"input.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=extra)
    read: dict[str, str] = json.loads(extra["input.json"])
    return read


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("to", ["onnx", "torch-export", "timm", "transformers"])
@pytest.mark.parametrize("config", [CNN, VIT], ids=["cnn", "vit"])
def test_an_export_gives_the_features_of_the_run(
    tmp_path: Path, config: SimCLRConfig, to: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For batches of any size, from frozen and synchronised norms, and by the lines in the card from an image file."""
    method = write_run(tmp_path / "run", "simclr", config, step=7, total=9, images_per_step=12)
    encoder = synchronise_batch_norm(method.encoder)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "run"), "--to", to, "--out", str(out)]) == 0
    loaded = load(to, out)
    for n in (1, 3):
        x = batch(n, 32)
        features, *maps = loaded(x)
        assert close(features, encoder(x))
        if to in formats.PROGRAMS:
            assert close(maps[0], encoder.to_map(encoder.features(x), (32, 32)))

    if to in formats.PROGRAMS:
        assert metadata(to, out) == {"model": config.model, "size": "32", **encoder.stats.texts()}
    card = (out / "README.md").read_text()
    assert "| training | 7 of 9 steps, 84 images |" in card
    assert "| data | birds |" in card
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    image.save(out / "image.jpg")
    monkeypatch.chdir(out)
    lines: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0], lines)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    resized = Image.open("image.jpg").resize((32, 32), filters[config.interpolation])
    pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)[None] / 255
    assert close(lines["features"], encoder(normalise(pixels, encoder.stats)))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "config", "to"),
    [("srgan", SRGAN, "onnx"), ("color", COLOR, "torch-export"), ("lcr", LCR, "torch-export")],
    ids=["srgan", "color", "lcr"],
)
def test_programs_hold_what_timm_does_not(tmp_path: Path, name: str, config: TrainConfig, to: Format) -> None:
    """Networks of fgfast, lightness and attention; the folders of libraries refuse them by name."""
    encoder = write_run(tmp_path / "run", name, config).encoder.eval()
    loaded = load(to, export_run(tmp_path / "run", to, tmp_path / "out"))
    for n in (1, 3):
        x = batch(n, config.size)
        assert close(loaded(x)[0], encoder(x))
    libraries: tuple[Format, ...] = ("timm", "transformers")
    for library in libraries:
        with pytest.raises(UserError, match=rf"--to {library}: the encoder {config.model} .* give --to onnx"):
            export_run(tmp_path / "run", library, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@torch.no_grad()
def test_a_setting_of_the_run_is_replaced(tmp_path: Path) -> None:
    """Without its attention the encoder of lcr is one of timm."""
    encoder = write_run(tmp_path / "run", "lcr", LCR).encoder.eval()
    out = export_run(tmp_path / "run", "timm", tmp_path / "out", settings={"pooling": "mean"})
    assert close(load("timm", out)(batch(2, 64))[0], encoder.pool(encoder.features(batch(2, 64))))


@torch.no_grad()
def test_the_average_of_the_weights_is_exported(tmp_path: Path) -> None:
    run, config = tmp_path / "run", replace(CNN, average=0.9)
    average = {k: 2 * v for k, v in write_run(tmp_path / "a", "simclr", config).encoder.net.state_dict().items()}
    write_run(run, "simclr", config, average=average, step=3)
    out = export_run(run, "timm", tmp_path / "out")
    encoder = load_run_encoder(run, "last", torch.device("cpu"))[0]
    assert torch.equal(encoder.net.conv1[0].weight, average["conv1.0.weight"])
    assert close(load("timm", out)(batch(2, 32))[0], encoder(batch(2, 32)))
    assert "averaged over the steps with decay 0.9" in (out / "README.md").read_text()


def test_the_metadata_hold_the_input(tmp_path: Path) -> None:
    """The statistics, size and interpolation are in the folder of timm and in what a run is started from."""
    import timm

    from fgfast.models.input_stats import stats_of_file

    write_run(tmp_path / "run", "simclr", CNN)
    out = export_run(tmp_path / "run", "timm", tmp_path / "out")
    stats = load_run_encoder(tmp_path / "run", "last", torch.device("cpu"))[0].stats
    net = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=5)  # to be trained further
    config = timm.data.resolve_model_data_config(net)
    assert [config[name] for name in ("interpolation", "crop_pct", "crop_mode")] == ["bicubic", 1.0, "squash"]
    assert [tuple(config[name]) for name in ("input_size", "mean", "std")] == [(3, 32, 32), stats.mean, stats.std]
    found = stats_of_file(out)
    assert found is not None
    assert found[0] == stats


def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence and exit status 2, and nothing is written."""
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(run, "simclr", CNN)
    (tmp_path / "file").touch()
    argv = ["export", str(run), "--out", str(out), "--to"]
    before = sorted(tmp_path.rglob("*"))

    def refused(argv: list[str], message: str) -> None:
        assert main(argv) == 2
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before

    refused([*argv, "keras"], "invalid choice 'keras'")
    refused(["export", "/no/run", "--out", str(out), "--to", "timm"], "/no/run is not a run folder")
    refused(["export", str(run), "--out", str(run), "--to", "timm"], f"{run} exists: give another --out.")
    refused(["export", str(run), "--out", str(tmp_path / "file" / "x"), "--to", "timm"], "is a file: give another")
    refused([*argv, "timm", "--checkpoint", "init"], "There is no checkpoint")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(formats, "save_encoder", full)
        refused([*argv, "timm"], "No space is left on the disk")
    with monkeypatch.context() as patch:
        patch.setattr(formats, "_load_folder", lambda *_: lambda images: torch.full((len(images), 96), torch.nan))
        refused([*argv, "timm"], "--to timm gives other features than test_resnet (by nan of the largest)")
    with monkeypatch.context() as patch:
        patch.setattr(torch.export, "export", lambda *_, **__: {}["a symbol"])
        refused([*argv, "torch-export"], "--to torch-export: test_resnet cannot be traced (KeyError, see --debug)")
    find_spec = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find_spec(name))
        refused([*argv, "onnx"], "The package onnxruntime is not installed: pip install 'fgfast[export]'")
