"""Weights & Biases: the rows of metrics.jsonl, one run for all resumptions, and failures that are said."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from fgfast.errors import UserError
from fgfast.train.log import RunLog
from fgfast.train.loop import pretrain
from fgfast.train.online import ID, WandbRun, open_online
from tests.train.short_runs import simclr_config

wandb = pytest.importorskip("wandb")

CHUNK = 7  # bytes before each record of a .wandb file: checksum, length, type


class Service(WandbRun):
    """A run at Weights & Biases that fails after some rows."""

    def __init__(self, rows: int) -> None:
        self.where, self.rows = "curves at Weights & Biases: nowhere", rows

    def write(self, row: dict[str, Any]) -> None:
        self.rows -= 1
        if self.rows < 0:
            raise ConnectionError("the network is down")

    def close(self, failed: bool) -> None:
        raise AssertionError("a run that failed is not closed")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


def stored(folder: Path) -> list[dict[str, Any]]:
    """The rows of an offline run, from its file: a header of 7 bytes and, below 32 KiB, whole records alone."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = next(folder.glob("*.wandb")).read_bytes()
    assert len(data) < 2**15
    rows, at = [], CHUNK
    while at < len(data):
        end = at + CHUNK + int.from_bytes(data[at + 4 : at + 6], "little")
        record = Record.FromString(data[at + CHUNK : end])
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        at = end
    return rows


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_one(drawn: Path, tmp_path: Path) -> None:
    run = pretrain("simclr", simclr_config(drawn, tmp_path / "run", log="wandb", knn_every=1, epochs=1))
    name = (run / "wandb" / ID).read_text().strip()
    assert f"wandb sync {run}/wandb/offline-run-* uploads them" in (run / "log.txt").read_text()
    pretrain("simclr", simclr_config(drawn, run, log="wandb", resume=True))
    folders = sorted((run / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime_ns)
    assert len(folders) == 2
    assert all(folder.name.endswith(f"-{name}") for folder in folders)
    found = {row["_step"]: row for folder in folders for row in stored(folder)}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row.items() - {("step", row["step"])} <= found[row["step"]].items()
    assert {"loss", "knn"} <= found[3].keys()


def test_a_new_run_in_the_same_folder_is_a_new_one(tmp_path: Path) -> None:
    config = simclr_config(tmp_path, tmp_path, log="wandb")
    with mock.patch("wandb.init") as init:
        for start in (0, 0, 4):
            WandbRun("simclr", config, start)
    names = [call.kwargs["id"] for call in init.call_args_list]
    assert names[0] != names[1] == names[2] == (tmp_path / "wandb" / ID).read_text().strip()


def test_a_failure_in_training_is_said_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"images_per_s": 1.0, "data_wait": 0.0, "memory_mb": 1.0, "loss": 1.0}
    with RunLog(tmp_path, 4, online=Service(1)) as run_log:
        for step in (1, 2, 3):
            run_log.write({"step": step, **row})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    for text in (capsys.readouterr().err, (tmp_path / "log.txt").read_text()):
        assert text.count("gets no further rows, metrics.jsonl has them (the network is down)") == 1


def test_a_new_run_that_cannot_start_is_refused_and_a_resumed_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.setenv("HOME", str(tmp_path))  # which has no .netrc
    wandb.teardown()  # it reads the environment once
    config = simclr_config(tmp_path, tmp_path, log="wandb")
    with pytest.raises(UserError, match=r"cannot start \(No API key configured.*\): run wandb login, set WANDB_MODE"):
        open_online("simclr", config, 0)
    assert open_online("simclr", config, 4) is None
    assert "training goes on without Weights & Biases" in caplog.text
    wandb.teardown()


def test_without_the_package_nothing_is_begun(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else True)
    with pytest.raises(UserError, match=r"^The package wandb is not installed: pip install 'fgfast\[wandb\]'\.$"):
        pretrain("simclr", simclr_config(drawn, tmp_path / "run", log="wandb"))
    assert not (tmp_path / "run").exists()


def test_other_ranks_and_other_logs_have_none(tmp_path: Path) -> None:
    assert open_online("simclr", simclr_config(tmp_path, tmp_path), 0) is None
    assert not list(tmp_path.iterdir())
