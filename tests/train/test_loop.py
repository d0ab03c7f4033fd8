"""A run from end to end on a tiny synthetic set: files, resuming, stop signals and errors."""

import json
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from fgfast.config import read_toml
from fgfast.data.splits import training_images
from fgfast.errors import UserError
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from fgfast.train.signals import collect_stop_signals
from tests.conftest import TINY
from tests.methods.common_checks import check_exact_resume, poisoned
from tests.train.short_runs import simclr_config

config_for = partial(simclr_config, knn_every=1, save_every="1")


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps."""
    return pretrain("simclr", config_for(drawn, tmp_path_factory.mktemp("loop") / "run"))


def test_run_folder_is_complete(run: Path) -> None:
    """All documented files exist, and metrics have the documented keys."""
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


def test_training_changes_the_weights(run: Path) -> None:
    """init.pt has the weights of step 0, last.pt others."""
    init, last = (torch.load(run / f"{n}.pt", weights_only=True)["method"] for n in ("init", "last"))
    changed = [k for k in init if init[k].is_floating_point() and not torch.equal(init[k], last[k])]
    assert any(k.startswith("encoder.") for k in changed)


@pytest.mark.parametrize("stop_after", [2, 4])
def test_resumed_run_equals_an_uninterrupted_one(drawn: Path, tmp_path: Path, stop_after: int) -> None:
    """A run interrupted in the middle of an epoch and resumed has the same metrics and weights."""
    check_exact_resume("simclr", config_for(drawn, tmp_path), tmp_path, stop_after)


def test_non_finite_batch_is_skipped_and_named(drawn: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A batch that gives NaN is named in the log and counted, and the run ends with finite weights."""
    out = pretrain(poisoned("simclr", step=2), config_for(drawn, tmp_path / "run", knn_every=0))
    assert "step 1: the loss was not finite" in capfd.readouterr().err
    assert read_metrics(out / "metrics.jsonl")[0][-1]["skipped"] == 1
    state = torch.load(out / "last.pt", weights_only=True)["method"]
    assert all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point())


def test_finished_run_is_not_overwritten(drawn: Path, run: Path) -> None:
    """Without --resume a folder that holds a run is refused."""
    before = (run / "last.pt").read_bytes()
    config = config_for(drawn, run)
    with pytest.raises(UserError, match="already holds a run"):
        pretrain("simclr", config)
    assert (run / "last.pt").read_bytes() == before


def test_passes_set_the_length(drawn: Path, tmp_path: Path) -> None:
    """A budget of passes replaces the epochs: 6 images x 2 passes per step."""
    out = pretrain("simclr", config_for(drawn, tmp_path / "run", passes=50, knn_every=0))
    assert read_metrics(out / "metrics.jsonl")[0][-1]["step"] == 4
    with pytest.raises(UserError, match="does not allow one step"):
        pretrain("simclr", config_for(drawn, tmp_path / "two", passes=5))


def test_holdout_takes_the_same_fraction_of_every_class(drawn: Path, tmp_path: Path) -> None:
    """Held-out images are not trained on, and classes keep their balance."""
    training, held_out = training_images(config_for(drawn, tmp_path, holdout=1 / 3))
    assert not set(training.paths) & set(held_out.paths)
    assert sorted(torch.bincount(torch.as_tensor(held_out.targets)).tolist()) == [2, 2, 2]
    assert len(training) + len(held_out) == 18


def test_other_options_on_resume_are_refused(drawn: Path, run: Path) -> None:
    """Another network on resume gives an error that points to config.toml."""
    with pytest.raises(UserError, match=r"config\.toml"):
        pretrain("simclr", config_for(drawn, run, resume=True, hidden=24))


def test_metrics_are_json(run: Path) -> None:
    """Every line of metrics.jsonl is a JSON object."""
    assert all(isinstance(json.loads(line), dict) for line in (run / "metrics.jsonl").read_text().splitlines())


def test_resuming_a_finished_run_changes_nothing(drawn: Path, run: Path) -> None:
    """--resume of a finished run changes no file."""
    files = ("last.pt", "encoder.safetensors", "metrics.jsonl", "config.toml")
    before = [(run / f).read_bytes() for f in files]
    pretrain("simclr", config_for(drawn, run, resume=True))
    assert [(run / f).read_bytes() for f in files] == before


def test_a_new_length_is_written_to_the_config(drawn: Path, tmp_path: Path) -> None:
    """A later --resume without options takes the new length."""
    out = pretrain("simclr", config_for(drawn, tmp_path / "run", epochs=1, knn_every=0))
    pretrain("simclr", config_for(drawn, out, epochs=2, knn_every=0, resume=True))
    assert read_toml(out / "config.toml")["epochs"] == 2
    assert read_metrics(out / "metrics.jsonl")[0][-1]["step"] == 6


def test_another_temperature_on_resume_is_refused(drawn: Path, run: Path) -> None:
    """Options that do not affect the shapes of the weights are compared with config.toml."""
    with pytest.raises(UserError, match=r"--temperature 0\.2, not 0\.5"):
        pretrain("simclr", config_for(drawn, run, resume=True, temperature=0.5))


def test_broken_images_are_logged_and_too_many_are_refused(drawn: Path, tmp_path: Path) -> None:
    """log.txt names a broken image; with more than 5% of them nothing is written."""
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


def test_file_in_place_of_the_run_folder_is_refused(drawn: Path, tmp_path: Path) -> None:
    """--out must not be a file."""
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="is a file"):
        pretrain("simclr", config_for(drawn, tmp_path / "run"))


def test_folder_of_other_files_is_refused(drawn: Path, tmp_path: Path) -> None:
    """Nothing is written to an --out that holds files which are not of a run."""
    for text in ('title = "my site"', "no toml"):
        (tmp_path / "config.toml").write_text(text)
        with pytest.raises(UserError, match="holds other files"):
            pretrain("simclr", config_for(drawn, tmp_path, resume=True))
        assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.toml", text)]


def test_a_second_interrupt_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is collected, as are the echo of it that torchrun sends and the signals of a scheduler."""
    now = 100.0
    monkeypatch.setattr("fgfast.train.signals.time.monotonic", lambda: now)
    with pytest.raises(KeyboardInterrupt), collect_stop_signals() as caught:  # noqa: PT012
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        now += 1
        signal.raise_signal(signal.SIGTERM)
        assert len(caught) == 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_parts_of_a_run_without_a_checkpoint_are_discovered_again(drawn: Path, tmp_path: Path) -> None:
    """Maps left by a killed run, perhaps of other options, are replaced; later rounds draw other crops."""
    from fgfast.data.maps import read_maps_info, write_maps_info
    from fgfast.data.views import Batch
    from fgfast.methods.particle import PARTICLE, PARTICLEConfig

    boxes: list[torch.Tensor] = []

    class Recording(PARTICLE):
        def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
            boxes.append(batch.boxes[batch.index.argsort()])
            return super().forward(batch)

    write_maps_info(tmp_path / "run/parts_0", 77, (8, 8), "another")
    (tmp_path / "run/config.toml").write_text('method = "particle"')  # written before the parts
    config = PARTICLEConfig(
        data=str(drawn), out=str(tmp_path / "run"), model=TINY, model_args="output_stride=8", size=32, batch_size=18,
        epochs=2, rounds=2, n_parts=3, hidden=16, projection=8, device="cpu", threads=1, amp="off", knn_every=0,
    )  # fmt: skip
    pretrain(Recording, config)
    assert read_maps_info(tmp_path / "run/parts_0")["n_parts"] == 3
    first, second = boxes  # one step per round, with all 18 images
    assert (first != second).any(dim=-1).all()


def test_images_without_labels(drawn: Path, tmp_path: Path) -> None:
    """A folder of images without classes is trained on without scores; evaluation and supervised training refuse it."""
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
