"""Damaged inputs for every reader of files: each must be read, or refused in one documented sentence."""

import importlib
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.endurance.blocks import DOCUMENTED, SUCCESS, outcome_of, run_trials
from benchmarks.endurance.report import Part, markdown

# Modules with dictionaries of name -> callable(random.Random, Path), and what divides the number of inputs: the readers
# of .mat files start a process for each.
REGISTRY = (("tests.fuzz_files", "READERS", 1), ("tests.data.fuzz", "READERS", 1), ("tests.data.fuzz", "MATLAB", 20))
MEMORY = Path("/dev/shm")
SHOWN = 5  # findings of a reader

Reader = Callable[[random.Random, Path], object]


def readers() -> dict[str, tuple[Reader, int]]:
    """The readers by name, with the divisor of each."""
    found: dict[str, tuple[Reader, int]] = {}
    for module, attribute, divisor in REGISTRY:
        for name, reader in getattr(importlib.import_module(module), attribute).items():
            found[name] = (reader, divisor)
    return found


def read_one(reader: Reader, name: str, first: int, seed: int, number: int, folder: Path) -> str:
    """Give one damaged input to a reader in an empty folder."""
    inside, cache = folder / "input", folder / "cache"
    for path in (inside, cache):
        shutil.rmtree(path, ignore_errors=True)
    inside.mkdir()
    os.environ["FGFAST_CACHE"] = str(cache)
    tempfile.tempdir = str(folder)
    return outcome_of(lambda: reader(random.Random(f"{seed} {name} {first + number}"), inside))


def measure(folder: Path, *, inputs: int, seed: int, only: Sequence[str], first: int = 0) -> Part:
    """Fuzz every reader, or those whose name holds one of ``only``, with the inputs from number ``first`` on."""
    rows, faults = [], []
    if MEMORY.is_dir() and os.access(MEMORY, os.W_OK):  # most of the time goes into files, which a disk makes slow
        folder = Path(tempfile.mkdtemp(dir=MEMORY, prefix="endurance"))
    for i, (name, (reader, divisor)) in enumerate(readers().items()):
        if only and not any(word in name for word in only):
            continue
        n = max(1, inputs // divisor)
        outcomes = run_trials(partial(read_one, reader, name, first, seed), n, folder / f"reader{i}", silent=60)
        counts = Counter(outcomes)
        found = {text: outcomes.index(text) for text in counts if text not in (SUCCESS, DOCUMENTED)}
        n_found = n - counts[SUCCESS] - counts[DOCUMENTED]
        rows.append([f"`{name}`", n, counts[DOCUMENTED], counts[SUCCESS], n_found])
        for text, number in list(found.items())[:SHOWN]:
            command = f"python -m benchmarks.endurance fuzz --only '{name}' --inputs 1 --first {first + number}"
            faults.append(f"{name}: {text} ({counts[text]} of {n}; {command} --seed {seed})")
        shutil.rmtree(folder / f"reader{i}")
        print("; ".join(map(str, rows[-1])), flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    text = "Damaged inputs by reader: refused in a documented sentence, read, and anything else.\n\n"
    return Part("fuzz", text + markdown(["reader", "inputs", "refused", "read", "anything else"], rows), faults)
