"""Tile sizes by operation, architecture and dtype: fixed tables, because tuning at run time needs a device and time.

A row is chosen by :func:`config`: one that was measured on this architecture (``tuned.py``, written by
``python -m fgfast.kernels.tune``) before the ones below, those of this architecture before the default ones, and among
these the first whose channels and shared memory suffice; but a row of a narrower kind ("fp16") always before one of a
wider kind ("half"). Sizes are powers of two. A row that spills with older compilers names the Triton that it is
``since``, and one for those stands behind it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

from fgfast.kernels.common import COMPILER, MOST_REGISTERS, launch_options
from fgfast.kernels.tuned import TUNED

SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a program may have


class Row(NamedTuple):
    """One row: for what it is, the tiles, warps and stages, and the shared memory that suffices.

    ``kind`` is "half" (bfloat16 and float16) or "fp32"; for kmeans_step also "half aligned" (rows of pixels or channels
    that start at multiples of 16 elements) and "half gaps" (neither that, nor without gaps between rows); for the
    contrast how products are made: "half", "fp16", "tf32" or "ieee".
    """

    kind: str
    tiles: dict[str, int]
    warps: int
    stages: int
    shared: int  # KiB; fgfast.kernels.aot holds the compiled kernels to it
    registers: int = 0  # see launch_options
    channels: int = 0  # most channels that it serves, 0 for any
    since: tuple[int, int] = (0, 0)  # the oldest Triton with which it does not spill

    @property
    def launch(self) -> dict[str, int]:
        """What a launch takes as keywords."""
        return launch_options(self.warps, self.stages, self.registers)


def contrast_row(
    kind: str, most: int, x: int, y: int, compared: int, d: int, warps: int, stages: int, shared: int,
    registers: int = 0, since: tuple[int, int] = (0, 0),
) -> Row:  # fmt: skip
    """Vectors kept, vectors a step, of them compared at a time, channels at a time: each one where d is ``most``."""
    tiles = {"BLOCK_X": x, "BLOCK_Y": y, "BLOCK_S": compared, "BLOCK_D": d, "WHOLE": int(d == most)}
    return Row(kind, tiles, warps, stages, shared, registers, most, since)


def kmeans_row(
    kind: str, n: int, d: int, s: int, held: int, most: int, warps: int, stages: int, shared: int, registers: int = 0
) -> Row:
    """Pixels and channels of a tile of scores, channels of a tile of sums, padded sums that a program keeps in its
    registers, 96 or 128 a thread, and padded clusters of such a program.
    """
    tiles = {"BLOCK_N": n, "BLOCK_D": d, "BLOCK_S": s, "HELD": held, "MOST_K": most}
    return Row(kind, tiles, warps, stages, shared, registers)


TRITON_3_8 = (3, 8)
SMALL_CONTRAST = (
    contrast_row("half", 8192, 32, 32, 32, 64, 4, 1, 48),
    contrast_row("tf32", 8192, 32, 32, 32, 32, 4, 1, 48),
    contrast_row("ieee", 8192, 32, 32, 32, 32, 4, 1, 48),
)

ROWS: dict[tuple[str, str], tuple[Row, ...]] = {
    # A channel block of 256 bytes a pixel keeps the labels, which each block reads again, under 5% of the traffic.
    ("part_pool", "default"): (
        Row("half", {"BLOCK_D": 128, "BLOCK_P": 64}, 8, 3, 64),
        Row("half", {"BLOCK_D": 64, "BLOCK_P": 32}, 4, 1, 32),
        Row("fp32", {"BLOCK_D": 64, "BLOCK_P": 32}, 4, 3, 64, MOST_REGISTERS),
        Row("fp32", {"BLOCK_D": 32, "BLOCK_P": 32}, 4, 1, 32, MOST_REGISTERS),
    ),
    # BLOCK_C, BLOCK_D: cells and channels of a tile; BLOCK_S: channels of a tile of sums, HELD of a program.
    ("kmeans_pyramid", "default"): (
        Row("half", {"BLOCK_C": 32, "BLOCK_D": 64, "BLOCK_S": 64, "HELD": 256}, 4, 3, 72, MOST_REGISTERS),
        Row("half", {"BLOCK_C": 32, "BLOCK_D": 32, "BLOCK_S": 32, "HELD": 64}, 4, 1, 48, MOST_REGISTERS),
        Row("fp32", {"BLOCK_C": 32, "BLOCK_D": 32, "BLOCK_S": 32, "HELD": 64}, 4, 2, 48, MOST_REGISTERS),
    ),
    # A program has 256 threads: 8 warps, 4 on an AMD GPU. More sums of rows with gaps between them spill.
    ("kmeans_step", "default"): (
        kmeans_row("half", 16, 32, 128, 24 << 10, 128, 8, 2, 48, MOST_REGISTERS),
        kmeans_row("half gaps", 16, 32, 128, 8 << 10, 128, 8, 2, 48, MOST_REGISTERS),
        kmeans_row("fp32", 16, 32, 128, 24 << 10, 64, 8, 2, 48, MOST_REGISTERS),
        kmeans_row("fp32 gaps", 16, 32, 128, 8 << 10, 64, 8, 2, 48, MOST_REGISTERS),
    ),
    ("kmeans_step", "gfx942"): (
        kmeans_row("half", 16, 32, 128, 24 << 10, 128, 4, 2, 48),
        kmeans_row("half gaps", 16, 32, 128, 24 << 10, 128, 4, 2, 48),
        kmeans_row("fp32", 16, 32, 128, 24 << 10, 64, 4, 2, 48),
        kmeans_row("fp32 gaps", 16, 32, 128, 24 << 10, 64, 4, 2, 48),
    ),
    ("kmeans_step", "sm_90"): (kmeans_row("half aligned", 64, 64, 128, 32 << 10, 128, 8, 4, 99, MOST_REGISTERS),),
    ("contrast forward", "default"): (
        contrast_row("half", 128, 128, 64, 16, 128, 8, 2, 72),
        contrast_row("half", 256, 64, 64, 16, 256, 8, 2, 99),
        contrast_row("half", 8192, 64, 64, 32, 64, 8, 2, 48),
        contrast_row("tf32", 128, 64, 32, 16, 128, 8, 2, 72, 0, TRITON_3_8),
        contrast_row("tf32", 128, 64, 32, 16, 128, 8, 2, 72, MOST_REGISTERS),
        contrast_row("tf32", 8192, 64, 64, 32, 32, 8, 2, 48),
        contrast_row("ieee", 8192, 64, 64, 16, 16, 8, 2, 48, MOST_REGISTERS),
    ),
    ("contrast gradient", "default"): (
        contrast_row("half", 128, 128, 32, 16, 128, 8, 2, 72, MOST_REGISTERS, TRITON_3_8),
        contrast_row("half", 128, 64, 64, 16, 128, 8, 2, 72, MOST_REGISTERS),
        contrast_row("half", 8192, 128, 64, 16, 64, 8, 2, 72),
        contrast_row("tf32", 8192, 64, 64, 32, 32, 8, 2, 64, MOST_REGISTERS),
        contrast_row("ieee", 8192, 128, 64, 32, 16, 8, 2, 48, 0, TRITON_3_8),
        contrast_row("ieee", 8192, 64, 64, 32, 16, 8, 2, 48, MOST_REGISTERS),
    ),
    ("contrast forward", "sm_90"): (
        contrast_row("half", 256, 128, 128, 32, 256, 8, 2, 200),
        contrast_row("half", 8192, 128, 128, 32, 64, 8, 3, 99),
    ),
    ("contrast gradient", "sm_90"): (
        # Of float16 a whole block of 256 channels, converted to bfloat16, would take too many registers.
        contrast_row("fp16", 128, 128, 64, 32, 128, 8, 3, 99),
        contrast_row("fp16", 8192, 128, 64, 32, 64, 8, 3, 99),
        contrast_row("half", 128, 128, 64, 32, 128, 8, 3, 99),
        contrast_row("half", 256, 128, 64, 16, 256, 8, 2, 163, MOST_REGISTERS, TRITON_3_8),
        contrast_row("half", 256, 128, 32, 16, 256, 8, 3, 163, MOST_REGISTERS),
        contrast_row("half", 8192, 128, 64, 32, 64, 8, 3, 99),
    ),
    ("contrast forward", "gfx942"): SMALL_CONTRAST,
    ("contrast gradient", "gfx942"): SMALL_CONTRAST,
}

_forced: dict[str, Row] = {}  # by operation, while the tuner measures


@cache
def architecture(device: torch.device) -> str:
    """The name of the device's architecture, "sm_90" or "gfx942"; "cpu" under the interpreter."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def shared_memory(device: torch.device) -> int:
    """KiB of shared memory that one program may have."""
    if device.type != "cuda":
        return 227
    known = SHARED.get(architecture(device))
    properties = torch.cuda.get_device_properties(device)
    return known or int(getattr(properties, "shared_memory_per_block_optin", 64 * 1024)) // 1024


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device: how many programs run at once, at least."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4


def row_kind(dtype: torch.dtype) -> str:
    """The kind of the rows for ``dtype``: "fp32" or "half"."""
    return "fp32" if dtype == torch.float32 else "half"


def rows(op: str, arch: str) -> Iterator[Row]:
    """The rows of ``op`` for an architecture and this compiler, in the order of preference."""
    yield from (Row(*row) for row in TUNED.get((op, arch), ()))
    for where in dict.fromkeys((arch, "default")):
        yield from (row for row in ROWS.get((op, where), ()) if row.since <= COMPILER)


def choose(op: str, arch: str, shared: int, kinds: tuple[str, ...], channels: int = 0) -> Row | None:
    """The first row for so many channels and at most ``shared`` KiB, of the first of ``kinds`` that has one.

    ``kinds`` go from the narrowest to the widest.
    """
    for kind in kinds:
        for row in rows(op, arch):
            if row.kind == kind and row.shared <= shared and channels <= (row.channels or channels):
                return row
    return None


@cache
def _config(op: str, device: torch.device, kinds: tuple[str, ...], channels: int) -> Row:
    most = shared_memory(device)
    row = choose(op, architecture(device), most, kinds, channels)
    if row is None:
        raise RuntimeError(
            f"No tile sizes of {op} for {kinds[-1]} and {channels or 'any'} channels fit the {most} KiB of shared "
            f"memory of {device}: use 'torch'."
        )
    return row


def config(op: str, device: torch.device, *kinds: str, channels: int = 0) -> Row:
    """The row for ``op`` on ``device`` and so many channels, of the first of ``kinds`` (narrow to wide) that has one.

    Raises:
        RuntimeError: no row fits the shared memory of the device.
    """
    return _forced.get(op) or _config(op, device, kinds, channels)


@contextmanager
def forced(op: str, row: Row) -> Iterator[None]:
    """Let ``op`` take this row whatever the table says."""
    _forced[op] = row
    try:
        yield
    finally:
        del _forced[op]


def table(op: str) -> Iterator[tuple[str, str, Row]]:
    """Every row of ``op`` for this compiler, with its architecture and a name: "row0", "tuned sm_90 row0"."""
    tables: tuple[tuple[str, Mapping[tuple[str, str], Sequence[Any]]], ...] = (("", ROWS), ("tuned ", TUNED))
    for before, known in tables:
        for (name, arch), its in known.items():
            if name == op:
                where = "" if arch == "default" else f"{arch} "
                every = [Row(*row) for row in its]
                for i, row in enumerate(every):
                    if row.since <= COMPILER and not any(_hides(other, row) for other in every[:i]):
                        yield arch, f"{before}{where}row{i}", row


def _hides(first: Row, row: Row) -> bool:
    """Whether whatever could take ``row`` takes ``first``, which stands before it in the same table."""
    wide = (first.channels or row.channels) >= row.channels > 0 or first.channels == row.channels
    return first.since <= COMPILER and first.kind == row.kind and first.shared <= row.shared and wide


def served(op: str, arch: str, row: Row) -> tuple[str, ...]:
    """The architectures that may take a row of ``op`` which stands under ``arch``: where it fits, nothing hides it."""
    if arch != "default":
        return (arch,)
    return tuple(
        a for a, most in SHARED.items()
        if row.shared <= most and not any(r.kind == row.kind for r in ROWS.get((op, a), ()))
    )  # fmt: skip
