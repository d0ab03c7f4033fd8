"""What every method promises: a stopped run goes on as if nothing had been, and padded images change nothing."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fgfast.config import TrainConfig
from fgfast.data.views import Batch
from fgfast.methods.base import Method
from fgfast.train import loop
from fgfast.train.log import read_metrics


def check_exact_resume(method: str, config: TrainConfig, folder: Path, stop_after: int) -> None:
    """Losses and weights of a run that is interrupted after some steps and resumed are those of one that was not."""
    real = loop.learning_rate

    def stopping(step: int, total: int, config: TrainConfig) -> float:
        if step == stop_after - 1:
            signal.raise_signal(signal.SIGINT)
        return real(step, total, config)

    whole = loop.pretrain(method, replace(config, out=str(folder / "whole")))
    halves = replace(config, out=str(folder / "halves"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "learning_rate", stopping)
        with pytest.raises(KeyboardInterrupt):
            loop.pretrain(method, halves)
    loop.pretrain(method, replace(halves, resume=True))
    rows = [[r["loss"] for r in read_metrics(Path(c) / "metrics.jsonl")[0] if "loss" in r] for c in (whole, halves.out)]
    assert rows[0] == rows[1]
    a, b = (torch.load(Path(c) / "last.pt", weights_only=True)["method"] for c in (whole, halves.out))
    assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


def check_padding(method: Method, batch: Batch) -> None:
    """What stands in a padded slot reaches neither loss nor accuracy (BatchNorm in evaluation mode)."""
    batch.valid[3] = False
    found = []
    for fill in (0.0, 2.0):
        batch.views[0][3] = fill
        found.append(method.eval()(batch))
    torch.testing.assert_close(found[0], found[1])
