r"""Triton kernels of the contrastive loss: the host side, which :mod:`fgfast.ops.contrast.contrast` calls.

.. math:: \ell_i = \log \sum_{j \in P_i \cup N_i \cup \text{bank}} e^{s_{ij}} - \frac{1}{|P_i|} \sum_{j \in P_i}
          s_{ij}, \qquad s_{ij} = \langle q_i, k_j \rangle / T, \qquad q\,[M, D],\ k\,[T, D],\ \text{bank}\,[Q, D]

Forward: ``prepare`` for query and key in one launch and for a bank (inverse norms, ranges of image ids), then
``forward``, in which a program keeps rows and loops over columns. Backward: ``prepare`` again, then for each gradient
``gradient``, in which a program keeps the vectors it computes gradients of and recomputes the tiles, and ``finish``
(1/T and the normalisation), in one launch for query and key. The part of
dL/dT due to a row is the inner product of the row with its own gradient (``inner``). Where query is key and logits are
bounded, one ``gradient`` covers both sides. If there are few rows, the columns are divided into splits, one program
each, whose results are added in a fixed order. No atomics are used: results are deterministic.

Where query is key and logits are bounded, ``forward`` computes one triangle of the symmetric logits if that is faster
(:func:`groups_and_splits`): M^2 D multiplications and additions instead of 2 M^2 D, and M^2 / 2 exponentials. Each tile
past the diagonal is added to the sums of its rows and of its columns, float32 [slots, 3, M]: in addition to one read of
x, 12 M slots bytes are written and read two or three times.

Memory beside inputs and results: a float32 buffer of the size of one gradient (at most :data:`SPLIT_BYTES` for the
splits of a small one; in forward at most that plus the bytes of x) and a few numbers per vector. Vectors are multiplied
in their stored dtype; in backward dL/ds is rounded to bfloat16 for bfloat16 and float16 vectors; sums are float32.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fgfast.ids import Ids
from fgfast.kernels.common import (
    MOST_REGISTERS,
    cdiv,
    interpreted,
    launch_options,
    on_device_of,
    output_dtype,
    power_of_2,
)
from fgfast.kernels.configs import Row, config, processors
from fgfast.kernels.contrast import kernels as device_side
from fgfast.tensors import BOUNDED, LOG2E

LARGEST_D = 8192
LARGEST_N = 2**31 - 2**20  # indices are 32-bit integers, also those of the blocks past the end that groups are dealt
SPLIT_BYTES = 32 << 20  # most bytes of the partial results of splits
TRIANGULAR_TILES = 8  # tiles per program of ``forward`` from which one triangle is faster: an estimate, not measured
FINISH_ROWS = 16  # vectors per program of ``finish``
JOIN_ROWS = 64  # rows per program of ``join``
INNER = launch_options(4, 3, MOST_REGISTERS)  # of ``inner``, which spills with the default budget of ptxas
CHUNK = 256  # blocks whose ranges of image ids a program reads at a time
NEGATIVES = ("all", "other_images", "same_image")


@dataclass(frozen=True)
class TileShape:
    """Tile sizes and launch options of one kernel."""

    x: int  # vectors that a program keeps
    y: int  # vectors per step of its loop
    compared: int  # of those, vectors whose ids are compared at a time
    d: int  # channels at a time; all channels if ``whole``
    whole: bool
    warps: int
    stages: int
    registers: int = 0

    @classmethod
    def of(cls, row: Row) -> "TileShape":
        """A row of the table."""
        t = row.tiles
        sizes = (t["BLOCK_X"], t["BLOCK_Y"], t["BLOCK_S"], t["BLOCK_D"], bool(t["WHOLE"]))
        return cls(*sizes, row.warps, row.stages, row.registers)

    @property
    def options(self) -> dict[str, Any]:
        return {"BLOCK_X": self.x, "BLOCK_Y": self.y, "BLOCK_S": self.compared, "BLOCK_D": self.d, "WHOLE": self.whole}


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    """The kind of products, for the table: "fp16", "half" (bfloat16, or float16 without a row), "tf32" or "ieee"."""
    return precision if dtype == torch.float32 else "fp16" if dtype == torch.float16 else "half"


def forward_registers(row: int, bounded: bool, triangular: bool) -> int:
    """The register budget of ``forward``, from its row's: column sums or maxima spill with the default of ptxas."""
    return MOST_REGISTERS if triangular or not bounded else row


def programs_wanted(device: torch.device) -> int:
    """Number of programs that occupies the device."""
    return 2 * processors(device) if device.type == "cuda" else 1


def tile(kernel: str, device: torch.device, kind: str, channels: int) -> TileShape:
    """Tile sizes of ``kernel`` ("forward" or "gradient") for vectors with this many channels."""
    kinds = ("fp16", "half") if kind == "fp16" else (kind,)
    return TileShape.of(config(f"contrast {kernel}", device, *kinds, channels=channels))


@dataclass
class Side:
    """Vectors and what ``prepare`` computes for them."""

    x: Tensor  # [N, D]
    ids: Ids | None  # None for a bank
    inverse: Tensor  # float32 [N]
    low: Tensor  # int64 [blocks]
    high: Tensor

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of ``forward`` and ``gradient`` for this side."""
        ids = (None, None, None, 0, 0, 0) if self.ids is None else (*self.ids, *(i.stride(0) for i in self.ids))
        return self.x, *self.x.stride(), self.inverse, *ids

    def to_prepare(self) -> tuple[Any, ...]:
        """The arguments of ``prepare`` for this side."""
        of_ids: tuple[Any, ...] = (None, None, 0, 0)
        if self.ids is not None:
            image, part, _ = self.ids
            of_ids = (image, part, image.stride(0), part.stride(0))
        return self.x, *self.x.stride(), *of_ids, self.inverse, self.low, self.high, len(self.x)


NOT_PREPARED = (None, 0, 0, None, None, 0, 0, None, None, None, 0)  # ``Side.to_prepare`` without a side


class Problem:
    """What all launches of one call share: the rows, the temperature, the options and the tile sizes.

    ``kernel`` is "forward" or "gradient"; ``upstream``: dL/dloss, log2-sum-exp2 and positives of the rows [M] each;
    ``key``: columns to prepare in the launch that prepares the rows, with their ids.
    """

    def __init__(
        self, kernel: str, query: Tensor, query_ids: Ids, temperature_tensor: Tensor | None, temperature: float,
        negatives: str, normalize: bool, precision: str, upstream: tuple[Tensor, Tensor, Tensor] | None = None,
        key: tuple[Tensor, Ids] | None = None,
    ):  # fmt: skip
        self.negatives, self.normalize = negatives, normalize
        self.number, self.pointer = temperature, None
        if temperature_tensor is not None:
            if on_device(temperature_tensor):
                self.pointer = temperature_tensor.detach()
            else:
                self.number = float(temperature_tensor)
        self.scale = LOG2E / self.number
        self.bounded = normalize and self.pointer is None and self.scale <= BOUNDED
        kind = arithmetic(query.dtype, precision)
        self.precision = "tf32" if kind == "tf32" else "ieee"
        self.tile = tile(kernel, query.device, kind, query.shape[1])
        self.coefficients: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if upstream is not None:
            values = query.new_empty(2 if self.bounded else 3, len(query), dtype=torch.float32).unbind()
            self.coefficients = (*values, None)[:3]  # type: ignore[assignment]
        self.rows = self._side(query, query_ids)
        self.keys = self.rows if key is None else self._side(*key)
        self._prepare(self.rows, None if key is None else self.keys, upstream)

    def _side(self, x: Tensor, ids: Ids | None) -> Side:
        """A side that is not prepared."""
        n = len(x)
        ranges = x.new_empty(2, 0 if ids is None else cdiv(n, self.tile.y), dtype=torch.int64)
        return Side(x, ids, x.new_empty(n, dtype=torch.float32), *ranges.unbind())

    def _prepare(self, x: Side, y: Side | None, upstream: tuple[Tensor, Tensor, Tensor] | None) -> None:
        block, d = self.tile.y, x.x.shape[1]
        grad, lse, count = upstream or (None, None, None)
        programs = cdiv(len(x.x), block) + (0 if y is None else cdiv(len(y.x), block))
        if programs:
            device_side.prepare[(programs,)](
                *x.to_prepare(), *(NOT_PREPARED if y is None else y.to_prepare()), grad,
                0 if grad is None else grad.stride(0), lse, count,
                *(self.coefficients if upstream else (None, None, None)), d, NORMALIZE=self.normalize,
                BOUNDED=self.bounded, BLOCK=block, BLOCK_D=_channels(d, 128), UPCAST=interpreted(), num_warps=4,
            )  # fmt: skip

    def prepare(self, x: Tensor, ids: Ids | None) -> Side:
        """Norms and ranges of x."""
        side = self._side(x, ids)
        self._prepare(side, None, None)
        return side

    def splits(self, rows: int, columns: int, width: int = 0) -> int:
        """Into how many splits the columns are divided, to have programs for the entire device.

        ``width``: float32 numbers that each split stores per row.
        """
        rows = max(rows, 1)
        count = min(programs_wanted(self.rows.x.device) // cdiv(rows, self.tile.x), cdiv(columns, self.tile.y))
        if width:
            count = min(count, SPLIT_BYTES // (4 * rows * width))
        return max(count, 1)

    def triangular_grid(self) -> tuple[int, int] | None:
        """:func:`groups_and_splits` for one triangle of the logits of the rows with themselves, None to compute all.

        Never for "same_image": sorted ids, which only the device can see, leave few tiles.
        """
        if not self.bounded or self.negatives == "same_image":
            return None
        x = self.rows.x
        return groups_and_splits(len(x), x.shape[1] * x.element_size(), self.tile, programs_wanted(x.device))

    def options(self, registers: int) -> dict[str, Any]:
        """Keyword arguments of both ``forward`` and ``gradient``, with a budget of registers."""
        blocks = self.tile.options
        if self.tile.whole:
            blocks["BLOCK_D"] = _channels(self.rows.x.shape[1], blocks["BLOCK_D"])
        return blocks | {
            "NEGATIVES": self.negatives, "BOUNDED": self.bounded, "CHUNK": CHUNK, "PRECISION": self.precision,
            "UPCAST": interpreted(), **launch_options(self.tile.warps, self.tile.stages, registers),
        }  # fmt: skip


def groups_and_splits(rows: int, row_bytes: int, tile: TileShape, programs: int) -> tuple[int, int] | None:
    """Groups of rows and splits of columns for one triangle of the logits of x with itself, None to compute all logits.

    The sums of columns need a slot per group, those of rows one per split: 12 bytes per row and slot, in total at most
    SPLIT_BYTES plus the bytes of x. A group has an even number of blocks of rows, for an equal number of tiles per
    group. Of the pairs that occupy the device, the one with the fewest splits is taken. None for few tiles, for which
    the slots cost too much.

    Example:
        >>> groups_and_splits(65_536, 512, TileShape(128, 128, 32, 256, True, 8, 2), 264)
        (64, 4)
    """
    blocks = cdiv(rows, tile.x)
    if blocks * cdiv(rows, tile.y) < TRIANGULAR_TILES * programs:
        return None
    slots = (SPLIT_BYTES + rows * row_bytes) // (12 * rows)
    for splits in range(1, programs + 1):
        blocks_per_group = 2 * cdiv(blocks, 2 * (programs // splits))
        groups = cdiv(blocks, blocks_per_group)
        if groups + splits <= slots and 8 * groups * splits >= 7 * programs:
            return groups, splits
    return None


def on_device(temperature: Tensor) -> bool:
    """Whether reading the temperature on the host would need a device sync."""
    return temperature.device.type != "cpu"


def _channels(d: int, most: int) -> int:
    """Channels of a tile: the power of two >= d, at least 16 (the smallest product) and at most ``most``."""
    return min(max(power_of_2(d), 16), most)


def check_sizes(**vectors: Tensor | None) -> None:
    """Raise for more channels or vectors than the kernels can index.

    Raises:
        ValueError: D over 8,192, or 2^31 vectors.
    """
    for name, x in vectors.items():
        if x is not None and x.shape[1] > LARGEST_D:
            raise ValueError(
                f"{name} has {x.shape[1]} channels and the Triton kernels take {LARGEST_D}: choose backend 'torch'."
            )
        if x is not None and x.shape[0] > LARGEST_N:
            raise ValueError(
                f"{name} has {x.shape[0]} rows and the Triton kernels take {LARGEST_N}: choose backend 'torch'."
            )


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
        x = problem.rows.x
        self.results = tuple(x.new_zeros(len(x), dtype=torch.float32) for _ in range(3))
        self.partial = None
        if slots > 1:
            self.partial = x.new_empty(slots, 3 if problem.bounded else 4, len(x), dtype=torch.float32)
            self.partial[:groups].zero_()

    def add(self, columns: Side, splits: int, triangular: bool = False) -> None:
        """Add a block of columns; ``triangular``: the columns are the rows."""
        problem = self.problem
        m, d = problem.rows.x.shape
        if m == 0:
            return
        if self.partial is not None and self.used + splits > len(self.partial):
            self._join_used()
        device_side.forward[(self.groups if triangular else cdiv(m, problem.tile.x), splits)](
            *problem.rows.arguments(), *columns.arguments(), columns.low, columns.high, problem.pointer, problem.scale,
            *self.results, self.partial, self.used, m, len(columns.x), d, TRIANGULAR=triangular, SPLITS=splits,
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
        if self.partial is not None and len(loss):
            device_side.join[(cdiv(len(loss), JOIN_ROWS),)](
                self.partial, loss, lse, count, self.used, len(loss), BOUNDED=self.problem.bounded, BLOCK_SLOTS=16,
                BLOCK=JOIN_ROWS, num_warps=4,
            )  # fmt: skip
        return loss, lse, count


def forward(
    query: Tensor, query_ids: Ids, key: Tensor | None, key_ids: Ids | None, bank: Tensor | None,
    temperature_tensor: Tensor | None, temperature: float, negatives: str, normalize: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, log2-sum-exp2 and number of positives of each query, float32 [M]; key None means the query itself."""
    check_sizes(query=query, key=key, bank=bank)
    with on_device_of(query):
        problem = Problem(
            "forward", query, query_ids, temperature_tensor, temperature, negatives, normalize, precision,
            key=_together(key, key_ids),
        )  # fmt: skip
        keys = problem.keys
        grid = problem.triangular_grid() if key is None else None
        groups, splits = grid or (0, problem.splits(len(query), len(keys.x)))
        of_bank = 0 if bank is None or len(bank) == 0 else problem.splits(len(query), len(bank))
        losses = Losses(problem, groups + splits + of_bank, groups)
        losses.add(keys, splits, grid is not None)
        if bank is not None and of_bank:
            losses.add(problem.prepare(bank, None), of_bank)
        return losses.finish()


class GradientSum:
    """dL/dx [X, D] of one side x, from a launch of ``gradient`` per block y of the other side.

    Args:
        problem: of "gradient".
        x: the rows of the problem, or columns.
        longest: vectors in the longest block.
    """

    def __init__(self, problem: Problem, x: Side, longest: int):
        self.problem, self.x, self.launched = problem, x, False
        n, d = x.x.shape
        self.splits = problem.splits(n, longest, d)
        self.raw = x.x.new_empty(n, self.splits, d, dtype=torch.float32)
        if not problem.tile.whole:
            self.raw.zero_()

    def add(self, y: Side, x_rows: bool, y_rows: bool) -> None:
        """Add the block y; x_rows and y_rows: which of x and y are rows whose losses count."""
        problem, (n, d) = self.problem, self.x.x.shape
        if n == 0:
            return
        device_side.gradient[(cdiv(n, problem.tile.x), self.splits)](
            *self.x.arguments(), *y.arguments(), *problem.coefficients, y.low, y.high, problem.pointer, problem.scale,
            self.raw, n, len(y.x), d, X_ROWS=x_rows, Y_ROWS=y_rows, ADD=self.launched, SPLITS=self.splits,
            **problem.options(problem.tile.registers),
        )  # fmt: skip
        self.launched = True

    def inner(self) -> Tensor:
        """T sum_ij s_ij dL/ds_ij over the rows x, 0-d: the inner products of the rows with their gradients so far.

        Pairs of a block added with both x_rows and y_rows count twice.
        """
        x, (n, d) = self.x, self.x.x.shape
        rows = x.x.new_empty(n, dtype=torch.float32)
        if n:
            device_side.inner[(cdiv(n, FINISH_ROWS),)](
                x.x, *x.x.stride(), x.inverse, self.raw, rows, n, d,
                SPLITS=self.splits, **(_small_options(d) | INNER),
            )  # fmt: skip
        return rows.sum()

    def finish(self) -> Tensor:
        """dL/dx [X, D]; nothing can be added after it."""
        return finish(self.problem, (self.x, self.raw))[0]


def _small_options(d: int) -> dict[str, Any]:
    """Keyword arguments of ``inner`` and ``finish``."""
    return {"BLOCK": FINISH_ROWS, "BLOCK_D": _channels(d, 128), "UPCAST": interpreted(), "num_warps": 4}


def finish(problem: Problem, *raws: tuple[Side, Tensor]) -> list[Tensor]:
    """dL/dx [X, D] of one or two sides from T dL/d(unit vector), raw [X, splits, D] float32; it may overwrite these."""
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
        device_side.finish[(programs,)](
            *arguments, *absent, problem.pointer, problem.scale, d, NORMALIZE=problem.normalize,
            X_SPLITS=raws[0][1].shape[1], Y_SPLITS=raws[-1][1].shape[1], **_small_options(d),
        )  # fmt: skip
    return results


def _together(key: Tensor | None, ids: Ids | None) -> tuple[Tensor, Ids] | None:
    return None if key is None or ids is None else (key, ids)


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
    if len(query) == 0:
        zeros = zip(needs, (query, key, bank, temperature_tensor), strict=True)
        return [torch.zeros_like(x) if need and x is not None else None for need, x in zeros]
    with on_device_of(query):
        problem = Problem(
            "gradient", query, query_ids, temperature_tensor, temperature, negatives, normalize, precision,
            (grad.to(torch.float32), lse, count), _together(key, key_ids),
        )  # fmt: skip
        rows, keys = problem.rows, problem.keys
        of_bank = None if bank is None or len(bank) == 0 else problem.prepare(bank, None)
        d_bank = d_temperature = None
        unfinished: list[GradientSum] = []
        if need_query or need_temperature:
            both_sides = key is None and need_query
            twice = both_sides and problem.bounded  # in one launch
            of_rows = GradientSum(problem, rows, max(len(keys.x), 0 if bank is None else len(bank)))
            of_rows.add(keys, True, twice)
            counted_twice = of_rows.inner() if need_temperature and twice else None
            if of_bank is not None:
                of_rows.add(of_bank, True, False)
            if need_temperature and temperature_tensor is not None:
                inner = counted_twice if counted_twice is not None and of_bank is None else of_rows.inner()
                if counted_twice is not None:
                    inner = inner - counted_twice / 2
                d_temperature = temperature_gradient(inner, temperature_tensor)
            if both_sides and not twice:
                of_rows.add(keys, False, True)
            if need_query:
                unfinished.append(of_rows)
        if need_key and key is not None:
            unfinished.append(columns_gradient(problem, keys))
        found = finish(problem, *((one.x, one.raw) for one in unfinished)) if unfinished else []
        d_query = found[0] if need_query else None
        d_key = found[-1] if need_key and key is not None else None
        if need_bank and bank is not None:
            d_bank = torch.zeros_like(bank) if of_bank is None else columns_gradient(problem, of_bank).finish()
    return [d_query, d_key, d_bank, d_temperature]


def columns_gradient(problem: Problem, columns: Side) -> GradientSum:
    """The gradient of columns, from the losses of all rows."""
    total = GradientSum(problem, columns, len(problem.rows.x))
    total.add(problem.rows, False, True)
    return total
