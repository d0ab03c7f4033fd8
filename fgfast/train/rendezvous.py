"""How the ranks meet: a store in the process of the first rank, or of torchrun, at MASTER_ADDR and MASTER_PORT."""

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from fgfast.errors import UserError
from fgfast.ranks import OtherRankError

T = TypeVar("T")
VERDICT = "verdict"
_NONE = "none"
_connections: dict[tuple[str, int, bool], "Connection"] = {}  # kept until the process ends: it may join again


@dataclass(frozen=True)
class Member:
    """The process of a rank."""

    process: int
    host: str

    @classmethod
    def here(cls) -> "Member":
        """This process."""
        return cls(os.getpid(), socket.gethostname())


@dataclass(frozen=True)
class Connection:
    """The store, and an idle socket to it, whose end tells that the process of the store has ended.

    A call of a store that is gone tells it too, and torch prints twenty lines about it.
    """

    store: Store
    idle: socket.socket | None = None

    def is_lost(self) -> bool:
        """Whether the process of the store has ended."""
        if self.idle is None:
            return False
        try:
            return not self.idle.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def part(self, prefix: str) -> Store:
        """A part of the store, with a connection of its own."""
        return PrefixStore(prefix, self.store.clone())


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end; the first one that is written to the store holds.

    Attributes:
        sentence: the reason.
        printer: the rank that prints it.
        status: exit status of the others.
    """

    sentence: str
    printer: int
    status: int = 2

    @classmethod
    def read(cls, text: bytes) -> "Verdict | None":
        """The verdict in the store, if there is one."""
        return None if text.decode() == _NONE else cls(**json.loads(text))


def post(store: Store, verdict: Verdict) -> None:
    """Write a verdict to the store, unless there is one."""
    store.compare_set(VERDICT, _NONE, json.dumps(vars(verdict)))


def connect(rank: int, world: int, address: str, port: int, timeout: float) -> Connection:
    """Reach the store at an address: the first rank holds it, unless torchrun does, and the others wait for it.

    Raises:
        UserError: the port is in use, or nothing answers at the address within the time.
    """
    hosting = rank == 0 and not hosted_by_torchrun()
    key = (address, port, hosting)
    if key not in _connections:
        listening = _listen(port) if hosting else None
        idle = _reach(rank, address, port, min(timeout, 10) if hosting else timeout)
        store = TCPStore(
            address, port, world, hosting, timedelta(seconds=timeout), wait_for_workers=False,
            master_listen_fd=_hand_over(listening),
        )  # fmt: skip
        _connections[key] = Connection(store, idle)
    return _connections[key]


def hosted_by_torchrun() -> bool:
    """Whether the store lives in a process of torchrun, which outlives the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def meet(store: Store, is_lost: Callable[[], bool], rank: int, world: int, timeout: float) -> list[Member]:
    """Wait for all ranks; the store then has the first beat of each, and the verdict that there is none.

    Args:
        store: the store.
        is_lost: whether the process of the store has ended.
        rank: this rank.
        world: the number of ranks.
        timeout: seconds to wait.

    Raises:
        UserError: two processes have the same rank, the numbers of ranks differ, or one is missing after the time.
        OtherRankError: another rank found such a mistake.
    """

    def refuse(sentence: str) -> UserError:
        post(store, Verdict(sentence, rank))
        verdict = Verdict.read(store.get(VERDICT))
        return (UserError if verdict == Verdict(sentence, rank) else OtherRankError)(sentence)

    me = Member.here()
    store.compare_set(VERDICT, "", _NONE)
    if store.add(f"taken/{rank}", 1) > 1:
        sentence = (
            f"Two processes have RANK {rank}, this one ({me.process} on {me.host}) and an earlier one: {_REMEDY}."
        )
        raise UserError(sentence) if store.check(["complete"]) else refuse(sentence)
    first, other = json.loads(store.compare_set("world", "", json.dumps([world, rank])))
    if first != world:
        raise refuse(f"WORLD_SIZE is {world} on rank {rank} and {first} on rank {other}: {_REMEDY}.")
    store.set(f"beat/{rank}", "{}")
    store.set(f"member/{rank}", json.dumps(vars(me)))
    keys, end, pause = [f"member/{r}" for r in range(world)], time.monotonic() + timeout, 0.01
    while not store.check(keys):
        if is_lost():
            raise UserError(f"Rank {rank} lost rank 0 before all ranks had joined: {_REMEDY}.")
        if (verdict := Verdict.read(store.get(VERDICT))) is not None:
            raise OtherRankError(verdict.sentence)
        if time.monotonic() > end:
            here = [str(r) for r, key in enumerate(keys) if store.check([key])]
            missing = [str(r) for r in range(world) if str(r) not in here]
            raise refuse(
                f"{_listed(missing)} of {world} did not join {_listed(here).lower()} within {timeout:.0f} s "
                f"(--rank-timeout): {_REMEDY}."
            )
        time.sleep(pause)
        pause = min(0.3, 1.5 * pause)
    store.set("complete", "")
    return [Member(**json.loads(text)) for text in store.multi_get(keys)]


def within(seconds: float, action: Callable[[], T], late: str) -> T:
    """The value of ``action``, which may hang outside Python, as at a port of another program.

    Raises:
        UserError: with the sentence ``late``, if there is none after the time.
    """
    values: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            values.append(action())
        except BaseException as error:  # raised again below
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not values:
        raise UserError(late)
    return values[0]


_REMEDY = "start every rank once, with the same WORLD_SIZE, MASTER_ADDR and MASTER_PORT"


def _listed(ranks: list[str]) -> str:
    return f"Rank {ranks[0]}" if len(ranks) == 1 else f"Ranks {', '.join(ranks[:-1])} and {ranks[-1]}"


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, backlog=2048, dualstack_ipv6=both
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"MASTER_PORT {port} is in use on {socket.gethostname()}, by another program or another process with "
                "RANK 0: set another one for all ranks."
            ) from error
        raise UserError(f"MASTER_PORT {port} cannot be used ({error.strerror}): set another one.") from error


def _hand_over(listening: socket.socket | None) -> int | None:
    """The socket's number for torch, which needs it where sockets are files; elsewhere the port is free again."""
    if listening is not None and os.name == "posix":
        return listening.detach()
    if listening is not None:
        listening.close()
    return None


def _reach(rank: int, address: str, port: int, timeout: float) -> socket.socket:
    """Wait until something listens; here, because torch prints a warning for every attempt that fails."""
    end = time.monotonic() + timeout
    while True:
        try:
            reached = socket.create_connection((address, port), timeout=max(1.0, end - time.monotonic()))
        except OSError as error:
            if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
                raise UserError(f"MASTER_ADDR {address!r} is no host that {socket.gethostname()} knows.") from error
            if time.monotonic() > end:
                raise UserError(
                    f"Rank {rank} found no rank 0 at MASTER_ADDR {address}, MASTER_PORT {port} within {timeout:.0f} s "
                    f"({error.strerror or 'no answer'}): start rank 0 there, or correct the address."
                ) from error
            time.sleep(0.1)
        else:
            reached.setblocking(False)
            return reached
