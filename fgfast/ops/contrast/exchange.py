"""Transfers between the ranks of a process group: every rank sends to the next one and receives from the previous."""

import struct
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fgfast.tensors import FLOATS

Choice = tuple[Any, tuple[Any, ...]]  # a value, and all values of which it is one


class Ring:
    """The ranks of a group, which have different numbers of columns and agree about everything else.

    Made by one all_gather and one read of its result, which is a device sync.

    Args:
        group: the process group.
        columns: those of this rank, [T, D]; T may differ between ranks.
        choices: by name, what all ranks must have chosen alike.
        numbers: by name, numbers or 0-d tensors that must be equal on all ranks.

    Raises:
        ValueError: on every rank, if they disagree about D, a dtype, a choice or a number.
    """

    def __init__(
        self, group: dist.ProcessGroup, columns: Tensor, choices: dict[str, Choice] | None = None,
        numbers: dict[str, float | Tensor] | None = None,
    ):  # fmt: skip
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self.previous = dist.get_global_rank(group, (self.rank - 1) % self.size)
        choices, numbers = {"dtype": (columns.dtype, FLOATS), **(choices or {})}, numbers or {}
        row = torch.tensor(
            [len(columns), columns.shape[1], *(values.index(value) for value, values in choices.values())]
            + [int(isinstance(x, Tensor)) for x in numbers.values()]
            + [0 if isinstance(x, Tensor) else struct.unpack("q", struct.pack("d", x))[0] for x in numbers.values()],
            device=columns.device,
        )  # fmt: skip
        for i, x in enumerate(reversed(numbers.values()), 1):
            if isinstance(x, Tensor):  # its bits are copied, as reading it would be another sync
                row[-i] = x.detach().to(torch.float64).view(torch.int64)
        rows = row.new_empty(self.size, len(row))
        dist.all_gather(list(rows.unbind()), row, group=group)
        received: list[list[int]] = rows.tolist()
        self.counts = [given[0] for given in received]  # columns of each rank
        _compare(group, [_describe(given[1:], choices, list(numbers)) for given in received])

    def start(self, tensors: list[Tensor], step: int) -> tuple[list[Tensor], list[dist.Work]]:
        """Start to send the block of rank - step; returns the tensors being received, and the work to wait for."""
        if self.size == 1:
            return tensors, []
        length = self.counts[(self.rank - step - 1) % self.size]
        arriving = [t.new_empty(length, *t.shape[1:]) for t in tensors]
        operations = [dist.P2POp(dist.isend, t, self.next, self.group) for t in tensors if t.numel()]
        operations += [dist.P2POp(dist.irecv, t, self.previous, self.group) for t in arriving if t.numel()]
        return arriving, dist.batch_isend_irecv(operations) if operations else []

    def pass_around(self, block: list[Tensor], compute: Callable[[list[Tensor]], Tensor | None]) -> Tensor | None:
        """Call ``compute`` with the block of every rank, own first, while the next block is on its way.

        Returns the sum over the ranks of what they compute for the block of this rank, None if they return None. The
        sum follows its block, a step behind: it arrives while this rank computes its own part. So that no buffer is
        used again too early, what is being sent keeps a name until after the wait.
        """
        total: Tensor | None = None
        arrived: Tensor | None = None
        of_total: list[dist.Work] = []
        for step in range(self.size):
            last = step == self.size - 1
            arriving, of_block = (block, []) if last else self.start(block, step)
            computed = compute(block)
            wait(of_total)
            if computed is not None:
                total = computed if arrived is None else computed.add_(arrived)
                (arrived,), of_total = self.start([total], step)
            wait(of_block)
            block = arriving
        wait(of_total)
        return arrived


def _describe(received: list[int], choices: dict[str, Choice], numbers: list[str]) -> dict[str, str]:
    """By name, what a rank was called with."""
    channels, *rest = received
    first, second = len(choices), len(choices) + len(numbers)
    indices, kinds, bits = rest[:first], rest[first:second], rest[second:]
    described = {"D": str(channels)}
    for (name, (_, values)), index in zip(choices.items(), indices, strict=True):
        described[name] = repr(values[index])
    for name, is_tensor, of_number in zip(numbers, kinds, bits, strict=True):
        (number,) = struct.unpack("d", struct.pack("q", of_number))
        described[name] = f"tensor({number})" if is_tensor else str(number)
    return described


def _compare(group: dist.ProcessGroup, described: list[dict[str, str]]) -> None:
    """Raise on the first difference between the first rank and another one."""
    for rank, other in enumerate(described):
        for name, value in described[0].items():
            if other[name] != value:
                raise ValueError(
                    f"{name} is {value} on rank {dist.get_global_rank(group, 0)} and {other[name]} on rank "
                    f"{dist.get_global_rank(group, rank)}: give all ranks the same options."
                )


def process_group(name: str) -> dist.ProcessGroup:
    """The process group with this name; operations take names because these can be traced.

    PyTorch's own traced collectives look up names with the same function; there is no public one.
    """
    from torch.distributed import distributed_c10d as c10d

    return c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]


def wait(transfers: list[dist.Work]) -> None:
    """Wait until the tensors have been sent and received; on a GPU only its stream waits."""
    for work in transfers:
        work.wait()
