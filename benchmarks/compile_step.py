"""What torch.compile makes of a training step: ``python -m benchmarks.compile_step [--device cuda] [--record]``.

Forward and backward of one batch of random images by each method: as it is, with the encoder compiled (what
``--compile`` does), and with the whole forward pass of the method compiled, loss included. Steps are taken in turns,
times are medians, and the seconds of the first step are those of compiling. ``--record`` writes
results/compile-step.csv.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.peak import ROOT
from benchmarks.plan import config_of, fill
from fgfast.methods.base import method_class
from fgfast.ranks import Ranks
from fgfast.train.compiling import compile_backbones
from fgfast.train.plan import make_batch

NET: dict[str, Any] = {"model": "resnet18", "size": 64, "batch_size": 32}
CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("simclr", NET),
    ("simclr", NET | {"model": "vit_tiny_patch16_224"}),
    ("particle", NET | {"parts": "grid"}),
    ("mocov3", NET | {"model": "vit_tiny_patch16_224"}),
    ("byol", NET),
)
VARIANTS = ("as it is", "encoder", "whole step")
ROUNDS = 15


class Steps:
    """Forward and backward of a method on one batch."""

    def __init__(self, name: str, options: dict[str, Any], variant: str, device: torch.device) -> None:
        torch.manual_seed(0)
        method = method_class(name)(config_of(name, options)).to(memory_format=torch.channels_last)
        self.method = method.to(device).train()
        self.batch = make_batch(self.method.views(), options["batch_size"])
        fill(self.batch, Ranks())
        self.batch = self.batch.to(device)
        self.forward: Callable[..., dict[str, Tensor]] = self.method
        if variant == "encoder":
            compile_backbones(self.method)
        elif variant == "whole step":
            self.forward = torch.compile(self.method)
        self.device = device

    def __call__(self) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        self.forward(self.batch)["loss"].backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        taken = time.perf_counter() - start
        self.method.zero_grad(set_to_none=True)
        return taken


def measure(name: str, options: dict[str, Any], device: torch.device) -> list[record.Row]:
    """A row for each variant."""
    steps = {variant: Steps(name, options, variant, device) for variant in VARIANTS}
    first = {variant: step() for variant, step in steps.items()}
    taken: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(ROUNDS):
        for variant, step in steps.items():
            taken[variant].append(step())
    plain = median(taken["as it is"])
    return [
        {
            "method": name, "model": options["model"], "variant": variant,
            "ms": round(1e3 * median(taken[variant]), 1), "of_plain": round(median(taken[variant]) / plain, 3),
            "first_s": round(first[variant], 1),
        }
        for variant in VARIANTS
    ]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--record", action="store_true", help="write results/compile-step.csv")
    chosen = parser.parse_args()
    device = torch.device(chosen.device)
    torch.set_num_threads(1)
    rows = []
    for case in CASES:
        torch._dynamo.reset()
        for row in measure(*case, device):
            rows.append(row)
            print(row, flush=True)
    if chosen.record:
        here = record.setting(device)
        record.overwrite([here | row for row in rows], ROOT / "benchmarks/results/compile-step.csv")


if __name__ == "__main__":
    main()
