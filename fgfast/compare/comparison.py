"""A resumable comparison: run what is missing, score it, store one row per finished run."""

import logging
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np

from fgfast.compare.checks import check_run
from fgfast.compare.entries import Entry, run_config
from fgfast.compare.store import (
    Key,
    lock,
    read_arrays,
    read_correct,
    read_rows,
    read_tuning,
    store_correct,
    store_row,
    store_tuning,
    training_summary,
)
from fgfast.compare.table import format_table
from fgfast.config import Range, TrainConfig, check_range, validate
from fgfast.data.layouts import open_images
from fgfast.errors import UserError
from fgfast.evaluate.keypoints import KeypointOptions
from fgfast.evaluate.options import Protocol, parse_protocols
from fgfast.files import check_folder, clear_leftovers, write_atomic
from fgfast.info import require

log = logging.getLogger("fgfast")

HELD_OUT = 0.2  # fraction of the training split on which learning rates are compared


@dataclass
class Comparison:
    """A comparison in a folder: rows of finished runs in compare.csv, runs in runs/, chosen rates in tuned.json.

    Args:
        out: folder.
        data: data sets.
        methods: entries as text; "random" is random weights, "start" the weights that ``init`` names.
        seeds: random seeds.
        shared: settings of all runs; "{seed}" in a text becomes the seed.
        lrs: learning rates to choose from for every trained method; if empty, the settings decide.
        tune_share: length of a tuning run as a fraction of the budget.
        baseline: entry that the others are compared with, paired by image.
        protocols: how every run is scored, as ``parse_protocols`` reads them; missing scores are added to old rows.
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
                raise UserError(f"--{name} is empty: give at least one.")
        self.entries = [Entry.parse(m) for m in self.methods]
        self.scored = parse_protocols(self.protocols)
        for data in self.data:
            open_images(data)
            for entry in self.entries:
                validate(self.run_config(entry, data, self.seeds[0]))
        check_range("--tune-share", self.tune_share, Range(0, 1, open=True))
        for lr in self.lrs:
            check_range("A rate of --lrs", lr, Range(0, open=True))
        for seed in self.seeds:
            check_range("A seed of --seeds", seed, Range(0))
        if len({p.name for p in self.data}) < len(self.data):
            raise UserError("Two data sets have the same folder name: rename one.")
        if self.baseline and self.baseline not in self.methods:
            raise UserError(f"The baseline {self.baseline!r} is not among the methods: add it.")

    def run_config(self, entry: Entry, data: Path, seed: int) -> TrainConfig:
        """The configuration of one run."""
        return run_config(entry, self.shared, data, self.out / "runs", seed)

    def run(self) -> None:
        """Train and score what is missing; a finished run is stored at once, a killed one resumes from its checkpoint.

        Several processes may run the same comparison: each takes runs that no other process holds.
        """
        require("matplotlib", "sklearn")
        check_folder(self.out)
        clear_leftovers(self.out)
        self._check_stored_rows()
        jobs = [(entry, data, seed) for seed in self.seeds for data in self.data for entry in self.entries]
        self._check_runs([job for job in jobs if _key(*job) not in self._complete()])
        while missing := [job for job in jobs if _key(*job) not in self._complete()]:
            worked = False
            for job in missing:
                with lock(self._lock_file(*job), wait=False) as acquired:
                    if acquired and _key(*job) not in self._complete():
                        self._run_one(*job)
                        worked = True
            if not worked:
                with lock(self._lock_file(*missing[0])):
                    pass  # other processes hold all missing runs: wait for the first one

    def _check_stored_rows(self) -> None:
        """Refuse to mix stored rows and tuning of other settings with new ones in a table."""
        from fgfast.methods.run_folder import read_run, resolve
        from fgfast.train.resume import ANY_TIME, check_options

        stored, complete = self._rows(), self._complete()
        grows = any(_key(*job) not in complete for job in product(self.entries, self.data, self.seeds))
        if self.lrs:
            read_tuning(self.out)  # a damaged file is found here
        for entry, data, seed in product(self.entries, self.data, self.seeds):
            config = self.run_config(entry, data, seed)
            run = Path(config.out)
            if _key(entry, data, seed) not in stored:
                continue
            if not (run / "correct.npz").is_file():
                raise UserError(f"{self.out / 'compare.csv'} has a row of {run}, which is gone: remove the row.")
            for label in self.scored:
                if stored[_key(entry, data, seed)].get(label):
                    read_correct(run, label)
            before = Path(read_run(run)[1].data)
            if before.is_dir() and before.resolve() != data.resolve():
                raise UserError(f"{run} was trained on {before}, not on {data}: give another --out.")
            if grows and (config.init == "timm" or Path(config.init).exists()):
                # new runs would follow the weights where earlier versions did not
                config = resolve(replace(config, resume=False))[0]
            tuned = ("lr",) if self.lrs and entry.trained else ()
            check_options(run, config, may_change=(*ANY_TIME, *tuned))

    def _check_runs(self, jobs: list[tuple[Entry, Path, int]]) -> None:
        """Build the network of every run and check that each protocol can score it, before the first run."""
        checked = set()
        for entry, data, seed in jobs:
            config = self.run_config(entry, data, seed)
            if Path(config.init).absolute().is_relative_to(self.out.absolute()):
                config = replace(config, init="none")  # an earlier run of this comparison writes the weights
            same = entry.name, repr(replace(config, seed=0, out=""))
            if same in checked:
                continue
            checked.add(same)
            check_run(entry, config, [*self.scored.values()])
            if self.lrs and entry.trained:
                check_run(entry, self._tuning_config(config, self.lrs[0]), [("linear", None)])

    def _rows(self) -> dict[Key, dict[str, str]]:
        return read_rows(self.out, self.scored)

    def _complete(self) -> set[Key]:
        """The keys of the rows that have a score of every protocol."""
        return {key for key, row in self._rows().items() if all(row.get(label) for label in self.scored)}

    def _lock_file(self, entry: Entry, data: Path, seed: int) -> Path:
        return Path(self.run_config(entry, data, seed).out + ".lock")

    def _run_one(self, entry: Entry, data: Path, seed: int) -> None:
        """Train and score one run and store its row; a stored row only gets the scores that it lacks."""
        from fgfast.evaluate.part_discovery import score_discovery
        from fgfast.train.distributed import choose_device
        from fgfast.train.loop import pretrain

        config = self.run_config(entry, data, seed)
        stored = self._rows().get(_key(entry, data, seed))
        if stored is not None:
            store_row(self.out, stored | self._score(Path(config.out), entry, data, config, stored), [*self.scored])
            return
        if self.lrs and entry.trained:
            config = replace(config, lr=self._tune_lr(entry, data))
        run = pretrain(entry.method, config, train=entry.trained)
        row: dict[str, Any] = {"data": data.name, "method": entry.label, "seed": seed, "lr": config.lr}
        row |= training_summary(run) | self._score(run, entry, data, config, {})
        if open_images(data).masks is not None:
            device = choose_device(config.device)
            try:
                discovery = score_discovery(run, data, checkpoint=entry.checkpoint, device=device)
                row |= {name: round(value, 4) for name, value in discovery.items()}
            except UserError as error:  # such as a network whose pixels cannot be clustered
                log.warning("The parts of %s are not scored: %s", run, error)
        store_row(self.out, row, [*self.scored])

    def _score(self, run: Path, entry: Entry, data: Path, config: TrainConfig, row: dict[str, str]) -> dict[str, Any]:
        """Top-1 under every protocol that ``row`` lacks; correct.npz is written after each."""
        from fgfast.evaluate.protocols import evaluate
        from fgfast.train.distributed import choose_device

        read_arrays(run)  # a damaged file would stop the score from being stored at the end
        device, scores = choose_device(config.device), {}
        for label in (label for label in self.scored if not row.get(label)):
            name, options = self.scored[label]
            if options is not None and not isinstance(options, KeypointOptions) and "seed" not in label:
                options = replace(options, seed=config.seed)
            protocol = cast(Protocol, name)
            score = evaluate(run, protocol, data, checkpoint=entry.checkpoint, device=device, options=options)
            store_correct(run, label, score.correct)
            scores[label] = round(score.top1, 5)
        return scores

    def _tune_lr(self, entry: Entry, data: Path) -> float:
        """The rate with the best linear probe on a held-out part of the training split, with the first seed."""
        from fgfast.evaluate.protocols import evaluate
        from fgfast.train.distributed import choose_device
        from fgfast.train.loop import pretrain

        name = f"{data.name} {entry.label}"
        with lock(Path(self.run_config(entry, data, self.seeds[0]).out + ".tune.lock")):
            scores = read_tuning(self.out).get(name, {})
            for lr in self.lrs:
                if str(lr) in scores:
                    continue
                config = self._tuning_config(self.run_config(entry, data, self.seeds[0]), lr)
                run = pretrain(entry.name, config)
                scores[str(lr)] = evaluate(run, "linear", data, device=choose_device(config.device)).top1
                store_tuning(self.out, name, scores)
        return max(self.lrs, key=lambda lr: scores[str(lr)])

    def _tuning_config(self, config: TrainConfig, lr: float) -> TrainConfig:
        """The configuration of a shorter run that tries a learning rate."""
        epochs = max(1, round(config.epochs * self.tune_share))
        passes = max(1, int(config.passes * self.tune_share)) if config.passes else 0
        out = f"{config.out}-lr{lr:g}"
        return replace(config, lr=lr, holdout=HELD_OUT, out=out, knn_every=0, passes=passes, epochs=epochs)

    def table(self) -> str:
        """Write compare.md and compare.png from the finished runs and return the Markdown table."""
        complete = self._complete()
        asked = {_key(*job) for job in product(self.entries, self.data, self.seeds)} & complete
        rows = [row for key, row in self._rows().items() if key in asked]
        lines: list[str] = []
        for data in self.data:
            sizes: dict[str, tuple[Path, int]] = {}

            def correct(entry: Entry, protocol: str, data: Path = data, sizes: Any = sizes) -> dict[int, np.ndarray]:
                seeds = [seed for seed in self.seeds if _key(entry, data, seed) in complete]
                return {
                    seed: _read_correct(Path(self.run_config(entry, data, seed).out), protocol, sizes) for seed in seeds
                }

            lines += format_table(data.name, self.entries, self.baseline, [*self.scored], rows, correct)
        text = "\n".join(lines)
        write_atomic(self.out / "compare.md", lambda p: p.write_text(text, encoding="utf-8"))
        if rows:
            from fgfast.report import plots

            first = next(iter(self.scored))
            plots.save_figure(plots.bars(rows, value=first, unit=f"{first} top-1, %"), self.out / "compare.png")
        return text


def _read_correct(run: Path, protocol: str, sizes: dict[str, tuple[Path, int]]) -> np.ndarray:
    """What is correct in a run, bool [N]; ``sizes`` is N of the first run of each protocol, which all must have."""
    correct = read_correct(run, protocol)
    first, size = sizes.setdefault(protocol, (run, len(correct)))
    if len(correct) != size:
        raise UserError(
            f"{run} has {len(correct)} images scored under {protocol}, {first} has {size}: remove the row of the run "
            "whose test images have changed from compare.csv."
        )
    return correct


def _key(entry: Entry, data: Path, seed: int) -> Key:
    return data.name, entry.label, str(seed)
