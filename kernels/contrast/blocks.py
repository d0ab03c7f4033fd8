"""The contrast of rows with columns that come in blocks, as from the ranks of a group: launches of the same kernels.

The memory does not grow with the number of blocks: each is added to the sums of the rows (:class:`Losses`) or to the
gradient of the rows (:class:`Gradients`), in the order in which they come. The gradient of a block is computed apart,
because the part of the other ranks arrives meanwhile.
"""

from typing import Any

import torch
from torch import Tensor

from fgfast.ids import Ids
from fgfast.kernels.contrast import launch
from fgfast.kernels.contrast.problem import Problem, check_sizes, copies_pay


class Losses:
    """The losses of the rows; takes the fields of ``Operands`` and the number of columns of the longest block."""

    def __init__(
        self, longest: int, query: Tensor, query_ids: Ids, key: Tensor, key_ids: Ids, bank: Tensor | None, *options: Any
    ):
        check_sizes(query=query, key=key, bank=bank)
        copied = copies_pay(query, longest, longest)
        self.problem = Problem("forward", query, query_ids, *options, copied=copied)
        self.sums = launch.Losses(self.problem, 1 + self.problem.splits(len(query), longest))

    def add(self, x: Tensor, ids: Ids | None) -> None:
        """Add a block of columns [T, D]; without ids (a bank) they are negatives of every row."""
        self.sums.add(self.problem.prepare(x, ids), self.problem.splits(len(self.problem.rows.x), len(x)))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, log2-sum-exp2 and number of positives of each row, float32 [M]."""
        return self.sums.finish()


class Gradients:
    """The gradients of the rows, of each block and of the temperature.

    Takes dL/dloss and the results of :class:`Losses`, whether query and temperature need a gradient, the number of
    columns of the longest block and the fields of ``Operands``.
    """

    def __init__(
        self, upstream: tuple[Tensor, Tensor, Tensor], need_query: bool, need_temperature: bool, longest: int,
        query: Tensor, query_ids: Ids, key: Tensor, key_ids: Ids, bank: Tensor | None,
        temperature_tensor: Tensor | None, *options: Any,
    ):  # fmt: skip
        check_sizes(query=query, key=key, bank=bank)
        grad, lse, count = upstream
        self.problem = Problem(
            "gradient", query, query_ids, temperature_tensor, *options, (grad.to(torch.float32), lse, count),
            copied=copies_pay(query, longest, len(query) + longest), as_columns=(True, False),
        )  # fmt: skip
        self.need_query, self.temperature = need_query, temperature_tensor if need_temperature else None
        self.of_rows = None
        if need_query or self.temperature is not None:
            self.of_rows = launch.GradientSum(self.problem, self.problem.rows, longest)

    def add(self, x: Tensor, ids: Ids | None, need: bool) -> Tensor | None:
        """Add a block of columns [T, D]; with ``need`` returns T dL/d(unit vector) of its vectors, float32 [T, D]."""
        columns, total = self.problem.prepare(x, ids), None
        if self.of_rows is not None:
            total = launch.GradientSum.beside(self.problem, columns, need)
            self.of_rows.add(columns, True, False, total)
        if not need:
            return None
        raw = (total or launch.columns_gradient(self.problem, columns)).raw
        return raw[:, 0] if raw.shape[1] == 1 else raw.sum(1)

    def finish_columns(self, x: Tensor, ids: Ids | None, total: Tensor) -> Tensor:
        """dL/dx [T, D] of a block from the sum of what ``add`` returned for it on all ranks."""
        return launch.finish(self.problem, (self.problem.prepare(x, ids, False), total[:, None]))[0]

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the query [M, D] and of the temperature, None where they are not needed."""
        if self.of_rows is None:
            return None, None
        d_temperature = None
        if self.temperature is not None:
            d_temperature = launch.temperature_gradient(self.of_rows.inner(), self.temperature)
        return self.of_rows.finish() if self.need_query else None, d_temperature
