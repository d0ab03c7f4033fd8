"""What the launches of one contrast share: tile sizes, the prepared rows and columns, and how the work is divided."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgfast.ids import Ids
from fgfast.kernels.common import MOST_REGISTERS, cdiv, interpreted, launch_options, power_of_2
from fgfast.kernels.configs import Row, config, processors
from fgfast.kernels.contrast import vectors as per_vector
from fgfast.kernels.launches import launch
from fgfast.tensors import BOUNDED, LOG2E

LARGEST_D = 8192
LARGEST_N = 2**31 - 2**20  # indices are 32-bit integers, also those of the blocks past the end that groups are dealt
SPLIT_BYTES = 32 << 20  # most bytes of the partial results of splits
TRIANGULAR_TILES = 8  # tiles per program of ``forward`` from which one triangle is faster: an estimate, not measured
COPIED_FROM = 1 << 24  # logits from which columns are copied, 10 us of products on an H200: an estimate, not measured
HELD_FROM = 129  # channels from which rows of the kind "held" are faster: fewer fit into shared memory
HELD_TRIANGLE = 256  # most channels with which they have room for one triangle
COPY_BYTES = 32 << 20  # most bytes of copies that exceed the memory bound otherwise
CHUNK = 256  # blocks whose ranges of image ids a program reads at a time
NEGATIVES = ("all", "other_images", "same_image")


class TileShape(NamedTuple):
    """Tile sizes and launch options of one kernel."""

    x: int  # vectors that a program keeps
    y: int  # vectors per step of its loop
    compared: int  # of those, vectors whose ids are compared at a time
    d: int  # channels at a time; all channels if ``whole``
    whole: bool
    warps: int
    stages: int
    registers: int = 0
    copied: bool = False  # columns are read from a copy
    ahead: bool = False  # forward multiplies a tile before it sums the exponentials of the one before
    held: int = 0  # channels of the rows that forward keeps in registers
    flipped: bool = False  # forward computes the tiles of one triangle as their transposes
    triangle: bool = True  # forward may compute one triangle

    @classmethod
    @cache
    def of(cls, row: Row) -> "TileShape":
        """A row of the table."""
        t = row.tiles
        sizes = (t["BLOCK_X"], t["BLOCK_Y"], t["BLOCK_S"], t["BLOCK_D"], bool(t["WHOLE"]))
        copied = row.kind.endswith((" copied", " held"))
        flags = bool(t.get("AHEAD", 0)), t.get("HELD", 0), bool(t.get("FLIPPED", 0)), not t.get("ALL", 0)
        return cls(*sizes, row.warps, row.stages, row.registers, copied, *flags)

    @property
    def options(self) -> dict[str, Any]:
        return {"BLOCK_X": self.x, "BLOCK_Y": self.y, "BLOCK_S": self.compared, "BLOCK_D": self.d, "WHOLE": self.whole}

    def of_forward(self, triangular: bool) -> dict[str, Any]:
        """Constants of ``forward`` alone, for all logits or for one triangle."""
        flipped = self.flipped and triangular
        return {"TRIANGULAR": triangular, "AHEAD": self.ahead and not flipped, "HELD": self.held, "FLIPPED": flipped}


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    """The kind of products, for the table: "fp16", "half" (bfloat16, or float16 without a row), "tf32" or "ieee"."""
    return precision if dtype == torch.float32 else "fp16" if dtype == torch.float16 else "half"


def forward_registers(row: int, bounded: bool, triangular: bool) -> int:
    """The register budget of ``forward``, from its row's: column sums or maxima spill with the default of ptxas."""
    return MOST_REGISTERS if triangular or not bounded else row


def programs_wanted(device: torch.device) -> int:
    """Number of programs that occupies the device."""
    return 2 * processors(device) if device.type == "cuda" else 1


def tile(
    kernel: str, device: torch.device, kind: str, channels: int, copied: bool = False, held: bool = False
) -> TileShape:
    """Tile sizes of ``kernel`` ("forward" or "gradient") for vectors with this many channels.

    ``copied``: rows of the table for copied columns come first, and with ``held`` those that keep channels in registers
    before them.
    """
    return TileShape.of(config(f"contrast {kernel}", device, *_kinds(kind, copied, held), channels=channels))


@cache
def _kinds(kind: str, copied: bool, held: bool) -> tuple[str, ...]:
    """The kinds of rows that serve, the most specific first."""
    kinds = {"half": ("bf16", "half"), "fp16": ("fp16", "half")}.get(kind, (kind,))
    endings = [" held"] * (copied and held) + [" copied"] * copied + [""]
    return tuple(k + ending for ending in endings for k in kinds)


def copies_pay(query: Tensor, columns: int, vectors: int, spare: int = 0) -> bool:
    """Whether the columns are to be copied: ``vectors`` in all, for products of the query with ``columns``.

    ``spare``: bytes that copies may take.
    """
    n, d = query.shape
    if n * columns < COPIED_FROM:
        return False
    return vectors * channels_of_copy(d) * query.element_size() <= max(spare, COPY_BYTES)


class Side:
    """Vectors x [N, D], not prepared yet, and the tensors in which ``prepare`` stores what it computes for them.

    Args:
        x: the vectors.
        ids: None for a bank.
        block: consecutive vectors of which the range of image ids is found.
        copied: whether ``prepare`` copies the vectors.

    Attributes:
        n: number of vectors.
        inverse: float32 [N].
        low, high: the ranges, int64 [blocks].
        copied: copy [whole blocks, channels], x where it is present, else 0 (the channels are a multiple of 16);
            factor float32 [whole blocks], inverse, 1 for an absent vector; bias float32 [whole blocks], 0, -inf for an
            absent vector. All None without a copy.
        channels: of the copy, 0 without one.
        arguments: of ``forward`` and ``gradient``.
    """

    def __init__(self, x: Tensor, ids: Ids | None, block: int, copied: bool):
        self.n, d = x.shape
        blocks = cdiv(self.n, block)
        self.x, self.ids, ranges = x, ids, 0 if ids is None else blocks
        self.inverse = x.new_empty(self.n, dtype=torch.float32)
        self.low, self.high = x.new_empty(ranges, dtype=torch.int64), x.new_empty(ranges, dtype=torch.int64)
        self.copied: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None] = (None, None, None)
        self.channels = 0
        if copied:
            self.channels = channels_of_copy(d)
            factor, bias = x.new_empty(2, blocks * block, dtype=torch.float32).unbind()
            self.copied = x.new_empty(blocks * block, self.channels), factor, bias
        of_ids: tuple[Any, ...] = (None, None, None, 0, 0, 0)
        if ids is not None:
            image, part, view = ids
            of_ids = (image, part, view, *image.stride(), *part.stride(), *view.stride())
        self.arguments = (x, *x.stride(), self.inverse, *of_ids)

    def scratch(self, grid: tuple[int, int]) -> Tensor | None:
        """Four integers for each program of a launch with these columns, None if they are not copied."""
        return self.x.new_empty(4 * grid[0] * grid[1], dtype=torch.int64) if self.channels else None

    def to_prepare(self) -> tuple[Any, ...]:
        """The arguments of ``prepare`` for this side."""
        x, stride_n, stride_d, inverse, image, part, _, stride_image, stride_part, _ = self.arguments
        of_ids = (image, part, stride_image, stride_part)
        return x, stride_n, stride_d, *of_ids, inverse, self.low, self.high, *self.copied, self.n


NOT_PREPARED = (None, 0, 0, None, None, 0, 0, *[None] * 6, 0)  # ``Side.to_prepare`` without a side


class Problem:
    """What all launches of one call share: the rows, the temperature, the options and the tile sizes.

    ``kernel`` is "forward" or "gradient"; ``upstream``: dL/dloss, log2-sum-exp2 and positives of the rows [M] each;
    ``key``: columns [T, D] to prepare in the launch that prepares the rows; by default the rows themselves;
    ``copied``: whether columns are copied where the table has such a row (:func:`copies_pay`); ``as_columns``: whether
    rows and keys are ever the columns of a launch.
    """

    def __init__(
        self, kernel: str, query: Tensor, query_ids: Ids, temperature_tensor: Tensor | None, temperature: float,
        negatives: str, normalize: bool, precision: str, upstream: tuple[Tensor, Tensor, Tensor] | None = None,
        key: Tensor | None = None, key_ids: Ids | None = None, copied: bool = False,
        as_columns: tuple[bool, bool] = (False, True),
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
        # Channels in registers go through a product, which only finite numbers survive: those of bounded logits, since
        # a vector with others has no finite logit anyway.
        most = HELD_TRIANGLE if as_columns[0] else LARGEST_D
        held = kernel == "forward" and self.bounded and HELD_FROM <= query.shape[1] <= most
        self.tile = tile(kernel, query.device, kind, query.shape[1], copied, held)
        self.programs = programs_wanted(query.device)
        self.rows = Side(query, query_ids, self.tile.y, as_columns[0] and self.tile.copied)
        self.keys = self.rows
        if key is not None:
            self.keys = Side(key, key_ids, self.tile.y, as_columns[1] and self.tile.copied)
        # The coefficients of the exponentials, of positives, and log-sum-exps.
        self.coefficients: tuple[Tensor | None, ...] = (None, None, None)
        if upstream is not None:
            of_exp, of_positive, of_lse = (
                query.new_empty(cdiv(self.rows.n, self.tile.y) * self.tile.y, dtype=torch.float32) if needed else None
                for needed in (True, True, not self.bounded)
            )
            self.coefficients = of_exp, of_positive, of_lse
        self._prepare(self.rows, None if key is None else self.keys, upstream)

    def _prepare(self, x: Side, y: Side | None, upstream: tuple[Tensor, Tensor, Tensor] | None) -> None:
        block, d = self.tile.y, x.x.shape[1]
        grad, lse, count = upstream or (None, None, None)
        programs = cdiv(x.n, block) + (0 if y is None else cdiv(y.n, block))
        if programs:
            launch(
                per_vector.prepare, (programs,),
                *x.to_prepare(), *(NOT_PREPARED if y is None else y.to_prepare()), grad,
                0 if grad is None else grad.stride(0), lse, count,
                *(self.coefficients if upstream else (None, None, None)), d, NORMALIZE=self.normalize,
                BOUNDED=self.bounded, CHANNELS=x.channels or (0 if y is None else y.channels), BLOCK=block,
                BLOCK_D=channels_of_tile(d, 128), UPCAST=interpreted(), num_warps=4,
            )  # fmt: skip

    def prepare(self, x: Tensor, ids: Ids | None, as_columns: bool = True) -> Side:
        """Norms and ranges of x, and the copy of columns."""
        side = Side(x, ids, self.tile.y, as_columns and self.tile.copied)
        self._prepare(side, None, None)
        return side

    def splits(self, rows: int, columns: int, width: int = 0) -> int:
        """Into how many splits the columns are divided, to have programs for the entire device.

        ``width``: float32 numbers that each split stores per row.
        """
        rows = max(rows, 1)
        count = min(self.programs // cdiv(rows, self.tile.x), cdiv(columns, self.tile.y))
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
        return groups_and_splits(self.rows.n, x.shape[1] * x.element_size(), self.tile, self.programs)

    def options(self, registers: int) -> dict[str, Any]:
        """Keyword arguments of both ``forward`` and ``gradient``, with a budget of registers."""
        channels = self.rows.x.shape[1]
        return _options(self.tile, channels, self.negatives, self.bounded, self.precision, registers, CHUNK)


@cache
def _options(
    tile: TileShape, channels: int, negatives: str, bounded: bool, precision: str, registers: int, chunk: int
) -> dict[str, Any]:
    blocks = tile.options
    if tile.whole:
        blocks["BLOCK_D"] = channels_of_tile(channels, blocks["BLOCK_D"])
    return blocks | {
        "NEGATIVES": negatives, "BOUNDED": bounded, "CHUNK": chunk, "PRECISION": precision, "UPCAST": interpreted(),
        **launch_options(tile.warps, tile.stages, registers),
    }  # fmt: skip


def groups_and_splits(rows: int, row_bytes: int, tile: TileShape, programs: int) -> tuple[int, int] | None:
    """Groups of rows and splits of columns for one triangle of the logits of x with itself, None to compute all logits.

    The sums of columns need a slot per group, those of rows one per split: 12 bytes per row and slot, in total at most
    SPLIT_BYTES plus the bytes of x. A group has an even number of blocks of rows, for an equal number of tiles per
    group. Of the pairs that occupy the device, the one with the fewest splits is taken. None for few tiles, for which
    the slots cost too much, and for tiles that are not for triangles.

    Example:
        >>> groups_and_splits(65_536, 512, TileShape(128, 128, 32, 256, True, 8, 2), 264)
        (64, 4)
    """
    blocks = cdiv(rows, tile.x)
    if not tile.triangle or blocks * cdiv(rows, tile.y) < TRIANGULAR_TILES * programs:
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


def channels_of_copy(d: int) -> int:
    """Channels of a vector in the copy: a multiple of 16, so that all vectors are aligned."""
    return 16 * cdiv(d, 16)


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
