"""Tile sizes by operation, architecture and dtype: fixed tables, because tuning at run time needs a device and time.

:func:`config` chooses a row: rows measured on this architecture (``tuned.py``, written by
``python -m fgfast.kernels.tune``) precede those below, rows of this architecture precede default rows, and the first
with enough channels and shared memory is taken; but a row of a more specific kind ("fp16") always precedes one of a
more general kind ("half"). Sizes are powers of two. A row that spills with older or newer compilers gives the first
Triton version that it is for (``since``) or the first that it is not for (``before``), and is followed by a row for the
others.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch

from fgfast.kernels.common import COMPILER, MOST_REGISTERS, launch_options
from fgfast.kernels.tuned import TUNED

SHARED = {  # KiB per program
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_103": 227, "sm_120": 99, "gfx942": 64
}  # fmt: skip


class Row(NamedTuple):
    """One row of the table: its kind, tile sizes, warps, stages and limits.

    ``kind`` is "half" (bfloat16 and float16) or "fp32"; for kmeans_step also with " aligned" (rows of pixels or
    channels start at multiples of 16 elements) or " gaps" (not aligned, with gaps between rows); for the contrast the
    kind of products: "half", "bf16", "fp16", "tf32" or "ieee", with " copied" where columns are copied (large problems)
    and " held" where forward also keeps channels of the rows in registers (bounded logits).
    """

    kind: str
    tiles: dict[str, int]
    warps: int
    stages: int
    shared: int  # KiB of shared memory that suffice; checked by fgfast.kernels.aot
    registers: int = 0  # see launch_options
    channels: int = 0  # most channels, 0 for any number
    since: tuple[int, int] = (0, 0)  # oldest Triton version with which it does not spill
    before: tuple[int, int] = (99, 0)  # oldest newer version with which it spills

    def __hash__(self) -> int:
        return hash((self.kind, self.warps, self.stages, self.shared, self.registers, self.channels))

    @property
    def compiles(self) -> bool:
        """Whether the row is for the installed version of Triton."""
        return self.since <= COMPILER < self.before

    @property
    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return launch_options(self.warps, self.stages, self.registers)


def contrast_row(
    kind: str, most: int, x: int, y: int, compared: int, d: int, warps: int, stages: int, shared: int,
    registers: int = 0, since: tuple[int, int] = (0, 0), before: tuple[int, int] = (99, 0), *, ahead: bool = False,
    held: int = 0, flipped: bool = False, triangle: bool = True,
) -> Row:  # fmt: skip
    """A row for up to ``most`` channels, all in one tile if d equals ``most``.

    ``x``: vectors that a program keeps; ``y``: vectors per step; ``compared``: vectors whose ids are compared at a
    time; ``d``: channels at a time; ``ahead``: forward multiplies a tile before it sums the one before; ``held``:
    channels of the rows that forward keeps in registers; ``flipped``: it computes one triangle by transposed tiles;
    ``triangle``: it may compute one triangle.
    """
    tiles = {"BLOCK_X": x, "BLOCK_Y": y, "BLOCK_S": compared, "BLOCK_D": d, "WHOLE": int(d == most)}
    options = {"AHEAD": int(ahead), "HELD": held, "FLIPPED": int(flipped), "ALL": int(not triangle)}
    tiles |= {name: value for name, value in options.items() if value}
    return Row(kind, tiles, warps, stages, shared, registers, most, since, before)


def kmeans_row(
    kind: str, n: int, d: int, s: int, held: int, most: int, warps: int, stages: int, shared: int, registers: int = 0,
    *, programs: int = 0,
) -> Row:  # fmt: skip
    """A row of kmeans_step.

    ``n``, ``d``: pixels and channels of a tile of scores; ``s``: channels of a tile of sums; ``held``: padded sums that
    a program keeps in registers, 96 or 128 per thread, 0 to read pixels twice; ``most``: padded clusters of such a
    program; ``programs``: of two reads, on a processor at a time.
    """
    tiles = {"BLOCK_N": n, "BLOCK_D": d, "BLOCK_S": s, "HELD": held, "MOST_K": most}
    if programs:
        tiles["PROGRAMS"] = programs
    return Row(kind, tiles, warps, stages, shared, registers)


TRITON_3_8, TRITON_3_9 = (3, 8), (3, 9)
SMALL_CONTRAST = (
    contrast_row("half", 8192, 32, 32, 32, 64, 4, 1, 48),
    contrast_row("tf32", 8192, 32, 32, 32, 32, 4, 1, 48),
    contrast_row("ieee", 8192, 32, 32, 32, 32, 4, 1, 48),
)
TWO_READS = kmeans_row("fp32 aligned", 64, 32, 64, 0, 64, 4, 3, 99, MOST_REGISTERS, programs=2)
RESIDENT = Row("half", {"BLOCK_N": 32, "HELD": 24 << 10}, 8, 3, 227, MOST_REGISTERS, 0, TRITON_3_8)

ROWS: dict[tuple[str, str], tuple[Row, ...]] = {
    # With channel blocks of 256 bytes per pixel, the labels, read once per block, stay below 5% of the traffic.
    ("part_pool", "default"): (
        Row("half", {"BLOCK_D": 128, "BLOCK_P": 64}, 8, 3, 64),
        Row("half", {"BLOCK_D": 64, "BLOCK_P": 32}, 4, 1, 32),
        Row("fp32", {"BLOCK_D": 64, "BLOCK_P": 32}, 4, 3, 64, MOST_REGISTERS),
        Row("fp32", {"BLOCK_D": 32, "BLOCK_P": 32}, 4, 1, 32, MOST_REGISTERS),
    ),
    # BLOCK_C, BLOCK_D: cells and channels of a tile of scores; BLOCK_S: channels of a tile of sums, HELD: of a program.
    ("kmeans_pyramid", "default"): (
        Row("half", {"BLOCK_C": 32, "BLOCK_D": 64, "BLOCK_S": 64, "HELD": 256}, 4, 3, 72, MOST_REGISTERS),
        Row("half", {"BLOCK_C": 32, "BLOCK_D": 32, "BLOCK_S": 32, "HELD": 64}, 4, 1, 48, MOST_REGISTERS),
        Row("fp32", {"BLOCK_C": 32, "BLOCK_D": 32, "BLOCK_S": 32, "HELD": 64}, 4, 2, 48, MOST_REGISTERS),
    ),
    # A program has 256 threads: 8 warps, 4 on an AMD GPU. With gaps between rows more sums would spill.
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
    # For sm_120 the compiler takes more registers: 24 Ki sums spilled up to 48 bytes, also in tiles of 16 channels.
    ("kmeans_step", "sm_120"): (
        kmeans_row("half", 16, 32, 128, 16 << 10, 128, 8, 2, 48, MOST_REGISTERS),
        kmeans_row("half gaps", 16, 32, 128, 8 << 10, 128, 8, 2, 48, MOST_REGISTERS),
        kmeans_row("fp32", 16, 32, 128, 16 << 10, 64, 8, 2, 48, MOST_REGISTERS),
        kmeans_row("fp32 gaps", 16, 32, 128, 8 << 10, 64, 8, 2, 48, MOST_REGISTERS),
    ),
    # Float32 pixels, whose scores take tiles of 16 pixels and no tensor core where the sums stay in registers, are read
    # twice by two kernels, which is predicted to be five times faster. With gaps, or unaligned, that spills.
    ("kmeans_step", "sm_90"): (
        kmeans_row("half aligned", 64, 64, 128, 32 << 10, 128, 8, 4, 99, MOST_REGISTERS),
        TWO_READS,
    ),
    ("kmeans_step", "sm_100"): (TWO_READS,),
    # A step whose tiles stay in shared memory (fgfast.kernels.kmeans.resident); HELD as above.
    ("kmeans_resident", "sm_90"): (RESIDENT,),
    ("kmeans_resident", "sm_100"): (RESIDENT,),
    ("contrast forward", "default"): (
        contrast_row("half", 128, 128, 64, 16, 128, 8, 2, 72),
        contrast_row("half", 256, 64, 64, 16, 256, 8, 2, 99),
        contrast_row("half", 8192, 64, 64, 32, 64, 8, 2, 48),
        contrast_row("tf32", 128, 64, 32, 16, 128, 8, 2, 72, 0, TRITON_3_8),
        contrast_row("tf32", 128, 64, 32, 16, 128, 8, 2, 72, MOST_REGISTERS),
        contrast_row("tf32", 8192, 64, 64, 32, 32, 8, 2, 48),
        contrast_row("ieee", 8192, 64, 64, 16, 16, 8, 2, 48, MOST_REGISTERS, TRITON_3_8, TRITON_3_9),
        contrast_row("ieee", 8192, 64, 32, 16, 16, 8, 2, 48, MOST_REGISTERS),
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
        # A tile ahead would spill 8 bytes in float16 where logits are unbounded; with Triton 3.9 also in bfloat16.
        contrast_row("fp16 copied", 128, 128, 64, 16, 128, 4, 3, 99, 0, TRITON_3_8, flipped=True),
        contrast_row(
            "half copied", 128, 128, 64, 16, 128, 4, 3, 99, 0, TRITON_3_8, TRITON_3_9, ahead=True, flipped=True
        ),
        contrast_row("half copied", 128, 128, 64, 16, 128, 4, 3, 99, 0, TRITON_3_9, flipped=True),
        # Two programs on a processor at 256 channels: with all of the rows in shared memory there would be one.
        # With Triton 3.9 128 of 256 channels in registers spill 8 bytes, and 384 of 512 spill 56.
        contrast_row("half held", 256, 128, 64, 8, 64, 4, 2, 113, MOST_REGISTERS, TRITON_3_8, TRITON_3_9, held=128),
        contrast_row("half held", 256, 128, 64, 8, 64, 4, 2, 113, MOST_REGISTERS, TRITON_3_9, held=64),
        contrast_row("half held", 512, 128, 64, 8, 64, 8, 3, 224, MOST_REGISTERS, TRITON_3_8, TRITON_3_9, held=384),
        contrast_row("half copied", 256, 128, 64, 32, 256, 8, 3, 163, MOST_REGISTERS, TRITON_3_8, ahead=True),
        contrast_row("half", 256, 128, 128, 32, 256, 8, 2, 200),
        contrast_row("half", 8192, 128, 128, 32, 64, 8, 3, 99),
    ),
    # Products go to tensor memory, which leaves a thread the registers of 64 columns. One triangle is predicted to take
    # as long as all tiles: a thread reads a row of a tile, so the sums of a column take five shuffles.
    ("contrast forward", "sm_100"): (
        contrast_row(
            "half copied", 128, 128, 64, 16, 128, 4, 3, 81, MOST_REGISTERS, TRITON_3_8, ahead=True, triangle=False
        ),
        contrast_row("half copied", 256, 128, 32, 16, 256, 4, 3, 113, MOST_REGISTERS, TRITON_3_8, triangle=False),
        contrast_row(
            "half copied", 512, 128, 32, 16, 512, 8, 3, 225, MOST_REGISTERS, TRITON_3_8, ahead=True, triangle=False
        ),
        contrast_row("half", 128, 128, 64, 16, 128, 8, 2, 72, MOST_REGISTERS),
        contrast_row("half", 256, 64, 64, 16, 256, 8, 2, 99, MOST_REGISTERS),
        contrast_row("half", 8192, 128, 128, 32, 64, 8, 3, 99, 0, TRITON_3_8, triangle=False),
        contrast_row("half", 8192, 64, 64, 32, 64, 8, 2, 48, 0, (0, 0), TRITON_3_8),
        contrast_row("tf32", 128, 64, 32, 16, 128, 8, 2, 72, MOST_REGISTERS),
        contrast_row("tf32", 8192, 64, 64, 32, 32, 8, 2, 48, 0, (0, 0), TRITON_3_9),
        contrast_row("tf32", 8192, 64, 64, 16, 32, 8, 2, 48),
    ),
    ("contrast forward", "sm_120"): (
        contrast_row("half", 128, 128, 64, 16, 128, 8, 2, 72),
        contrast_row("half", 256, 64, 64, 16, 256, 8, 2, 99),
        contrast_row("half", 8192, 64, 32, 32, 64, 8, 2, 48),
        contrast_row("tf32", 128, 64, 32, 16, 128, 8, 2, 72, MOST_REGISTERS),
        contrast_row("tf32", 8192, 64, 32, 32, 32, 8, 2, 48),
    ),
    ("contrast gradient", "sm_120"): (contrast_row("tf32", 8192, 64, 32, 32, 32, 8, 2, 64, MOST_REGISTERS),),
    ("contrast gradient", "sm_90"): (
        # For float16 a tile of all 256 channels, converted to bfloat16, would take too many registers.
        contrast_row("fp16", 128, 128, 64, 32, 128, 8, 3, 99),
        contrast_row("fp16", 8192, 128, 64, 32, 64, 8, 3, 99),
        # 4 warps and at most 113 KiB: of two programs on a processor one multiplies while the other has exponentials.
        contrast_row("bf16 copied", 128, 64, 64, 16, 128, 4, 3, 72, MOST_REGISTERS, TRITON_3_8),
        contrast_row("bf16 copied", 256, 64, 64, 16, 256, 4, 2, 113, MOST_REGISTERS, TRITON_3_8, TRITON_3_9),
        contrast_row("bf16 copied", 256, 64, 32, 16, 256, 4, 2, 72, MOST_REGISTERS, TRITON_3_9),
        contrast_row("half", 128, 128, 64, 32, 128, 8, 3, 99),
        contrast_row("half", 256, 128, 64, 16, 256, 8, 2, 163, MOST_REGISTERS, TRITON_3_8),
        contrast_row("half", 256, 128, 32, 16, 256, 8, 3, 163, MOST_REGISTERS),
        contrast_row("half", 8192, 128, 64, 32, 64, 8, 3, 99),
    ),
    ("contrast gradient", "sm_100"): (
        contrast_row("bf16 copied", 128, 128, 32, 16, 128, 4, 4, 77, MOST_REGISTERS, TRITON_3_8),
        contrast_row("bf16 copied", 256, 128, 32, 16, 256, 8, 3, 131, MOST_REGISTERS, TRITON_3_8),
    ),
    # Chunks of dL/ds. The logits of float32 vectors come from a library. On sm_90 and sm_100 two programs fit on a
    # processor with 128 registers, so that one writes while the other multiplies.
    ("contrast weights", "default"): (
        contrast_row("half", 8192, 128, 128, 32, 64, 8, 3, 99, MOST_REGISTERS),
        contrast_row("fp32", 8192, 64, 64, 32, 32, 4, 1, 48, MOST_REGISTERS),
    ),
    ("contrast weights", "sm_90"): (contrast_row("half", 8192, 128, 128, 16, 64, 8, 3, 99, 128),),
    ("contrast weights", "sm_100"): (contrast_row("half", 8192, 128, 128, 16, 64, 8, 3, 99, 128, TRITON_3_8),),
    # The gradient of the sigmoid loss has the rows above but for float32, where it keeps one more tile in registers.
    ("contrast sigmoid gradient", "default"): (contrast_row("ieee", 8192, 64, 64, 32, 16, 8, 2, 48, MOST_REGISTERS),),
    ("contrast sigmoid gradient", "gfx942"): SMALL_CONTRAST[-1:],
    ("contrast forward", "gfx942"): SMALL_CONTRAST,
    ("contrast gradient", "gfx942"): SMALL_CONTRAST,
}

ROWS |= {(op, "sm_103"): values for (op, arch), values in ROWS.items() if arch == "sm_100"}

_forced: dict[str, Row] = {}  # by operation, set by the tuner


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
    """KiB of shared memory available to one program."""
    if device.type != "cuda":
        return 227
    known = SHARED.get(architecture(device))
    properties = torch.cuda.get_device_properties(device)
    return known or int(getattr(properties, "shared_memory_per_block_optin", 64 * 1024)) // 1024


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 4 on the CPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 4


def row_kind(dtype: torch.dtype) -> str:
    """The kind of the rows for ``dtype``: "fp32" or "half"."""
    return "fp32" if dtype == torch.float32 else "half"


def rows(op: str, arch: str) -> Iterator[Row]:
    """The rows of ``op`` for an architecture and the installed compiler, in order of preference."""
    yield from (Row(*row) for row in TUNED.get((op, arch), ()))
    for where in dict.fromkeys((arch, "default")):
        yield from (row for row in ROWS.get((op, where), ()) if row.compiles)


def choose(op: str, arch: str, shared: int, kinds: tuple[str, ...], channels: int = 0) -> Row | None:
    """The first row for this many channels and at most ``shared`` KiB, of the first of ``kinds`` that has one.

    ``kinds`` are ordered from the most specific to the most general.
    """
    for kind in kinds:
        for row in rows(op, arch):
            if row.kind == kind and row.shared <= shared and channels <= (row.channels or channels):
                return row
    return None


@cache
def _find(op: str, device: torch.device, kinds: tuple[str, ...], channels: int) -> Row | None:
    return choose(op, architecture(device), shared_memory(device), kinds, channels)


def config(op: str, device: torch.device, *kinds: str, channels: int = 0) -> Row:
    """The row of ``op`` for ``device`` and this many channels, of the first of ``kinds`` (most specific first).

    Raises:
        RuntimeError: no row fits the shared memory of the device.
    """
    row = _forced.get(op) or _find(op, device, kinds, channels)
    if row is None:
        raise RuntimeError(
            f"No tile sizes of {op} for {kinds[-1]} and {channels or 'any'} channels fit the {shared_memory(device)} "
            f"KiB of shared memory of {device}: choose backend 'torch'."
        )
    return row


def find(op: str, device: torch.device, *kinds: str) -> Row | None:
    """The row of ``op`` for ``device``, None where the table has none."""
    return _forced.get(op) or _find(op, device, kinds, 0)


@contextmanager
def force_row(op: str, row: Row) -> Iterator[None]:
    """Within this context ``op`` uses this row instead of the table."""
    _forced[op] = row
    try:
        yield
    finally:
        del _forced[op]


def table(op: str) -> Iterator[tuple[str, str, Row]]:
    """Every row of ``op`` for the installed compiler: architecture, name ("row0", "tuned sm_90 row0") and row."""
    tables: tuple[tuple[str, Mapping[tuple[str, str], Sequence[Any]]], ...] = (("", ROWS), ("tuned ", TUNED))
    for before, known in tables:
        for (name, arch), values in known.items():
            if name == op:
                where = "" if arch == "default" else f"{arch} "
                found = [Row(*row) for row in values]
                for i, row in enumerate(found):
                    if row.compiles and not any(_hides(other, row) for other in found[:i]):
                        yield arch, f"{before}{where}row{i}", row


def _hides(first: Row, row: Row) -> bool:
    """Whether ``row`` is never chosen because ``first`` precedes it in the same table."""
    enough_channels = (first.channels or row.channels) >= row.channels > 0 or first.channels == row.channels
    return first.compiles and first.kind == row.kind and first.shared <= row.shared and enough_channels


def architectures_for(op: str, arch: str, row: Row) -> tuple[str, ...]:
    """The architectures that may use a row of ``op`` listed under ``arch``, with the installed compiler."""
    if arch != "default":
        return (arch,)
    return tuple(
        a for a, most in SHARED.items()
        if row.shared <= most and not any(r.kind == row.kind and r.compiles for r in ROWS.get((op, a), ()))
    )  # fmt: skip
