"""The contrast of rows with columns that come in blocks, by tiles of the logit matrix.

``fgfast.kernels.contrast.blocks`` has the same classes for the Triton kernels.
"""

from typing import Any

from torch import Tensor

from fgfast.ids import Ids
from fgfast.ops.contrast import sides, tiled
from fgfast.ops.contrast.operands import Operands
from fgfast.ops.contrast.statistics import RowStatistics
from fgfast.tensors import accumulation


class _Blocks:
    """The rows, and the tiles of their logits with a block of columns."""

    def __init__(self, operands: Operands):
        self.dtype = accumulation(operands.query.dtype)
        self.normalize, self.negatives = operands.normalize, operands.negatives
        self.scale = tiled.logit_scale(operands.temperature_tensor, operands.temperature, self.dtype)
        self.rows = self.make_side(operands.query, operands.query_ids)

    def make_side(self, x: Tensor, ids: Ids | None) -> sides.Side:
        return sides.make_side(x, ids, self.normalize, self.dtype, self.negatives)

    def logit_tiles(self, x: Tensor, ids: Ids | None) -> tiled.LogitTiles:
        return tiled.LogitTiles(self.rows, self.make_side(x, ids), self.scale, self.negatives)


class Losses(_Blocks):
    """The losses of the rows; ``longest``, the number of columns of the longest block, has no effect here."""

    def __init__(self, longest: int, *operands: Any):
        super().__init__(Operands(*operands))
        self.statistics = RowStatistics.zeros(self.rows, tiled.has_bounded_logits(self.scale, self.normalize))

    def add(self, x: Tensor, ids: Ids | None) -> None:
        """Add a block of columns [T, D]; without ids (a bank) they are negatives of every row."""
        tiled.forward_tiles(self.logit_tiles(x, ids), self.statistics)

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, log2-sum-exp2 and number of positives of each row [M]."""
        return self.statistics.finish()


class Gradients(_Blocks):
    """The gradients of the rows, of each block and of the temperature.

    Takes dL/dloss and the results of :class:`Losses`, whether query and temperature need a gradient, the number of
    columns of the longest block, which has no effect here, and the fields of ``Operands``.
    """

    def __init__(
        self, upstream: tuple[Tensor, Tensor, Tensor], need_query: bool, need_temperature: bool, longest: int,
        *arguments: Any,
    ):  # fmt: skip
        operands = Operands(*arguments)
        super().__init__(operands)
        self.coefficients = tiled.Coefficients.make(*upstream)
        self.need_query, self.temperature = need_query, operands.temperature_tensor if need_temperature else None
        self.d_rows = None
        if need_query or self.temperature is not None:
            self.d_rows = operands.query.new_zeros(operands.query.shape, dtype=self.dtype)

    def add(self, x: Tensor, ids: Ids | None, need: bool) -> Tensor | None:
        """Add a block of columns [T, D]; with ``need`` returns T dL/d(unit vector) of its vectors [T, D]."""
        total = x.new_zeros(x.shape, dtype=self.dtype) if need else None
        tiled.backward_tiles(self.logit_tiles(x, ids), self.coefficients, self.d_rows, total)
        return total

    def finish_columns(self, x: Tensor, ids: Ids | None, total: Tensor) -> Tensor:
        """dL/dx [T, D] of a block from the sum of what ``add`` returned for it on all ranks."""
        tiled.finish_gradient(self.make_side(x, ids), total, self.scale)
        return total

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the query [M, D] and of the temperature, None where they are not needed."""
        if self.d_rows is None:
            return None, None
        d_temperature = None
        if self.temperature is not None:
            inner_products = tiled.sum_inner_products(self.rows, self.d_rows)
            d_temperature = tiled.temperature_gradient(inner_products, self.scale, self.temperature)
        if not self.need_query:
            return None, d_temperature
        tiled.finish_gradient(self.rows, self.d_rows, self.scale)
        return self.d_rows, d_temperature
