"""The log of a run: always JSON and UTF-8, and the same rows whatever kills and cuts interrupt it."""

import errno
import json
import random
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fgfast.errors import UserError
from fgfast.train import log as log_module
from fgfast.train.log import RunLog, has_scores, read_metrics
from tests.examples import examples

TOTAL, LOGGED, SAVED = 12, 2, 4  # steps; steps between rows; steps between checkpoints and scores
OPEN_BOARD = RunLog._open_board
ROW = {"step": 2, "loss": 1.0, "images_per_s": 1.0, "data_wait": 0.0, "memory_mb": 1.0}


class Killed(BaseException):
    """The end of the process."""


@pytest.fixture(autouse=True)
def no_curves() -> Any:
    with mock.patch.object(RunLog, "_open_board", return_value=None):
        yield


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, all of which must be JSON."""
    content = path.read_bytes()
    assert content.endswith(b"\n")
    return [json.loads(line, parse_constant=pytest.fail) for line in content.splitlines()]


def open_log(run: Path, saved: int, rng: random.Random) -> RunLog:
    """The log of a resumed run, which may be killed before or after it has replaced metrics.jsonl."""
    replace, fate = log_module.write_atomic, rng.choice(["go on", "go on", "before", "after"])

    def killed(path: Path, *args: Any, **options: Any) -> None:
        if fate == "before":
            path.with_name(f".{path.name}.1.2.partial").write_bytes(b'{"step": 1')
            raise Killed
        replace(path, *args, **options)
        if fate == "after":
            raise Killed

    with mock.patch.object(log_module, "write_atomic", killed):
        return RunLog(run, TOTAL, saved)


def train(run: Path, saved: list[int], size: list[int], rng: random.Random) -> None:
    """Train from the last checkpoint until a kill or the end, with a checkpoint and then scores every SAVED steps."""
    run_log, may_die = open_log(run, saved[-1], rng), saved[-1] < TOTAL

    def die() -> None:
        if may_die and rng.random() < 0.1:
            raise Killed

    def score(step: int) -> None:
        if not has_scores(run / "metrics.jsonl", step):
            run_log.write({"step": step, "epoch": step / SAVED, "knn": 0.25})

    with run_log:
        if saved[-1]:
            score(saved[-1])
        for step in range(saved[-1] + 1, TOTAL + 1):
            run_log.record(f"step {step}: \u00e9 \u9ce5")
            die()
            if step % LOGGED == 0:
                run_log.write(ROW | {"step": step, "loss": 1 / step})
                die()
            if step % SAVED == 0:
                run_log.sync()
                size.append((run / "metrics.jsonl").stat().st_size)
                saved.append(step)
                die()
                score(step)
                die()


def cut(file: Path, least: int, rng: random.Random) -> None:
    """Keep at least the first bytes of a file and any number of the others."""
    if file.exists():
        content = file.read_bytes()
        file.write_bytes(content[: rng.randint(min(least, len(content)), len(content))])


@given(st.integers(0, 2**32))
@examples(15)
def test_rows_are_those_of_a_run_that_nothing_interrupted(seed: int) -> None:
    """Kills at any moment, also while the log is opened again, and cuts of all that came after the last checkpoint."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        run, saved, size = Path(folder), [0], [0]
        while True:
            try:
                train(run, saved, size, rng)
                break
            except Killed:
                cut(run / "metrics.jsonl", size[-1], rng)
                cut(run / "log.txt", 0, rng)
        wanted = [step for step in range(1, TOTAL + 1) if step % LOGGED == 0]
        rows = rows_of(run / "metrics.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == wanted
        assert [row["step"] for row in rows if "knn" in row] == wanted[SAVED // LOGGED - 1 :: SAVED // LOGGED]
        assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
        assert read_metrics(run / "metrics.jsonl") == (rows, [])
        (run / "log.txt").read_text(encoding="utf-8")


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    with RunLog(tmp_path, TOTAL) as run_log:
        run_log.write(ROW | {"loss": float("nan"), "grad_norm": float("inf")})
        run_log.write(
            {"step": 4, "knn": float("nan"), "psnr": None, "psnr_bicubic": 1.0, "ssim": None, "ssim_bicubic": 1.0}
        )
    assert rows_of(tmp_path / "metrics.jsonl")[0] == ROW | {"loss": None, "grad_norm": None}
    assert "step 2: loss = nan, grad_norm = inf is written as null" in (tmp_path / "log.txt").read_text()


def test_files_of_earlier_versions_are_read_with_null(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN, "grad_norm": -Infinity, "lr": 1e999}\n')
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == [{"step": 1, "loss": None, "grad_norm": None, "lr": None}]


@pytest.mark.parametrize(
    "line",
    ['{"step": true}', '{"step": NaN}', '{"step": -1}', '{"step": 1e999}', '{"step": 1, "a": [1]}', "[" * 100_000,
     '{"step": ' + "9" * 5000 + "}", '{"step": "1"}'],
)  # fmt: skip
def test_a_line_that_no_run_writes_is_reported(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == ([{"step": 1}], [2])


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with RunLog(tmp_path, TOTAL) as run_log:
        run_log.write(ROW)
        assert rows_of(tmp_path / "metrics.jsonl") == [ROW]


def test_a_row_that_does_not_fit_on_the_disk_is_an_error(tmp_path: Path) -> None:
    with RunLog(tmp_path, TOTAL) as run_log:
        file, run_log.file = run_log.file, mock.Mock(write=lambda line: len(line) // 2)
        run_log.file.name = "metrics.jsonl"
        with pytest.raises(OSError, match="metrics") as caught:
            run_log.write(ROW)
        assert caught.value.errno == errno.ENOSPC
        run_log.file = file


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} cannot be read \(it is a folder\): restore or remove it"):
        RunLog(tmp_path, TOTAL)


def test_scores_are_known_by_their_step(tmp_path: Path) -> None:
    with RunLog(tmp_path, TOTAL) as run_log:
        run_log.write(ROW)
        run_log.write({"step": 4, "knn": 0.5})
        assert [has_scores(tmp_path / "metrics.jsonl", step) for step in (2, 4)] == [False, True]
    assert not has_scores(tmp_path / "none.jsonl", 4)


def test_the_curves_keep_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    """TensorBoard drops what is at the step that it is given, too."""
    with mock.patch("torch.utils.tensorboard.SummaryWriter") as writer, mock.patch("importlib.util.find_spec"):
        OPEN_BOARD(mock.Mock(), tmp_path, 8)
    assert writer.call_args.kwargs["purge_step"] == 9
