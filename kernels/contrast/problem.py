"""What the launches of one contrast share: tile sizes, the prepared rows and columns, and how the work is divided."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fgfast.ids import Ids
from fgfast.kernels.common import MOST_REGISTERS, cdiv, interpreted, launch_options, power_of_2
from fgfast.kernels.configs import Row, config, processors
from fgfast.kernels.contrast import vectors as per_vector
from fgfast.tensors import BOUNDED, LOG2E

LARGEST_D = 8192
LARGEST_N = 2**31 - 2**20  # indices are 32-bit integers, also those of the blocks past the end that groups are dealt
SPLIT_BYTES = 32 << 20  # most bytes of the partial results of splits
TRIANGULAR_TILES = 8  # tiles per program of ``forward`` from which one triangle is faster: an estimate, not measured
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
    ``key``: columns [T, D] to prepare in the launch that prepares the rows; by default the rows themselves.
    """

    def __init__(
        self, kernel: str, query: Tensor, query_ids: Ids, temperature_tensor: Tensor | None, temperature: float,
        negatives: str, normalize: bool, precision: str, upstream: tuple[Tensor, Tensor, Tensor] | None = None,
        key: Tensor | None = None, key_ids: Ids | None = None,
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
        self.coefficients: list[Tensor | None] = [None, None, None]  # of the exponentials, of positives, log-sum-exps
        if upstream is not None:
            n_kinds = 2 if self.bounded else 3
            self.coefficients[:n_kinds] = query.new_empty(n_kinds, len(query), dtype=torch.float32)
        self.rows = self._side(query, query_ids)
        self.keys = self.rows if key is None else self._side(key, key_ids)
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
            per_vector.prepare[(programs,)](
                *x.to_prepare(), *(NOT_PREPARED if y is None else y.to_prepare()), grad,
                0 if grad is None else grad.stride(0), lse, count,
                *(self.coefficients if upstream else (None, None, None)), d, NORMALIZE=self.normalize,
                BOUNDED=self.bounded, BLOCK=block, BLOCK_D=channels_of_tile(d, 128), UPCAST=interpreted(), num_warps=4,
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
            blocks["BLOCK_D"] = channels_of_tile(self.rows.x.shape[1], blocks["BLOCK_D"])
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


def channels_of_tile(d: int, most: int) -> int:
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
