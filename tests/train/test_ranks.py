"""Ranks that fail, are killed or stand still end the others, which name them; ranks started wrongly never begin.

The runs of all scenarios are started together: most of their time is waiting.
"""

import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from fgfast.errors import UserError
from fgfast.ranks import OtherRankError
from fgfast.train import heartbeat, rendezvous
from fgfast.train.distributed import check_equal, is_of_another_rank, joined
from tests import ranks

pytestmark = pytest.mark.slow

WORLD = 3
KILLED = "has ended without a word"
NO_NAME = r"\[c10d\] The hostname of the client socket cannot be retrieved"  # torch, where the resolver is busy
# Of each scenario the exit status of every rank, the rank that prints, and what it prints.
SCENARIOS: dict[str, tuple[list[int], int | None, str]] = {
    "a clean end, twice": ([0, 0, 0], None, ""),
    "the first is killed": ([-9, 2, 2], 1, rf"Rank 0 \(process \d+ on .+\) {KILLED}.*: run again with --resume"),
    "another is killed": ([2, -9, 2], 0, rf"Rank 1 \(process \d+ on .+\) {KILLED}"),
    "one is killed while the others are busy": ([2, -9, 2], 0, rf"Rank 1 .* {KILLED}"),
    "one is stopped": ([2, -9, 2], 0, r"Rank 1 .* has not answered for 8 s"),
    "the first is stopped": ([-9, 2, 2], 1, r"Rank 0 .* has not answered for 8 s"),
    "one hangs": ([2, 2, 2], 0, r"Rank 1 .* has been loading images at step 7 for over 8 s"),
    "one makes a mistake": ([2, 2, 2], 1, r"give another --data"),
    "all make a mistake": ([2, 2, 2], None, r"give another --data"),
    "one has other options": ([2, 2, 2], 0, "lr is 1 on rank 1 and 0 on rank 0: start all ranks alike"),
    "one is interrupted": ([130, 130, 130], None, "interrupted"),
}


def _run(rank: int, port: int, scenario: str) -> int:
    """One rank of a scenario; rank 1 is the one to which it happens, unless it is the first."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    from fgfast.cli import commands, main

    def command(_argv: list[str]) -> None:
        hit = rank == (0 if "the first" in scenario else 1)
        if scenario == "a clean end, twice":
            with joined("cpu"):
                dist.barrier()
        with joined("cpu") as members:
            heart = heartbeat._current
            assert heart is not None
            heart.interval = 0.6
            heart._wake.set()  # it waits for the interval of before, and the others take it for silent by the new one
            if "stopped" in scenario or "hangs" in scenario:
                heart.timeout = 8.0  # from here on: a busy machine may take longer to join
            dist.barrier()
            heartbeat.progress(7, "loading images")
            if "options" in scenario:
                check_equal(members, {"method": "simclr", "lr": rank})
            if "killed" in scenario and hit:
                os.kill(os.getpid(), signal.SIGKILL)
            if "stopped" in scenario and hit:
                os.kill(os.getpid(), signal.SIGSTOP)
            if "hangs" in scenario and hit:
                time.sleep(60)
            if "mistake" in scenario and (hit or "all" in scenario):
                raise UserError("give another --data.")
            if "interrupted" in scenario and hit:
                raise KeyboardInterrupt
            heartbeat.progress(8, "training")
            if "busy" in scenario:
                time.sleep(60)
            dist.barrier()

    commands.COMMANDS["pretrain"] = command
    return main(["pretrain"])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[int, str]]]:
    """Exit status and standard error of each rank of each scenario."""
    return ranks.run_together(_run, list(SCENARIOS), WORLD, tmp_path_factory.mktemp("ranks"), within=80)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks_end_together(results: dict[str, list[tuple[int, str]]], scenario: str) -> None:
    """With their exit statuses, and one sentence of one rank."""
    statuses, printer, sentence = SCENARIOS[scenario]
    assert [status for status, _ in results[scenario]] == statuses
    printed = [rank for rank, (_, text) in enumerate(results[scenario]) if "fgfast: " in text]
    whole = re.sub(rf".*{NO_NAME}.*\n", "", "".join(text for _, text in results[scenario]))
    assert whole.count("fgfast: ") == (3 if "interrupted" in scenario else bool(sentence)), whole
    assert re.search(sentence, whole) if sentence else not whole, whole
    assert printer is None or printed == [printer]


class Threads:
    """Ranks in threads of one process, which meet at a store in its memory."""

    def __init__(self) -> None:
        self.store = dist.HashStore()

    def meet(self, places: list[tuple[int, int]], timeout: float = 5) -> list[Any]:
        """What (rank, world) each get: the members, or an exception."""

        def meet(place: tuple[int, int]) -> Any:
            try:
                return rendezvous.meet(self.store, lambda: False, *place, timeout)
            except UserError as error:
                return error

        with ThreadPoolExecutor(len(places)) as pool:
            return list(pool.map(meet, places))


@pytest.mark.parametrize(
    ("places", "timeout", "sentence"),
    [
        ([(0, 2), (1, 3)], 5, "WORLD_SIZE is .* on rank . and .* on rank ."),
        ([(0, 3), (1, 3), (1, 3)], 5, "Two processes have RANK 1"),
        ([(0, 4), (2, 4)], 0.2, r"Ranks 1 and 3 of 4 did not join ranks 0 and 2 within 0 s \(--rank-timeout\)"),
    ],
)
def test_ranks_started_wrongly_do_not_begin(places: list[tuple[int, int]], timeout: float, sentence: str) -> None:
    """One rank reports it."""
    errors = Threads().meet(places, timeout)
    assert all(isinstance(error, UserError) for error in errors)
    (reported,) = (str(error) for error in errors if not isinstance(error, OtherRankError))
    assert re.search(sentence, reported), reported


def test_a_second_process_of_a_rank_leaves_those_that_train_alone() -> None:
    threads = Threads()
    members = threads.meet([(0, 2), (1, 2)])
    assert members[0] == members[1] == [rendezvous.Member.here()] * 2
    (error,) = threads.meet([(1, 2)])
    assert "Two processes have RANK 1" in str(error)
    assert rendezvous.Verdict.read(threads.store.get(rendezvous.VERDICT)) is None


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"MASTER_PORT {port} is in use on .*RANK 0: set another one"):
            rendezvous.connect(0, 2, "127.0.0.1", port, 1)


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("no such host", "MASTER_ADDR 'no such host' is no host"),
        (
            "127.0.0.1",
            r"Rank 1 found no rank 0 at MASTER_ADDR 127.0.0.1, MASTER_PORT 1 within 0 s \(Connection refused\)",
        ),
    ],
)
def test_an_address_without_a_first_rank_is_named(
    address: str, sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=sentence):
        rendezvous.connect(1, 2, address, 1, 0.1)
    assert capfd.readouterr().err == ""


def test_what_hangs_outside_python_is_given_up() -> None:
    """As a port at which something else listens, which answers nothing."""
    with pytest.raises(UserError, match="does not answer"):
        rendezvous.within(0.01, lambda: time.sleep(5), "it does not answer.")
    with pytest.raises(KeyError):
        rendezvous.within(5, lambda: {}["key"], "")


def hearts(timeout: float, world: int = 2) -> list[heartbeat.Heartbeat]:
    """The heartbeats of ranks in this process."""
    store, me = dist.HashStore(), rendezvous.Member.here()
    for rank in range(world):
        store.set(f"beat/{rank}", "{}")
    store.set(rendezvous.VERDICT, "none")
    return [heartbeat.Heartbeat(store, lambda: False, r, [me] * world, None, timeout) for r in range(world)]


class Silent(Store):
    """The store of a process that is stopped."""

    def set(self, *_: Any) -> None:
        threading.Event().wait()


def test_a_file_being_completed_puts_off_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank's failure does not cut a checkpoint."""
    done: list[str] = []
    monkeypatch.setattr(os, "_exit", lambda status: done.append(f"ended with {status}"))
    first, second = hearts(2)
    with heartbeat.holding():
        second.fail("give another --data.")
        second.leave(heartbeat.FAILED)
        time.sleep(1.7)  # over the grace of 1.4 s
        done.append("written")
    first._threads[1].join(10)
    assert done == ["written", "ended with 2"]


def test_a_rank_is_behind_from_when_the_others_get_on() -> None:
    """A phase of any length without progress makes no rank late; one that then stands still is."""
    first, second = hearts(1)
    lost = RuntimeError("Connection closed by peer")
    time.sleep(1.2)
    first.progress(1, "training")
    time.sleep(0.4)
    second.progress(1, "training")
    assert not first._decided.is_set()
    first.progress(2, "training")
    assert first._decided.wait(10)
    with pytest.raises(UserError, match=r"Rank 1 .* has been training at step 1 for over 1 s"):
        raise first.explain(lost)
    with pytest.raises(OtherRankError):
        raise second.explain(lost)
    for heart in (first, second):
        heart.leave(heartbeat.FAILED)


def test_a_rank_that_is_silent_itself_is_not_asked_to_print() -> None:
    """The first is accused while the second is silent too, but not yet for long enough: the third prints."""
    silent = hearts(2, world=3)
    last = silent.pop()
    for heart in silent:
        heart._closed.set()
        heart._stop = True
        heart._wake.set()
        time.sleep(0.6)  # so much later is the second silent: three of its intervals, of 2 s before it is accused
    assert last._decided.wait(10)
    error = last.explain(RuntimeError("Connection closed by peer"))
    assert re.search("Rank 0 .* has not answered for 2 s", str(error))
    assert not isinstance(error, OtherRankError)  # which would leave the sentence to the second
    last.leave(heartbeat.FAILED)


def test_a_store_that_does_not_answer_accuses_its_host_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last beat of another rank is older than what was read last, but that rank may well have beaten since."""
    monkeypatch.setattr(heartbeat.Heartbeat, "_patience", lambda _: 1.0)
    first, second, third = hearts(2, world=3)
    third.host = 0
    second._stop = True
    second._wake.set()
    time.sleep(0.5)  # so much older than what is read last is the second's beat: it would be accused before the host
    third.store = Silent()
    assert third._decided.wait(10)
    for heart in (first, second, third):
        heart._stop = True
        heart._closed.set()
    assert third._verdict is not None
    assert re.search("Rank 0 .* has not answered for 2 s", third._verdict.sentence)


def test_an_interrupted_rank_is_believed_at_once() -> None:
    """When a collective has failed, whatever a busy machine does to the others' clocks."""
    first, second = hearts(20)
    second.leave(heartbeat.INTERRUPTED)
    began = time.monotonic()
    error = first.explain(RuntimeError("Connection closed by peer"))
    assert isinstance(error, KeyboardInterrupt)
    assert time.monotonic() - began < first._patience()
    first.leave(heartbeat.INTERRUPTED)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[.../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("[.../unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL error"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ConnectionResetError("Connection reset by peer"), False),
    ],
)
def test_errors_that_speak_of_another_rank(error: Exception, expected: bool) -> None:
    assert is_of_another_rank(error) == expected
