"""Memory and time of gradient caching against a plain step: ``python -m benchmarks.micro_batch [--record]``.

A small convolutional encoder sees images of 16 x 16 pixels in two views, on a CPU. Peak memory is that of a fresh
process above its level after the inputs, less the representations and their gradients; with chunks it should not depend
on the batch. Times are medians of steps taken in turns. A step whose gradients differ from the plain one's by more than
1e-5 of their norm is not measured. ``--record`` writes results/micro-batch.csv.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks import record
from benchmarks.peak import ROOT, of_cpu
from fgfast import NTXentLoss, PartContrastiveLoss, cached_contrast

SIDE, WIDTH, D, PARTS, CHUNK = 16, 32, 32, 4, 256
LOSSES = {"NT-Xent": (256, 512, 1024, 4096, 16_384), "parts": (256, 512, 1024, 4096)}
PLAIN_UP_TO = 512
ROUNDS = 5
TOLERANCE = 1e-5
MIB = 2**20


class Encoder(nn.Module):
    """Maps two views [b, 2, 3, S, S] to vectors [b, 2, D], or with id maps [b, 2, S, S] to pooled parts and areas."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 3, 1, 1, bias=False)]
        for _ in range(2):
            layers += [nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 3, 1, 1, groups=WIDTH, bias=False)]
            layers += [nn.GELU(), nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.GroupNorm(1, WIDTH)]
        self.layers = nn.Sequential(*layers, nn.AvgPool2d(2), nn.Conv2d(WIDTH, D, 1, bias=False))
        self.pool = PartContrastiveLoss(PARTS, nn.Identity()).pool

    def forward(self, views: Tensor, ids: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Vectors, or parts."""
        maps = self.layers(views.flatten(0, 1)).unflatten(0, (-1, 2))
        return maps.mean((3, 4)) if ids is None else self.pool(*maps.unbind(1), *ids.unbind(1))


class Problem:
    """A batch, an encoder and a loss."""

    def __init__(self, loss: str, batch: int) -> None:
        g = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        colours = torch.randn(batch, 1, 3, 1, 1, generator=g)  # by which images differ: noise alone gives equal vectors
        views = colours + torch.randn(batch, 2, 3, SIDE, SIDE, generator=g)
        ids = torch.randint(0, PARTS, (batch, 2, SIDE, SIDE), generator=g)
        self.batch = (views, ids) if loss == "parts" else (views,)
        self.encoder, vectors, parts = Encoder(), NTXentLoss(), PartContrastiveLoss(PARTS, nn.Identity())
        self.loss: Callable[..., Tensor] = lambda r: parts.contrast(*r) if loss == "parts" else vectors(*r.unbind(1))
        rows = 2 * batch * (PARTS if loss == "parts" else 1)
        self.held = 2 * rows * D * 4  # bytes of representations and their gradients

    def step(self, variant: str) -> Tensor:
        """All gradients, in chunks or by a plain step."""
        self.encoder.zero_grad(set_to_none=True)
        if variant == "chunks":
            cached_contrast(self.encoder, self.batch, self.loss, CHUNK)
        else:
            self.loss(self.encoder(*self.batch)).backward()
        return torch.cat([p.grad.flatten() for p in self.encoder.parameters() if p.grad is not None])


def peak(loss: str, batch: int, variant: str) -> int:
    """Bytes of a step beyond inputs, representations and their gradients, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.micro_batch", loss, str(batch), variant]
    fixed = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}  # else glibc keeps freed activations, and the peak is an accident
    done = subprocess.run(command, cwd=ROOT, env=os.environ | fixed, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def times(loss: str, batch: int) -> dict[str, float]:
    """Median seconds of a step of each variant, in turns, after a check of the gradients."""
    problem = Problem(loss, batch)
    plain, chunks = problem.step("plain"), problem.step("chunks")
    if not (chunks - plain).norm() <= TOLERANCE * plain.norm():
        raise RuntimeError(
            f"{loss} at {batch}: the gradients in chunks are off by {(chunks - plain).norm() / plain.norm()}."
        )
    seconds: dict[str, list[float]] = {"plain": [], "chunks": []}
    for _ in range(ROUNDS):
        for variant, taken in seconds.items():
            start = time.perf_counter()
            problem.step(variant)
            taken.append(time.perf_counter() - start)
    return {variant: median(taken) for variant, taken in seconds.items()}


def main() -> None:
    """Print the table, or the bytes of one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("one", nargs="*", help="loss, batch and variant of one step whose peak is printed")
    parser.add_argument("--record", action="store_true", help="write results/micro-batch.csv")
    chosen = parser.parse_args()
    torch.set_num_threads(2)
    if chosen.one:
        loss, batch, variant = chosen.one
        Problem(loss, CHUNK).step(variant)  # what libraries allocate once
        problem = Problem(loss, int(batch))
        print(of_cpu(lambda: problem.step(variant)) - problem.held)
        return
    rows: list[record.Row] = []
    for loss, batches in LOSSES.items():
        for batch in batches:
            fits = batch <= PLAIN_UP_TO
            seconds = times(loss, batch) if fits else {}
            for variant in ("chunks", "plain") if fits else ("chunks",):
                row = {"loss": loss, "batch": batch, "chunk": CHUNK, "variant": variant}
                row |= {"peak_mib": round(peak(loss, batch, variant) / MIB, 1)}
                row |= {"ms": round(1e3 * seconds[variant], 1) if fits else ""}
                row |= {"of_plain": round(seconds[variant] / seconds["plain"], 2) if fits else ""}
                rows.append(row)
                print(row, flush=True)
    if chosen.record:
        here = record.setting(torch.device("cpu"))
        record.overwrite([here | row for row in rows], ROOT / "benchmarks/results/micro-batch.csv")


if __name__ == "__main__":
    main()
