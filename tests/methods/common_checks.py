"""Properties of every method: a resumed run equals an uninterrupted one, and padded images have no effect."""

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fgfast.config import TrainConfig
from fgfast.data.views import Batch
from fgfast.methods.base import Method, Progress, method_class
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain

MEASURED = ("images_per_s", "passes_per_s", "data_wait", "memory_mb")  # metrics that differ between equal runs


def stopping(method: str, after: int) -> type[Method]:
    """The method, which receives SIGINT in its step number ``after`` (from 1)."""

    class Stopping(method_class(method)):  # type: ignore[misc]
        def before_step(self, progress: Progress) -> None:
            super().before_step(progress)
            if progress.step == after - 1:
                signal.raise_signal(signal.SIGINT)

    return Stopping


def poisoned(method: str, step: int) -> type[Method]:
    """The method, which sees NaN in the first image of the batch of step number ``step`` (from 1)."""

    class Poisoned(method_class(method)):  # type: ignore[misc]
        steps = 0

        def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
            self.steps += 1
            if self.steps == step:
                images = batch.views[0] if batch.patch is None else batch.patch
                images[0] = float("nan")
            terms: dict[str, torch.Tensor] = super().forward(batch)
            return terms

    return Poisoned


def recording(method: str) -> tuple[type[Method], list[Method]]:
    """The method, and a list of its instances, which grows with each one."""
    instances: list[Method] = []

    class Recording(method_class(method)):  # type: ignore[misc]
        def __init__(self, config: TrainConfig) -> None:
            super().__init__(config)
            instances.append(self)

    return Recording, instances


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without measured times and memory."""
    rows, _ = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def check_exact_resume(method: str, config: TrainConfig, folder: Path, stop_after: int) -> Path:
    """Metrics, weights and optimiser state of a run interrupted after some steps and resumed equal those of one run.

    Returns the folder of the resumed run.
    """
    uninterrupted = pretrain(method, replace(config, out=str(folder / "uninterrupted")))
    config = replace(config, out=str(folder / "resumed"))
    with pytest.raises(KeyboardInterrupt):
        pretrain(stopping(method, stop_after), config)
    assert torch.load(folder / "resumed/last.pt", weights_only=True)["step"] == stop_after
    resumed = pretrain(method, replace(config, resume=True))
    assert metrics(uninterrupted) == metrics(resumed)
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (uninterrupted, resumed))
    torch.testing.assert_close(a["method"], b["method"], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    return resumed


def check_padding(method: Method, batch: Batch) -> None:
    """The content of a padded slot affects neither loss nor accuracy (BatchNorm in evaluation mode)."""
    batch.valid[3] = False
    results = []
    for fill in (0.0, 2.0):
        batch.views[0][3] = fill
        results.append(method.eval()(batch))
    torch.testing.assert_close(results[0], results[1])
