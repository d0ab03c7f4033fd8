r"""The contrast with its logits in memory: the "torch" backend on the CPU where they are few.

Logits are in base 2, as in :mod:`tiled`. Forward keeps :math:`E_{ij} = 2^{s'_{ij} - m_i}`, where m is 0 if logits are
bounded, else the largest logit of the row, so that backward does not multiply queries and keys again. It forms

.. math:: A_{ij} = \frac{1}{T} \frac{\partial L}{\partial s_{ij}}
                 = \frac{g_i}{T} \Bigl(\frac{E_{ij}}{\sum_j E_{ij}} - \frac{[j \in P_i]}{|P_i|}\Bigr)

and multiplies it by the unit vectors. Where query is key and m = 0, E is symmetric and :math:`A + A^\top` needs one
product instead of two.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast.ops.contrast.autograd import POSITIONS, as_function
from fgfast.ops.contrast.operands import Operands, define_losses
from fgfast.ops.contrast.positives import ListedPositives, MaskedPositives, Positives, find_pairs
from fgfast.ops.contrast.sides import Side, compare_ids, make_side
from fgfast.ops.contrast.statistics import LN2, RowStatistics
from fgfast.ops.contrast.tiled import has_bounded_logits, logit_scale
from fgfast.ops.derivatives import gradients
from fgfast.tensors import accumulation, readable, transformed, without_autocast

KEPT = 8 << 20  # bytes of logits that are kept; backward needs up to four times as much
COMPARED = 1 << 16  # logits up to which comparing all ids is faster than sorting them: measured on a CPU core


def fits(operands: Operands) -> bool:
    """Whether the logits are few and values can be read at no cost."""
    query, key, bank = operands.query, operands.key, operands.bank
    n_columns = len(query if key is None else key) + (0 if bank is None else len(bank))
    return readable(query) and len(query) * n_columns * accumulation(query.dtype).itemsize <= KEPT


class DenseContrast(torch.autograd.Function):
    """Loss and number of positives of each query [M], from ``Operands.flat()``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        """See the class."""
        operands = Operands.from_flat(*arguments)
        query, key, bank, normalize = operands.query, operands.key, operands.bank, operands.normalize
        dtype = accumulation(query.dtype)
        scale = float(logit_scale(operands.temperature_tensor, operands.temperature, dtype))
        with without_autocast(query.device):
            rows = keys = make_side(query, operands.query_ids, normalize, dtype, with_ranges=False)
            unit_rows = columns = rows.load()
            if key is not None:
                keys = make_side(key, operands.key_ids, normalize, dtype, with_ranges=False)
                columns = keys.load()
            sides = [rows, keys, keys if bank is None else make_side(bank, None, normalize, dtype)]
            if bank is not None:
                columns = torch.cat([columns, sides[2].load()])
            logits = torch.mm(unit_rows * scale, columns.T)
            positives = _mask(logits, rows, keys, operands)
            positive, count = positives.sums(logits)
            maximum = None
            if not has_bounded_logits(scale, normalize):
                maximum = logits.amax(1) if logits.shape[1] else torch.zeros_like(count)
                logits.sub_(torch.where(maximum == -torch.inf, 0, maximum)[:, None])
            total = torch.exp2(logits, out=logits).sum(1)
            loss, divisor = RowStatistics(maximum, total, positive, count).losses(), count
            if not (len(count) and float(count.min()) > 0):  # rows without a positive: no loss, no gradient
                loss, total = torch.where(count > 0, loss, 0), torch.where(count > 0, total, torch.inf)
                divisor = count.clamp(min=1)
        of_sides = [x for side in sides for x in (side.inverse_norms, side.present)]
        ctx.save_for_backward(*arguments[:10], unit_rows, columns, logits, total, divisor, *of_sides)
        ctx.options, ctx.scale, ctx.positives = arguments[10:], scale, positives
        ctx.symmetric = key is None and bank is None and maximum is None
        ctx.mark_non_differentiable(count)
        return loss, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """See the module; a gradient that is itself differentiated is that of the definition."""
        arguments = [*ctx.saved_tensors[:10], *ctx.options]
        if torch.is_grad_enabled() or transformed(grad):
            given, losses = as_function(define_losses, arguments)
            found = dict(zip(given, gradients(losses, list(given.values()), grad), strict=True))
        else:
            grads = _backpropagate(ctx, Operands.from_flat(*arguments), grad)
            found = dict(zip(POSITIONS, grads, strict=True))
        return tuple(found.get(i) for i in range(len(arguments)))


def _mask(logits: Tensor, rows: Side, keys: Side, operands: Operands) -> Positives:
    """Set the logits of the columns that do not count for a row to -inf; returns the positives."""
    positives: Positives
    pairs = None
    if operands.negatives == "all" and logits.numel() > COMPARED:
        pairs = find_pairs(operands.query_ids, operands.key_ids, max(logits.shape))
    if pairs is None:
        positive, masked_out = compare_ids(
            operands.query_ids, rows.present, operands.key_ids or operands.query_ids, keys.present, operands.negatives
        )
        if logits.shape[1] > len(keys):  # the bank
            positive, masked_out = (F.pad(x, (0, logits.shape[1] - len(keys))) for x in (positive, masked_out))
        logits.masked_fill_(masked_out, -torch.inf)
        positives = MaskedPositives(None, None, positive)
    else:
        row, column, positive = pairs.row, pairs.column, pairs.positive
        flat = row * logits.shape[1] + column
        logits.view(-1).index_fill_(0, flat[~positive], -torch.inf)
        positives = ListedPositives(row[positive], column[positive], flat[positive])
    if keys.absent_bias is not None:
        logits[:, : len(keys)] += keys.absent_bias
    return positives


def _backpropagate(ctx: Any, operands: Operands, grad: Tensor) -> list[Tensor | None]:
    """The gradients of query, key, bank and temperature; None where they are not needed."""
    query, key, bank, temperature = operands.query, operands.key, operands.bank, operands.temperature_tensor
    rows, columns, exponentials, total, divisor, *of_sides = ctx.saved_tensors[10:]
    need_query, need_key, need_bank, need_temperature = (ctx.needs_input_grad[i] for i in POSITIONS)
    n_keys = len(query if key is None else key)
    d_query = d_key = d_bank = d_temperature = None
    with without_autocast(query.device):
        grad = grad * (ctx.scale * LN2)
        softmax_weight, positive_weight = grad / total, grad / divisor
        if ctx.symmetric:
            a = (softmax_weight.unsqueeze(1) + softmax_weight).mul_(exponentials)
            ctx.positives.subtract(a, positive_weight, positive_weight)
        else:
            a = exponentials * softmax_weight.unsqueeze(1)
            ctx.positives.subtract(a, positive_weight, None)
        if ctx.symmetric or need_query or need_temperature:
            d_query = torch.mm(a, columns)
        if temperature is not None and need_temperature and d_query is not None:
            inner_products = (rows * d_query).sum() / (2 if ctx.symmetric else 1)
            d_temperature = (-inner_products / temperature).to(temperature.dtype)
        if not ctx.symmetric and (need_key or need_bank or (need_query and key is None)):
            d_columns = torch.mm(a.T, rows)
            d_key, d_bank = d_columns[:n_keys], d_columns[n_keys:]
            if key is None and d_query is not None:
                d_query += d_key
        grads = [d_query if need_query else None, d_key if need_key else None, d_bank if need_bank else None]
        for i, (vectors, d_unit) in enumerate(zip((query, key, bank), grads, strict=True)):
            if vectors is not None and d_unit is not None:
                inverse_norms, present = of_sides[2 * i : 2 * i + 2]
                side = Side(vectors, None, inverse_norms, present, None, None, total.dtype)
                side.backpropagate(None, d_unit, (rows, columns[:n_keys], columns[n_keys:])[i])
                grads[i] = d_unit.to(vectors.dtype)
    return [*grads, d_temperature]
