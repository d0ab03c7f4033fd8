"""Resuming and sharing of run folders: who may write, what may change, and what config.toml records of it."""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fgfast import claim as claims
from fgfast.claim import NAME, claim_folder
from fgfast.cli.parse import parse_method
from fgfast.config import read_toml
from fgfast.data.synthetic import generate
from fgfast.errors import UserError
from fgfast.methods.base import Progress
from fgfast.methods.particle import PARTICLE, PARTICLEConfig
from fgfast.methods.run_folder import read_run
from fgfast.methods.simclr import SimCLR
from fgfast.ranks import Ranks
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from fgfast.train.resume import Resumed, claim_run, record_resumption
from tests.conftest import TINY
from tests.train.short_runs import simclr_config as config_for


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps in two epochs, which no test changes."""
    return pretrain("simclr", config_for(drawn, tmp_path_factory.mktemp("resume") / "run"))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run."""
    import shutil

    return Path(shutil.copytree(run, tmp_path / "copy"))


def contents(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def history(run: Path) -> list[dict[str, Any]]:
    return list(read_toml(run / "config.toml")["environment"]["resumed"])


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_run_holds_is_left_alone(drawn: Path, tmp_path: Path, resume: bool) -> None:
    """From before its first file on."""
    with claim_folder(tmp_path / "run"):
        before = contents(tmp_path / "run")
        with pytest.raises(UserError, match="in use by process"):
            pretrain("simclr", config_for(drawn, tmp_path / "run", resume=resume))
        assert contents(tmp_path / "run") == before


def test_a_run_holds_its_folder_from_its_first_file_to_its_last_step(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    real: Callable[..., None] = Path.replace

    def recording(self: Path, target: Path) -> None:
        held.append((tmp_path / "run" / NAME).is_file())
        real(self, target)

    monkeypatch.setattr(Path, "replace", recording)
    pretrain("simclr", config_for(drawn, tmp_path / "run", epochs=1))
    assert len(held) >= 4  # config.toml, init.pt, metrics.jsonl, last.pt and others
    assert all(held)
    assert not (tmp_path / "run" / NAME).exists()


def test_a_run_killed_before_its_first_file_is_no_foreign_folder(drawn: Path, tmp_path: Path) -> None:
    gone = replace(claims._of_this_process(), machine="of another start")
    (tmp_path / ".config.toml.1.1.partial").touch()
    (tmp_path / NAME).write_text(json.dumps(asdict(gone)))
    with pytest.raises(UserError, match="in use"):
        pretrain("simclr", config_for(drawn, tmp_path), train=False)
    (tmp_path / NAME).write_text(json.dumps(asdict(replace(claims._of_this_process(), pid=2**22 + 1))))
    pretrain("simclr", config_for(drawn, tmp_path), train=False)
    assert (tmp_path / "init.pt").is_file()


def test_a_run_that_lost_its_folder_saves_nothing_more(drawn: Path, tmp_path: Path) -> None:
    """It was suspended so long that another process took the folder over."""

    class Losing(SimCLR):
        def after_step(self, progress: Progress) -> None:
            super().after_step(progress)
            if progress.step == 4:
                end = time.monotonic() + 30
                while not (tmp_path / "run/last.pt").exists() and time.monotonic() < end:
                    time.sleep(0.01)  # the checkpoint of step 3 is written beside the training
                (tmp_path / "run" / NAME).unlink()

    with pytest.raises(UserError, match="stops and leaves the folder"):
        pretrain(Losing, config_for(drawn, tmp_path / "run", save_every="1"))
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize(("values", "given"), [({"epochs": 1}, "--epochs 1 gives 3"), ({"passes": 36}, "--passes 36")])
def test_a_shorter_run_is_refused(drawn: Path, copy: Path, values: dict[str, int], given: str) -> None:
    """Nothing changes, config.toml included."""
    before = contents(copy)
    with pytest.raises(UserError, match=rf"done 6 steps and {given}"):
        pretrain("simclr", config_for(drawn, copy, resume=True, **values))
    assert contents(copy) == before


def test_a_finished_run_says_so(drawn: Path, copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing changes, whatever else is given."""
    before = contents(copy)
    pretrain("simclr", config_for(drawn, copy, resume=True, threads=2))
    assert "is finished: all 6 steps are done" in caplog.text
    assert contents(copy) == before


def test_a_longer_run_says_how_the_rate_changes(drawn: Path, run: Path, copy: Path) -> None:
    """The sentence has the rates of metrics.jsonl, and config.toml tells when the length changed and from what."""
    started = config_for(drawn, run)
    pretrain("simclr", config_for(drawn, copy, epochs=4, resume=True))
    rates = [row["lr"] for row in read_metrics(copy / "metrics.jsonl")[0]]
    sentence = f"the learning rate goes from {rates[5]:.1e} to {rates[6]:.1e} at step 6, since the schedule now ends at"
    assert f"{sentence} step 12, not 6" in (copy / "log.txt").read_text()
    assert rates[5] == pytest.approx(started.learning_rate(5, 6), rel=1e-5)
    assert rates[6] == pytest.approx(started.learning_rate(6, 12), rel=1e-5)
    _, config = read_run(copy)
    assert config.epochs == 4
    (entry,) = history(copy)
    assert (entry["step"], entry["before"]["epochs"]) == (6, 2)


def test_every_option_that_changes_is_recorded(drawn: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options are those of the last steps; each entry has those before it; an unchanged --resume only its step."""
    monkeypatch.setattr("fgfast.info._version", lambda package: "0")
    pretrain("simclr", config_for(drawn, copy, epochs=3, resume=True, threads=2, log_every=2))
    pretrain("simclr", config_for(drawn, copy, epochs=4, resume=True, threads=2, log_every=3))
    before = [entry["before"] for entry in history(copy)]
    assert before[0].pop("environment")["torch"] in torch.__version__
    assert before[0].pop("out") != str(copy)
    assert before == [{"threads": 1, "log_every": 1, "epochs": 2}, {"log_every": 2, "epochs": 3}]
    _, config = read_run(copy)
    assert (config.threads, config.log_every, config.epochs, config.resume) == (2, 3, 4, False)
    assert parse_method(["simclr", "--config", str(copy / "config.toml")])[1] == config


def test_a_run_that_stopped_between_two_rounds_is_recorded(drawn: Path, tmp_path: Path) -> None:
    class Stopped(PARTICLE):
        def after_step(self, progress: Progress) -> None:
            super().after_step(progress)
            if progress.step == 3:
                signal.raise_signal(signal.SIGTERM)

    config = PARTICLEConfig(
        data=str(drawn), out=str(tmp_path / "run"), model=TINY, size=32, batch_size=6, epochs=2, log_every=1,
        knn_every=0, hidden=16, projection=8, device="cpu", threads=1, amp="off", parts="grid", grid=2, rounds=2,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        pretrain(Stopped, config)
    pretrain("particle", replace(config, resume=True, log_every=2))
    assert [(entry["step"], entry["before"]) for entry in history(tmp_path / "run")] == [(3, {"log_every": 1})]
    assert read_run(tmp_path / "run")[1].log_every == 2


def test_an_image_that_is_lost_between_stop_and_resume_is_named_once(tmp_path: Path) -> None:
    data = generate(tmp_path / "set", classes=2, images=48, size=48, seed=0, workers=1)
    run = pretrain("simclr", config_for(data, tmp_path / "run", batch_size=12, epochs=1))
    lost = json.loads((run / "images.json").read_text())["paths"][0]
    next(data.rglob(lost)).unlink()
    before = (run / "log.txt").read_text()
    pretrain("simclr", config_for(data, run, batch_size=12, epochs=2, resume=True))
    log = (run / "log.txt").read_text().removeprefix(before)
    assert f"1 of the 24 images with which the run began cannot be read and are skipped: {lost} (No such file" in log
    assert log.count(lost) == 1
    assert [row["lost"] for row in read_metrics(run / "metrics.jsonl")[0] if row["step"] > 2] == [1, 1]


@pytest.mark.parametrize("text", ["environment = 3", "[environment]\nresumed = 3", "[environment]\nresumed = [3]"])
def test_an_edited_environment_does_not_stop_the_record(tmp_path: Path, text: str) -> None:
    config = config_for(tmp_path, tmp_path)
    (tmp_path / "config.toml").write_text(text)
    record_resumption(SimpleNamespace(config=config, name="simclr"), Resumed({"step": 4}, config, 6))  # type: ignore[arg-type]
    assert [table["step"] for table in history(tmp_path)] == [4]


def test_a_folder_with_other_files_names_one(tmp_path: Path) -> None:
    (tmp_path / "train.log").write_text("")
    with (
        pytest.raises(UserError, match=r"holds other files, such as train\.log: give another --out"),
        claim_run(tmp_path, Ranks(0, 1, torch.device("cpu"))),
    ):
        pass


def test_other_images_on_resume_leave_the_record(drawn: Path, copy: Path, tmp_path: Path) -> None:
    """A set of another size is refused before config.toml names it."""
    import shutil

    fewer = Path(shutil.copytree(drawn / "images", tmp_path / "set"))
    next(fewer.rglob("*.jpg")).unlink()
    before = contents(copy)
    with pytest.raises(UserError, match=r"images with which .* began cannot be read"):
        pretrain("simclr", config_for(fewer, copy, epochs=3, resume=True))
    assert contents(copy) == before


def test_a_file_that_is_no_checkpoint_of_a_run_is_refused(drawn: Path, copy: Path) -> None:
    (copy / "last.pt").write_bytes((copy / "init.pt").read_bytes())
    with pytest.raises(UserError, match="has no 'loader'"):
        pretrain("simclr", config_for(drawn, copy, resume=True))
