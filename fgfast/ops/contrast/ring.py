r"""The contrast with the columns of all ranks: blocks of keys are passed around a ring.

Rank r starts with its own keys and sends them to rank r + 1 while it works on them; after W blocks every row has been
compared with every column. Backward sends the keys around again, and a step behind them the gradient accumulated so
far, which is back at its rank after W steps: it is on its way while the next block is computed. Keys travel in their
dtype, gradients in float32 (float64 for float64). Each rank holds two blocks of keys and, in backward, three of
gradients; no tensor of size rows x all columns exists, and no memory grows with the number of ranks.

The backend is that of a single process: the kernels (``fgfast.kernels.contrast.blocks``) launched once per block, or
tiles in plain PyTorch (:mod:`fgfast.ops.contrast.blocks`). Ranks that were called differently learn so before the first
transfer (:class:`fgfast.ops.contrast.exchange.Ring`).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fgfast.backend import BACKENDS, check_triton
from fgfast.ids import Ids
from fgfast.ops.contrast import blocks as tiled_blocks
from fgfast.ops.contrast.autograd import cast_gradients, forget_zero_vectors, register_autograd
from fgfast.ops.contrast.checks import NEGATIVES, PRECISIONS, REDUCTIONS
from fgfast.ops.contrast.exchange import Ring, process_group
from fgfast.ops.contrast.operands import Operands
from fgfast.ops.registration import operation
from fgfast.tensors import FLOATS, exact, readable


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
    if readable(image) and len(image) and image.min() < 0:
        raise ValueError(f"ids.image holds the image id {image.min().item()}: number the images from 0.")
    if not dist.is_available() or not dist.is_initialized():
        return ids._replace(image=image)
    count = torch.cat([image, image.new_full((1,), -1)]).amax(0, keepdim=True) + 1
    counts = count.new_empty(dist.get_world_size(group))
    dist.all_gather(list(counts.split(1)), count, group=group)
    return ids._replace(image=image + counts[: dist.get_rank(group)].sum())


def _make_block(key: Tensor, *ids: Tensor) -> list[Tensor]:
    """The tensors that are sent around: keys and their ids."""
    return [key.contiguous(), *(i.to(torch.int64).contiguous() for i in ids)]


def _form_ring(
    group: str, operands: Operands, key: Tensor, reduction: str, backend: str, need_key: bool = False
) -> tuple[Ring, int, Any]:
    """The ring, the number of columns of the longest block, and the module that computes with blocks.

    What a single rank might refuse is checked after the exchange: the ranks would wait for it in vain.
    """
    query, tensor = operands.query, operands.temperature_tensor
    choices = {
        "query.dtype": (query.dtype, FLOATS),
        "negatives": (operands.negatives, NEGATIVES),
        "normalize": (operands.normalize, (False, True)),
        "precision": (operands.precision, PRECISIONS),
        "reduction": (reduction, REDUCTIONS),
        "backend": (backend, BACKENDS),
        "key.requires_grad": (need_key, (False, True)),
    }
    temperature = operands.temperature if tensor is None else tensor
    ring = Ring(process_group(group), key, choices, {"temperature": temperature})
    longest = max(*ring.counts, 0 if operands.bank is None else len(operands.bank))
    if backend != "triton":
        return ring, longest, tiled_blocks
    from fgfast.kernels.contrast import blocks

    check_triton("query", query)
    return ring, longest, blocks


@operation("ring_contrast")
def _ring_contrast(
    query: Tensor, query_image: Tensor, query_part: Tensor, query_view: Tensor,
    key: Tensor, key_image: Tensor, key_part: Tensor, key_view: Tensor,
    bank: Tensor | None, temperature_tensor: Tensor | None, temperature: float,
    negatives: str, normalize: bool, precision: str, reduction: str, backend: str, group: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, log2-sum-exp2 and positives of the local rows [M] with the columns of all ranks of the named group.

    The ranks must agree about ``reduction`` too, which is not applied here.
    """
    operands = Operands.from_flat(
        query, query_image, query_part, query_view, key, key_image, key_part, key_view, bank, temperature_tensor,
        temperature, negatives, normalize, precision,
    )  # fmt: skip
    block = _make_block(key, key_image, key_part, key_view)
    ring, longest, blocks = _form_ring(group, operands, key, reduction, backend)
    with exact(query.device, precision), torch.cuda.device_of(query):
        losses = blocks.Losses(longest, *operands)
        if bank is not None:
            losses.add(bank, None)
        ring.pass_around(block, lambda arrived: losses.add(arrived[0], Ids(*arrived[1:])))
        loss, lse, count = losses.finish()
        return loss, lse, count


@operation("ring_contrast_backward")
def _ring_contrast_backward(
    grad: Tensor, lse: Tensor, count: Tensor, needs: list[bool],
    query: Tensor, query_image: Tensor, query_part: Tensor, query_view: Tensor,
    key: Tensor, key_image: Tensor, key_part: Tensor, key_view: Tensor,
    bank: Tensor | None, temperature_tensor: Tensor | None, temperature: float,
    negatives: str, normalize: bool, precision: str, reduction: str, backend: str, group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, bank and temperature, empty where ``needs`` is False."""
    need_query, need_key, need_bank, need_temperature = needs
    operands = Operands.from_flat(
        query, query_image, query_part, query_view, key, key_image, key_part, key_view, bank, temperature_tensor,
        temperature, negatives, normalize, precision,
    )  # fmt: skip
    block = _make_block(key, key_image, key_part, key_view)
    ring, longest, blocks = _form_ring(group, operands, key, reduction, backend, need_key)
    d_bank = d_key = None
    with exact(query.device, precision), torch.cuda.device_of(query):
        gradients = blocks.Gradients((grad, lse, count), need_query, need_temperature, longest, *operands)
        if bank is not None:
            d_bank = gradients.add(bank, None, need_bank)
            if d_bank is not None:
                d_bank = gradients.finish_columns(bank, None, d_bank)
        d_key = ring.pass_around(block, lambda arrived: gradients.add(arrived[0], Ids(*arrived[1:]), need_key))
        if d_key is not None:
            d_key = gradients.finish_columns(key, operands.key_ids, d_key)
        d_query, d_temperature = gradients.finish()
        grads = [d_query, d_key, d_bank, d_temperature]
        if normalize and backend == "triton":
            grads[:3] = [forget_zero_vectors(g, x) for g, x in zip(grads[:3], (query, key, bank), strict=True)]
        return cast_gradients(grads, query, key, bank, temperature_tensor)


def _refuse(operands: Operands) -> Tensor:
    raise RuntimeError(
        "contrastive_loss over a group has no second derivative and does not work inside torch.func: give no group."
    )


register_autograd(_ring_contrast, _ring_contrast_backward, _refuse)


@operation("group_sum")
def _group_sum(x: Tensor, group: str) -> Tensor:
    """Sum of x over the ranks of the named group."""
    x = x.clone()
    dist.all_reduce(x, group=process_group(group))
    return x


@_group_sum.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def ring_contrast(
    operands: Operands, weight: Tensor | None, reduction: str, group: "dist.ProcessGroup", backend: str
) -> Tensor:
    """``contrastive_loss`` over a group: world size x local sum / global divisor; "none" gives the local losses."""
    # Reaches kernels.contrast.blocks (triton) or ops.contrast.blocks (torch) with each block of keys.
    loss, _, count = _ring_contrast(*operands.flat(), reduction, backend, group.group_name)
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
