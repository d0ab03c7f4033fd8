"""Flipped bits and cuts of weights, and damages of the other files of a run folder."""

import os
import random
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.endurance.blocks import DOCUMENTED, SUCCESS, describe, outcome_of, run_trials
from benchmarks.endurance.processes import Case, config_of, set_pretrain, start
from benchmarks.endurance.report import Part, markdown

METHOD = "particle"
CORRUPTIONS = 106
BLOCK = 256  # flips or cuts of a trial
# The commands that read a file of a run folder, by its name.
COMMANDS: dict[str, tuple[str, ...]] = {
    "config.toml": ("report", "knn", "resume"),
    "eval.json": ("report", "knn"),
    "metrics.jsonl": ("report", "resume"),
    "maps.json": ("resume",),
    ".png": ("resume",),
    ".json": ("report", "resume"),
}


def measure(folder: Path, *, quick: bool, seed: int) -> Part:
    """Flip every bit of small files and some of those of a run, cut them at every length, and damage the others."""
    from fgfast.data.synthetic import generate

    data = generate(folder / "set", classes=3, images=36, size=48, seed=0, workers=1)
    run = folder / "run"
    ended = start(Case(METHOD), data, run, epochs=2)
    if any(ended.codes):
        return Part("flips", "", [f"a run ends with {ended.codes}: {ended.log}"])
    small = _small(folder / "small")
    rows, faults = [], []
    files = [(path, False) for path in small] + [(run / name, True) for name in ("last.pt", "init.pt", ENCODER)]
    for path, sampled in files:
        content = path.read_bytes()
        size = len(content)
        for kind, n_all in (("flips", 8 * size), ("cuts", size)):
            most = (100 if quick else 2000) if sampled else n_all
            chosen = range(n_all) if n_all <= most else sorted(random.Random(seed).sample(range(n_all), most))
            trial = partial(damage_block, path, kind, chosen)
            n_blocks = -(-len(chosen) // BLOCK)
            outcomes = run_trials(trial, n_blocks, folder / "trials")
            shutil.rmtree(folder / "trials")
            counts: Counter[str] = Counter()
            for outcome in outcomes:
                counts.update(_counts(outcome))
            share = "all" if len(chosen) == n_all else f"{len(chosen):,} of {n_all:,}"
            name = f"`{path.name}`, {size:,} bytes"
            rows.append([name, f"{kind}, {share}", f"{counts[DOCUMENTED]:,} / {len(chosen):,}"])
            others = {text: n for text, n in counts.items() if text != DOCUMENTED}
            faults += [f"{kind} of {name}: {n} end with {text}" for text, n in list(others.items())[:5]]
            print("; ".join(rows[-1]), flush=True)
    n = 20 if quick else CORRUPTIONS
    if run_trials(partial(_evaluate, run, data), 1, folder / "evaluation") != [SUCCESS]:
        faults.append("the run cannot be evaluated")
    outcomes = run_trials(partial(corrupt_and_use, run, data, seed), n, folder / "trials", silent=300)
    wrong = [text for text in outcomes if not text.startswith((SUCCESS, DOCUMENTED))]
    refused = sum(text.startswith(DOCUMENTED) for text in outcomes)
    harmless = sum(text.startswith(SUCCESS) for text in outcomes)
    rows.append(["other files of a run folder", f"damages, {n}", f"{refused} / {n}; {harmless} harmless"])
    faults += [f"damage {outcomes.index(text)}: {text} ({outcomes.count(text)} times)" for text in dict.fromkeys(wrong)]
    text = "Damages that are found, each by a documented sentence, of those tried.\n\n"
    return Part("flips", text + markdown(["file", "damage", "found / tried"], rows), faults)


ENCODER = "encoder.safetensors"


def _small(folder: Path) -> list[Path]:
    """The smallest files with the writers of fgfast."""
    from fgfast.run import save_checkpoint, save_encoder

    network = torch.nn.Linear(2, 2)
    state = {"name": METHOD, "step": 1, "method": network.state_dict()}
    save_checkpoint(folder / "last.pt", {**state, "total": 2, "rng": torch.zeros(4, dtype=torch.uint8)})
    save_checkpoint(folder / "init.pt", state)
    save_encoder(folder / ENCODER, network, "linear")
    return [folder / name for name in ("last.pt", "init.pt", ENCODER)]


def damage_block(path: Path, kind: str, chosen: range | list[int], number: int, folder: Path) -> str:
    """Read a file with one bit flipped or cut at one length, for a block of places; counts of the outcomes as text."""
    damaged, counts = folder / path.name, Counter[str]()
    shutil.copyfile(path, damaged)
    for place in reversed(chosen[number * BLOCK : (number + 1) * BLOCK]):  # every cut is shorter than the one before
        if kind == "flips":
            _flip(damaged, place)
        else:
            os.truncate(damaged, place)
        counts[outcome_of(_reading(damaged)).replace("|", "/")] += 1
        if kind == "flips":
            _flip(damaged, place)
    return "|".join(f"{n} {text}" for text, n in counts.items())


def _flip(path: Path, place: int) -> None:
    with path.open("rb+") as file:
        file.seek(place // 8)
        value = file.read(1)[0] ^ 1 << place % 8
        file.seek(place // 8)
        file.write(bytes([value]))


def _reading(path: Path) -> Callable[[], Any]:
    from fgfast.models.checkpoints import read_checkpoint
    from fgfast.run import load_checkpoint

    return partial(read_checkpoint, path) if path.name == ENCODER else partial(load_checkpoint, path, METHOD)


def _counts(outcome: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for part in outcome.split("|"):
        n, _, text = part.partition(" ")
        counts.update({text: int(n)} if n.isdigit() else {part: 1})
    return counts


def corrupt_and_use(run: Path, data: Path, seed: int, number: int, folder: Path) -> str:
    """Damage one file of a copy of a run and give it to the commands that read it; the worst outcome."""
    rng = random.Random(f"{seed} {number}")
    copy = folder / "run"  # the name of the run: it is part of the origin of its maps
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    files = sorted(p for p in copy.rglob("*") if p.is_file() and p.suffix in (".toml", ".json", ".jsonl", ".png"))
    kinds = sorted({_kind(path) for path in files})
    wanted = kinds[number % len(kinds)]
    chosen = rng.choice([path for path in files if _kind(path) == wanted])
    how = corrupt(chosen, rng)
    outcomes = []
    for name in COMMANDS[wanted]:
        status, text = _command(name, copy, data)
        if status not in (0, 2):
            return f"{how} of {chosen.relative_to(copy)}, {name}: exit status {status}: {text}"
        outcomes.append(DOCUMENTED if status else SUCCESS)
    return DOCUMENTED if DOCUMENTED in outcomes else SUCCESS


def _evaluate(run: Path, data: Path, number: int, folder: Path) -> str:
    return outcome_of(lambda: _command("knn", run, data))


def _kind(path: Path) -> str:
    return next(name for name in COMMANDS if path.name.endswith(name))


def corrupt(path: Path, rng: random.Random) -> str:
    """Damage a file in one of several ways; returns which."""
    content = bytearray(path.read_bytes())
    how = rng.choice(("flip", "cut", "empty", "noise", "number", "word", "doubled", "deep"))
    if how == "flip":
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[rng.randrange(len(content)) :]
    elif how == "empty":
        content.clear()
    elif how == "noise":
        content[:] = rng.randbytes(rng.randint(1, 200))
    elif how in ("number", "word"):  # in place of a number or a word of a text
        digits = how == "number"
        places = [i for i, c in enumerate(content) if (chr(c).isdigit() if digits else chr(c).isalpha())]
        at = rng.choice(places or [0])
        content[at : at + 1] = rng.choice((b"-1", b"1e999", b"nan", b"null", b'"x"', b"[]", b"{}", b"9" * 30, b"../"))
    elif how == "doubled":
        content += bytes(content)
    else:
        content[:] = b"[" * 100_000
    path.write_bytes(content)
    return how


def _command(name: str, run: Path, data: Path) -> tuple[int, str]:
    """Run a command of fgfast in this process: its exit status, and what was raised if it is a mistake of fgfast."""
    from fgfast.cli import main

    set_pretrain(METHOD, config_of(Case(METHOD), data, run, epochs=3))
    words = {
        "resume": ["pretrain"],
        "report": ["report", str(run)],
        "knn": ["eval", "knn", str(run), "--data", str(data), "--device", "cpu"],
    }
    printed: list[str] = []
    real = traceback.print_exc

    def recording(*args: Any, **options: Any) -> None:
        error = sys.exc_info()[1]
        printed.append("" if error is None else describe(error))
        real(*args, **options)

    traceback.print_exc = recording
    try:
        return main(words[name]), printed[0] if printed else ""
    finally:
        traceback.print_exc = real
