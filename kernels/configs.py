"""Tile sizes by operation, architecture and dtype: fixed tables, because tuning at run time needs a device and time.

A row is chosen by :func:`config`: one that was measured on this architecture (``tuned.py``, written by
``python -m fgfast.kernels.tune``) before the default ones below, and among these the first whose shared memory the
device has. Sizes are powers of two; rows of one operation stand in the order of preference.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from fgfast.kernels._common import MOST_REGISTERS, launch_options
from fgfast.kernels.tuned import TUNED

SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a program may have


class Row(NamedTuple):
    """One row: for elements of ``bits`` bits, the tiles, warps and stages, and the shared memory that suffices."""

    bits: int
    tiles: dict[str, int]
    warps: int
    stages: int
    shared: int  # KiB; fgfast.kernels.aot holds the compiled kernels to it
    registers: int = 0  # see launch_options

    @property
    def launch(self) -> dict[str, int]:
        """What a launch takes as keywords."""
        return launch_options(self.warps, self.stages, self.registers)


# A channel block of 256 bytes a pixel keeps the labels, which each block reads again, under 5% of the traffic.
DEFAULTS: dict[str, tuple[Row, ...]] = {
    "part_pool": (
        Row(16, {"BLOCK_D": 128, "BLOCK_P": 64}, 8, 3, 64),
        Row(16, {"BLOCK_D": 64, "BLOCK_P": 32}, 4, 1, 32),
        Row(32, {"BLOCK_D": 64, "BLOCK_P": 32}, 4, 3, 64, MOST_REGISTERS),
        Row(32, {"BLOCK_D": 32, "BLOCK_P": 32}, 4, 1, 32, MOST_REGISTERS),
    ),
    # BLOCK_C, BLOCK_D: cells and channels of a tile; BLOCK_S: channels of a tile of sums, HELD of a program.
    "kmeans_pyramid": (
        Row(16, {"BLOCK_C": 64, "BLOCK_D": 64, "BLOCK_S": 64, "HELD": 256}, 4, 3, 72, MOST_REGISTERS),
        Row(16, {"BLOCK_C": 32, "BLOCK_D": 32, "BLOCK_S": 32, "HELD": 64}, 4, 1, 48, MOST_REGISTERS),
        Row(32, {"BLOCK_C": 32, "BLOCK_D": 32, "BLOCK_S": 32, "HELD": 64}, 4, 2, 48, MOST_REGISTERS),
    ),
}


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


@cache
def config(op: str, device: torch.device, dtype: torch.dtype) -> Row:
    """The row for ``op`` on ``device``.

    Raises:
        RuntimeError: no row fits the shared memory of the device.
    """
    bits, most = dtype.itemsize * 8, shared_memory(device)
    rows = (*TUNED.get((op, architecture(device)), ()), *DEFAULTS[op])
    for row in (Row(*r) for r in rows):
        if row.bits == bits and row.shared <= most:
            return row
    raise RuntimeError(
        f"No tile sizes of {op} for {dtype} fit the {most} KiB of shared memory of {device}: use 'torch'."
    )


def table(op: str) -> Iterator[tuple[str, Row]]:
    """Every row of ``op`` with a name: "part_pool row0", "part_pool tuned sm_90 row0"."""
    for i, row in enumerate(DEFAULTS[op]):
        yield f"{op} row{i}", row
    for (name, arch), rows in TUNED.items():
        if name == op:
            yield from ((f"{op} tuned {arch} row{i}", Row(*row)) for i, row in enumerate(rows))
