"""Whether the other ranks still answer.

Every rank writes a beat to the store that all share and reads the others', in a thread of its own, since the main
thread of a rank that waits for a dead one hangs outside Python. The first rank that finds another one dead writes a
verdict, by which all end.
"""

import contextlib
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from fgfast.errors import UserError
from fgfast.files import is_running
from fgfast.ranks import OtherRankError
from fgfast.train.rendezvous import VERDICT, Member, Verdict, post

DONE, INTERRUPTED, FAILED = "done", "interrupted", "failed"
"""How a rank has left the others."""
REMEDY = "run again with --resume to continue from the last checkpoint"

_held = 0
_released = threading.Condition()
_current: "Heartbeat | None" = None


def progress(step: int, doing: str = "training") -> None:
    """Tell the other ranks that this one has got on; they must all call this the same number of times.

    A rank that falls behind by one call for as long as --rank-timeout ends the run, even if it still answers.

    Args:
        step: steps done.
        doing: what comes next, for the message "Rank 1 has been ... for 300 s".
    """
    if _current is not None:
        _current.progress(step, doing)


@contextlib.contextmanager
def holding() -> Iterator[None]:
    """While a file is completed, another rank's failure does not end this process; for --rank-timeout at most."""
    global _held
    with _released:
        _held += 1
    try:
        yield
    finally:
        with _released:
            _held -= 1
            _released.notify_all()


@dataclass
class Beat:
    """What a rank tells the others."""

    number: int = 0
    calls: int = 0
    step: int = 0
    doing: str = "starting"
    left: str = ""


@dataclass
class _Other:
    """What this rank has seen of another one, and since when."""

    beat: Beat = field(default_factory=Beat)
    beaten: float = 0.0
    seen: float = 0.0
    """When its last beat was read; ``beaten`` is later where this process stood still itself."""
    behind: float = math.inf
    """Since when it has been behind others by the same number of calls."""
    gone: float = math.inf
    """When its process was seen to have ended."""

    def see(self, beat: Beat, now: float) -> None:
        if beat.number != self.beat.number:
            self.beaten = self.seen = now
        if beat.calls != self.beat.calls:
            self.behind = math.inf
        self.beat = beat


class Heartbeat:
    """The threads of one rank that beat and watch, from its construction until :meth:`leave`.

    Args:
        store: a connection of its own to the store of the ranks.
        is_lost: whether the process of the store has ended.
        rank: this rank.
        members: all ranks; each has put its first beat into the store.
        host: the rank within whose process the store lives; None if it is none of them.
        timeout: seconds without a beat after which a rank is dead.
    """

    def __init__(
        self,
        store: Store,
        is_lost: Callable[[], bool],
        rank: int,
        members: list[Member],
        host: int | None,
        timeout: float,
    ):
        global _current
        self.store, self.is_lost = store, is_lost
        self.rank, self.members, self.host, self.timeout = rank, members, host, timeout
        self.interval = min(2.0, timeout / 10)
        store.set_timeout(timedelta(seconds=2 * timeout + 60))  # longer than here: torch would print a warning
        now = time.monotonic()
        self._stood = self._went_on = 0.0  # seconds for which this process stood still itself, and when that ended
        self._others = {r: _Other(beaten=now, seen=now) for r in range(len(members)) if r != rank}
        self._beat = Beat()
        self._asked = now  # when the last exchange that is done began
        self._exchanged, self._lost, self._suspicious, self._stop = now, False, False, False
        self._proposal: Verdict | None = None
        self._verdict: Verdict | None = None
        self._wake, self._told, self._decided, self._closed = (threading.Event() for _ in range(4))
        self._last_word = threading.Lock()  # of the thread that ends the process or lets it go on
        self._threads = [threading.Thread(target=f, daemon=True) for f in (self._exchange, self._watch)]
        for thread in self._threads:
            thread.start()
        _current = self

    def progress(self, step: int, doing: str) -> None:
        """See :func:`progress`."""
        self._beat.step, self._beat.doing, self._beat.calls = step, doing, self._beat.calls + 1

    def fail(self, sentence: str) -> Verdict:
        """End the other ranks because this one has failed; returns the verdict, which is another's if that was first.

        Args:
            sentence: why; this rank prints it.
        """
        self._propose(Verdict(sentence, self.rank))
        self._decided.wait(3 * self.interval + 1)
        return self._verdict or Verdict(sentence, self.rank)

    def explain(self, error: Exception) -> BaseException:
        """The exception to raise in place of one by which a collective says that another rank does not take part."""
        self._suspicious = True
        wait = self._patience() + 3 * self.interval + 2
        began = time.monotonic()
        last = began + max(wait, self.timeout)  # a process that stands still itself learns late what has happened
        while not self._decided.is_set() and time.monotonic() < min(max(began, self._went_on) + wait, last):
            with contextlib.suppress(KeyboardInterrupt):  # torchrun ends all ranks when one has ended
                self._decided.wait(0.1)
        verdict = self._verdict or self.fail(
            f"The ranks lost touch although all of them answer ({_cause(error)}): {REMEDY}, with a higher "
            f"--rank-timeout if one of them was busy for more than {self.timeout:.0f} s."
        )
        if verdict.status == 130:
            return KeyboardInterrupt()
        return (UserError if verdict.printer == self.rank else OtherRankError)(verdict.sentence)

    def leave(self, how: str) -> None:
        """Tell the others that this rank takes no further part, and stop.

        The rank that holds the store goes last.

        Args:
            how: DONE, INTERRUPTED or FAILED.
        """
        global _current
        _current = None
        if not self._last_word.acquire(blocking=False):
            threading.Event().wait()  # the watching thread ends this process
        self._closed.set()
        if self._lost and how == FAILED:
            time.sleep(1.5 * self.interval)  # the others of this machine shall see that this rank is there to print it
        self._tell(how)
        self._stop = True
        self._wake.set()
        for thread in self._threads:
            thread.join(self.interval)

    def _tell(self, how: str) -> None:
        """Mark this rank as gone; the one that holds the store waits until the others have read what they need."""
        self._beat.left = how
        self._told.clear()
        self._wake.set()
        self._told.wait(2 * self.interval + 1)
        end = time.monotonic() + (self.timeout if how == DONE else self._patience())
        while self.rank == self.host and not self._lost and time.monotonic() < end:
            now = time.monotonic()
            if all(o.beat.left or self._is_still(r, now, self._patience()) for r, o in self._others.items()):
                break
            self._wake.set()
            time.sleep(0.02)

    def _exchange(self) -> None:
        """Beat, and read what the others wrote."""
        beats, key = [f"beat/{r}" for r in self._others], f"beat/{self.rank}"
        while not self._stop:
            self._wake.clear()
            left, asked = self._beat.left, time.monotonic()
            self._beat.number += 1
            try:
                if self.is_lost():
                    raise RuntimeError
                if self._proposal is not None:
                    post(self.store, self._proposal)
                self.store.set(key, json.dumps(vars(self._beat)))
                if left and self.rank != self.host:  # the host may end as soon as it has read this
                    self._told.set()
                    return
                *read, verdict = self.store.multi_get([*beats, VERDICT])
            except RuntimeError:
                self._lost = True
                self._told.set()
                return
            now = time.monotonic()
            for other, text in zip(self._others.values(), read, strict=True):
                other.see(Beat(**json.loads(text)), now)
            self._asked, self._exchanged = asked, now
            if self._verdict is None:
                self._verdict = Verdict.read(verdict)
            if self._verdict is not None:
                self._decided.set()
            if left:
                self._told.set()
            self._wake.wait(self.interval)

    def _watch(self) -> None:
        """Judge the others; end this process after a verdict, unless its main thread leaves by itself."""
        last = time.monotonic()
        while not self._decided.is_set():
            tick = 0.05 if self._suspicious else self.interval / 2
            if self._closed.wait(tick):
                return
            now = time.monotonic()
            if now - last > tick + min(1.0, self.timeout / 4):  # the others' beats are yet to be read
                self._stood, self._went_on, self._exchanged = now - last, now, now
                for other in self._others.values():
                    other.beaten, other.behind = now, math.inf
            last = now
            self._lost = self._lost or self.is_lost()
            verdict = self._judge(now)
            if verdict is None:
                continue
            if self._lost or now - self._exchanged > self._patience():  # nobody is left to agree with
                self._verdict = verdict
                self._decided.set()
            else:
                self._propose(verdict)
                self._decided.wait(self.interval)
                last = time.monotonic()
        if self._closed.wait(2 * self.interval + 1):
            return
        assert self._verdict is not None
        self._end(self._verdict)

    def _judge(self, now: float) -> Verdict | None:
        """The verdict on the ranks that do not answer, if there are any."""
        limit = self._patience() if self._suspicious else self.timeout
        if self._lost or now - self._exchanged > limit:
            return self._verdict_on_the_host(limit)
        still = [r for r in self._others if not self._others[r].beat.left and self._is_still(r, now, limit)]
        if still:
            return self._accuse(still, self._how(not _runs(self.members[still[0]]), limit))
        interrupted = [r for r, o in self._others.items() if o.beat.left == INTERRUPTED]
        if interrupted and (self._suspicious or now - self._others[interrupted[0]].beaten > limit):
            return Verdict(f"Rank {interrupted[0]} was interrupted.", interrupted[0], 130)
        most = max(self._beat.calls, *(o.beat.calls for o in self._others.values()))
        for other in self._others.values():
            is_behind = other.beat.calls < most and not other.beat.left
            other.behind = min(other.behind, now) if is_behind else math.inf
        answer = [r for r, o in self._others.items() if now - o.beaten < 3 * self.interval]
        behind = [r for r in answer if now - self._others[r].behind > self.timeout]
        if behind:
            beat = self._others[behind[0]].beat
            how = f"has been {beat.doing} at step {beat.step} for over {self.timeout:.0f} s (--rank-timeout)"
            return self._accuse(behind, how)
        return None

    def _verdict_on_the_host(self, limit: float) -> Verdict:
        """The store does not answer, so its host is dead; each machine has a rank that says so."""
        if self.host is None:
            return Verdict(f"The store at which the ranks meet does not answer: {REMEDY}.", self.rank)
        here = [r for r, m in enumerate(self.members) if r != self.host and m.host == self.members[self.rank].host]
        printer = min((r for r in here if _runs(self.members[r]) and self._answers(r)), default=self.rank)
        ended = self._lost or not _runs(self.members[self.host])
        return self._accuse([self.host], self._how(ended, limit), printer)

    def _accuse(self, ranks: list[int], how: str, printer: int | None = None) -> Verdict:
        if self._stood > self.timeout / 2 and time.monotonic() - self._went_on < self.timeout:
            me = self.members[self.rank]
            how = f"stood still for {self._stood:.0f} s, and the others went without it"
            return Verdict(f"Rank {self.rank} (process {me.process} on {me.host}) {how}: {REMEDY}.", self.rank)
        member = self.members[ranks[0]]
        more = {0: "", 1: ", and another one too,"}.get(len(ranks) - 1, f", and {len(ranks) - 1} others too,")
        living = [r for r in range(len(self.members)) if r not in ranks and self._answers(r)]
        sentence = f"Rank {ranks[0]} (process {member.process} on {member.host}){more} {how}: {REMEDY}."
        return Verdict(sentence, min(living) if printer is None else printer)

    def _how(self, ended: bool, limit: float) -> str:
        if ended:
            return "has ended without a word, perhaps killed or out of memory"
        return f"has not answered for {limit:.0f} s{' (--rank-timeout)' if limit == self.timeout else ''}"

    def _answers(self, rank: int) -> bool:
        """Whether a rank is there to print: one that is silent, but not for long enough to be accused, may not be."""
        if rank == self.rank:
            return True
        other = self._others[rank]
        return not other.beat.left and self._asked - other.seen < 3 * self.interval

    def _is_still(self, rank: int, now: float, limit: float) -> bool:
        """Whether a rank has not beaten for ``limit`` seconds, or has missed two beats and its process is gone.

        Only what was read counts: while the store does not answer, nothing is known of any rank but its host.
        """
        other = self._others[rank]
        if now - other.beaten < 2.5 * self.interval:
            return False
        if other.gone == math.inf and not _runs(self.members[rank]):
            other.gone = now
        return self._asked > min(other.beaten + limit, other.gone)  # it may have left properly just before

    def _patience(self) -> float:
        """Seconds without a beat after which a rank is dead, once a collective has failed."""
        return min(self.timeout, max(4 * self.interval, 4.0))

    def _propose(self, verdict: Verdict) -> None:
        self._proposal = self._proposal or verdict
        self._wake.set()

    def _end(self, verdict: Verdict) -> None:
        """End the process, whatever its main thread does: it may hang with every lock that printing needs."""
        with _released:
            _released.wait_for(lambda: not _held, self.timeout)
        if not self._last_word.acquire(blocking=False):
            return

        def say() -> None:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            if verdict.printer == self.rank:
                cursor = b"\n\x1b[?25h" if os.isatty(2) else b""  # which a progress bar has hidden
                os.write(2, cursor + f"fgfast: {verdict.sentence}\n".encode(errors="backslashreplace"))

        said = threading.Thread(target=say, daemon=True)
        said.start()
        said.join(5)
        self._tell(FAILED)
        os._exit(verdict.status)


def _runs(member: Member) -> bool:
    """Whether a process of this machine still runs; True for others, whose state is not known."""
    return member.host != Member.here().host or os.name != "posix" or is_running(member.process)


def _cause(error: Exception) -> str:
    """The first line of a message of torch, without the file of its source."""
    return re.sub(r"^\[\S+\] *", "", str(error).partition("\n")[0])[:200].rstrip(".") or type(error).__name__
