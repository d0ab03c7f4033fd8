"""The definition of the contrastive loss: the full logit matrix, one line per rule, for tests to compare with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast.ids import Ids
from fgfast.tensors import accumulation, unit_vectors, without_autocast


def contrastive_loss(
    query: Tensor,
    key: Tensor,
    *,
    query_ids: Ids,
    key_ids: Ids,
    temperature: float | Tensor = 0.1,
    negatives: str = "all",
    weight: Tensor | None = None,
    normalize: bool = True,
    bank: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Contrast of parts, as ``fgfast.contrastive_loss`` documents it, without checks and with every logit in memory.

    .. math:: \ell_i = \log \sum_{j \in C_i} e^{s_{ij}} - \frac{1}{|P_i|} \sum_{j \in P_i} s_{ij}, \qquad
              s_{ij} = \langle q_i, k_j \rangle / T

    where C_i holds the positives P_i, the allowed negatives and the bank. Absent rows and columns are set to zero
    before the first product, so NaN in them affects neither loss nor gradients. float64 is accumulated in
    float64, everything else in float32.

    Example:
        >>> q = torch.eye(2)
        >>> ids = lambda view: Ids(torch.arange(2), torch.zeros(2, dtype=torch.int64), torch.full((2,), view))
        >>> loss = contrastive_loss(q, q, query_ids=ids(0), key_ids=ids(1), temperature=1.0)
        >>> round(loss.item(), 4)  # log(e + 1) - 1
        0.3133
    """
    with without_autocast(query.device):
        dtype = accumulation(query.dtype)
        row_present, column_present = query_ids.part >= 0, key_ids.part >= 0
        q, k = torch.where(row_present[:, None], query, 0), torch.where(column_present[:, None], key, 0)
        q, *columns_given = [
            unit_vectors(x, dtype) if normalize else x.to(dtype) for x in (q, k, bank) if x is not None
        ]
        columns = torch.cat(columns_given)  # [T + Q, D]
        logits = q @ columns.T / temperature  # [M, T + Q]

        same_image = query_ids.image[:, None] == key_ids.image
        same_part = same_image & (query_ids.part[:, None] == key_ids.part)
        same_view = query_ids.view[:, None] == key_ids.view
        positive = same_part & ~same_view & column_present & row_present[:, None]
        if negatives == "other_images":
            counted = positive | (~same_image & column_present)
        elif negatives == "same_image":
            counted = same_image & ~(same_part & same_view) & column_present
        else:
            counted = ~(same_part & same_view) & column_present
        if bank is not None:
            of_bank = counted.new_ones(len(q), len(bank))
            counted, positive = torch.cat([counted, of_bank], 1), torch.cat([positive, ~of_bank], 1)

        loss, valid = row_losses(logits, positive, counted)
    return reduce(loss, valid, weight, reduction)


def row_losses(logits: Tensor, positive: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The losses [M] of logits [M, T], 0 for a row without a positive, and which rows have one [M].

    ``positive`` and ``counted``, bool [M, T], mark P_i and C_i.

    Example:
        >>> every = torch.tensor([[True, True]])
        >>> loss, _ = row_losses(torch.tensor([[1.0, 0.0]]), torch.tensor([[True, False]]), every)
        >>> round(loss.item(), 4)  # log(e + 1) - 1
        0.3133
    """
    if logits.shape[1] == 0:  # add a masked column: logsumexp of nothing is undefined
        logits, counted, positive = (F.pad(t, (0, 1)) for t in (logits, counted, positive))
    n_positives = positive.sum(1)
    valid = n_positives > 0
    counted = counted | ~valid[:, None]  # a row without a positive keeps a finite log-sum-exp; it is not used
    mean_positive = torch.where(positive, logits, 0).sum(1, keepdim=True) / n_positives.clamp(min=1)[:, None]
    # Subtracted before the logarithm, so that a loss far below the rounding error of the logits is not lost.
    above = torch.where(counted, logits - mean_positive, -torch.inf)
    return torch.where(valid, above.logsumexp(1), 0), valid


def reduce(loss: Tensor, valid: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Weight the losses [M] of rows and reduce them; ``valid`` [M] is not 0 for the rows that have a positive.

    Example:
        >>> reduce(torch.tensor([1.0, 0.0]), torch.tensor([True, False]), None, "mean_valid").item()
        1.0
    """
    if weight is not None:
        weight, valid = weight.detach(), valid > 0
        loss = torch.where(valid, loss * weight.to(loss.dtype), 0)
        valid = valid & (weight > 0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean_valid":
        return loss.sum() / (valid > 0).sum().clamp(min=1)
    return loss.mean() if loss.shape[0] else loss.sum()
