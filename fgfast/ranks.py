"""The processes that train together: their number, and actions of the first one that the others wait for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

from fgfast.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among those that train together; by default it is the only one."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0


class OtherRankError(UserError):
    """A mistake that the first rank reports: the command line prints it there alone."""


def ranks_of(group: dist.ProcessGroup | None, device: torch.device) -> Ranks:
    """The ranks of a process group whose collectives take tensors on ``device``; None is this process alone."""
    return Ranks(0, 1, device) if group is None else Ranks(dist.get_rank(group), dist.get_world_size(group), device)


def on_first(ranks: Ranks, action: Callable[[], T]) -> T | None:
    """Run ``action`` on the first rank while the others wait; an exception ends the others too.

    An interrupt does not: a KeyboardInterrupt leaves the others waiting, until torchrun stops them.

    Returns:
        Its value on the first rank, None on the others.

    Raises:
        OtherRankError: on the other ranks, if it raised an exception on the first.
    """
    if ranks.world == 1:
        return action()
    error, value = None, None
    if ranks.first:
        try:
            value = action()
        except Exception as raised:  # raised again below, once the others know
            error = raised
    message = [None if error is None else str(error) or type(error).__name__]
    dist.broadcast_object_list(message, src=0, device=ranks.device)
    if error is not None:
        raise error
    if message[0] is not None:
        raise OtherRankError(message[0])
    return value


def share_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """As :func:`on_first`, but its value is returned on all ranks; it must be one that can be pickled."""
    value = on_first(ranks, action)
    if ranks.world > 1:
        values = [value]
        dist.broadcast_object_list(values, src=0, device=ranks.device)
        value = values[0]
    return value  # type: ignore[return-value]  # the value of the first rank


def on_any(ranks: Ranks, condition: bool) -> bool:
    """Whether a condition holds on any rank."""
    if ranks.world == 1:
        return condition
    flag = torch.tensor(float(condition), device=ranks.device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def gather(ranks: Ranks, value: T) -> list[T]:
    """The values of all ranks in their order, on every rank; they must be ones that can be pickled."""
    values: list[T] = [value] * ranks.world
    if ranks.world > 1:
        dist.all_gather_object(values, value)
    return values


def on_all(ranks: Ranks, action: Callable[[], T]) -> T:
    """Run ``action``, in which no rank waits for another, on all ranks; an exception on one of them ends all.

    Returns:
        Its value on this rank.

    Raises:
        UserError: on the first rank, if ``action`` raised an exception on another one only.
        OtherRankError: on the other ranks, if it raised an exception elsewhere or one that the first rank reports.
        RuntimeError: on the ranks without an exception, if that of another one is no UserError or OSError.
    """
    if ranks.world == 1:
        return action()
    error, value = None, None
    try:
        value = action()
    except Exception as raised:  # raised again below, once the others know
        error = raised
    expected = isinstance(error, UserError | OSError)
    answers = gather(ranks, None if error is None else (str(error) or type(error).__name__, expected))
    if error is not None and (ranks.first or not isinstance(error, UserError)):
        raise error
    for rank, answer in enumerate(answers):
        if answer is not None and not answer[1]:  # a bug, which nobody may take for a mistake of the user
            raise RuntimeError(f"Rank {rank} failed: {answer[0]}")
    if message := next((answer[0] for answer in answers if answer is not None), None):
        raise (UserError if ranks.first else OtherRankError)(message)
    return value  # type: ignore[return-value]  # the action raised nothing
