"""The cases of the kernels of feature pyramids that are compiled ahead of time and timed by the tuner."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from fgfast.kernels.common import MOST_REGISTERS, AotCase
from fgfast.kernels.configs import Row, architectures_for, row_kind, table
from fgfast.kernels.kmeans import pyramid_move, pyramid_score, pyramid_squares, pyramid_sums
from fgfast.kernels.kmeans.pyramid import GRAM_TILE, kmeans
from fgfast.kernels.kmeans.pyramid_tiles import blocks, held_blocks, score_tile
from fgfast.kernels.tune import TuneCase
from fgfast.pixels.options import KMeansOptions

SIZES = ((256, 56, 56), (1024, 14, 14))  # two levels, one with a narrow and one with a wide tile of scores
LAYOUTS = {  # the dimension of stride 1 (or None), no gaps between rows, weighted pixels, cosine, padded clusters
    "maps": (3, True, False, False, 16),
    "channels": (1, True, False, False, 32),
    "gaps": (None, False, True, True, 64),
    "many": (3, True, False, False, 256),
}


def tune_cases(
    device: str = "cuda", images: int = 32, side: int = 64, channels: tuple[int, int] = (1024, 2048)
) -> Iterator[TuneCase]:
    """Four iterations for 15 clusters of the last two maps of a ResNet-50."""
    for dtype in (torch.bfloat16, torch.float32):
        shapes = [(images, d, side // s, side // s) for d, s in zip(channels, (2, 4), strict=True)]
        maps = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        sizes = product((16, 32, 64), (32, 64), (32, 64), (64, 128, 256), (4, 8), (1, 2, 3), (0, MOST_REGISTERS))
        rows = [
            Row(row_kind(dtype), {"BLOCK_C": c, "BLOCK_D": d, "BLOCK_S": s, "HELD": held}, warps, stages, 0, most)
            for c, d, s, held, warps, stages, most in sizes
        ]
        seed = torch.zeros(1, dtype=torch.int64)
        options = KMeansOptions(15, 4, "random", None, side**2, 1, 0.0, "euclidean", "farthest", "ieee", True)
        yield TuneCase("kmeans_pyramid", rows, partial(kmeans, maps, (side, side), None, seed, options))


def aot_cases() -> Iterator[AotCase]:
    """Every kernel, dtype and row of the table, for both memory orders, gaps between rows, and the most clusters."""
    for (arch, name, row), kind in product(table("kmeans_pyramid"), ("bf16", "fp16", "fp32")):
        if (row.kind == "fp32") != (kind == "fp32"):
            continue
        archs = architectures_for("kmeans_pyramid", arch, row)
        for layout, (unit, flat, weighted, cosine, KP) in LAYOUTS.items():
            if kind == "fp16" and layout not in ("maps", "gaps"):
                continue  # as for bfloat16 but for one instruction
            t, row_blocks = row.tiles, blocks(row, KP)
            BLOCK_S, BLOCK_C = row_blocks["BLOCK_S"], row_blocks["BLOCK_C"]
            tiles = tuple(score_tile(row, KP, t["BLOCK_D"], size, 4 if kind == "fp32" else 2) for size in SIZES)
            flags: dict[str, Any] = {
                "LEVELS": 2, "FLATS": (flat, flat), "SAME": (unit == 3, False), "WIDE": False,
                "ALIGNS": (8, 4) if unit == 3 else (1, 1), "COSINE": cosine, "WEIGHTED": weighted, "KP": KP,
                "UNIT": not (weighted or cosine), "PRECISION": "ieee", "UPCAST": False, "PAD": t["BLOCK_D"],
                "BLOCK_C": BLOCK_C, "BLOCKS_C": (BLOCK_C, 16), "BLOCK_S": BLOCK_S, "BLOCK_X": 2 * BLOCK_C,
                "CHUNKS": tuple(held_blocks(row, KP, BLOCK_S, d, kind == "fp16") for d, _, _ in SIZES),
                "START": False, "LENGTHS": False, "SHIFT": kind == "fp32" and not cosine, "FARTHEST": True,
                "BLOCK_N": row_blocks["BLOCK_N"],
            }  # fmt: skip
            rare = kind == "fp16" or layout in ("channels", "many")
            for kernel, own in (
                (pyramid_score.score, {"TILES": tiles}),
                (pyramid_sums.sums, {}),
                (pyramid_move.move, {"BLOCK": 256, "BLOCK_D": min(row_blocks["BLOCK_M"], t["BLOCK_D"])}),
                (pyramid_squares.grams, {"BLOCK_C": GRAM_TILE, "BLOCK_D": 16}),
                (pyramid_squares.rows, {"BLOCK": 16, "BLOCK_D": t["BLOCK_D"]}),
                (pyramid_squares.squares, {"BLOCK_N": 256}),
            ):
                once = kernel in (pyramid_squares.grams, pyramid_squares.rows, pyramid_squares.squares)
                if once and (layout in ("channels", "many") or (kernel is pyramid_squares.squares and kind != "fp32")):
                    continue
                full = f"kmeans_pyramid {name} {kernel.__name__} {kind} {layout}"
                warps = {
                    pyramid_score.score: row_blocks["warps"], pyramid_sums.sums: row.warps,
                    pyramid_move.move: row_blocks["MOVE_WARPS"],
                }.get(kernel)  # fmt: skip
                budget = row.registers if warps else MOST_REGISTERS if kernel is pyramid_squares.grams else 0
                stages = row_blocks["stages"] if kernel is pyramid_score.score else row.stages
                launch = row._replace(warps=warps or 4, stages=stages, registers=budget)
                yield _case(full, kernel, kind, unit, flags | own, launch, archs, rare, "tuned" in name)


def _case(
    name: str, kernel: Any, kind: str, unit: int | None, flags: dict[str, Any], row: Row, archs: tuple[str, ...],
    rare: bool, tuned: bool,
) -> AotCase:  # fmt: skip
    """A case with the types of the host side; the first of two levels is aligned unless no stride is 1."""
    aligned = "" if unit is None else ":16"
    strides = tuple(
        tuple("constexpr=1" if i == unit else f"i32{a}" for i in range(4)) for a in (aligned, "")
    )  # fmt: skip
    types: dict[str, Any] = {
        "xs": (f"*{kind}{aligned}", f"*{kind}{aligned}"), "strides": strides, "parts": ("*fp32:16", "*fp32:16"),
        "sizes": (("i32:16", "i32", "i32"), ("i32:16", "i32", "i32")), "splits": ("i32", "i32"),
    } | {"index_ptr": "*i64:16", "spans": ("i32:16", "i32:16"), "m_ptr": f"*{kind}:16"}  # fmt: skip
    types["copies"] = types["splits"]
    types |= dict.fromkeys(("done_ptr", "steps_ptr", "arrived_ptr", "needed_ptr", "changed_ptr"), "*i32:16")
    types["labels_ptr"] = "*i8:16" if flags["KP"] < 128 else "*i16:16"
    if kernel is pyramid_squares.rows:
        types["out_ptr"] = f"*{kind}:16"
    constants = {n: v for n, v in flags.items() if n in kernel.arg_names}
    signature = {
        n: "constexpr" if n in constants else types.get(n, "*fp32:16" if n.endswith("_ptr") else "i32")
        for n in kernel.arg_names
    }
    return AotCase(
        name, kernel, signature, constants, row.warps, row.stages, archs, rare, tuned, row.registers, row.shared
    )
