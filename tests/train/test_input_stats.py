"""Input statistics of runs: what config.toml, checkpoints and exports hold, and who takes them from there."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open

from fgfast.cli.main import main
from fgfast.compare.entries import Entry
from fgfast.config import TrainConfig, read_toml
from fgfast.data.loader import make_plan
from fgfast.data.normalise import IMAGENET, InputStats
from fgfast.data.views import ViewSpec
from fgfast.errors import UserError
from fgfast.evaluate.few_shot import SegmentationOptions
from fgfast.evaluate.finetune import FinetuneOptions
from fgfast.evaluate.mlp import MLPOptions
from fgfast.evaluate.options import Protocol
from fgfast.evaluate.part_discovery import score_discovery
from fgfast.evaluate.protocols import evaluate
from fgfast.methods.particle import PARTICLEConfig
from fgfast.methods.run_folder import load_run_encoder, load_run_method, read_run
from fgfast.models.input_stats import stats_from_texts
from fgfast.report.draw import draw_run
from fgfast.run import read_state
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests.train.short_runs import simclr_config

CPU = torch.device("cpu")
SHORT: dict[str, Any] = {
    "mlp": MLPOptions(epochs=1), "finetune": FinetuneOptions(epochs=1),
    "segmentation": SegmentationOptions(n_labelled=4, epochs=1, every=1, batch_size=4),
}  # fmt: skip
HALF = InputStats((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")

config_for = partial(simclr_config, epochs=1)


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with statistics of its own, given in another form."""
    given = {"mean": "0.5, .5,0.50", "std": "0.5,0.5,0.5", "interpolation": "bicubic"}
    return pretrain("simclr", config_for(drawn, tmp_path_factory.mktemp("stats") / "run", **given))


@pytest.fixture
def earlier(run: Path, tmp_path: Path) -> Path:
    """A folder as earlier versions wrote it: nothing names any statistics, and the network has others in timm."""
    copy = Path(shutil.copytree(run, tmp_path / "earlier"))
    lines = (copy / "config.toml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.partition(" ")[0] not in InputStats._fields]
    assert len(kept) == len(lines) - 3
    (copy / "config.toml").write_text("".join(kept).replace('init = "none"', 'init = "timm"'))
    return copy


def test_config_checkpoints_and_export_hold_them(run: Path) -> None:
    stored = read_toml(run / "config.toml")
    with safe_open(run / "encoder.safetensors", "pt") as file:
        held = [stored, file.metadata(), *(read_state(run / name)["input"] for name in ("init.pt", "last.pt"))]
    for texts in held:
        assert {name: texts[name] for name in InputStats._fields} == HALF.texts()


def test_a_run_without_options_holds_resolved_values(drawn: Path, tmp_path: Path) -> None:
    stored = read_toml(pretrain("simclr", config_for(drawn, tmp_path / "run"), train=False) / "config.toml")
    assert {name: stored[name] for name in InputStats._fields} == IMAGENET.texts()


def test_what_loads_a_run_takes_them(run: Path) -> None:
    name, config = read_run(run)
    assert stats_from_texts(vars(config), "--") == HALF
    for checkpoint in ("init", "last"):
        assert load_run_encoder(run, checkpoint, CPU)[0].stats == HALF  # type: ignore[arg-type]
    assert load_run_method(run, "last", name, replace(config, init="none")).normalised_views().mean == HALF.mean
    settings = {"mean": "0,0,0", "interpolation": "bilinear"}
    changed = load_run_encoder(run, "last", CPU, settings)[0].stats
    assert changed == InputStats((0.0, 0.0, 0.0), HALF.std, "bilinear")
    assert load_run_encoder(run, "last", CPU, {"mean": "auto", "interpolation": "auto"})[0].stats == HALF


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[ViewSpec]:
    """The views of every loader that is made."""
    specs: list[ViewSpec] = []

    def record(images: Any, spec: ViewSpec, *args: Any, **kwargs: Any) -> Any:
        specs.append(spec)
        return make_plan(images, spec, *args, **kwargs)

    monkeypatch.setattr("fgfast.data.loader.make_plan", record)
    return specs


def test_every_loader_of_a_run_gets_them(run: Path, drawn: Path, tmp_path: Path, loaded: list[ViewSpec]) -> None:
    """In training and its scores, every protocol, part discovery and figures; only thumbnails have ImageNet's."""
    texts = HALF.texts()
    config = config_for(drawn, tmp_path / "run", model_args="output_stride=8", knn_every=1, **texts)
    options = {name: getattr(config, name) for name in vars(TrainConfig())}
    particle = PARTICLEConfig(
        **options | {"out": str(tmp_path / "parts")}, hidden=16, projection=8, n_parts=3, map_size=8
    )
    pretrain("simclr", config)
    pretrain("particle", particle)
    counts = [len(loaded)]
    for protocol in get_args(Protocol):
        evaluate(tmp_path / "run", protocol, drawn, device=CPU, options=SHORT.get(protocol))
        counts.append(len(loaded))
    score_discovery(tmp_path / "run", drawn, device=CPU, n_images=4)
    counts.append(len(loaded))
    assert main(["discover", str(tmp_path / "run"), "--data", str(drawn), "--out", str(tmp_path / "maps")]) == 0
    counts.append(len(loaded))
    draw_run(tmp_path / "parts", drawn, device=CPU)
    assert all(more > fewer for fewer, more in zip([0, *counts], [*counts, len(loaded)], strict=True))
    others = [spec for spec in loaded if spec != spec.with_stats(HALF)]
    assert others == [ViewSpec(whole=96)]


@pytest.mark.parametrize("weights", ["", "encoder.safetensors", "last.pt", "init.pt"])
def test_a_run_passes_them_on(run: Path, drawn: Path, tmp_path: Path, weights: str) -> None:
    """A folder, an export and a checkpoint as initial weights; one line of the log says so."""
    new = pretrain("simclr", config_for(drawn, tmp_path / "new", init=str(run / weights)))
    assert load_run_encoder(new, "last", CPU)[0].stats == HALF
    lines = [line for line in (new / "log.txt").read_text().splitlines() if "input statistics" in line]
    assert len(lines) == 1
    assert "mean 0.5,0.5,0.5, std 0.5,0.5,0.5, bicubic" in lines[0]


def test_a_resumed_run_keeps_them(drawn: Path, tmp_path: Path, run: Path, loaded: list[ViewSpec]) -> None:
    """Whether they are given again or not; others are refused, and then nothing has changed."""
    out = Path(shutil.copytree(run, tmp_path / "run"))
    before = (out / "config.toml").read_text()
    with pytest.raises(UserError, match=r"was started with --mean 0.5,0.5,0.5, not 0.485,0.456,0.406"):
        pretrain("simclr", config_for(drawn, out, epochs=2, resume=True, mean="0.485,0.456,0.406"))
    assert (out / "config.toml").read_text() == before
    for epochs, given in ((2, {}), (3, {"mean": "0.5,0.5,.5"})):
        loaded.clear()
        pretrain("simclr", config_for(drawn, out, epochs=epochs, resume=True, **given))
        assert loaded == [spec.with_stats(HALF) for spec in loaded] != []
    assert load_run_encoder(out, "last", CPU)[0].stats == HALF


def test_runs_of_earlier_versions_used_imagenets(earlier: Path, drawn: Path) -> None:
    """Whatever network they had, for evaluation and when they are resumed."""
    assert stats_from_texts(vars(read_run(earlier)[1]), "--") == IMAGENET
    assert load_run_encoder(earlier, "last", CPU)[0].stats == IMAGENET
    text = (earlier / "config.toml").read_text()
    (earlier / "config.toml").write_text(text.replace('init = "timm"', 'init = "none"'))
    pretrain("simclr", config_for(drawn, earlier, epochs=2, resume=True))
    stored = read_toml(earlier / "config.toml")
    assert {name: stored[name] for name in InputStats._fields} == IMAGENET.texts()
    with safe_open(earlier / "encoder.safetensors", "pt") as file:
        assert file.metadata()["mean"] == "0.485,0.456,0.406"


def test_imagenets_given_by_hand_change_no_bit(drawn: Path, tmp_path: Path) -> None:
    """The default of random weights is what earlier versions did: the same losses as with the values spelled out."""
    losses = []
    for name, texts in (("default", {}), ("given", IMAGENET.texts())):
        out = pretrain("simclr", config_for(drawn, tmp_path / name, **texts))
        losses.append([row["loss"] for row in read_metrics(out / "metrics.jsonl")[0]])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mean", "0.5,0.5"], "--mean is '0.5,0.5': give three numbers"),
        (["--mean", "0.5,0.5,0.5,0.5"], "give three numbers"),
        (["--mean", "a,b,c"], "give three numbers"),
        (["--mean", "0.5,0.5,1.5"], "A number of --mean is 1.5: give at least 0 and at most 1"),
        (["--mean=-0.1,0,0"], "A number of --mean is -0.1"),
        (["--mean", "nan,0,0"], "A number of --mean is nan"),
        (["--std", "1,1,0"], "A number of --std is 0.0: give more than 0"),
        (["--std", "1,1,inf"], "A number of --std is inf"),
        (["--std", "1,1"], "--std is '1,1': give three numbers"),
        (["--mean", ""], "--mean is '': give three numbers"),
        (["--interpolation", "nearest"], "invalid choice 'nearest'"),
        (["--interpolation", "nearest"], "'auto', 'bilinear', 'bicubic'"),
    ],
)
def test_impossible_statistics_end_a_command_before_anything_is_written(
    drawn: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["pretrain", "simclr", "--data", str(drawn), "--out", str(out), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mean=0.5", "--mean is '0.5': give three numbers"),
        ("std=0,0,0", "A number of --std is 0.0"),
        ("interpolation=area", "choose one of auto, bilinear, bicubic."),
    ],
)
def test_impossible_settings_of_an_evaluation_are_refused(
    run: Path, drawn: Path, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run.iterdir())
    assert main(["eval", "knn", str(run), "--data", str(drawn), "--set", setting, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(run.iterdir()) == before


def test_a_damaged_config_is_named(earlier: Path) -> None:
    text = (earlier / "config.toml").read_text()
    (earlier / "config.toml").write_text(f'std = "1,1"\n{text}')
    with pytest.raises(UserError, match=r"In .*config\.toml std is '1,1': give three numbers"):
        read_run(earlier)


def test_an_entry_of_a_comparison_takes_values_with_commas() -> None:
    values = Entry.parse("simclr:mean=0.5,0.5,0.5,lr=0.1,model_args=channels=(8,16)").values
    assert values == {"mean": "0.5,0.5,0.5", "lr": "0.1", "model_args": "channels=(8,16)"}
