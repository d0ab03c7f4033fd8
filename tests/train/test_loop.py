"""A run from end to end on a tiny drawn set: files, exact resume, stops, what is refused."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fgfast.config import read_toml
from fgfast.data.splits import training_images
from fgfast.errors import UserError
from fgfast.methods.simclr import SimCLRConfig
from fgfast.train import loop
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests.conftest import TINY


def config_for(data: Path, out: Path, **values: object) -> SimCLRConfig:
    return replace(
        SimCLRConfig(
            data=str(data), out=str(out), model=TINY, size=32, batch_size=6, epochs=2, log_every=1, knn_every=1,
            save_every=1, hidden=16, projection=8, device="cpu", threads=1, amp="off",
        ),
        **values,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of six steps."""
    return pretrain("simclr", config_for(drawn, tmp_path_factory.mktemp("loop") / "run"))


def test_run_folder_is_complete(run: Path) -> None:
    """Every promised file is there and metrics hold the documented keys."""
    names = {p.name for p in run.iterdir()}
    assert {"config.toml", "init.pt", "last.pt", "encoder.safetensors", "metrics.jsonl", "tensorboard"} <= names
    rows, broken = read_metrics(run / "metrics.jsonl")
    train = [r for r in rows if "loss" in r]
    assert not broken
    assert [r["step"] for r in train] == [1, 2, 3, 4, 5, 6]
    keys = {
        "step",
        "epoch",
        "loss",
        "lr",
        "grad_norm",
        "images_per_s",
        "passes_per_s",
        "data_wait",
        "memory_mb",
        "skipped",
    }
    assert all(set(r) == keys for r in train)
    assert [r["step"] for r in rows if "knn" in r] == [3, 6]
    assert all(0 <= r["knn"] <= 1 for r in rows if "knn" in r)


def test_training_moves_the_weights(run: Path) -> None:
    """init.pt holds step 0 and last.pt something else."""
    init, last = (torch.load(run / f"{n}.pt", weights_only=True)["method"] for n in ("init", "last"))
    moved = [k for k in init if init[k].is_floating_point() and not torch.equal(init[k], last[k])]
    assert any(k.startswith("encoder.") for k in moved)


@pytest.mark.parametrize("stop_after", [2, 4])
def test_stopped_run_goes_on_exactly(
    drawn: Path, run: Path, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run interrupted in the middle of an epoch and resumed has the losses and weights of one that was not."""
    real = loop.learning_rate

    def stopping(step: int, total: int, config: SimCLRConfig) -> float:
        if step == stop_after - 1:
            signal.raise_signal(signal.SIGINT)
        return real(step, total, config)

    config = config_for(drawn, tmp_path / "run")
    monkeypatch.setattr(loop, "learning_rate", stopping)
    with pytest.raises(KeyboardInterrupt):
        pretrain("simclr", config)
    monkeypatch.setattr(loop, "learning_rate", real)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == stop_after
    pretrain("simclr", replace(config, resume=True))
    whole, parts = (read_metrics(r / "metrics.jsonl")[0] for r in (run, tmp_path / "run"))
    assert [(r["step"], r["loss"]) for r in parts if "loss" in r] == [
        (r["step"], r["loss"]) for r in whole if "loss" in r
    ]
    a, b = (torch.load(r / "last.pt", weights_only=True)["method"] for r in (run, tmp_path / "run"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_non_finite_batch_is_skipped_and_named(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A batch that gives NaN is named in the log, counted, and the run ends with finite weights."""
    from fgfast.methods.simclr import SimCLR

    calls = []
    real = SimCLR.forward

    def poisoned(self: SimCLR, batch: object) -> dict[str, torch.Tensor]:
        calls.append(0)
        if len(calls) == 2:
            batch.views[0][0] = float("nan")  # type: ignore[attr-defined]
        return real(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(SimCLR, "forward", poisoned)
    out = pretrain("simclr", config_for(drawn, tmp_path / "run", knn_every=0))
    assert "step 1: the loss was not finite" in capfd.readouterr().err
    assert read_metrics(out / "metrics.jsonl")[0][-1]["skipped"] == 1
    state = torch.load(out / "last.pt", weights_only=True)["method"]
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())


def test_finished_run_is_not_overwritten(drawn: Path, run: Path) -> None:
    """Without --resume a folder that holds a run is refused; with it a finished run stays as it is."""
    before = (run / "last.pt").read_bytes()
    config = config_for(drawn, run)
    with pytest.raises(UserError, match="already holds a run"):
        pretrain("simclr", config)
    assert (run / "last.pt").read_bytes() == before


def test_passes_set_the_length(drawn: Path, tmp_path: Path) -> None:
    """A budget of passes replaces the epochs: 6 images x 2 passes a step."""
    out = pretrain("simclr", config_for(drawn, tmp_path / "run", passes=50, knn_every=0))
    assert read_metrics(out / "metrics.jsonl")[0][-1]["step"] == 4
    with pytest.raises(UserError, match="does not pay"):
        pretrain("simclr", config_for(drawn, tmp_path / "two", passes=5))


def test_holdout_takes_the_same_share_of_every_class(drawn: Path, tmp_path: Path) -> None:
    """Nothing held out is trained on, and classes keep their balance."""
    kept, held = training_images(config_for(drawn, tmp_path, holdout=1 / 3))
    assert not set(kept.paths) & set(held.paths)
    assert sorted(torch.bincount(torch.as_tensor(held.targets)).tolist()) == [2, 2, 2]
    assert len(kept) + len(held) == 18


def test_other_options_on_resume_are_refused(drawn: Path, run: Path) -> None:
    """Another network on resume is one sentence that points to config.toml."""
    with pytest.raises(UserError, match=r"config\.toml"):
        pretrain("simclr", config_for(drawn, run, resume=True, hidden=24))


def test_metrics_are_json(run: Path) -> None:
    """Every line of metrics.jsonl is an object by itself."""
    assert all(isinstance(json.loads(line), dict) for line in (run / "metrics.jsonl").read_text().splitlines())


def test_finished_run_stays_as_it_is_on_resume(drawn: Path, run: Path) -> None:
    """--resume of a finished run changes no file."""
    files = ("last.pt", "encoder.safetensors", "metrics.jsonl", "config.toml")
    before = [(run / f).read_bytes() for f in files]
    pretrain("simclr", config_for(drawn, run, resume=True))
    assert [(run / f).read_bytes() for f in files] == before


def test_a_new_length_stands_in_the_config(drawn: Path, tmp_path: Path) -> None:
    """A later plain --resume must not go on to the old length."""
    out = pretrain("simclr", config_for(drawn, tmp_path / "run", epochs=1, knn_every=0))
    pretrain("simclr", config_for(drawn, out, epochs=2, knn_every=0, resume=True))
    assert read_toml(out / "config.toml")["epochs"] == 2
    assert read_metrics(out / "metrics.jsonl")[0][-1]["step"] == 6


def test_another_temperature_on_resume_is_refused(drawn: Path, run: Path) -> None:
    """An option that the weights do not show is compared with config.toml; the length may change."""
    with pytest.raises(UserError, match=r"--temperature 0\.2, not 0\.5"):
        pretrain("simclr", config_for(drawn, run, resume=True, temperature=0.5))


def test_broken_images_are_logged_or_refuse_the_run(drawn: Path, tmp_path: Path) -> None:
    """A broken image is named in log.txt; with more than 5% of them nothing is written."""
    import shutil

    data = tmp_path / "set"
    (data / "all").mkdir(parents=True)
    for i, path in enumerate(sorted((drawn / "images").rglob("*.jpg"))):
        shutil.copy(path, data / f"all/{i:02d}.jpg")
    (data / "all/empty.jpg").touch()
    out = pretrain("simclr", config_for(data, tmp_path / "run", epochs=1))
    assert "all/empty.jpg: the file is empty" in (out / "log.txt").read_text()
    for i in range(4):
        (data / f"all/more{i}.jpg").touch()
    with pytest.raises(UserError, match="5 of 41 images"):
        pretrain("simclr", config_for(data, tmp_path / "another", epochs=1))
    assert not (tmp_path / "another").exists()


def test_file_in_place_of_the_run_folder_is_named(drawn: Path, tmp_path: Path) -> None:
    """--out that is a file is the user's to change."""
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="is a file"):
        pretrain("simclr", config_for(drawn, tmp_path / "run"))


def test_folder_of_other_files_is_left_alone(drawn: Path, tmp_path: Path) -> None:
    """--out that holds what is no run is not written into."""
    for text in ('title = "my site"', "no toml"):
        (tmp_path / "config.toml").write_text(text)
        with pytest.raises(UserError, match="holds other files"):
            pretrain("simclr", config_for(drawn, tmp_path, resume=True))
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.toml", text)]


def test_second_signal_stops_at_once() -> None:
    """The first signal is noted, the second one raises."""
    with loop._stop_signals() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_parts_of_a_run_that_never_saved_are_made_anew(drawn: Path, tmp_path: Path) -> None:
    """Maps that a killed run left behind are not taken for those of other options; later rounds see other crops."""
    from fgfast.data.base import Loader
    from fgfast.data.maps import read_maps_info, write_maps_info
    from fgfast.methods.particle import PARTICLEConfig

    write_maps_info(tmp_path / "run/parts_0", 77, (8, 8), "another")
    (tmp_path / "run/config.toml").write_text('method = "particle"')  # written before the parts
    config = PARTICLEConfig(
        data=str(drawn), out=str(tmp_path / "run"), model=TINY, model_args="output_stride=8", size=32, batch_size=6,
        epochs=2, rounds=2, n_parts=3, hidden=16, projection=8, device="cpu", threads=1, amp="off", knn_every=0,
    )  # fmt: skip
    epochs = []
    with pytest.MonkeyPatch.context() as patch:
        real = Loader.__iter__
        patch.setattr(Loader, "__iter__", lambda self: epochs.append(self.epoch) or real(self))
        pretrain("particle", config)
    assert read_maps_info(tmp_path / "run/parts_0")["n_parts"] == 3
    assert [e for e in epochs if e > 0] == [1]  # the whole images of discovery are read in epoch 0


def test_images_without_labels(drawn: Path, tmp_path: Path) -> None:
    """A folder of images alone trains without scores; scoring and supervised training say what they need."""
    import shutil

    from fgfast.evaluate.protocols import evaluate
    from fgfast.methods.supervised import SupervisedConfig

    (tmp_path / "set").mkdir()
    for path in (drawn / "images").rglob("*.jpg"):
        shutil.copy(path, tmp_path / "set")
    config = config_for(tmp_path / "set", tmp_path / "run", epochs=1)
    out = pretrain("simclr", config)
    assert not [r for r in read_metrics(out / "metrics.jsonl")[0] if "knn" in r]
    with pytest.raises(UserError, match="train with --holdout"):
        evaluate(out, "knn", tmp_path / "set", device=torch.device("cpu"))
    with pytest.raises(UserError, match="two or more"):
        pretrain("supervised", SupervisedConfig(data=config.data, out=str(tmp_path / "two"), model=TINY, device="cpu"))
