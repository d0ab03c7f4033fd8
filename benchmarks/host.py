"""Time on the host per call, by stage: ``python -m benchmarks.host [--record] [--arch sm_90] [--rounds 200]``.

A GPU waits for the host where calls are small. The driver of tests.kernels.launches accepts every kernel and runs none,
so what remains of a call by the Triton kernels is the host's work. Its stages:

- checks: all outside the operation: arguments, choice of the backend, and in backward PyTorch's engine
- dispatch: the operation's choice between the dispatcher and a plain call, and its graph node
- arguments: sizes, grids, outputs and scratch memory of the launches
- triton: Triton's own binding of arguments, per launch

``--record`` writes results/host.csv. Microseconds are those of the fastest of many calls; the five-line formula runs in
turn with the calls, on the CPU at the size of the contrast. Ratios to it travel between machines, microseconds do not.
"""

import argparse
import gc
import importlib
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fgfast
from benchmarks import record
from benchmarks.cases.common import sizes
from fgfast import Ids
from fgfast.ops.registration import Operation

FORWARD, BACKWARD, FORMULA = "forward", "backward", "formula"
STAGES = ("checks", "dispatch", "arguments", "triton")
WARM_UP = 10  # rounds
GOAL_US = 200.0  # of a call and direction; the contrast is measured against the formula
M, T, D = 48, 96, 128


class Stopwatch:
    """Seconds spent in wrapped functions, and how often they were called, since the last ``reset``."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def reset(self) -> None:
        """Start again at zero."""
        self.spent, self.calls = dict.fromkeys(self.spent, 0.0), dict.fromkeys(self.calls, 0)

    def wrap(self, stage: str, run: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed; a call inside another of the same stage counts once."""
        self.spent[stage], self.calls[stage] = 0.0, 0
        depth = 0

        def timed(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            start = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                depth -= 1
                if not depth:
                    self.spent[stage] += time.perf_counter() - start
                    self.calls[stage] += 1

        return timed


def formula(query: Tensor, key: Tensor, positive: Tensor) -> Tensor:
    """The contrast in five lines of PyTorch."""
    query, key = torch.nn.functional.normalize(query), torch.nn.functional.normalize(key)
    logits = query @ key.T / 0.1
    return (logits.logsumexp(1) - (logits * positive).sum(1) / positive.sum(1)).mean()


def calls() -> dict[str, tuple[str, Callable[[], Any]]]:
    """Shape and forward pass of every call by name; a tensor that it returns is differentiated."""
    torch.manual_seed(0)
    query, key = torch.randn(M, D, requires_grad=True), torch.randn(T, D, requires_grad=True)
    row, column = torch.arange(M), torch.arange(T)
    one, two = Ids(row, row * 0, row * 0), Ids(column % M, column * 0, column * 0 + 1)
    views = Ids(row // 2, row * 0, row % 2)
    positive = (one.image[:, None] == two.image).float()
    x, labels = torch.randn(2, 64, 7, 7, requires_grad=True), torch.randint(0, 4, (2, 7, 7))
    large = labels.repeat_interleave(2, 1)
    maps, first = torch.randn(2, 32, 7, 7), torch.randn(2, 4, 32)
    centroids, low = torch.randn(2, 4, 64), torch.rand(D) < 0.5
    of_contrast, of_maps = sizes(M=M, T=T, D=D), sizes(B=2, D=64, h=7, w=7, K=4)

    return {
        FORMULA: (of_contrast, lambda: formula(query, key, positive)),
        "contrast": (of_contrast, lambda: fgfast.contrastive_loss(query, key, query_ids=one, key_ids=two)),
        "contrast of itself": (
            sizes(M=M, D=D), lambda: fgfast.contrastive_loss(query, query, query_ids=views, key_ids=views)
        ),
        "part_pool": (of_maps, lambda: fgfast.part_pool(x, labels, 4).pooled),
        "part_pool of id maps": (of_maps, lambda: fgfast.part_pool(x, large, 4).pooled),
        "labels_to_grid": (of_maps, lambda: fgfast.labels_to_grid(labels, (3, 3), 4)),
        "assign_and_pool": (of_maps, lambda: fgfast.assign_and_pool(x, centroids)[0]),
        "kmeans_step": (of_maps, lambda: fgfast.kmeans_step(x, centroids)),
        "kmeans, 1 iteration": (
            sizes(B=2, D=32, h=7, w=7, K=4), lambda: fgfast.kmeans(maps, 4, n_iter=1, init=first)
        ),
        "perturb": (of_contrast, lambda: fgfast.perturb(query, low_variance=low, strategy="zero")),
    }  # fmt: skip


def pretend(arch: str) -> Stopwatch:
    """Launch without a GPU from now on; returns the watch of the stages."""
    launches = importlib.import_module("tests.kernels.launches")
    launch = importlib.import_module("fgfast.kernels.launches").launch
    for name in ("assign_and_pool", "contrast.launch", "kmeans.launch", "kmeans.step", "part_pool.launch", "perturb"):
        importlib.import_module(f"fgfast.kernels.{name}")
    owners: list[tuple[Any, str]] = [(torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")]
    allocate = [(owner, name, getattr(owner, name)) for owner, name in owners]
    launches.pretend(arch)
    for owner, name, function in allocate:
        setattr(owner, name, function)  # launches fills with zeros, which takes time
    watch = Stopwatch()
    timed = watch.wrap("triton", launch)
    for name, module in list(sys.modules.items()):
        for function in ("values_checked", "readable") if name.startswith("fgfast.") else ():
            if hasattr(module, function):
                setattr(module, function, lambda _: False)  # as on a GPU
        if getattr(module, "launch", None) is launch:
            vars(module)["launch"] = timed
    mock.patch.object(Operation, "__call__", watch.wrap("operation", Operation.__call__)).start()
    modules = [module for name, module in sys.modules.items() if name.startswith("fgfast.ops")]
    for operation in {value for module in modules for value in vars(module).values() if isinstance(value, Operation)}:
        operation.run = watch.wrap("run", operation.run)
    return watch


def stages(watch: Stopwatch, run: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What ``run`` returns, and its microseconds by stage."""
    watch.reset()
    start = time.perf_counter()
    result = run()
    total = time.perf_counter() - start
    ends = total, watch.spent["operation"], watch.spent["run"], watch.spent["triton"], 0.0
    parts = dict(zip(STAGES, (a - b for a, b in itertools.pairwise(ends)), strict=True))
    return result, {name: 1e6 * seconds for name, seconds in {"total": total, **parts}.items()}


def measure(watch: Stopwatch, rounds: int) -> list[record.Row]:
    """A row per call and direction, the calls in turns."""
    planned = calls()
    times: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    launches: dict[tuple[str, str], int] = {}
    gc.disable()
    for number in range(rounds + WARM_UP):
        for name, (_, run) in planned.items():
            out, spent = stages(watch, run)
            measured = [(FORWARD, spent, watch.calls["triton"])]
            if isinstance(out, Tensor) and out.requires_grad:
                loss = out.sum()
                _, spent = stages(watch, loss.backward)
                measured.append((BACKWARD, spent, watch.calls["triton"]))
            for direction, spent, launched in measured:
                if number >= WARM_UP:  # what comes before compiles
                    times[name, direction].append(spent)
                launches[name, direction] = launched
        gc.collect(0)
    gc.enable()
    fastest = {key: min(each, key=lambda one: one["total"]) for key, each in times.items()}
    both = fastest[FORMULA, FORWARD]["total"] + fastest[FORMULA, BACKWARD]["total"]
    return [
        {
            "call": name, "shape": planned[name][0], "direction": direction, "launches": launches[name, direction],
            **{f"{stage}_us": round(us, 1) for stage, us in spent.items() if name != FORMULA or stage == "total"},
            "of_formula": round(spent["total"] / both, 2),
        }
        for (name, direction), spent in fastest.items()
    ]  # fmt: skip


def missed(rows: Sequence[record.Row]) -> list[str]:
    """The goals that are missed, a sentence each."""
    found = []
    of_contrast = sum(row["of_formula"] for row in rows if row["call"] == "contrast")
    if of_contrast > 1:
        found.append(f"contrast, both directions: {of_contrast:.2f} times the formula; the goal is 1.")
    for row in rows:
        if not row["call"].startswith(("contrast", FORMULA)) and row["total_us"] > GOAL_US:
            found.append(f"{row['call']}, {row['direction']}: {row['total_us']:.0f} us; the goal is {GOAL_US:.0f}.")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description="Measure the host's time per call.")
    parser.add_argument("--record", action="store_true", help="write results/host.csv")
    parser.add_argument("--arch", default="sm_90", help="architecture whose configurations are taken")
    parser.add_argument("--rounds", type=int, default=200, help="calls of each kind")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    watch = pretend(chosen.arch)
    with fgfast.use_backend("triton"):
        rows = measure(watch, chosen.rounds)
    columns = ("launches", "total_us", *(f"{stage}_us" for stage in STAGES), "of_formula")
    print(f"{'':<31}" + "".join(f"{name:>14}" for name in columns))
    for row in rows:
        print(f"{row['call']:<22}{row['direction']:<9}" + "".join(f"{row.get(name, ''):>14}" for name in columns))
    print(*missed(rows), sep="\n")
    if chosen.record:
        setting = record.setting(torch.device("cpu"))
        blank = dict.fromkeys(rows[-1], "")
        made = [{**setting, "arch": chosen.arch, **blank, **row} for row in rows]
        record.overwrite(made, record.RESULTS / "host.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
