"""The running statistics of each row of logits: what the forward pass keeps instead of the logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fgfast.ops.contrast.sides import Side

LN2 = math.log(2)


@dataclass
class RowStatistics:
    """The running statistics of each row in the forward pass, in base 2."""

    maximum: Tensor | None  # [M] running maximum; None when logits are bounded
    total: Tensor  # [M] sum of 2^(s' - maximum)
    positive: Tensor  # [M] sum of s' over positives
    count: Tensor  # [M] number of positives

    @classmethod
    def zeros(cls, rows: Side, bounded: bool) -> "RowStatistics":
        zero = rows.vectors.new_zeros(len(rows), dtype=rows.dtype)
        return cls(None if bounded else torch.full_like(zero, -torch.inf), zero, zero.clone(), zero.clone())

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [M] in nats, log2-sum-exp2 [M], positives [M]: all of them 0 for a row without a positive."""
        valid = self.count > 0
        mean_positive = self.positive / self.count.clamp(min=1)
        # The sum relative to the positives: a loss far below the rounding error of the logits is not lost.
        if self.maximum is None:
            lse, of_positive = self.total.log2(), torch.exp2(mean_positive)
            loss = ((self.total - of_positive) / of_positive).log1p()
        else:
            lse = self.total.log2() + self.maximum
            loss = (self.total.log2() + (self.maximum - mean_positive)) * LN2
        return torch.where(valid, loss, 0), torch.where(valid, lse, 0), self.count
