r"""Triton kernels of the contrastive loss: the host side, which :mod:`fgfast.ops.contrast.contrast` calls.

.. math:: \ell_i = \log \sum_{j \in P_i \cup N_i \cup \text{bank}} e^{s_{ij}} - \frac{1}{|P_i|} \sum_{j \in P_i}
          s_{ij}, \qquad s_{ij} = \langle q_i, k_j \rangle / T, \qquad q\,[M, D],\ k\,[T, D],\ \text{bank}\,[Q, D]

Forward: ``prepare`` for query and key in one launch and for a bank (inverse norms, ranges of image ids), then
``forward``, in which a program keeps rows and loops over columns. Backward: ``prepare`` again, then for each gradient
``gradient``, in which a program keeps the vectors it computes gradients of and recomputes the tiles, and ``finish``
(1/T and the normalisation), in one launch for query and key where their buffers are small. The part of
dL/dT due to a row is the inner product of the row with its own gradient (``inner``). Where query is key and logits are
bounded, one ``gradient`` covers both sides. If there are few rows, the columns are divided into splits, one program
each, whose results are added in a fixed order. No atomics are used: results are deterministic.

Where query is key and logits are bounded, ``forward`` computes one triangle of the symmetric logits if that is faster
(:func:`groups_and_splits`): M^2 D multiplications and additions instead of 2 M^2 D, and M^2 / 2 exponentials. Each tile
past the diagonal is added to the sums of its rows and of its columns, float32 [slots, 3, M]: in addition to one read of
x, 12 M slots bytes are written and read two or three times.

Memory beside inputs and results: a float32 buffer of the size of one gradient (at most :data:`SPLIT_BYTES` for the
splits of a small one; in forward at most that plus the bytes of x; with :mod:`fgfast.kernels.contrast.wide`, for many
channels, buffers for both sides and a chunk of weights) and a few numbers per vector. Vectors are multiplied
in their stored dtype; in backward dL/ds is rounded to bfloat16 for bfloat16 and float16 vectors; sums are float32.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fgfast.ids import Ids
from fgfast.kernels.common import MOST_REGISTERS, cdiv, interpreted, launch_options, on_device_of, output_dtype
from fgfast.kernels.contrast import vectors as per_vector
from fgfast.kernels.contrast import wide
from fgfast.kernels.contrast.forward import forward as forward_kernel
from fgfast.kernels.contrast.gradient import gradient as gradient_kernel
from fgfast.kernels.contrast.problem import (
    SPLIT_BYTES,
    Problem,
    Side,
    channels_of_tile,
    check_sizes,
    copies_pay,
    forward_registers,
)
from fgfast.kernels.launches import launch

FINISH_ROWS = 16  # vectors per program of ``finish``
JOIN_ROWS = 64  # rows per program of ``join``
INNER = launch_options(4, 3, MOST_REGISTERS)  # of ``inner``, which spills with the default budget of ptxas


class Losses:
    """The losses of the rows, from a launch of ``forward`` per block of columns.

    Args:
        problem: of "forward".
        slots: of sums, each as many as one split stores; when a launch finds too few left, the used ones are joined
            into one. With 1, the only launch stores the results.
        groups: slots that a launch for one triangle needs beside those of its splits.
    """

    def __init__(self, problem: Problem, slots: int, groups: int = 0):
        self.problem, self.groups, self.used = problem, groups, groups
        x, n = problem.rows.x, problem.rows.n
        self.results = tuple([x.new_empty(n, dtype=torch.float32) for _ in range(3)])
        self.partial = None
        if slots > 1:
            self.partial = x.new_empty(slots, 3 if problem.bounded else 4, n, dtype=torch.float32)
            self.partial[:groups].zero_()

    def add(self, columns: Side, splits: int, triangular: bool = False) -> None:
        """Add a block of columns; ``triangular``: the columns are the rows."""
        problem = self.problem
        m, d = problem.rows.x.shape
        if m == 0:
            return
        if self.partial is not None and self.used + splits > len(self.partial):
            self._join_used()
        grid = (self.groups if triangular else cdiv(m, problem.tile.x), splits)
        launch(
            forward_kernel, grid,
            *problem.rows.arguments, *columns.arguments, *columns.copied, columns.low, columns.high,
            problem.pointer, problem.scale, *self.results, self.partial, self.used, columns.scratch(grid), m,
            columns.n, d, SPLITS=splits, CHANNELS=columns.channels, **problem.tile.of_forward(triangular),
            **problem.options(forward_registers(problem.tile.registers, problem.bounded, triangular)),
        )  # fmt: skip
        self.used += splits

    def _join_used(self) -> None:
        """Join the used slots into the first one."""
        assert self.partial is not None
        used = self.partial[: self.used]
        if not self.problem.bounded:
            top = used[:, 3].amax(0)
            used[:, 0] *= torch.exp2(used[:, 3] - torch.where(top == -torch.inf, 0, top))
            used[0, 3] = top
        used[0, :3] = used[:, :3].sum(0)
        self.used = 1

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, log2-sum-exp2 and number of positives of each row, float32 [M]."""
        loss, lse, count = self.results
        n = self.problem.rows.n
        if self.partial is not None and n:
            launch(
                per_vector.join, (cdiv(n, JOIN_ROWS),),
                self.partial, loss, lse, count, self.used, n, BOUNDED=self.problem.bounded, BLOCK_SLOTS=16,
                BLOCK=JOIN_ROWS, num_warps=4,
            )  # fmt: skip
        return loss, lse, count


def forward(
    query: Tensor, query_ids: Ids, key: Tensor | None, key_ids: Ids | None, bank: Tensor | None,
    temperature_tensor: Tensor | None, temperature: float, negatives: str, normalize: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, log2-sum-exp2 and number of positives of each query, float32 [M]; key None means the query itself."""
    check_sizes(query=query, key=key, bank=bank)
    m = query.shape[0]
    columns = m if key is None else key.shape[0], 0 if bank is None else bank.shape[0]
    with on_device_of(query):
        problem = Problem(
            "forward", query, query_ids, temperature_tensor, temperature, negatives, normalize, precision,
            key=key, key_ids=key_ids, copied=copies_pay(query, max(columns), sum(columns), _bytes(query, key, bank)),
            as_columns=(key is None, True),
        )  # fmt: skip
        keys = problem.keys
        grid = problem.triangular_grid() if key is None else None
        groups, splits = grid or (0, problem.splits(m, columns[0]))
        of_bank = problem.splits(m, columns[1]) if columns[1] else 0
        losses = Losses(problem, groups + splits + of_bank, groups)
        losses.add(keys, splits, grid is not None)
        if bank is not None and of_bank:
            losses.add(problem.prepare(bank, None), of_bank)
        return losses.finish()


def _bytes(*tensors: Tensor | None) -> int:
    """Bytes of the elements."""
    return sum([x.nbytes for x in tensors if x is not None])


class GradientSum:
    """dL/dx [X, D] of one side x, from a launch of ``gradient`` or from chunks per block y of the other side.

    Args:
        problem: of "gradient".
        x: the rows of the problem, or columns.
        longest: vectors in the longest block that ``gradient`` adds.
    """

    def __init__(self, problem: Problem, x: Side, longest: int):
        self.problem, self.x, self.launched = problem, x, False
        n, d = x.x.shape
        self.splits = problem.splits(n, longest, d)
        self.raw = x.x.new_empty(n, self.splits, d, dtype=torch.float32)
        if not problem.tile.whole:
            self.raw.zero_()

    def add(self, y: Side, x_rows: bool, y_rows: bool, of_y: "GradientSum | None" = None) -> None:
        """Add the block y; x_rows and y_rows: which of x and y are rows whose losses count.

        ``of_y``: of the columns y, which chunks add to at the same time (:meth:`beside`).
        """
        problem, (n, d) = self.problem, self.x.x.shape
        if n == 0:
            return
        columns = y if x_rows else self.x
        if wide.serves(problem, columns):
            total, symmetric = self.raw[:, 0], x_rows and y_rows and problem.bounded
            of_columns = None if of_y is None else of_y.raw[:, 0]
            if y_rows and not symmetric:
                of_columns = total
            wide.add(problem, columns, total if x_rows else None, of_columns, symmetric)
            return
        grid = (cdiv(n, problem.tile.x), self.splits)
        launch(
            gradient_kernel, grid,
            *self.x.arguments, *y.arguments, *y.copied, *problem.coefficients, y.low, y.high, problem.pointer,
            problem.scale, self.raw, y.scratch(grid), n, y.n, d, X_ROWS=x_rows, Y_ROWS=y_rows, ADD=self.launched,
            SPLITS=self.splits, CHANNELS=y.channels, **problem.options(problem.tile.registers),
        )  # fmt: skip
        self.launched = True

    @classmethod
    def beside(cls, problem: Problem, columns: Side, need: bool) -> "GradientSum | None":
        """The sum of columns, still empty, if it is needed and comes from the same chunks as that of the rows."""
        return cls(problem, columns, 0) if need and wide.serves(problem, columns) else None

    def inner(self) -> Tensor:
        """T sum_ij s_ij dL/ds_ij over the rows x, 0-d: the inner products of the rows with their gradients so far.

        Pairs of a block added with both x_rows and y_rows count twice.
        """
        x, (n, d) = self.x, self.x.x.shape
        rows = x.x.new_empty(n, dtype=torch.float32)
        if n:
            launch(
                per_vector.inner, (cdiv(n, FINISH_ROWS),),
                x.x, *x.x.stride(), x.inverse, self.raw, rows, n, d,
                SPLITS=self.splits, **(_small_options(d) | INNER),
            )  # fmt: skip
        return rows.sum()

    def finish(self) -> Tensor:
        """dL/dx [X, D]; nothing can be added after it."""
        return finish(self.problem, (self.x, self.raw))[0]


@cache
def _small_options(d: int) -> dict[str, Any]:
    """Keyword arguments of ``inner`` and ``finish``."""
    return {"BLOCK": FINISH_ROWS, "BLOCK_D": channels_of_tile(d, 128), "UPCAST": interpreted(), "num_warps": 4}


def finish(problem: Problem, *raws: tuple[Side, Tensor]) -> list[Tensor]:
    """dL/dx [X, D] of up to two sides from T dL/d(unit vector), raw [X, splits, D] float32; it may overwrite these."""
    results, arguments, programs = [], [], 0
    for x, raw in raws:
        n, splits, d = raw.shape
        dtype = output_dtype(x.x.dtype)
        out = raw.view(n, d) if splits == 1 and dtype == raw.dtype else raw.new_empty(n, d, dtype=dtype)
        results.append(out)
        arguments += [x.x, *x.x.stride(), x.inverse, raw, out, n]
        programs += cdiv(n, FINISH_ROWS)
    if programs:
        absent = () if len(raws) > 1 else (None, 0, 0, None, None, None, 0)
        launch(
            per_vector.finish, (programs,),
            *arguments, *absent, problem.pointer, problem.scale, d, NORMALIZE=problem.normalize,
            X_SPLITS=raws[0][1].shape[1], Y_SPLITS=raws[-1][1].shape[1], **_small_options(d),
        )  # fmt: skip
    return results


def temperature_gradient(inner: Tensor, temperature: Tensor) -> Tensor:
    """dL/dT from T sum_ij s_ij dL/ds_ij, on the device of the temperature."""
    return -inner.to(temperature.device) / temperature.detach().float().square()


def backward(
    grad: Tensor, lse: Tensor, count: Tensor, needs: list[bool],
    query: Tensor, query_ids: Ids, key: Tensor | None, key_ids: Ids | None, bank: Tensor | None,
    temperature_tensor: Tensor | None, temperature: float, negatives: str, normalize: bool, precision: str,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of query, key, bank and temperature, None where ``needs`` is False."""
    need_query, need_key, need_bank, need_temperature = needs
    check_sizes(query=query, key=key, bank=bank)
    n, d = query.shape
    if n == 0:
        zeros = zip(needs, (query, key, bank, temperature_tensor), strict=True)
        return [torch.zeros_like(x) if need and x is not None else None for need, x in zeros]
    sizes = [x.shape[0] for x in (query, key, bank) if x is not None]
    spare = 2 * _bytes(query, key, bank) - 4 * d * max(sizes)  # beside the largest gradient in float32
    with on_device_of(query):
        problem = Problem(
            "gradient", query, query_ids, temperature_tensor, temperature, negatives, normalize, precision,
            (grad.to(torch.float32), lse, count), key, key_ids, copies_pay(query, max(sizes), sum(sizes), spare),
            (need_key or need_bank or key is None, need_query or need_temperature),
        )  # fmt: skip
        rows, keys = problem.rows, problem.keys
        of_bank = None
        if bank is not None and bank.shape[0]:
            of_bank = problem.prepare(bank, None, need_query or need_temperature)
        d_query = d_key = d_bank = d_temperature = None
        of_keys = sum_of_bank = None
        unfinished: list[GradientSum] = []
        if need_query or need_temperature:
            both_sides = key is None and need_query
            twice = both_sides and (problem.bounded or wide.serves(problem, keys))  # at the same time
            left = [y.n for y in (keys, of_bank) if y is not None and not wide.serves(problem, y)]
            of_rows = GradientSum(problem, rows, max(left, default=0))
            of_keys = GradientSum.beside(problem, keys, need_key and key is not None)
            of_rows.add(keys, True, twice, of_keys)
            counted_twice = of_rows.inner() if need_temperature and twice else None
            if of_bank is not None:
                sum_of_bank = GradientSum.beside(problem, of_bank, need_bank)
                of_rows.add(of_bank, True, False, sum_of_bank)
            if need_temperature and temperature_tensor is not None:
                inner = counted_twice if counted_twice is not None and of_bank is None else of_rows.inner()
                if counted_twice is not None:
                    inner = inner - counted_twice / 2
                d_temperature = temperature_gradient(inner, temperature_tensor)
            if both_sides and not twice:
                of_rows.add(keys, False, True)
            if need_query and of_rows.raw.nbytes > SPLIT_BYTES:
                d_query = of_rows.finish()
            elif need_query:
                unfinished.append(of_rows)
            del of_rows  # so that a large buffer is freed before the next one is allocated
        if need_key and key is not None:
            unfinished.append(of_keys or columns_gradient(problem, keys))
        finished = iter(finish(problem, *((one.x, one.raw) for one in unfinished)))
        if need_query and d_query is None:
            d_query = next(finished)
        if need_key and key is not None:
            d_key = next(finished)
        unfinished.clear()
        if need_bank and bank is not None:
            d_bank = torch.zeros_like(bank)
            if of_bank is not None:
                d_bank = (sum_of_bank or columns_gradient(problem, of_bank)).finish()
    return [d_query, d_key, d_bank, d_temperature]


def columns_gradient(problem: Problem, columns: Side) -> GradientSum:
    """The gradient of columns, from the losses of all rows."""
    total = GradientSum(problem, columns, 0 if wide.serves(problem, columns) else problem.rows.n)
    total.add(problem.rows, False, True)
    return total
