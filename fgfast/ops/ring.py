r"""The contrast over the columns of all ranks: keys travel round a ring, logits stay tiles.

Rank r starts with its own keys and passes them to rank r + 1 while it works on them; after W blocks every row has met
every column. Backward sends the keys round again together with the gradient that they have gathered so far, which is
home after W steps. Each rank holds two blocks of keys; nothing of size rows x all columns exists.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fgfast.ops import _contrast_tiled as tiled
from fgfast.ops._tensors import accumulation, exact
from fgfast.ops.ids import Ids


def global_ids(ids: Ids, group: "dist.ProcessGroup | None" = None) -> Ids:
    """Shift image ids so that no two ranks of a group share one.

    Rank r adds the sum over the ranks before it of (highest image id + 1).

    Args:
        ids: ids of this rank, image ids 0 and up; the number of them may be 0 and may differ between ranks.
        group: the process group; None is the default group, or one process where none was set up.

    Returns:
        Ids with int64 image ids that are unique over the group; parts and views as they were.

    Raises:
        ValueError: an image id is negative (looked at on the CPU).

    Example:
        >>> import torch
        >>> from fgfast import Ids, global_ids
        >>> global_ids(Ids(*torch.zeros(3, 2, dtype=torch.int64))).image
        tensor([0, 0])
    """
    image = ids.image.to(torch.int64)
    if image.device.type == "cpu" and len(image) and image.min() < 0:
        raise ValueError(f"An image id is {image.min().item()}: number images from 0 to make the ids global.")
    if not dist.is_available() or not dist.is_initialized():
        return ids._replace(image=image)
    used = torch.cat([image, image.new_full((1,), -1)]).amax(0, keepdim=True) + 1
    counts = used.new_empty(dist.get_world_size(group))
    dist.all_gather(list(counts.split(1)), used, group=group)
    return ids._replace(image=image + counts[: dist.get_rank(group)].sum())


class _Ring:
    """Sends lists of tensors to the next rank and receives those of the one before."""

    def __init__(self, group: dist.ProcessGroup, columns: Tensor):
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self.before = dist.get_global_rank(group, (self.rank - 1) % self.size)
        mine = torch.tensor([len(columns)], device=columns.device)
        each = mine.new_empty(self.size)
        dist.all_gather(list(each.split(1)), mine, group=group)
        self.counts: list[int] = each.tolist()

    def start(self, tensors: list[Tensor], step: int) -> tuple[list[Tensor], list[dist.Work]]:
        """Begin to pass on what belongs to rank - step; returns what arrives, and the work to wait for."""
        n = self.counts[(self.rank - step - 1) % self.size]
        arriving = [t.new_empty(n, *t.shape[1:]) for t in tensors]
        transfers = [dist.P2POp(dist.isend, t, self.next, self.group) for t in tensors if t.numel()]
        transfers += [dist.P2POp(dist.irecv, t, self.before, self.group) for t in arriving if t.numel()]
        return arriving, dist.batch_isend_irecv(transfers) if transfers else []


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()


class _RingContrast(torch.autograd.Function):
    """Losses and positives of the local rows against the columns of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, bank: Tensor | None, temperature: Tensor | None, number: float,
        query_ids: Ids, key_ids: Ids, negatives: str, normalize: bool, precision: str, group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dtype = accumulation(query.dtype)
        with exact(query.device, precision):
            scale = tiled.logit_scale(temperature, number, dtype)
            rows = tiled.make_side(query, query_ids, normalize, dtype)
            stats = tiled.Stats.zeros(rows, tiled.bounded(scale, normalize))
            if bank is not None:
                columns = tiled.make_side(bank, None, normalize, dtype)
                tiled.forward_tiles(tiled.Products(rows, columns, scale, negatives), stats)
            ring = _Ring(group, key)
            block = [key.contiguous(), *(i.to(torch.int64).contiguous() for i in key_ids)]
            for step in range(ring.size):
                last = step == ring.size - 1
                arriving, works = (block, []) if last else ring.start(block, step)
                columns = tiled.make_side(block[0], Ids(*block[1:]), normalize, dtype)
                tiled.forward_tiles(tiled.Products(rows, columns, scale, negatives), stats)
                _wait(works)
                block = arriving
            loss, lse, count = stats.finish()
        ctx.save_for_backward(query, key, bank, temperature, *query_ids, *key_ids, lse, count)
        ctx.options = number, negatives, normalize, precision, group
        ctx.mark_non_differentiable(count)
        return loss, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, bank, temperature, *ids, lse, count = ctx.saved_tensors
        number, negatives, normalize, precision, group = ctx.options
        need_query, need_key, need_bank, need_temperature = ctx.needs_input_grad[:4]
        dtype = accumulation(query.dtype)
        with exact(query.device, precision):
            scale = tiled.logit_scale(temperature, number, dtype)
            k = tiled.Coefficients.make(grads[0], lse, count)
            rows = tiled.make_side(query, Ids(*ids[:3]), normalize, dtype)
            d_query = query.new_zeros(query.shape, dtype=dtype) if need_query or need_temperature else None
            d_bank = None
            if bank is not None:
                of_bank = tiled.make_side(bank, None, normalize, dtype)
                d_bank = bank.new_zeros(bank.shape, dtype=dtype) if need_bank else None
                tiled.backward_tiles(tiled.Products(rows, of_bank, scale, negatives), k, d_query, d_bank)
                if d_bank is not None:
                    tiled.finish_gradient(of_bank, d_bank, scale)
            ring = _Ring(group, key)
            block = [key.contiguous(), *(i.to(torch.int64).contiguous() for i in ids[3:])]
            d_block = key.new_zeros(key.shape, dtype=dtype) if need_key else None
            for step in range(ring.size):
                last = step == ring.size - 1
                arriving, works = (block, []) if last else ring.start(block, step)
                columns = tiled.make_side(block[0], Ids(*block[1:]), normalize, dtype)
                tiled.backward_tiles(tiled.Products(rows, columns, scale, negatives), k, d_query, d_block)
                _wait(works)
                if d_block is not None:
                    (d_block,), works = ring.start([d_block], step)
                    _wait(works)
                block = arriving
            if d_block is not None:
                tiled.finish_gradient(tiled.make_side(key, Ids(*ids[3:]), normalize, dtype), d_block, scale)
            d_temperature = None
            if d_query is not None:
                if need_temperature:
                    d_temperature = tiled.temperature_gradient(tiled.inner(rows, d_query), scale, temperature)
                tiled.finish_gradient(rows, d_query, scale)
        of_inputs = ((need_query, d_query, query), (need_key, d_block, key), (need_bank, d_bank, bank),
                     (need_temperature, d_temperature, temperature))  # fmt: skip
        return (*(d.to(x.dtype) if need and d is not None else None for need, d, x in of_inputs), *[None] * 7)


def ring_contrast(
    query: Tensor, key: Tensor, query_ids: Ids, key_ids: Ids, temperature: float | Tensor, negatives: str,
    weight: Tensor | None, normalize: bool, bank: Tensor | None, reduction: str, precision: str,
    group: "dist.ProcessGroup",
) -> Tensor:  # fmt: skip
    """``contrastive_loss`` over a group: world size x local sum / global divisor; "none" gives the local losses."""
    number, tensor = (1.0, temperature) if isinstance(temperature, Tensor) else (float(temperature), None)
    loss, count = _RingContrast.apply(
        query, key, bank, tensor, number, query_ids, key_ids, negatives, normalize, precision, group
    )
    valid = count > 0
    if weight is not None:
        loss = torch.where(valid, loss * weight.to(loss.dtype), 0)
        valid = valid & (weight > 0)
    if reduction == "none":
        return loss
    total = loss.sum() * dist.get_world_size(group)
    if reduction == "sum":
        return total
    divisor = valid.sum() if reduction == "mean_valid" else torch.tensor(len(loss), device=loss.device)
    dist.all_reduce(divisor, group=group)
    return total / divisor.clamp(min=1)
