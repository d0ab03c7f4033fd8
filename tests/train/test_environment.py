"""Variables of the environment and packages that are missing: one sentence before any work, or a run without them."""

import logging
import sys
from pathlib import Path

import pytest
import torch

from fgfast import backend
from fgfast.errors import UserError
from fgfast.methods.simclr import SimCLRConfig
from fgfast.train.compiling import check_compiler
from fgfast.train.distributed import _device_of_rank, choose_device, joined, will_be_first
from fgfast.train.log import RunLog
from fgfast.train.loop import pretrain

RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def set_environment(patch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", *RENDEZVOUS):
        patch.delenv(name, raising=False)
    for name, value in values.items():
        patch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", **RENDEZVOUS}, "RANK is '2'"),
        ({"WORLD_SIZE": "2", "RANK": "-1", **RENDEZVOUS}, "RANK is '-1'"),
        ({"RANK": "1"}, "RANK is 1 but WORLD_SIZE is not set"),
        ({"RANK": "x", "WORLD_SIZE": ""}, "RANK is x but WORLD_SIZE is not set"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK is '1' and must be 0"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", **RENDEZVOUS, "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
)
def test_an_incomplete_group_of_ranks_is_refused(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], named: str
) -> None:
    set_environment(monkeypatch, values)
    sentence = rf"{named}.*: start all ranks with torchrun, or unset WORLD_SIZE and RANK"
    with pytest.raises(UserError, match=sentence), joined("cpu"):
        pass


@pytest.mark.parametrize(("value", "named"), [(None, "is not set"), ("0", "is '0'"), ("x", "is 'x'")])
def test_a_gpu_is_not_guessed(monkeypatch: pytest.MonkeyPatch, value: str | None, named: str) -> None:
    """Without LOCAL_RANK all ranks would share the first GPU."""
    given = {"WORLD_SIZE": "2", "RANK": "1"} | ({} if value is None else {"LOCAL_RANK": value})
    set_environment(monkeypatch, given)
    monkeypatch.setattr("fgfast.train.distributed.choose_device", torch.device)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UserError, match=f"LOCAL_RANK {named}"):
        _device_of_rank("cuda")


@pytest.mark.parametrize("values", [{}, {"WORLD_SIZE": "", "RANK": ""}, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "x"}])
def test_one_process_needs_no_variable(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    set_environment(monkeypatch, values)
    with joined("cpu") as ranks:
        assert ranks.world == 1


@pytest.mark.parametrize(("rank", "first"), [(None, True), ("", True), (" 0", True), ("1", False), ("10", False)])
def test_the_first_rank_is_known_before_the_group_exists(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, first: bool
) -> None:
    set_environment(monkeypatch, {} if rank is None else {"RANK": rank})
    assert will_be_first() == first


@pytest.mark.parametrize("name", ["nosuch", "triton"])
def test_an_unusable_backend_is_refused_before_the_first_operation(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(backend, "_chosen", name)
    monkeypatch.setattr(backend, "missing", lambda name: "there is no GPU")
    with pytest.raises(UserError, match=rf"{name}.*: choose "):
        choose_device("cpu")


def test_training_goes_on_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says so."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with RunLog(tmp_path, 1) as log:
        log.write({"step": 1, "knn": 0.5})
    assert (tmp_path / "log.txt").read_text().splitlines()[0].endswith("pip install tensorboard")
    assert not (tmp_path / "tensorboard").exists()
    assert (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("package", ["rich", "safetensors", "timm"])
def test_a_missing_package_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is not installed: pip install 'fgfast\[train\]'"):
        pretrain("simclr", SimCLRConfig(data="/no/such", out=str(tmp_path / "run")))


@pytest.mark.parametrize(("device", "variable"), [("cpu", "CXX"), ("cuda", "CC")])
def test_compile_without_a_compiler_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, variable: str
) -> None:
    monkeypatch.setattr("fgfast.train.distributed.choose_device", torch.device)
    monkeypatch.setattr("fgfast.train.compiling.require", lambda package: None)
    monkeypatch.setenv(variable, sys.executable)
    check_compiler(torch.device(device))
    monkeypatch.setenv(variable, "/no/compiler")
    with pytest.raises(UserError, match=f"--compile needs a .* compiler, and /no/compiler is not found: .* {variable}"):
        pretrain("simclr", SimCLRConfig(data="/no/such", out=str(tmp_path / "run"), device=device, compile=True))


def test_messages_are_one_line_in_the_log(tmp_path: Path) -> None:
    """Such as one that names a file with a newline and bytes that are not UTF-8."""
    with RunLog(tmp_path, 1) as log:
        log.print("skipped a\nb\udcff")
    assert (tmp_path / "log.txt").read_text() == "skipped a\\nb\\udcff\n"


def test_messages_are_one_line_for_every_handler(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("fgfast").warning("skipped %s", "a\nb\udcff")
    assert caplog.messages == ["skipped a\\nb\\udcff"]


def test_the_name_of_a_run_is_no_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is shown as it is beside the progress bar of a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    (tmp_path / "run[red]").mkdir()
    with RunLog(tmp_path / "run[red]", 1):
        pass
    assert "run[red]" in capsys.readouterr().err
