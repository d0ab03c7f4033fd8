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

    def losses(self) -> Tensor:
        """Losses [M] in nats of the rows that have a positive."""
        mean_positive = self.positive / self.count
        if self.maximum is not None:
            return (self.total.log2() + (self.maximum - mean_positive)) * LN2
        # The sum relative to the positives: a loss far below the rounding error of the logits is not lost.
        of_positive = torch.exp2(mean_positive)
        return ((self.total - of_positive) / of_positive).log1p()

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [M] in nats, log2-sum-exp2 [M], positives [M]: all of them 0 for a row without a positive."""
        valid, lse = self.count > 0, self.total.log2()
        if self.maximum is not None:
            lse += self.maximum
        return torch.where(valid, self.losses(), 0), torch.where(valid, lse, 0), self.count
