"""Transfers between the ranks of a process group: every rank sends to the next one and receives from the previous."""

import torch
import torch.distributed as dist
from torch import Tensor


class Ring:
    """Sends lists of tensors to the next rank and receives those of the previous one."""

    def __init__(self, group: dist.ProcessGroup, columns: Tensor):
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self.previous = dist.get_global_rank(group, (self.rank - 1) % self.size)
        count = torch.tensor([len(columns)], device=columns.device)
        counts = count.new_empty(self.size)
        dist.all_gather(list(counts.split(1)), count, group=group)
        self.counts: list[int] = counts.tolist()  # columns of each rank

    def start(self, tensors: list[Tensor], step: int) -> tuple[list[Tensor], list[dist.Work]]:
        """Start to send the block of rank - step; returns the tensors being received, and the work to wait for."""
        if self.size == 1:
            return tensors, []
        length = self.counts[(self.rank - step - 1) % self.size]
        arriving = [t.new_empty(length, *t.shape[1:]) for t in tensors]
        operations = [dist.P2POp(dist.isend, t, self.next, self.group) for t in tensors if t.numel()]
        operations += [dist.P2POp(dist.irecv, t, self.previous, self.group) for t in arriving if t.numel()]
        return arriving, dist.batch_isend_irecv(operations) if operations else []


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
