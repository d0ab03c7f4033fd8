"""Long runs in one process, with many saves and scores: memory, open files and threads must not grow."""

import json
import multiprocessing
import os
import threading
from pathlib import Path
from typing import Any

import torch

from benchmarks.endurance.processes import Case, config_of
from benchmarks.endurance.report import Part, markdown

CASES = (Case("particle", (("parts", "online"),)), Case("simclr"))
WINDOW = 100  # steps, with several saves and a score
GROWTH = 0.01  # of memory, from step 500 to 2,000
EARLY_GROWTH = 0.05  # in a shorter run
EPOCH = 3  # steps


def measure(folder: Path, *, steps: int) -> Part:
    """Train each case for some steps and compare the values after a quarter of them with those at the end."""
    from fgfast.data.synthetic import generate

    data = generate(folder / "set", classes=3, images=36, size=48, seed=0, workers=1)
    rows, faults = [], []
    for i, case in enumerate(CASES):
        out = folder / f"case{i}"
        out.mkdir()
        # A process of its own: a forked one maps the pages of the server little by little, which looks like growth
        process = multiprocessing.get_context("spawn").Process(
            target=_train, args=(case, data, out, steps), daemon=True
        )
        process.start()
        process.join()
        if process.exitcode:
            faults.append(f"{case}: exit status {process.exitcode}: {(out / 'log').read_text()[-600:]}")
            continue
        early, late = (_summary(part) for part in json.loads((out / "seen").read_text()))
        growth = late["memory"] / early["memory"] - 1
        files, threads = ((early[k], late[k]) for k in ("files", "threads"))
        memory = (f"{part['memory'] / 2**20:.1f}" for part in (early, late))
        counts = (f"{before} -> {after}" for before, after in (files, threads))
        rows.append([f"`{case}`", f"{steps:,}", *memory, f"{growth:+.2%}", *counts])
        print("; ".join(rows[-1]), flush=True)
        if growth > (GROWTH if steps >= 2000 else EARLY_GROWTH) or files[0] != files[1] or threads[0] != threads[1]:
            faults.append(f"{case}: memory {growth:+.2%}, open files {files}, threads {threads}")
    text = (
        "One process, a save every 10 steps and a score every 60. Of 100 steps: the largest memory, and the fewest "
        "files and threads, as a save has some of its own for a moment.\n\n"
    )
    head = ["run", "steps", f"MiB at {steps // 4:,}", f"at {steps:,}", "growth", "open files", "threads"]
    return Part("soak", text + markdown(head, rows), faults)


def _train(case: Case, data: Path, out: Path, steps: int) -> None:
    log = os.open(out / "log", os.O_WRONLY | os.O_CREAT)
    for standard in (1, 2):
        os.dup2(log, standard)
    torch.set_num_threads(1)
    from fgfast.methods.base import Progress, method_class
    from fgfast.train.loop import pretrain

    seen: tuple[list[dict[str, int]], ...] = ([], [])

    class Watched(method_class(case.method)):  # type: ignore[misc]
        def after_step(self, progress: Progress) -> None:
            super().after_step(progress)
            for part, end in zip(seen, (steps // 4, steps), strict=True):
                if end - WINDOW < progress.step <= end:
                    part.append(state())

    saving: dict[str, Any] = {"save_every": "10s"}
    pretrain(Watched, config_of(case, data, out / "run", epochs=-(-steps // EPOCH), knn_every=20, **saving))
    (out / "seen").write_text(json.dumps(seen))


def _summary(seen: list[dict[str, int]]) -> dict[str, int]:
    return {name: (max if name == "memory" else min)(step[name] for step in seen) for name in seen[0]}


def state() -> dict[str, int]:
    """Resident bytes, open files and threads of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"memory": resident, "files": len(os.listdir("/proc/self/fd")), "threads": threading.active_count()}
