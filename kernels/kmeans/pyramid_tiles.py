"""Tile sizes of the kernels of feature pyramids."""

from fgfast.kernels.common import cdiv
from fgfast.kernels.configs import Row
from fgfast.kernels.kmeans.step import power

UNIT_BYTES = 512 << 10  # features read per program, approximately
HELD = 4096  # sums, or scores, in the registers of a program


def held_channels(row: Row, KP: int) -> int:
    """Channels whose sums a program holds in its registers."""
    return max(16, min(row.tiles["HELD"], HELD // KP))


def held_blocks(row: Row, KP: int, BLOCK_S: int, channels: int, float16: bool) -> int:
    """Blocks of channels whose sums a program holds.

    Half as many in float16, which is split into two bfloat16, and in float32 with over 32 clusters (56 bytes spilled).
    """
    fewer = float16 or (row.kind == "fp32" and KP > 32)
    return max(1, min(cdiv(channels, BLOCK_S), held_channels(row, KP) // (2 if fewer else 1) // BLOCK_S))


def blocks(row: Row, KP: int) -> dict[str, int]:
    """Tile sizes for KP padded clusters: cells and pixels of a tile of scores, channels of sums and of centroids."""
    t = row.tiles
    return {
        "BLOCK_C": min(t["BLOCK_C"], max(16, 1024 // KP)), "BLOCK_N": max(16, min(64, 1024 // KP)),
        "BLOCK_S": min(t["BLOCK_S"], held_channels(row, KP)), "BLOCK_M": 64 if KP <= 32 else 16, "MOVE_WARPS": 4,
        "warps": row.warps * (2 if KP > 32 else 1), "stages": row.stages if KP <= 128 else 1,
    }  # fmt: skip


def score_tile(row: Row, KP: int, pad: int, size: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Cells and channels of a tile of scores of a level (D, h, w).

    Each tile reads all channels of the centroids, from L2: tiles are as wide as registers and the level allow.
    """
    channels, height, width = size
    narrow = min(row.tiles["BLOCK_C"], max(16, 1024 // KP))
    most = min(256, 2 * HELD // (KP * itemsize), UNIT_BYTES // (channels * itemsize), power(height * width))
    return max(narrow, 1 << most.bit_length() - 1), max(16, pad // 2)
