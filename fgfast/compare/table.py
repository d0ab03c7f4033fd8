"""The results of a comparison as Markdown: means over seeds with 95% intervals over seeds and test images."""

from collections.abc import Callable

import numpy as np

from fgfast.compare.entries import Entry
from fgfast.evaluate.bootstrap import accuracy_interval, paired_interval

MEANS = ("passes", "seconds", "images_per_s", "data_wait", "nmi", "ari")  # columns whose means the table shows

Correct = Callable[[Entry, str], dict[int, np.ndarray]]  # an entry and a protocol to bool [N] of each finished seed


def format_table(
    data: str, entries: list[Entry], baseline: str, protocols: list[str], rows: list[dict[str, str]], correct: Correct
) -> list[str]:
    """The lines of the table of one data set.

    Args:
        data: name of the data set.
        entries: methods in the order of their lines; one without a finished run is left out.
        baseline: label of the method that the others are compared with.
        protocols: labels of the protocols, one column each and another one for the gain (not for kNN).
        rows: rows of compare.csv.
        correct: which test images are classified correctly, for each finished seed.
    """
    scores = [name for label in protocols for name in ([label, "gain on baseline"] if label != "knn" else ["kNN"])]
    names = ["method", "seeds", *scores, "NMI / ARI", "passes", "minutes", "img/s", "wait"]
    lines = [f"**{data}**", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    base = next((e for e in entries if e.label == baseline), None)
    for entry in entries:
        of_entry = [r for r in rows if r["data"] == data and r["method"] == entry.label]
        if of_entry:
            lines.append(_line(entry, base, protocols, of_entry, correct))
    return [*lines, ""]


def _line(entry: Entry, base: Entry | None, protocols: list[str], rows: list[dict[str, str]], correct: Correct) -> str:
    scores = []
    for label in protocols:
        of_entry = correct(entry, label)
        scores.append(_percent(np.stack([*of_entry.values()])))
        if label != "knn":
            scores.append("-" if base in (None, entry) else _gain(of_entry, correct(base, label)))
    means = {k: np.mean([float(r[k]) for r in rows if r.get(k)] or float("nan")) for k in MEANS}
    parts = "-" if np.isnan(means["nmi"]) else f"{means['nmi']:.3f} / {means['ari']:.3f}"
    cells = [
        f"`{entry.label}`", str(len(rows)), *scores, parts,
        f"{means['passes'] / 1e6:.2f} M" if entry.trained else "0",
        f"{means['seconds'] / 60:.1f}" if entry.trained else "0",
        f"{means['images_per_s']:.0f}" if entry.trained else "-",
        f"{means['data_wait']:.1%}" if entry.trained else "-",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _percent(correct: np.ndarray) -> str:
    low, high = accuracy_interval(correct)
    return f"{100 * correct.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _gain(correct: dict[int, np.ndarray], base: dict[int, np.ndarray]) -> str:
    """The paired difference from the baseline in per cent, with its interval, over the seeds that both have."""
    both = [seed for seed in correct if seed in base]
    if not both:
        return "-"
    ours, theirs = (np.stack([rows[seed] for seed in both]) for rows in (correct, base))
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in paired_interval(ours, theirs)))
