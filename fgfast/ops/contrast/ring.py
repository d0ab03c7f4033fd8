r"""The contrast with the columns of all ranks: blocks of keys are passed around a ring, logits are computed by tiles.

Rank r starts with its own keys and sends them to rank r + 1 while it works on them; after W blocks every row has been
compared with every column. Backward sends the keys around again together with the gradient accumulated so far, which
is back at its rank after W steps. Each rank holds two blocks of keys; no tensor of size rows x all columns exists.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fgfast.ids import Ids
from fgfast.ops.contrast import sides, tiled
from fgfast.ops.contrast.autograd import cast_gradients, register_autograd
from fgfast.ops.contrast.exchange import Ring, process_group, wait
from fgfast.ops.contrast.operands import Operands
from fgfast.ops.contrast.statistics import RowStatistics
from fgfast.tensors import accumulation, exact


def global_ids(ids: Ids, group: "dist.ProcessGroup | None" = None) -> Ids:
    """Shift image ids so that no two ranks of a group share one.

    Rank r adds the sum over the ranks before it of (highest image id + 1).

    Args:
        ids: ids of this rank, image ids from 0 up; their number may be 0 and may differ between ranks.
        group: the process group; None is the default group, or a single process if no group was initialised.

    Returns:
        Ids with int64 image ids that are unique over the group; parts and views are unchanged.

    Raises:
        ValueError: an image id is negative (checked on the CPU).

    Example:
        >>> import torch
        >>> from fgfast import Ids, global_ids
        >>> global_ids(Ids(*torch.zeros(3, 2, dtype=torch.int64))).image
        tensor([0, 0])
    """
    image = ids.image.to(torch.int64)
    if image.device.type == "cpu" and len(image) and image.min() < 0:
        raise ValueError(f"ids.image holds the image id {image.min().item()}: number the images from 0.")
    if not dist.is_available() or not dist.is_initialized():
        return ids._replace(image=image)
    count = torch.cat([image, image.new_full((1,), -1)]).amax(0, keepdim=True) + 1
    counts = count.new_empty(dist.get_world_size(group))
    dist.all_gather(list(counts.split(1)), count, group=group)
    return ids._replace(image=image + counts[: dist.get_rank(group)].sum())


def _make_block(key: Tensor, ids: Ids) -> list[Tensor]:
    """The tensors that are sent around: keys and their ids."""
    return [key.contiguous(), *(i.to(torch.int64).contiguous() for i in ids)]


@torch.library.custom_op("fgfast::ring_contrast", mutates_args=())
def _ring_contrast(
    query: Tensor, query_image: Tensor, query_part: Tensor, query_view: Tensor,
    key: Tensor, key_image: Tensor, key_part: Tensor, key_view: Tensor,
    bank: Tensor | None, temperature_tensor: Tensor | None, temperature: float,
    negatives: str, normalize: bool, precision: str, group: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, log2-sum-exp2 and positives of the local rows [M] with the columns of all ranks of the named group."""
    dtype = accumulation(query.dtype)
    with exact(query.device, precision):
        scale = tiled.logit_scale(temperature_tensor, temperature, dtype)
        rows = sides.make_side(query, Ids(query_image, query_part, query_view), normalize, dtype, negatives)
        statistics = RowStatistics.zeros(rows, tiled.has_bounded_logits(scale, normalize))
        if bank is not None:
            columns = sides.make_side(bank, None, normalize, dtype)
            tiled.forward_tiles(tiled.LogitTiles(rows, columns, scale, negatives), statistics)
        ring = Ring(process_group(group), key)
        block = _make_block(key, Ids(key_image, key_part, key_view))
        for step in range(ring.size):
            last = step == ring.size - 1
            arriving, transfers = (block, []) if last else ring.start(block, step)
            columns = sides.make_side(block[0], Ids(*block[1:]), normalize, dtype, negatives)
            tiled.forward_tiles(tiled.LogitTiles(rows, columns, scale, negatives), statistics)
            wait(transfers)
            block = arriving
        return statistics.finish()


@torch.library.custom_op("fgfast::ring_contrast_backward", mutates_args=())
def _ring_contrast_backward(
    grad: Tensor, lse: Tensor, count: Tensor, needs: list[bool],
    query: Tensor, query_image: Tensor, query_part: Tensor, query_view: Tensor,
    key: Tensor, key_image: Tensor, key_part: Tensor, key_view: Tensor,
    bank: Tensor | None, temperature_tensor: Tensor | None, temperature: float,
    negatives: str, normalize: bool, precision: str, group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, bank and temperature, empty where ``needs`` is False."""
    need_query, need_key, need_bank, need_temperature = needs
    dtype = accumulation(query.dtype)
    with exact(query.device, precision):
        scale = tiled.logit_scale(temperature_tensor, temperature, dtype)
        coefficients = tiled.Coefficients.make(grad, lse, count)
        rows = sides.make_side(query, Ids(query_image, query_part, query_view), normalize, dtype, negatives)
        d_query = query.new_zeros(query.shape, dtype=dtype) if need_query or need_temperature else None
        d_bank = None
        if bank is not None:
            bank_side = sides.make_side(bank, None, normalize, dtype)
            d_bank = bank.new_zeros(bank.shape, dtype=dtype) if need_bank else None
            tiled.backward_tiles(tiled.LogitTiles(rows, bank_side, scale, negatives), coefficients, d_query, d_bank)
            if d_bank is not None:
                tiled.finish_gradient(bank_side, d_bank, scale)
        ring = Ring(process_group(group), key)
        key_ids = Ids(key_image, key_part, key_view)
        block = _make_block(key, key_ids)
        d_key = key.new_zeros(key.shape, dtype=dtype) if need_key else None
        for step in range(ring.size):
            last = step == ring.size - 1
            arriving, transfers = (block, []) if last else ring.start(block, step)
            columns = sides.make_side(block[0], Ids(*block[1:]), normalize, dtype, negatives)
            tiled.backward_tiles(tiled.LogitTiles(rows, columns, scale, negatives), coefficients, d_query, d_key)
            wait(transfers)
            if d_key is not None:
                (d_key,), transfers = ring.start([d_key], step)
                wait(transfers)
            block = arriving
        if d_key is not None:
            tiled.finish_gradient(sides.make_side(key, key_ids, normalize, dtype), d_key, scale)
        d_temperature = None
        if d_query is not None:
            if need_temperature and temperature_tensor is not None:
                d_temperature = tiled.temperature_gradient(
                    tiled.sum_inner_products(rows, d_query), scale, temperature_tensor
                )
            tiled.finish_gradient(rows, d_query, scale)
        grads = [d_query if need_query else None, d_key, d_bank, d_temperature]
        return cast_gradients(grads, query, key, bank, temperature_tensor)


def _refuse(operands: Operands) -> Tensor:
    raise RuntimeError(
        "contrastive_loss over a group has no second derivative and does not work inside torch.func: give no group."
    )


register_autograd(_ring_contrast, _ring_contrast_backward, _refuse)


@torch.library.custom_op("fgfast::group_sum", mutates_args=())
def _group_sum(x: Tensor, group: str) -> Tensor:
    """Sum of x over the ranks of the named group."""
    x = x.clone()
    dist.all_reduce(x, group=process_group(group))
    return x


@_group_sum.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def ring_contrast(operands: Operands, weight: Tensor | None, reduction: str, group: "dist.ProcessGroup") -> Tensor:
    """``contrastive_loss`` over a group: world size x local sum / global divisor; "none" gives the local losses."""
    # Reaches the "torch" backend on every rank: tiled.forward_tiles on each block of keys.
    loss, _, count = _ring_contrast(*operands.flat(), group.group_name)
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
    return total / _group_sum(divisor, group.group_name).clamp(min=1)
