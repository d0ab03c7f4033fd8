r"""The gradient for vectors of more channels than a tile holds: by chunks of dL/ds and the products of a library.

:func:`~fgfast.kernels.contrast.gradient.gradient` keeps the sums of its vectors in registers where a tile has all D
channels. Above that (256 for half precision, any D for float32) it would move them to L2 and back for each block of
channels, which takes 5 to 10 times as long as the products. So here a chunk of W = dL/ds is written, and

.. math:: \text{raw}_i \mathrel{+}= \sum_j (W_{ij} / |y_j|)\, y_j, \qquad
          \text{raw}_j \mathrel{+}= \sum_i (W_{ij} / |x_i|)\, x_i

are two products of :func:`torch.addmm`, with float32 sums. Rows and columns share one computation of W: 3 products for
query and key instead of 4, and 1.5 instead of 2 where query is key and logits are bounded, where only chunks on and
past the diagonal are computed. In half precision W is rounded to bfloat16 once per sum, as in ``gradient``, and float16
vectors for that product. Absent vectors are replaced by zeros in a copy of the chunk, because 0 times NaN is NaN.

Memory: the float32 sums of both sides, up to :data:`WEIGHTS_BYTES` of weights (twice that where the vectors outside of
a chunk are as large), and copies of the vectors of a chunk. The bound is twice the inputs and 64 MiB beside the
inputs and the returned gradients, and leaves 32 MiB for the workspace of cuBLAS.

Results are deterministic where the library's are: those of cuBLAS are for equal shapes, version and GPU model, with
the workspace per stream that torch gives it. Shapes depend on those of the inputs alone, and nothing waits for the
device.
"""

from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgfast.kernels.common import cdiv, interpreted, launch_options, output_dtype
from fgfast.kernels.configs import config, row_kind
from fgfast.kernels.contrast import wide_kernels as device_side
from fgfast.kernels.contrast.problem import Problem, Side, TileShape, channels_of_tile
from fgfast.kernels.launches import launch
from fgfast.tensors import exact

FEWEST_LOGITS = 1 << 21  # from which it is faster than ``gradient``: predicted from about 5 launches of 10 us
WEIGHTS_BYTES = 32 << 20
LONGEST_SIDE = 4096  # vectors of a chunk, more only where the other side is shorter
COPY_ROWS = 16  # vectors per program of ``copy_present``


def serves(problem: Problem, columns: Side) -> bool:
    """Whether to take the chunks rather than ``gradient``.

    Not for "same_image": ``gradient`` skips blocks without a common image, and is faster where fewer than about a
    quarter of the blocks have one; only the device can see how many do. Not on ROCm, which has no such product.
    """
    return (
        not problem.tile.whole
        and problem.rows.n * columns.n >= FEWEST_LOGITS
        and (columns.ids is None or problem.negatives != "same_image")
        and torch.version.hip is None
    )


class _Chunk(NamedTuple):
    """Consecutive vectors of a side."""

    part: slice
    x: Tensor
    arguments: tuple[Any, ...]  # of ``weights``, behind the vectors and their strides


def _chunks(side: Side, size: int) -> list[_Chunk]:
    """The vectors of a side in chunks."""
    found = []
    for first in range(0, len(side.x), size):
        part = slice(first, first + size)
        ids: tuple[Any, ...] = (None, None, None, 0, 0, 0)
        if side.ids is not None:
            ids = (*(i[part] for i in side.ids), *(i.stride(0) for i in side.ids))
        found.append(_Chunk(part, side.x[part], (side.inverse[part], *ids)))
    return found


def _even(number: int, most: int, multiple: int) -> int:
    """The size of equal chunks of up to ``most`` of ``number`` vectors, rounded up to a multiple.

    Example:
        >>> _even(5000, 4096, 128), _even(100, 4096, 128)
        (2560, 128)
    """
    most = max(most // multiple, 1) * multiple
    return cdiv(cdiv(number, cdiv(number, most)), multiple) * multiple


def chunk_sizes(rows: int, columns: int, same: bool, vector: int, logit: int, tile: TileShape) -> tuple[int, int]:
    """Rows and columns of a chunk, equal where the columns are the rows; ``vector``, ``logit``: bytes of one.

    Example:
        >>> tile = TileShape(128, 256, 32, 64, False, 8, 3)
        >>> chunk_sizes(65_536, 65_536, False, 1024, 4, tile), chunk_sizes(4096, 4096, False, 1024, 4, tile)
        ((4096, 4096), (4096, 2048))
    """
    for limit in (2 * WEIGHTS_BYTES, WEIGHTS_BYTES):
        logits = limit // logit
        if same:
            wide = high = _even(rows, min(isqrt(logits), LONGEST_SIDE), max(tile.x, tile.y))
        else:
            wide = _even(columns, LONGEST_SIDE, tile.y)
            high = _even(rows, logits // wide, tile.x)
            wide = _even(columns, logits // high, tile.y)
        spare = (rows + (0 if same else columns) - high - wide) * vector
        if high * wide * logit <= WEIGHTS_BYTES + spare:
            break
    return high, wide


def _multiply_add(total: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Total += a b: products of numbers of ``dtype`` are exact or, in float32, those of the context; sums float32."""
    a, b = a.to(dtype), b.to(dtype)
    if dtype == torch.float32:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:  # the CPU, where kernels are interpreted, has no such product
        total.addmm_(a.float(), b.float())


class _Weigher:
    """Launches for the chunks of rows and columns; ``outputs``: 2 where both need their weights, else 1."""

    def __init__(self, problem: Problem, columns: Side, outputs: int):
        x = problem.rows.x
        self.problem, self.x_dtype, self.d = problem, x.dtype, x.shape[1]
        self.dtype = torch.float32 if x.dtype == torch.float32 else torch.bfloat16  # of the products
        self.tile = TileShape.of(config("contrast weights", x.device, row_kind(x.dtype), channels=self.d))
        width, size = cdiv(self.d, 16) * 16, self.dtype.itemsize  # rows of copies start at multiples of 16 numbers
        same = columns is problem.rows
        high, wide = chunk_sizes(len(x), len(columns.x), same, width * size, outputs * size, self.tile)
        self.rows = _chunks(problem.rows, high)
        self.columns = self.rows if same else _chunks(columns, wide)
        stored = output_dtype(self.dtype)
        self.weights = x.new_empty(outputs, high, wide, dtype=stored)
        sizes = (high,) if same and high >= len(x) else (high, wide)
        self.copies = [x.new_empty(n, width, dtype=stored) for n in sizes]

    def copy(self, chunk: _Chunk, out: Tensor) -> Tensor:
        """The vectors of a chunk, zeros for absent ones and past the last channel."""
        n = len(chunk.x)
        launch(
            device_side.copy_present, (cdiv(n, COPY_ROWS),),
            chunk.x, *chunk.x.stride(), chunk.arguments[0], out, n, self.d, out.shape[1], BLOCK=COPY_ROWS,
            BLOCK_D=channels_of_tile(self.d, 128), UPCAST=interpreted(), num_warps=4,
        )  # fmt: skip
        return out[:n]

    def weigh(
        self, row: _Chunk, x: Tensor, column: _Chunk, y: Tensor, for_rows: bool, for_columns: bool, symmetric: bool
    ) -> tuple[Tensor, Tensor]:
        """W divided by the norms of the columns, and by those of the rows [X, Y]: only those asked for are filled."""
        problem, tile, logits = self.problem, self.tile, None
        first, last = self.weights[0], self.weights[-1]
        if self.dtype == torch.float32:
            logits = first
            torch.mm(x, y.T, out=logits[: len(x), : len(y)])
        elif self.x_dtype != self.dtype:  # the logits of float16 vectors are exact products of these
            x, y = row.x, column.x
        of_x = [None if values is None else values[row.part] for values in problem.coefficients]
        of_y = [None if values is None or not symmetric else values[column.part] for values in problem.coefficients[:2]]
        launch(
            device_side.weights, (cdiv(len(x), tile.x), cdiv(len(y), tile.y)),
            x, *x.stride(), *row.arguments, y, *y.stride(), *column.arguments, *of_x, *of_y, problem.pointer,
            problem.scale, logits, first if for_rows else None, last if for_columns else None, first.stride(0),
            len(x), len(y), x.shape[1], NEGATIVES=problem.negatives, BOUNDED=problem.bounded, BLOCK_X=tile.x,
            BLOCK_Y=tile.y, BLOCK_S=tile.compared, BLOCK_D=tile.d, UPCAST=interpreted(),
            **launch_options(tile.warps, tile.stages, tile.registers),
        )  # fmt: skip
        return first[: len(x), : len(y)], last[: len(x), : len(y)]


def add(
    problem: Problem, columns: Side, of_rows: Tensor | None, of_columns: Tensor | None, symmetric: bool = False
) -> None:
    """Add T dL/d(unit vector) of the rows to of_rows [M, D] and of the columns to of_columns [T, D], float32, or None.

    ``symmetric``: the columns are the rows, whose losses count too, and logits are bounded: of_rows receives both.
    """
    if symmetric:
        of_columns = of_rows
    chunks = _Weigher(problem, columns, (of_rows is not None) + (of_columns is not None))
    with exact(problem.rows.x.device, problem.precision):
        copied = None  # the chunk of columns that the second copy holds
        for i, row in enumerate(chunks.rows):
            x = chunks.copy(row, chunks.copies[0])
            for column in chunks.columns[i:] if symmetric else chunks.columns:
                y, on_diagonal = x, column is row
                if not on_diagonal:
                    if copied is not column:
                        chunks.copy(column, chunks.copies[1])
                    y, copied = chunks.copies[1][: len(column.x)], column
                for_columns = of_columns is not None and not (symmetric and on_diagonal)
                by_columns, by_rows = chunks.weigh(row, x, column, y, of_rows is not None, for_columns, symmetric)
                if of_rows is not None:
                    _multiply_add(of_rows[row.part], by_columns, y[:, : chunks.d], chunks.dtype)
                if of_columns is not None and for_columns:
                    _multiply_add(of_columns[column.part], by_rows.T, x[:, : chunks.d], chunks.dtype)
