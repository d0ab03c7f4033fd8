"""Checkpoints: when they are saved, and that nothing is lost by an error, a stop signal or a kill at a boundary."""

import errno
import json
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fgfast.config import Interval
from fgfast.data.views import Batch
from fgfast.errors import UserError
from fgfast.methods.base import Progress
from fgfast.methods.simclr import SimCLR
from fgfast.ranks import Ranks
from fgfast.train.checkpoint import RandomSource
from fgfast.train.loop import pretrain
from fgfast.train.saving import CheckpointWriter
from fgfast.train.trainer import Trainer
from tests.methods.common_checks import metrics
from tests.train.test_loop import config_for


@pytest.fixture(scope="module")
def whole(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing interrupts, with a score after each of its two epochs."""
    return pretrain("simclr", config_for(drawn, tmp_path_factory.mktemp("whole") / "run"))


def same_end(a: Path, b: Path) -> None:
    """Two runs have the same tensors, the counters of BatchNorm included, and the same metrics."""
    first, second = (torch.load(run / "last.pt", weights_only=True) for run in (a, b))
    assert first["step"] == second["step"]
    torch.testing.assert_close(first["method"], second["method"], rtol=0, atol=0)
    torch.testing.assert_close(first["optimizer"]["state"], second["optimizer"]["state"], rtol=0, atol=0)
    assert metrics(a) == metrics(b)


@pytest.mark.parametrize(
    "text", ["0", "-1", "1.5", "10h", "s", "m", "0m", "0.0m", "nan", "infm", "1e3", "10 m", "", "9" * 30]
)
def test_intervals_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"--save-every is .* give 3"):
        Interval.parse(text)


@pytest.mark.parametrize(
    ("text", "steps"), [("1", [3, 6]), ("2", [6]), ("2s", [2, 4, 6]), ("0.000001m", [1, 2, 3, 4, 5, 6]), ("10m", [6])]
)
def test_checkpoints_are_saved_in_time(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, steps: list[int]
) -> None:
    """After epochs, steps or minutes, and at the end."""
    saved: list[int] = []
    real = CheckpointWriter.save

    def recording(self: CheckpointWriter, state: dict[str, Any], *others: Any) -> None:
        saved.append(state["step"])
        real(self, state, *others)

    monkeypatch.setattr(CheckpointWriter, "save", recording)
    pretrain("simclr", config_for(drawn, tmp_path / "run", save_every=text, knn_every=0))
    assert saved == steps


def failing(where: str, step: int, error: Exception) -> type[SimCLR]:
    """SimCLR with an error in step ``step`` (from 1), at the end of a method."""

    class Failing(SimCLR):
        steps = 0

        def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
            terms = super().forward(batch)
            torch.rand(3)
            self.steps += 1
            if where == "forward" and self.steps == step:
                raise error
            return terms

        def after_step(self, progress: Progress) -> None:
            super().after_step(progress)
            if where == "after_step" and progress.step == step:
                raise error

    return Failing


@pytest.mark.parametrize("step", [2, 4, 6])
def test_an_error_in_a_step_loses_no_step(drawn: Path, tmp_path: Path, step: int) -> None:
    """The run is saved as it was before the step, whatever the forward pass has changed, and goes on from there."""
    config = config_for(drawn, tmp_path / "run", save_every="10m")
    whole = pretrain(failing("never", 0, RuntimeError()), replace(config, out=str(tmp_path / "whole")))
    with pytest.raises(RuntimeError, match="no memory"):
        pretrain(failing("forward", step, RuntimeError("no memory")), config)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == step - 1
    same_end(whole, pretrain(failing("never", 0, RuntimeError()), replace(config, resume=True)))


def test_an_error_within_the_update_saves_nothing_half_done(drawn: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half"):
        pretrain(failing("after_step", 5, RuntimeError("half")), config_for(drawn, tmp_path / "run", knn_every=0))
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 3


@pytest.mark.parametrize(
    ("message", "saved"), [("[gloo/transport/tcp/pair.cc:534] Connection closed by peer", []), ("no memory", [3])]
)
def test_a_lost_rank_leaves_the_checkpoint_that_has_its_state(message: str, saved: list[int]) -> None:
    """From it the run goes on exactly; after an error of its own the first rank saves what it knows."""
    steps: list[int] = []
    trainer = SimpleNamespace(
        ranks=Ranks(0, 2), complete=True, saved_step=2, step=3, marked=(None, {"failed": []}),
        guard=SimpleNamespace(restore=lambda: None), writer=SimpleNamespace(wait=lambda: None),
        gradients=SimpleNamespace(sharded=None, state=lambda optimizer: {}), optimizer=None,
        _write=lambda *_: steps.append(trainer.step),
    )  # fmt: skip
    Trainer._save_after(trainer, RuntimeError(message), 0)  # type: ignore[arg-type]
    assert steps == saved


def test_ranks_on_gpus_go_on_from_a_checkpoint_of_cpus() -> None:
    """Whose states a generator of a GPU does not take; here a CPU plays the GPU, and a state is cut."""
    states = []
    for rank in (0, 1):
        random = RandomSource(Ranks(rank, 2), seed=0)
        random.on_cuda = True
        random.restore({"rng": torch.zeros(3, dtype=torch.uint8), "step": 4})
        assert random.shared is not None
        states.append(random.shared.get_state())
    assert torch.equal(*states)


def test_an_error_in_the_first_step_leaves_a_run_that_can_start_again(drawn: Path, tmp_path: Path) -> None:
    """With other options, such as a smaller batch."""
    config = config_for(drawn, tmp_path / "run", knn_every=0)
    with pytest.raises(RuntimeError):
        pretrain(failing("forward", 1, RuntimeError()), config)
    pretrain("simclr", replace(config, batch_size=3))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_in_a_score_stops_and_the_score_is_made_up_for(
    drawn: Path, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals
) -> None:
    from fgfast.evaluate import protocols

    config = config_for(drawn, tmp_path / "run", save_every="10m")
    real: Callable[..., Any] = protocols.online_knn
    calls: list[int] = []

    def signalled(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == step // 3:
            signal.raise_signal(number)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(protocols, "online_knn", signalled)
        with pytest.raises(KeyboardInterrupt):
            pretrain("simclr", config)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == step
    assert [row["step"] for row in metrics(tmp_path / "run") if "knn" in row] == [3] * (step == 6)
    same_end(whole, pretrain("simclr", replace(config, resume=True)))


@pytest.mark.parametrize("world", [1, 2])
def test_a_second_interrupt_in_the_scores_of_ranks_ends_them(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """One process goes on to save and stop; a rank that did so alone would leave the others waiting."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fgfast.evaluate.protocols.online_knn", interrupted)
    monkeypatch.setattr("fgfast.train.trainer.first_buffers", lambda *_: nullcontext())
    trainer = SimpleNamespace(
        step=3, ranks=Ranks(0, world), random=SimpleNamespace(kept=nullcontext), config=None,
        caught=SimpleNamespace(raised=nullcontext), method=SimpleNamespace(encoder=None, group=None),
        _evaluated_weights=nullcontext, gradients=SimpleNamespace(whole_networks=nullcontext),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt) if world > 1 else nullcontext():
        Trainer._evaluate(trainer, None)  # type: ignore[arg-type]


def test_a_stop_without_its_checkpoint_is_an_error(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that is queued again after a stop would lose these steps each time."""

    class Stopped(SimCLR):
        def after_step(self, progress: Progress) -> None:
            super().after_step(progress)
            if progress.step == 2:
                signal.raise_signal(signal.SIGTERM)

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fgfast.train.saving.save_newest", fail)
    with pytest.raises(OSError, match="No space left"):
        pretrain(Stopped, config_for(drawn, tmp_path / "run"))
    assert "--resume continues" not in (tmp_path / "run/log.txt").read_text()


def test_a_score_that_a_kill_lost_is_made_up_for(drawn: Path, tmp_path: Path, whole: Path) -> None:
    """Also when every step is done."""
    run = pretrain("simclr", config_for(drawn, tmp_path / "run"))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "knn" in json.loads(lines[-1])
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    same_end(whole, pretrain("simclr", config_for(drawn, run, resume=True)))
