"""Tiny training runs in processes forked from a server that has imported everything, so that a start costs a second.

A process can send a signal to itself at a moment that cannot be met from outside: in the n-th file operation on a
checkpoint, in the n-th score.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

PRELOADED = [
    "torch", "torch._dynamo", "torch.distributed", "torchvision", "timm", "nvidia.dali", "torch.utils.tensorboard",
    "rich.progress", "safetensors.torch", "fgfast", "fgfast.cli.main", "fgfast.train.loop", "fgfast.data.loader",
    "fgfast.data.dali", "fgfast.data.splits", "fgfast.evaluate.protocols", "fgfast.losses", "fgfast.parts.discover",
    *(f"fgfast.methods.{name}" for name in ("lodisc", "particle", "srgan", "supervised", "synthpair", "color")),
]  # fmt: skip
PLACES = ("score", "save", "discovery", "files")
TIMEOUT = 20.0  # seconds after which a rank that does not answer ends the others
NETS = {"model": "test_resnet", "model_args": "output_stride=8", "hidden": 16, "projection": 8}
TINY: dict[str, dict[str, Any]] = {
    "particle": {"n_parts": 4, "max_parts": 3, "map_size": 16, "prototypes": 32},
    "srgan": {"width": 4, "blocks": 1, "gan_share": 0.5, "model": "srgan", "model_args": ""},
    "color": {"prior_pictures": 20},
    "jigsaw": {"n_permutations": 10},
    "synthpair": {},
}


class Case(NamedTuple):
    """A run: the method, options that differ from the tiny ones, and the number of ranks."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()
    ranks: int = 1

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.options)])


class Aim(NamedTuple):
    """A moment of a run, and the signal that is sent to some ranks then.

    Args:
        place: one of PLACES, or "time".
        nth: the event of that place, from 1.
        delay: seconds after that event, or for "time" after the start.
        number: the signal.
        rank: the rank that gets it, which is also the one whose events count.
        all_ranks: whether the others get it too.
    """

    place: str
    nth: int
    delay: float
    number: int = signal.SIGKILL
    rank: int = 0
    all_ranks: bool = True


class Ended(NamedTuple):
    """How a start ended.

    Args:
        codes: exit codes by rank, negative for a signal; None for a rank that did not end and was killed.
        hit: whether the signal was sent.
        seconds: from the start to the end of the last rank.
        alone: seconds that the other ranks needed to end after one was killed; None if none was killed alone.
        step: the last step in metrics.jsonl when the signal was sent.
        log: the last lines of standard error of the ranks.
    """

    codes: tuple[int | None, ...]
    hit: bool
    seconds: float
    alone: float | None
    step: int
    log: str


def config_of(case: Case, data: Path, out: Path, **values: Any) -> Any:
    """The configuration of a case: 12 steps in 4 epochs, a checkpoint every two steps, a score every two epochs."""
    from fgfast.methods.base import method_class

    kind = method_class(case.method).Config
    known = {field.name: field.default for field in dataclasses.fields(kind)}
    options: dict[str, Any] = {
        "data": str(data), "out": str(out), "size": 32, "batch_size": {1: 6, 2: 3}.get(case.ranks, 2), "epochs": 4,
        "log_every": 1, "knn_every": 2, "save_every": "2s" if isinstance(known["save_every"], str) else 1,
        "device": "cpu", "threads": 1, "amp": "off", "rank_timeout": TIMEOUT, "resume": True, **NETS,
        **TINY.get(case.method, {}), **dict(case.options), **values,
    }  # fmt: skip
    return kind(**{name: value for name, value in options.items() if name in known})


def context() -> multiprocessing.context.ForkServerContext:
    """The start method of all processes here; what the server imports is set before the first one."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOADED)
    return found


def warm_up() -> None:
    """Start the server, which takes seconds, before the first process whose time counts."""
    process = context().Process(target=os.getpid)
    process.start()
    process.join()


def start(case: Case, data: Path, out: Path, aim: Aim | None = None, *, limit: float = 120.0, **values: Any) -> Ended:
    """Start all ranks of a case on the run folder ``out``, which is resumed if it exists, and wait for their end.

    A rank that ends in another way than by finishing gets the others SIGTERM, as torchrun does, unless the aim is at
    one rank alone: then they have to end by themselves.
    """
    logs = [out.parent / f"{out.name}-rank{rank}.log" for rank in range(case.ranks)]
    sent = out.parent / f"{out.name}-sent"
    sent.unlink(missing_ok=True)
    config = config_of(case, data, out, **values)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began = time.monotonic()
    running: list[BaseProcess] = []
    for rank, log in enumerate(logs):
        own = aim if aim is not None and aim.rank == rank and aim.place != "time" else None
        arguments = (rank, port, case, config, log, sent, own)
        running.append(context().Process(target=_rank, args=arguments, daemon=True))
        running[-1].start()
    alone = _watch(running, aim, began, limit, sent, out)
    seconds = time.monotonic() - began
    codes = tuple(process.exitcode if process.is_alive() is False else None for process in running)
    for process in running:
        if process.is_alive():
            process.kill()
        process.join()
    text = "\n".join(f"[rank {rank}] {_tail(log)}" for rank, log in enumerate(logs))
    hit = sent.exists()
    return Ended(codes, hit, seconds, alone, int(sent.read_text()) if hit else 0, text)


def _watch(
    running: list[BaseProcess], aim: Aim | None, began: float, limit: float, sent: Path, out: Path
) -> float | None:
    """Send the signals of an aim and wait; returns how long the others lived after one rank was killed alone."""
    older = metrics_file(out)
    died, told, waiting = None, None, aim if aim is not None and aim.place == "time" else None
    others_wait = aim is not None and not aim.all_ranks
    while any(process.is_alive() for process in running) and time.monotonic() - began < limit:
        now = time.monotonic()
        if waiting is not None and now - began >= waiting.delay:
            sent.write_text(str(last_step(out, older)))
            _send(running if waiting.all_ranks else running[waiting.rank : waiting.rank + 1], waiting.number)
            waiting = None
        if died is None and any(not p.is_alive() and p.exitcode != 0 for p in running):
            died = now
            if aim is not None and aim.place != "time" and aim.all_ranks and sent.exists():
                _send(running, aim.number)
        if died is not None and told is None and now - died > (3 * TIMEOUT if others_wait else 1.0):
            told = now
            _send(running, signal.SIGTERM)
        if told is not None and now - told > 10.0:
            break
        until = 0.25 if waiting is None else min(0.25, waiting.delay - (now - began))
        wait([p.sentinel for p in running if p.is_alive()], timeout=max(0.0, until))
    return time.monotonic() - died if others_wait and died is not None else None


def metrics_file(run: Path) -> int | None:
    """Identifies the present metrics.jsonl, which every start replaces; None if there is none."""
    try:
        return (run / "metrics.jsonl").stat().st_ino
    except OSError:
        return None


def last_step(run: Path, older: int | None) -> int:
    """The step of the last complete row of metrics.jsonl; 0 without one, and if the file is still the ``older`` one."""
    if metrics_file(run) == older:
        return 0
    try:
        rows = (run / "metrics.jsonl").read_text().split("\n")[:-1]
        return int(json.loads(rows[-1])["step"])
    except (OSError, ValueError, LookupError):
        return 0


def _send(processes: list[BaseProcess], number: int) -> None:
    for process in processes:
        if process.is_alive() and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
    if number == signal.SIGSTOP:
        time.sleep(random.uniform(0.2, 1.0))
        _send(processes, signal.SIGCONT)


def _tail(log: Path, lines: int = 6) -> str:
    text = log.read_text(errors="replace") if log.is_file() else ""
    return "\n".join(text.splitlines()[-lines:])


def _rank(rank: int, port: int, case: Case, config: Any, log: Path, sent: Path, aim: Aim | None) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if case.ranks > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case.ranks), "LOCAL_RANK": str(rank)}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    from fgfast.cli import main

    if aim is not None:
        send_at(aim, Path(config.out), case.method, sent)
    elif rank == 0:
        counts = count_events(Path(config.out), case.method)
    set_pretrain(case.method, config)
    sys.argv = ["fgfast", "pretrain"]
    status = main()
    if aim is None and rank == 0:
        sent.with_suffix(".json").write_text(json.dumps(counts))
    if torch.distributed.is_initialized() and status == 0:
        torch.distributed.destroy_process_group()
    sys.exit(status)


def set_pretrain(method: str, config: Any) -> None:
    """Let the command ``pretrain`` of this process train with a configuration, without the figures that follow."""
    from fgfast.cli import commands
    from fgfast.train.loop import pretrain

    def run(argv: list[str]) -> None:
        pretrain(method, config)

    commands.COMMANDS["pretrain"] = run


def count_events(run: Path, method: str) -> dict[str, int]:
    """A dictionary in which the events of all places are counted while this process runs."""
    counts = dict.fromkeys(PLACES, 0)
    folder = os.path.abspath(run)

    def add(place: str) -> None:
        counts[place] += 1

    def hook(event: str, values: tuple[Any, ...]) -> None:
        for place in PLACES[1:]:
            if _is_at(place, event, values, folder):
                add(place)

    _before_scores(method, lambda: add("score"))
    sys.addaudithook(hook)
    return counts


def send_at(aim: Aim, run: Path, method: str, sent: Path) -> None:
    """Let this process send the signal of ``aim`` to itself, after it has written the last step to ``sent``."""
    count, older = 0, metrics_file(run)

    def fire() -> None:
        sent.write_text(str(last_step(run, older)))
        os.kill(os.getpid(), aim.number)

    def event() -> None:
        nonlocal count
        count += 1
        if count == aim.nth:
            if aim.delay:
                threading.Timer(aim.delay, fire).start()
            else:
                fire()

    if aim.place == "score":
        _before_scores(method, event)
    else:
        place, folder = aim.place, os.path.abspath(run)
        sys.addaudithook(lambda name, values: event() if _is_at(place, name, values, folder) else None)


def _before_scores(method: str, event: Callable[[], None]) -> None:
    from fgfast.evaluate import protocols
    from fgfast.methods.base import method_class

    kind = method_class(method)
    for owner, name in ((kind, "scores"), (protocols, "online_knn")):
        real = getattr(owner, name)

        def counted(*args: Any, _real: Any = real, **options: Any) -> Any:
            event()
            return _real(*args, **options)

        setattr(owner, name, counted)


def _is_at(place: str, event: str, values: tuple[Any, ...], folder: str) -> bool:
    """Whether an audit event is an operation on a file of the run that belongs to the place."""
    if event not in ("open", "os.rename", "os.remove") or not isinstance(values[0], str | os.PathLike):
        return False
    path = os.path.abspath(os.fspath(values[0])) if not isinstance(values[0], bytes) else ""
    if not path.startswith(folder + os.sep):
        return False
    inside = path.removeprefix(folder + os.sep)
    if place == "discovery":
        return inside.startswith(("parts_", ".parts_"))
    return place == "files" or ".pt" in inside or ".safetensors" in inside
