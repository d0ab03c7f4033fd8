"""Runs on several ranks go on exactly where they stopped, and on another number of ranks with the same images."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ranks
from tests.conftest import TINY
from tests.methods.common_checks import metrics

pytestmark = pytest.mark.slow

NO_NORM = {"model": "test_convnext", "model_args": ""}
SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "online parts": ("particle", {"parts": "online", "model_args": "output_stride=8", "map_size": 16, "n_parts": 4}),
    "dropout": ("jigsaw", {"size": 64}),
    "sync_bn": ("simclr", {"sync_bn": True, "hidden": 16, "projection": 8}),
    "sgd": ("supervised", {"optimizer": "sgd"}),
    "three ranks": ("mocov3", {"batch_size": 2, "hidden": 32, "projection": 8}),  # whose sums depend on their order
}


def _config(name: str, data: str, out: str, values: dict[str, Any]) -> Any:
    from fgfast.methods.base import method_class

    options: dict[str, Any] = {
        "data": data, "out": out, "model": TINY, "size": 32, "batch_size": 3, "epochs": 2, "log_every": 1,
        "knn_every": 1, "device": "cpu", "threads": 1, "amp": "off", "save_every": "2s",
    }  # fmt: skip
    return method_class(name).Config(**options | values)


def _stop_and_go(rank: int, port: int, world: int, data: str, folder: str, name: str, values: dict[str, Any]) -> None:
    """An uninterrupted run, and one that a signal to the last rank stops in its third step and that is resumed."""
    ranks.join(rank, world, port)
    from fgfast.methods.base import Progress, method_class
    from fgfast.train.loop import pretrain

    kind = method_class(name)

    class Stopped(kind):  # type: ignore[misc,valid-type]
        def after_step(self, progress: Progress) -> None:
            super().after_step(progress)
            if rank == world - 1 and progress.step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    pretrain(kind, _config(name, data, f"{folder}/whole", values))
    config = _config(name, data, f"{folder}/stopped", values)
    with pytest.raises(KeyboardInterrupt):
        pretrain(Stopped, config)
    pretrain(kind, replace(config, resume=True))


@pytest.mark.parametrize("case", SETS)
def test_a_run_on_ranks_goes_on_exactly(drawn: Path, tmp_path: Path, case: str) -> None:
    """Each rank has its own dropout and BatchNorm statistics, and gets them back."""
    (name, values), world = SETS[case], 3 if case == "three ranks" else 2
    ranks.start(_stop_and_go, ranks.free_port(), world, str(drawn), str(tmp_path), name, values, ranks=world)
    a, b = (torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("whole", "stopped"))
    assert a["step"] == b["step"] == 6
    assert len(a["ranks"]) == world
    for key in ("method", "ranks", "rng"):
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")
    assert "stopped at step" in (tmp_path / "stopped/log.txt").read_text()


def _resume(rank: int, port: int, world: int, data: str, out: str, name: str, values: dict[str, Any]) -> None:
    ranks.join(rank, world, port)
    from fgfast.train.loop import pretrain

    pretrain(name, replace(_config(name, data, out, values), resume=True))


@pytest.mark.parametrize("world", [1, 3])
def test_a_run_goes_on_with_another_number_of_ranks(drawn: Path, tmp_path: Path, world: int) -> None:
    """As long as a step has as many images: the losses are those of the run that nothing stopped."""
    values = {**NO_NORM, "parts": "discovered", "map_size": 16, "n_parts": 4, "max_parts": 2, "knn_every": 0}
    ranks.start(_stop_and_go, ranks.free_port(), 2, str(drawn), str(tmp_path), "particle", values, ranks=2)
    out = tmp_path / "stopped"
    stopped = [row["loss"] for row in metrics(out)]
    ranks.start(
        _resume, ranks.free_port(), world, str(drawn), str(out), "particle",
        {**values, "batch_size": 6 // world, "epochs": 4}, ranks=world,
    )  # fmt: skip
    ranks.start(
        _resume, ranks.free_port(), 2, str(drawn), str(tmp_path / "whole"), "particle", {**values, "epochs": 4}, ranks=2
    )
    assert len(stopped) == 6
    losses = [[row["loss"] for row in metrics(tmp_path / run)] for run in ("whole", "stopped")]
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
