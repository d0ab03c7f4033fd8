"""A short run ends at the same loss with every backend."""

import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

from fgfast import use_backend
from fgfast.methods.particle import PARTICLEConfig
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests.conftest import TINY

pytestmark = pytest.mark.slow

STEPS, LAST = 100, 30
SEEDS = (0, 1, 2)


def losses_of(data: Path, out: Path, backend: str, device: str, parts: str) -> tuple[list[float], list[float]]:
    """Mean loss of the first and of the last 30 of 100 steps of PARTICLE, for one run per seed."""
    config = PARTICLEConfig(
        data=str(data), model=TINY, model_args="output_stride=8", size=32, batch_size=6, log_every=1, knn_every=0,
        save_every="1000", n_parts=4, max_parts=3, map_size=16, hidden=16, projection=8, parts=parts, discover_size=32,
        device=device, threads=1, amp="off", lr=6e-3,
    )  # fmt: skip
    first, last = [], []
    for seed in SEEDS:
        with use_backend(backend):
            # two views through two encoders, and the full image with online parts
            passes = STEPS * config.batch_size * (5 if parts == "online" else 4)
            run = pretrain("particle", replace(config, out=str(out / f"{backend}{seed}"), seed=seed, passes=passes))
        losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl")[0] if "loss" in row]
        assert len(losses) == STEPS
        first.append(statistics.mean(losses[:LAST]))
        last.append(statistics.mean(losses[-LAST:]))
    return first, last


def compare(data: Path, out: Path, backends: tuple[str, str], device: str, parts: str) -> None:
    """The mean final losses differ by less than 3 standard errors, which is far less than their decrease.

    The difference of the means of n independent runs each, of standard deviation s, has standard deviation
    s sqrt(2 / n).
    """
    (first, expected), (_, last) = (losses_of(data, out, backend, device, parts) for backend in backends)
    most = 3 * statistics.stdev(expected) * math.sqrt(2 / len(SEEDS))
    assert statistics.mean(first) - statistics.mean(expected) > 2 * most
    assert abs(statistics.mean(expected) - statistics.mean(last)) < most


def test_tiled_torch_ends_where_the_reference_does(drawn: Path, tmp_path: Path) -> None:
    compare(drawn, tmp_path, ("reference", "torch"), "cpu", "truth")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
@pytest.mark.parametrize("parts", ["truth", "online"])
def test_kernels_end_where_the_reference_does(drawn: Path, tmp_path: Path, parts: str) -> None:
    compare(drawn, tmp_path, ("reference", "triton"), "cuda", parts)
