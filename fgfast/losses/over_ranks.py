"""Means and random numbers over the images of all ranks, independent of how these are divided among the ranks.

The joined batch of W ranks has image j of rank r in place j W + r, as the loaders deal images to ranks.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fgfast.tensors import has_values

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def rank_and_world(group: "ProcessGroup | None") -> tuple[int, int]:
    """Rank of this process in a group, and its number of processes; (0, 1) without a group."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def count_valid(valid: Tensor, group: "ProcessGroup | None" = None) -> Tensor:
    """The number of valid rows of all ranks divided by the number of ranks, at least 1 row: a scalar.

    A sum divided by it, averaged over ranks as DistributedDataParallel averages gradients, is the mean over all rows.

    Example:
        >>> count_valid(torch.tensor([True, True, False])).item()
        2
    """
    count = valid.sum()
    if group is None:
        return count.clamp(min=1)
    dist.all_reduce(count, group=group)
    return count.clamp(min=1) / dist.get_world_size(group)


def mean_valid(
    values: Tensor, valid: Tensor, group: "ProcessGroup | None" = None, count: Tensor | None = None
) -> Tensor:
    """Mean of values [B] over the valid ones [B]; the others, NaN included, affect neither loss nor gradients.

    With a group: world size x local sum / global count, whose average over ranks is the mean over all of them. The
    numbers of rows may differ.

    Args:
        values: [B].
        valid: bool [B].
        group: the ranks over which the mean is taken.
        count: what :func:`count_valid` gave for these rows, to save a collective per mean.

    Example:
        >>> mean_valid(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False])).item()
        2.0
    """
    return torch.where(valid, values, 0).sum() / (count_valid(valid, group) if count is None else count)


def share_mean(loss: Tensor, group: "ProcessGroup") -> Tensor:
    """A loss with its own gradient whose value is the mean over the ranks."""
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    return loss + (total / dist.get_world_size(group) - loss.detach())


def count_rows(x: Tensor, group: "ProcessGroup") -> list[int]:
    """The numbers of rows of all ranks, on the host, which waits for them; without values, as if they were equal."""
    if not has_values(x):
        return [len(x)] * dist.get_world_size(group)
    counts = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=x.device)
    dist.all_gather(list(counts.split(1)), counts.new_full((1,), len(x)), group=group)
    lengths: list[int] = counts.tolist()
    return lengths


def gather_rows(x: Tensor, group: "ProcessGroup", lengths: list[int] | None = None) -> Tensor:
    """Rows of all ranks, rank by rank, from rows [B, ...] whose number may differ; without a gradient.

    Args:
        x: the rows of this rank.
        group: the ranks.
        lengths: what :func:`count_rows` gave for these rows, to wait once for several tensors.
    """
    lengths = count_rows(x, group) if lengths is None else lengths
    padded = x.new_zeros(max(lengths), *x.shape[1:])  # a collective takes as many rows of every rank
    padded[: len(x)] = x.detach()
    gathered = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([rows[:n] for rows, n in zip(gathered, lengths, strict=True)])


def draw_joined(draw: Callable[[int], Tensor], n: int, group: "ProcessGroup | None" = None) -> Tensor:
    """Rows of this rank of numbers that are drawn for the joined batch.

    Args:
        draw: gives numbers [N, ...] for N images, the same on every rank.
        n: number of images of each rank.
        group: the ranks.

    Example:
        >>> draw_joined(torch.arange, 2).tolist()
        [0, 1]
    """
    rank, world = rank_and_world(group)
    return draw(n * world)[rank::world]


def sample_images(
    sample: Callable[..., Tensor],
    n: int,
    device: torch.device,
    group: "ProcessGroup | None" = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Random numbers of the images of this rank, whichever rank these are on.

    Args:
        sample: gives numbers [N, ...] as sample(N, device=, generator=).
        n: number of images, the same on every rank.
        device: where the numbers go.
        group: the ranks.
        generator: in the same state on every rank; None draws only for this rank, by PyTorch's own.
    """
    source = device if generator is None else generator.device
    draw = partial(sample, device=source, generator=generator)
    return draw_joined(draw, n, None if generator is None else group).to(device)


def join_rows(x: Tensor, group: "ProcessGroup | None" = None) -> Tensor:
    """Rows [W B, ...] of the joined batch from rows [B, ...], as many on every rank; without a gradient.

    Example:
        >>> join_rows(torch.tensor([1, 2])).tolist()
        [1, 2]
    """
    world = rank_and_world(group)[1]
    if world == 1:
        return x.detach()
    out = x.new_empty(world * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.detach().contiguous(), group=group)
    return out.unflatten(0, (world, len(x))).transpose(0, 1).flatten(0, 1)
