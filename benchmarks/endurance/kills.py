"""Runs that are killed at random moments, resumed until they are finished, and compared with uninterrupted ones."""

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.endurance.processes import TIMEOUT, Aim, Case, Ended, start, warm_up
from benchmarks.endurance.report import Part, markdown
from fgfast.methods.base import METHODS

CASES = (*((name, ()) for name in METHODS), ("particle", (("parts", "online"),)), ("particle", (("rounds", 2),)))
MEASURED = ("images_per_s", "passes_per_s", "data_wait", "memory_mb")  # differ between equal runs
# These differ, or are compared otherwise
OWN = ("config.toml", "log.txt", "metrics.jsonl", "tensorboard", ".pt", ".safetensors")
STEPS, SLACK = 12, 3  # of a run; steps that ranks need to agree on a stop
LATE = 10.0  # seconds beyond the time-out of a rank

# Moments: the name, the place of the aim, the signal, whether all ranks get it, and how often it is drawn.
MOMENTS: dict[str, tuple[str, int, bool, int]] = {
    "any time": ("time", signal.SIGKILL, True, 4),
    "any time, one rank": ("time", signal.SIGKILL, False, 2),
    "a save": ("save", signal.SIGKILL, True, 3),
    "a discovery": ("discovery", signal.SIGKILL, True, 2),
    "a score": ("score", signal.SIGKILL, True, 2),
    "another file": ("files", signal.SIGKILL, True, 1),
    "SIGTERM": ("time", signal.SIGTERM, True, 2),
    "SIGTERM to one rank": ("time", signal.SIGTERM, False, 1),
    "SIGUSR1": ("time", signal.SIGUSR1, True, 2),
    "SIGTERM in a save": ("save", signal.SIGTERM, True, 1),
    "SIGTERM in a score": ("score", signal.SIGTERM, True, 1),
    "SIGSTOP and SIGCONT": ("time", signal.SIGSTOP, True, 1),
}


class Point(NamedTuple):
    """A signal that reached a run, and what was wrong afterwards ("" for nothing)."""

    case: Case
    moment: str
    fault: str


class Reference(NamedTuple):
    """An uninterrupted run, the seconds that it took, and the events of each place."""

    run: Path
    seconds: float
    events: dict[str, int]


def measure(folder: Path, *, minutes: float, quick: bool, seed: int, only: Sequence[str], ranks: Sequence[int]) -> Part:
    """Kill runs of every case until the time is up, each case at least once (``quick``: one number of ranks each)."""
    from fgfast.data.synthetic import generate

    warm_up()
    data = generate(folder / "set", classes=3, images=36, size=48, seed=0, workers=1)
    cases = list(_cases(quick, only, ranks))
    references: dict[Case, Reference] = {}
    points: list[Point] = []
    until = time.monotonic() + 60 * minutes
    for number in range(10**6):
        for i, case in enumerate(cases):
            if number and time.monotonic() > until:
                return _part(points, cases)
            place = folder / f"case{i}"
            if case not in references:
                reference = _reference(case, data, place / "uninterrupted")
                if isinstance(reference, str):
                    points.append(Point(case, "uninterrupted", reference))
                    continue
                references[case] = reference
            rng = random.Random(f"{seed} {case} {case.ranks} {number}")
            found = chain(case, data, references[case], place / f"killed{number}", rng, kills=2 if quick else 4)
            points += found
            for point in found:
                if point.fault:
                    print(f"{case}, {case.ranks} ranks, {point.moment}: {point.fault}", flush=True)
    raise AssertionError


def _cases(quick: bool, only: Sequence[str], ranks: Sequence[int]) -> Iterator[Case]:
    for i, (method, options) in enumerate(CASES):
        for j, world in enumerate(ranks):
            if (not only or method in only) and (not quick or i % len(ranks) == j):
                yield Case(method, options, world)


def _reference(case: Case, data: Path, folder: Path) -> Reference | str:
    folder.mkdir(parents=True)
    ended = start(case, data, folder / "run")
    if any(code != 0 for code in ended.codes):
        return f"an uninterrupted run ends with {ended.codes}: {ended.log}"
    return Reference(folder / "run", ended.seconds, json.loads((folder / "run-sent.json").read_text()))


def chain(case: Case, data: Path, reference: Reference, folder: Path, rng: random.Random, *, kills: int) -> list[Point]:
    """Kill one run several times, resume it to its end, and compare it with the uninterrupted one.

    A fault of an end belongs to its point, a difference in the end to all points of the run.
    """
    folder.mkdir(parents=True)
    run = folder / "run"
    points: list[Point] = []
    for _ in range(3 * kills):
        if len(points) == kills:
            break
        moment, aim = draw(rng, case, reference)
        ended = start(case, data, run, aim, limit=60 + 20 * reference.seconds)
        if not ended.hit:
            if all(code == 0 for code in ended.codes):  # finished before the moment came
                if points:
                    break
                shutil.rmtree(run)
                continue
            return [*points, Point(case, moment, f"does not resume: {ended.codes} {ended.log}")]
        points.append(Point(case, moment, end_fault(case, aim, ended, run)))
        if all(code == 0 for code in ended.codes):
            break
    ended = start(case, data, run, limit=60 + 20 * reference.seconds)
    if any(code != 0 for code in ended.codes):
        faults = [f"does not resume: {ended.codes} {ended.log}"]
    else:
        faults = differences(reference.run, run, case.method)
    if not faults:
        shutil.rmtree(folder)
    history = ", ".join(point.moment for point in points)
    return [p._replace(fault=p.fault or (f"({history}) {'; '.join(faults)}" if faults else "")) for p in points]


def draw(rng: random.Random, case: Case, reference: Reference) -> tuple[str, Aim]:
    """A random moment of a case, in the first half of the events of its place."""
    events, seconds = reference.events, reference.seconds
    names = [
        name for name, (place, _, all_ranks, _) in MOMENTS.items()
        if (place == "time" or events[place]) and (all_ranks or case.ranks > 1)
    ]  # fmt: skip
    name = rng.choices(names, [MOMENTS[n][3] for n in names])[0]
    place, number, all_ranks, _ = MOMENTS[name]
    rank = rng.randrange(case.ranks) if place in ("time", "score") else 0  # the first one writes the files
    delay = rng.uniform(0.1, 1.0) * seconds if place == "time" else rng.choice((0.0, rng.uniform(0, 0.02)))
    nth = 0 if place == "time" else rng.randint(1, max(1, events[place] // 2))
    return name, Aim(place, nth, delay, number, rank, all_ranks)


def end_fault(case: Case, aim: Aim, ended: Ended, run: Path) -> str:
    """What is wrong with the end of a run that got a signal."""
    if lines := not_json(run):
        return f"metrics.jsonl has lines that are no JSON: {lines}"
    if aim.number == signal.SIGSTOP:
        return "" if all(code == 0 for code in ended.codes) else f"does not go on: {ended.codes} {ended.log}"
    if any(code is None for code in ended.codes):
        return f"does not end: {ended.codes} {ended.log}"
    if aim.number == signal.SIGKILL and aim.all_ranks:
        return ""
    if 1 in ended.codes or "bug in fgfast" in ended.log:
        return f"an end that is called a bug: {ended.codes} {ended.log}"
    if aim.number == signal.SIGKILL:
        late = ended.alone is not None and ended.alone > TIMEOUT + LATE
        return f"the others end after {ended.alone:.0f} s" if late else ""
    if all(code == 0 for code in ended.codes):
        return f"goes on to its end after step {ended.step}" if ended.step < STEPS - SLACK else ""
    if 0 < ended.step < STEPS and any(code is not None and code < 0 for code in ended.codes):  # not while Python ends
        return f"ends at once after step {ended.step}: {ended.codes}"
    saved = saved_step(run, case.method)
    return f"step {ended.step} was done and {saved} is saved" if saved < ended.step else ""


def saved_step(run: Path, method: str) -> int:
    """The step of the newest checkpoint, 0 without one."""
    from fgfast.run import load_checkpoint

    return int(load_checkpoint(run / "last.pt", method)["step"]) if (run / "last.pt").exists() else 0


def not_json(run: Path) -> list[int]:
    """The numbers of the lines of metrics.jsonl that do not parse."""
    file, wrong = run / "metrics.jsonl", []
    for number, line in enumerate(file.read_text(errors="replace").splitlines() if file.exists() else (), start=1):
        try:
            json.loads(line)
        except ValueError:
            wrong.append(number)
    return wrong


def rows(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without times and memory."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def differences(reference: Path, run: Path, method: str) -> list[str]:
    """What differs between a resumed run and an uninterrupted one, in a few words each."""
    from fgfast.models.checkpoints import read_checkpoint
    from fgfast.run import load_checkpoint

    a, b = (load_checkpoint(folder / "last.pt", method) for folder in (reference, run))
    found = [f"last.pt: {name}" for name in sorted(a.keys() | b.keys()) if not equal(a.get(name), b.get(name))]
    if not equal(*(read_checkpoint(folder / "encoder.safetensors") for folder in (reference, run))):
        found.append("encoder.safetensors")
    if bad := not_json(run):
        found.append(f"metrics.jsonl has lines that are no JSON: {bad}")
    elif rows(reference) != rows(run):
        ours, theirs = rows(run), rows(reference)
        place = next((i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), len(ours))
        found.append(f"metrics.jsonl: {len(ours)} of {len(theirs)} rows, first difference in row {place + 1}")
    a_files, b_files = contents(reference), contents(run)
    if extra := sorted(b_files.keys() - a_files.keys()):
        found.append(f"left over: {', '.join(extra[:3])}")
    if missing := sorted(a_files.keys() - b_files.keys()):
        found.append(f"missing: {', '.join(missing[:3])}")
    other = [n for n in a_files.keys() & b_files.keys() if a_files[n] != b_files[n] and not _is_own(n)]
    return found + [f"other content: {', '.join(sorted(other)[:3])}"] * bool(other)


def _is_own(name: str) -> bool:
    return name.startswith(OWN) or name.endswith(OWN)


def contents(run: Path) -> dict[str, bytes]:
    """The files of a run folder, except TensorBoard's, of which every start writes one."""
    files = (file for file in run.rglob("*") if file.is_file())
    return {n: f.read_bytes() for f in files if not (n := str(f.relative_to(run))).startswith("tensorboard")}


def equal(a: Any, b: Any) -> bool:
    """Whether two values are the same to the last bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype
        return same and torch.equal(_bytes(a), _bytes(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _part(points: Sequence[Point], cases: Sequence[Case]) -> Part:
    def share(chosen: Sequence[Point]) -> str:
        return f"{sum(not p.fault for p in chosen)} / {len(chosen)}" if chosen else ""

    worlds = sorted({case.ranks for case in cases})
    names = list(dict.fromkeys(str(case) for case in cases))
    first = [
        [f"`{name}`", *(share([p for p in points if str(p.case) == name and p.case.ranks == w]) for w in worlds)]
        for name in names
    ]  # fmt: skip
    first.append(["all", *(share([p for p in points if p.case.ranks == w]) for w in worlds)])
    moments = Counter(p.moment for p in points)
    second = [
        [moment, *(share([p for p in points if p.moment == moment and p.case.ranks == w]) for w in worlds)]
        for moment in moments
    ]  # fmt: skip
    head = [f"{w} rank{'s' * (w > 1)}" for w in worlds]
    text = (
        "Kill points survived / tried: the resumed run equals the uninterrupted one in every tensor of `last.pt`, "
        "every row of `metrics.jsonl` (but for times and memory), every other file, and nothing is left over.\n\n"
    )
    text += markdown(["method", *head], first) + "\n\n" + markdown(["moment", *head], second)
    return Part("kills", text, [f"{p.case} on {p.case.ranks} ranks, {p.moment}: {p.fault}" for p in points if p.fault])
