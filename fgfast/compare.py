"""Methods x data x seeds under one budget: a resumable runner, and a table with paired intervals."""

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np

from fgfast.config import Range, TrainConfig, check_range, parse_values, read_toml, validate, with_values
from fgfast.data.layouts import open_images
from fgfast.errors import UserError
from fgfast.evaluate.bootstrap import accuracy_interval, paired_interval
from fgfast.evaluate.finetune import FinetuneOptions
from fgfast.evaluate.mlp import MLPOptions
from fgfast.evaluate.protocols import Protocol, parse_protocols
from fgfast.files import write_atomic, write_json
from fgfast.methods.base import METHODS, method_class
from fgfast.train.log import read_metrics

OWN = ("data", "out", "seed", "resume")  # settings that the runner gives each run
UNTRAINED = ("random", "start")  # evaluated without a step: random weights; the weights that --init names
HELD_OUT = 0.2  # share of the training split on which learning rates are compared
COLUMNS = (
    "data", "method", "seed", "lr", "steps", "passes", "seconds", "images_per_s", "data_wait", "linear",
    "knn", "nmi", "ari",
)  # fmt: skip
SUMMARY = ("passes", "seconds", "images_per_s", "data_wait", "nmi", "ari")  # columns whose means the table shows


@dataclass(frozen=True)
class Entry:
    """A method with its own settings, parsed from "name:key=value,key=value"."""

    label: str
    name: str
    values: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Read an entry.

        Raises:
            UserError: the text is not of the form, or the method does not exist.

        Example:
            >>> Entry.parse("particle:parts=truth").values
            {'parts': 'truth'}
        """
        name, _, rest = text.partition(":")
        pairs = [p.partition("=") for p in rest.split(",") if p]
        if any(not sign for _, sign, _ in pairs):
            raise UserError(f"The method {text!r} is not of the form name:setting=value,setting=value.")
        if name not in UNTRAINED:
            method_class(name)
        return cls(text, name, {key: value for key, _, value in pairs})


@dataclass
class Comparison:
    """A comparison in a folder: rows of finished runs in compare.csv, runs below runs/, chosen rates in tuned.json.

    Args:
        out: folder.
        data: sets.
        methods: entries as text; "random" is random weights, "start" the weights that ``init`` names.
        seeds: seeds.
        shared: settings of all runs; "{seed}" in a text becomes the seed.
        lrs: learning rates to choose from for every trained method alike; empty keeps what the settings say.
        tune_share: share of the budget of a tuning run.
        baseline: entry with which the others are compared in pairs.
        protocols: how every run is scored, as ``parse_protocols`` reads them; a row that lacks one is completed.
    """

    out: Path
    data: list[Path]
    methods: list[str]
    seeds: list[int]
    shared: dict[str, Any] = field(default_factory=dict)
    lrs: list[float] = field(default_factory=list)
    tune_share: float = 0.3
    baseline: str = ""
    protocols: list[str] = field(default_factory=lambda: ["linear", "knn"])

    def __post_init__(self) -> None:
        """Check everything before the first run."""
        for name, given in (("data", self.data), ("methods", self.methods), ("seeds", self.seeds)):
            if not given:
                raise UserError(f"--{name} names none: give one at least.")
        self.entries = [Entry.parse(m) for m in self.methods]
        self.scored = parse_protocols(self.protocols)
        for data in self.data:
            open_images(data)
            for entry in self.entries:
                validate(self._config(entry, data, self.seeds[0]))
        check_range("--tune-share", self.tune_share, Range(0, 1, open=True))
        for lr in self.lrs:
            check_range("A rate of --lrs", lr, Range(0, open=True))
        if len({p.name for p in self.data}) < len(self.data):
            raise UserError("Two data sets have the same folder name: rename one.")
        if self.baseline and self.baseline not in self.methods:
            raise UserError(f"The baseline {self.baseline!r} is not among the methods: add it.")

    def _config(self, entry: Entry, data: Path, seed: int) -> TrainConfig:
        """The configuration of one run; shared settings that only other methods have are left out."""
        config = method_class("simclr" if entry.name in UNTRAINED else entry.name).Config()
        known = vars(config).keys() - (set() if config.takes_unlabelled else {"unlabelled"})
        values = {k: v.replace("{seed}", str(seed)) if isinstance(v, str) else v for k, v in self.shared.items()}
        texts = {k: v for k, v in values.items() if isinstance(v, str) and k.replace("-", "_") in known}
        plain = {k: v for k, v in values.items() if not isinstance(v, str) and k.replace("-", "_") in known}
        if taken := [k for k in (*self.shared, *entry.values) if k in OWN]:
            raise UserError(f"The comparison itself decides {taken[0]}: leave it out of the settings.")
        unknown = [k for k in values if not any(k.replace("-", "_") in vars(method_class(m).Config()) for m in METHODS)]
        if unknown:
            raise UserError(f"No method has the setting {unknown[0]!r}: remove it.")
        config = with_values(config, plain | parse_values(config, texts, "--set"), "The shared settings")
        own = {k: v.replace("{seed}", str(seed)) for k, v in entry.values.items()}
        config = with_values(config, parse_values(config, own, entry.label), f"The method {entry.label!r}")
        if entry.name == "random":
            config = replace(config, init="none")
        slug = "".join(c if c.isalnum() or c in "-_." else "-" for c in entry.label)
        return replace(
            config,
            data=str(data),
            out=str(self.out / "runs" / data.name / slug / f"seed{seed}"),
            seed=seed,
            resume=True,
        )

    def run(self) -> None:
        """Do what is missing; every finished run is a row at once, and a killed one goes on from its checkpoint.

        Several processes may run the same comparison: each takes runs that no other is at.
        """
        self._check_rows()
        jobs = [(entry, data, seed) for seed in self.seeds for data in self.data for entry in self.entries]
        while missing := [job for job in jobs if self._key(*job) not in self._done()]:
            worked = False
            for job in missing:
                with _lock(self._lock_file(*job), wait=False) as mine:
                    if mine and self._key(*job) not in self._done():
                        self._one(*job)
                        worked = True
            if not worked:
                with _lock(self._lock_file(*missing[0])):
                    pass  # all that is missing is in other hands: wait for the first of it

    def _check_rows(self) -> None:
        """Refuse rows and tuning of other settings, which a table would mix with new ones."""
        from fgfast.train.loop import ANY_TIME, check_options

        for entry in self.entries:
            for data in self.data:
                for seed in self.seeds:
                    config = self._config(entry, data, seed)
                    run = Path(config.out)
                    if self._key(entry, data, seed) in self._begun():
                        if not (run / "correct.npz").is_file():
                            raise UserError(
                                f"{self.out / 'compare.csv'} has a row of {run}, which is gone: remove the row."
                            )
                        before = Path(str(read_toml(run / "config.toml").get("data", "")))
                        if before.is_dir() and before.resolve() != data.resolve():
                            raise UserError(f"{run} was trained on {before}, not on {data}: give another --out.")
                        tuned = ("lr",) if self.lrs and entry.name not in UNTRAINED else ()
                        check_options(run, config, may_change=(*ANY_TIME, *tuned))

    def _lock_file(self, entry: Entry, data: Path, seed: int) -> Path:
        return Path(self._config(entry, data, seed).out + ".lock")

    def _begun(self) -> dict[tuple[str, str, str], dict[str, str]]:
        return {(r["data"], r["method"], r["seed"]): r for r in self.rows()}

    def _done(self) -> set[tuple[str, str, str]]:
        """The keys of the rows that have a score of every protocol."""
        return {key for key, row in self._begun().items() if all(row.get(label) for label in self.scored)}

    def _key(self, entry: Entry, data: Path, seed: int) -> tuple[str, str, str]:
        return data.name, entry.label, str(seed)

    def rows(self) -> list[dict[str, str]]:
        """The rows of compare.csv."""
        file = self.out / "compare.csv"
        return list(csv.DictReader(io.StringIO(file.read_text()))) if file.is_file() else []

    def _one(self, entry: Entry, data: Path, seed: int) -> None:
        from fgfast.evaluate.part_discovery import score_discovery
        from fgfast.train.distributed import choose_device
        from fgfast.train.loop import pretrain

        config = self._config(entry, data, seed)
        row: dict[str, Any] | None = self._begun().get(self._key(entry, data, seed))
        if row is not None:
            self._append(row | self._scores(Path(config.out), entry, data, config, row))
            return
        if self.lrs and entry.name not in UNTRAINED:
            config = replace(config, lr=self._tuned(entry, data))
        name = "simclr" if entry.name in UNTRAINED else entry.name
        run = pretrain(name, config, train=entry.name not in UNTRAINED)
        device = choose_device(config.device)
        checkpoint: Any = "init" if entry.name in UNTRAINED else "last"
        row = {"data": data.name, "method": entry.label, "seed": seed, "lr": config.lr}
        row |= training_summary(run) | self._scores(run, entry, data, config, {})
        if open_images(data).masks is not None:
            row |= {k: round(v, 4) for k, v in score_discovery(run, data, checkpoint=checkpoint, device=device).items()}
        self._append(row)

    def _scores(
        self, run: Path, entry: Entry, data: Path, config: TrainConfig, row: dict[str, str]
    ) -> dict[str, float]:
        """Top-1 under every protocol that ``row`` lacks; what was right stands in correct.npz after each."""
        from fgfast.evaluate.protocols import evaluate
        from fgfast.train.distributed import choose_device

        device, file, found = choose_device(config.device), run / "correct.npz", {}
        checkpoint: Any = "init" if entry.name in UNTRAINED else "last"
        for label in (label for label in self.scored if not row.get(label)):
            name, options = self.scored[label]
            if isinstance(options, MLPOptions | FinetuneOptions) and "seed" not in label:
                options = replace(options, seed=config.seed)
            score = evaluate(run, cast(Protocol, name), data, checkpoint=checkpoint, device=device, options=options)
            arrays = dict(np.load(file)) if file.is_file() else {}
            write_atomic(file, partial(_save_arrays, arrays=arrays | {label: score.correct}))
            found[label] = round(score.top1, 5)
        return found

    def _append(self, row: dict[str, Any]) -> None:
        """Put a row into compare.csv, in place of an earlier one of the same run."""
        text = io.StringIO()
        with _lock(self.out / "compare.csv.lock"):
            rows = self._begun()
            columns = dict.fromkeys([*COLUMNS, *(name for r in rows.values() for name in r), *self.scored])
            rows[row["data"], row["method"], str(row["seed"])] = row
            writer = csv.DictWriter(text, list(columns), extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(rows.values())
            write_atomic(self.out / "compare.csv", lambda p: p.write_text(text.getvalue()))

    def _tuned(self, entry: Entry, data: Path) -> float:
        """The rate with the best linear probe on a held-out part of the training split (first seed), kept."""
        from fgfast.evaluate.protocols import evaluate
        from fgfast.train.distributed import choose_device
        from fgfast.train.loop import pretrain

        with _lock(Path(self._config(entry, data, self.seeds[0]).out + ".tune.lock")):
            scores = self._tuning(entry, data)
            for lr in self.lrs:
                if str(lr) in scores:
                    continue
                config = self._config(entry, data, self.seeds[0])
                config = replace(config, lr=lr, holdout=HELD_OUT, out=f"{config.out}-lr{lr:g}", knn_every=0)
                passes, epochs = int(config.passes * self.tune_share), max(1, round(config.epochs * self.tune_share))
                run = pretrain(entry.name, replace(config, passes=passes, epochs=epochs))
                scores[str(lr)] = evaluate(run, "linear", data, device=choose_device(config.device)).top1
                with _lock(self.out / "tuned.json.lock"):
                    write_json(self.out / "tuned.json", self._all_tuning() | {f"{data.name} {entry.label}": scores})
        return max(self.lrs, key=lambda lr: scores[str(lr)])

    def _all_tuning(self) -> dict[str, dict[str, float]]:
        file = self.out / "tuned.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def _tuning(self, entry: Entry, data: Path) -> dict[str, float]:
        return self._all_tuning().get(f"{data.name} {entry.label}", {})

    def _correct(self, entry: Entry, data: Path, protocol: str) -> np.ndarray:
        """Right or wrong of every finished seed, bool [S, N]."""
        done = self._done()
        runs = [Path(self._config(entry, data, s).out) for s in self.seeds if self._key(entry, data, s) in done]
        return np.stack([np.load(r / "correct.npz")[protocol] for r in runs])

    def table(self) -> str:
        """The results as Markdown: means over seeds, 95% intervals over seeds and images; compare.md, compare.png."""
        lines = []
        asked = {self._key(*job) for job in product(self.entries, self.data, self.seeds)}
        rows = [r for key, r in self._begun().items() if key in asked]
        for data in self.data:
            scores = [
                name for label in self.scored for name in ([label, "gain on baseline"] if label != "knn" else ["kNN"])
            ]
            names = ["method", "seeds", *scores, "NMI / ARI", "passes", "minutes", "img/s", "wait"]
            lines += [f"**{data.name}**", "", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
            base = next((e for e in self.entries if e.label == self.baseline), None)
            for entry in self.entries:
                mine = [r for r in rows if r["data"] == data.name and r["method"] == entry.label]
                if mine:
                    lines.append(self._line(entry, base, data, mine))
            lines.append("")
        text = "\n".join(lines)
        write_atomic(self.out / "compare.md", lambda p: p.write_text(text))
        if rows:
            from fgfast.report import plots

            first = next(iter(self.scored))
            rows = [row for row in rows if row.get(first)]
            plots.save(plots.bars(rows, value=first, unit=f"{first} top-1, %"), self.out / "compare.png")
        return text

    def _line(self, entry: Entry, base: Entry | None, data: Path, mine: list[dict[str, str]]) -> str:
        scores = []
        for label in self.scored:
            correct = self._correct(entry, data, label)
            scores.append(_percent(correct))
            if label != "knn":
                scores.append(self._gain(correct, entry, base, data, label))
        means = {k: np.mean([float(r[k]) for r in mine]) if mine[0][k] else float("nan") for k in SUMMARY}
        parts = "-" if np.isnan(means["nmi"]) else f"{means['nmi']:.3f} / {means['ari']:.3f}"
        trained = entry.name not in UNTRAINED
        cells = [
            f"`{entry.label}`", str(len(mine)), *scores, parts,
            f"{means['passes'] / 1e6:.2f} M" if trained else "0", f"{means['seconds'] / 60:.1f}" if trained else "0",
            f"{means['images_per_s']:.0f}" if trained else "-", f"{means['data_wait']:.1%}" if trained else "-",
        ]  # fmt: skip
        return "| " + " | ".join(cells) + " |"

    def _gain(self, correct: np.ndarray, entry: Entry, base: Entry | None, data: Path, label: str) -> str:
        """The paired difference from the baseline under a protocol, with its interval; "-" for the baseline."""
        if base is None or base == entry:
            return "-"
        other = self._correct(base, data, label)
        n = min(len(correct), len(other))
        return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * v for v in paired_interval(correct[:n], other[:n])))


@contextmanager
def _lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that ends with the process; yields False where ``wait`` is False and another process holds it."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _percent(correct: np.ndarray) -> str:
    low, high = accuracy_interval(correct)
    return f"{100 * correct.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def training_summary(run: Path) -> dict[str, Any]:
    """Steps, encoder passes, seconds of training, rate and data wait of a run, from its metrics."""
    file = run / "metrics.jsonl"
    rows = [r for r in read_metrics(file)[0] if "loss" in r] if file.is_file() else []
    if not rows:
        return {"steps": 0, "passes": 0, "seconds": 0, "images_per_s": "", "data_wait": ""}
    steps = np.diff([0, *(r["step"] for r in rows)])
    from fgfast.methods.stored import read_run

    _, config = read_run(run)
    seconds = steps * config.batch_size / np.array([r["images_per_s"] for r in rows])
    passes = seconds * np.array([r["passes_per_s"] for r in rows])
    wait = float((seconds * [r["data_wait"] for r in rows]).sum() / seconds.sum())
    return {
        "steps": rows[-1]["step"], "passes": round(float(passes.sum())), "seconds": round(float(seconds.sum()), 1),
        "images_per_s": round(rows[-1]["step"] * config.batch_size / float(seconds.sum()), 1),
        "data_wait": round(wait, 4),
    }  # fmt: skip
