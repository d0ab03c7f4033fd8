"""Run folders with made-up results."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fgfast.data.panels import Panel, in_rows, overlay
from fgfast.report.pictures import save_png, write_grid

CONFIG = """
method = "particle"
data = "/data/synthetic"
model = "resnet18"
init = "none"
lr = 0.001
n_parts = 15
resume = false
"""

EVALUATION: list[dict[str, Any]] = [
    {"protocol": protocol, "checkpoint": name, "top1": top1, "low": top1 - 0.02, "high": top1 + 0.02, "n": 1000}
    for protocol, name, top1 in [
        ("knn", "init", 0.083), ("knn", "last", 0.271), ("linear", "init", 0.112), ("linear", "last", 0.348),
    ]
]  # fmt: skip


def metrics(steps: int = 600, every: int = 5) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        part = 2.0 * math.exp(-step / 200) + 1.0 + 0.1 * float(rng.normal())
        rows.append(
            {
                "step": step, "epoch": step / 100, "loss": part + 0.4, "part": part, "consistency": 0.4,
                "lr": 0.001 * (1 + math.cos(math.pi * step / steps)) / 2, "grad_norm": 1.0 + float(rng.random()),
                "images_per_s": 1500 + 60 * float(rng.normal()), "passes_per_s": 4000.0,
                "data_wait": 0.02 + 0.01 * float(rng.random()), "memory_mb": 900.0, "ema": 0.99 + 0.01 * step / steps,
            }
        )  # fmt: skip
        if step % 100 == 0:
            rows.append({"step": step, "epoch": step / 100, "knn": 0.08 + 0.19 * (1 - math.exp(-step / 200))})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]], tail: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")


def waves(seed: int = 0, size: int = 64) -> np.ndarray[Any, np.dtype[np.uint8]]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    channels = [np.sin(6 * (x * a + y * b) + c) for a, b, c in rng.normal(size=(3, 3))]
    return (127 + 90 * np.stack(channels, axis=-1)).astype(np.uint8)


def make_run(run: Path) -> Path:
    run.mkdir(parents=True)
    (run / "config.toml").write_text(CONFIG)
    (run / "eval.json").write_text(json.dumps(EVALUATION))
    write_jsonl(run / "metrics.jsonl", metrics())
    y, x = np.mgrid[:64, :64]
    labels = np.where(np.hypot(x - 32, y - 32) < 28, (x // 12 + 5 * (y // 20)) % 15, -1)
    painted = [overlay(waves(i), labels) for i in range(8)]
    panels = [Panel(image, f"bird {i}") for i, image in enumerate(painted)]
    write_grid(in_rows(panels, 4), run / "parts.png", description="Parts found in eight images")
    write_grid(in_rows([*panels, *panels], 8), run / "parts-init.png", description="Parts found in eight images")
    write_grid(in_rows(panels[:4], 4), run / "pictures" / "views.png")
    save_png(waves(9), run / "pictures" / "nearest_neighbours.png")
    return run
