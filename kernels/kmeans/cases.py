"""The cases of the kernels of dense pixels that are compiled ahead of time and timed by the tuner."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import triton

from fgfast.kernels.common import MOST_REGISTERS, AotCase
from fgfast.kernels.configs import SHARED, choose, kmeans_row
from fgfast.kernels.kmeans import centroids, fused, resident, tiles
from fgfast.kernels.kmeans.launch import SAMPLES, plus_plus
from fgfast.kernels.kmeans.step import (
    GROUPS,
    LANES,
    UPDATE_BLOCKS,
    assign_blocks,
    kinds,
    kmeans_step,
    resident_blocks,
    resident_tile,
    step_blocks,
    sum_registers,
    tile,
)
from fgfast.kernels.tune import TuneCase
from fgfast.kernels.tuned import TUNED


def tune_cases(device: str = "cuda", images: int = 32, side: int = 64) -> Iterator[TuneCase]:
    """A step with 768 channels and 25 clusters."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(images, 768, side, side, device=device, dtype=dtype)
        start = x[:, :, 0, :25].mT.contiguous()
        sizes = product((16, 32, 64), (16, 32, 64), (64, 128), (16 << 10, 24 << 10, 32 << 10), (4, 8), (2, 3, 4))
        rows = [
            kmeans_row(kinds(dtype, aligned=True, flat=True)[0], n, d, s, held, 128, warps, stages, 0)
            for n, d, s, held, warps, stages in sizes
            if d <= s
        ]
        if dtype == torch.float32:  # two reads
            others = product((32, 64, 128), (16, 32, 64), (4, 8), (2, 3), (1, 2, 3))
            rows += [
                kmeans_row("fp32 aligned", n, d, 64, 0, 64, warps, stages, 0, MOST_REGISTERS, programs=programs)
                for n, d, warps, stages, programs in others
            ]
        yield TuneCase("kmeans_step", rows, partial(kmeans_step, x, start, None, "euclidean", "ieee", True))


# D, K: small, at the limits of what registers hold, and beyond them.
SHAPES = ((64, 60), (384, 60), (128, 128), (700, 25), (768, 25), (1024, 10), (1000, 25), (1024, 25), (2048, 256))
RESIDENT_SHAPES = ((768, 25), (768, 32), (768, 10), (704, 25), (1024, 10), (256, 60), (384, 25))
TYPICAL = {
    *((768, 25, "maps cosine"), (1024, 25, "maps cosine"), (700, 25, "gaps")),
    *((128, 128, "gaps"), (1024, 10, "gaps"), (2048, 256, "gaps")),
}

POINTERS = {
    "labels_ptr": "*i64",
    "chosen_ptr": "*i64",
    "uniform_ptr": "*fp64",
    "done_ptr": "*i32",
    "steps_ptr": "*i32",
    "changed_ptr": "*i32",
    "changed_from": "*i32",
}


class PixelLayout(NamedTuple):
    """Memory layout of the pixels of a case, and the options of its kernels."""

    unit: str  # the stride that is 1, or none
    flat: bool
    aligned: bool
    weighted: bool
    cosine: bool


LAYOUTS = {
    "maps": PixelLayout("stride_x", True, True, False, False),
    "maps cosine": PixelLayout("stride_x", True, True, False, True),
    "channels": PixelLayout("stride_d", True, True, False, False),
    "channels weighted": PixelLayout("stride_d", True, True, True, False),
    "odd": PixelLayout("stride_d", True, False, False, False),
    "gaps": PixelLayout("stride_x", False, False, True, True),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEMANDING = ("maps cosine", "gaps")  # take the most registers: of aligned layouts and of all


def case(
    name: str, kernel: triton.JITFunction, dtype: str, launch: dict[str, int], aligned: bool = False,
    archs: tuple[str, ...] = (), rare: bool = False, **constants: object,
) -> AotCase:  # fmt: skip
    """A case with the types of the host side: x and m in ``dtype``, other data float32, sizes and strides i32."""
    types = POINTERS | {"x_ptr": f"*{dtype}", "m_ptr": f"*{dtype}"}
    types["x_desc"] = f"tensordesc<{dtype}[1, {GROUPS}, {constants.get('BLOCK_N')}, {LANES}]>"
    fallback = {True: "*fp32", False: "i32"}
    signature = {
        a: types.get(a, fallback[a.endswith(("_ptr", "_from"))]) for a in kernel.arg_names if a not in constants
    }
    for a, kind in signature.items():
        own = kind.startswith("*") and a != "x_ptr"  # allocated by the host side
        if own or (aligned and (kind.startswith("*") or a in ("N", "DP", "KP") or a.startswith("stride"))):
            signature[a] += ":16"
    return AotCase(name, kernel, signature, constants, launch["num_warps"], launch["num_stages"], archs, rare)


def aot_cases() -> Iterator[AotCase]:
    """Every kernel, dtype and row of the table: the demanding layouts at every shape, the others at two of them."""
    for dtype, (channels, clusters), (name, layout) in product(DTYPES, SHAPES, LAYOUTS.items()):
        rare = (channels, clusters, name) not in TYPICAL
        if dtype == "fp16" and rare:
            continue  # as for bfloat16 but for one instruction
        if name not in DEMANDING and (channels, clusters) not in ((768, 25), (2048, 256)):
            continue
        served: dict[Any, list[str]] = {}  # architectures by tile, shared memory of the row and whether it was measured
        for arch, most in SHARED.items():
            row = choose("kmeans_step", arch, most, kinds(DTYPES[dtype], layout.aligned, layout.flat))
            assert row is not None
            tuned = tuple(row) in TUNED.get(("kmeans_step", arch), ())
            sizes = tile(row, channels, clusters, layout.flat and (layout.cosine or layout.weighted))
            served.setdefault((tuple(sizes.items()), row.shared, tuned), []).append(arch)
        for precision in ("ieee", "tf32") if dtype == "fp32" and name == "channels" else ("ieee",):
            for (items, shared, tuned), archs in served.items():
                name_of_row = "default" if archs[0] == next(iter(SHARED)) else archs[0]
                full = f"{name_of_row} {dtype}{' tf32' * (precision == 'tf32')} {channels}x{clusters} {name}"
                for one in _step_cases(full, dtype, dict(items), channels, layout, precision, tuple(archs), rare):
                    yield one._replace(shared=shared, tuned=tuned)
    small = {"num_warps": 4, "num_stages": 3}
    yield from _resident_cases()
    kinds_of_centroids = [(*one, False) for one in product(("fp32", "fp16", "bf16"), (False, True))]
    for dtype, cosine, turned in (*kinds_of_centroids, ("bf16", False, True)):
        name, rare = f"{dtype}{' cosine' * cosine}{' turned' * turned}", dtype == "fp16"
        blocks: dict[str, Any] = {"BLOCK_K": 32, "BLOCK_D": 32}
        prepare, update = centroids.prepare_centroids_kernel, centroids.update_centroids_kernel
        flags: dict[str, Any] = {"COSINE": cosine, "SHIFT": dtype == "fp32" and not cosine, "TURNED": turned}
        yield case(f"kmeans prepare {name}", prepare, dtype, small, rare=rare, GIVEN=False, **flags, **blocks)
        blocks = UPDATE_BLOCKS | {"BLOCK_D": 32, "WEIGHTED": True, "FARTHEST": True}
        update_case = case(f"kmeans update {name}", update, dtype, small, rare=rare, **flags, **blocks)
        yield update_case._replace(registers=MOST_REGISTERS)
    yield case("kmeans reduce", tiles.reduce_rows, "fp32", small, LLOYD=True, BLOCK=1024)
    launch = {"num_warps": 8, "num_stages": 3}
    yield case("kmeans plus_plus", plus_plus, "fp32", launch, BLOCK=SAMPLES, COSINE=False)


def _resident_cases() -> Iterator[AotCase]:
    """The resident kernel at the shapes that it serves."""
    off: dict[str, Any] = {"PREPARE": False, "MOVE": False, "FARTHEST": False, "LLOYD": True}
    ways: dict[str, dict[str, Any]] = {
        "step": {"PREPARE": True, "LLOYD": False, "SPLITS": 1},
        "lloyd": {"MOVE": True, "FARTHEST": True, "SPLITS": 1},
        "plain": {},
    }
    for (arch, most), dtype, (channels, clusters) in product(SHARED.items(), ("bf16", "fp16"), RESIDENT_SHAPES):
        row = choose("kmeans_resident", arch, most, ("half",))
        t = row and resident_tile(row, channels, clusters)
        if row is None or t is None:
            continue
        known: dict[str, Any] = {
            "archs": (arch,), "rare": dtype == "fp16" or (channels, clusters) != (768, 25), "UPCAST": False,
            "ATOMIC": False, "EVEN": channels % t["BLOCK_S"] == 0, "stride_cd": 1, **resident_blocks(t),
        }  # fmt: skip
        for way, flags in ways.items():
            name = f"kmeans resident {way} {arch} {dtype} {channels}x{clusters}"
            one = case(name, resident.step_resident, dtype, t, True, **known, **(off | flags))
            tuned = tuple(row) in TUNED.get(("kmeans_resident", arch), ())
            yield one._replace(registers=row.registers, shared=row.shared, tuned=tuned)


def _step_cases(
    name: str, dtype: str, t: dict[str, int], channels: int, layout: PixelLayout, precision: str,
    archs: tuple[str, ...], rare: bool,
) -> Iterator[AotCase]:  # fmt: skip
    """The kernels of one step: centroids prepared by it, centroids updated by it, and neither."""
    known: dict[str, Any] = {
        "archs": archs, "rare": rare, "FLAT": layout.flat, "EVEN": channels % t["BLOCK_S"] == 0,
        "WEIGHTED": layout.weighted, "PRECISION": precision, "UPCAST": False, layout.unit: 1,
        "SHIFT": dtype == "fp32" and not layout.cosine,
    }  # fmt: skip

    def make(which: str, kernel: triton.JITFunction, blocks: dict[str, Any], **flags: Any) -> AotCase:
        budgets = {"assign": MOST_REGISTERS, "sum": sum_registers(DTYPES[dtype], flags.get("UNIT", True))}
        step_case = case(f"kmeans {which} {name}", kernel, dtype, t, layout.aligned, **known, **blocks, **flags)
        return step_case._replace(registers=budgets.get(which, t["registers"]))

    if t["HELD"]:
        flags: dict[str, Any] = {"COSINE": layout.cosine, "ATOMIC": False, "stride_cd": 1}
        single = flags | {"SPLITS": 1}
        off: dict[str, Any] = {"PREPARE": False, "MOVE": False, "FARTHEST": False}
        with_centroids, plain = step_blocks(t, False), step_blocks(t, True)
        yield make("step", fused.step, with_centroids, LLOYD=False, **(off | {"PREPARE": True}), **single)
        yield make(
            "lloyd", fused.step, with_centroids, LLOYD=True, **(off | {"MOVE": True, "FARTHEST": True}), **single
        )
        yield make("plain", fused.step, plain, LLOYD=True, **off, **flags)
    else:
        yield make("assign", tiles.assign, assign_blocks(t, precision), LLOYD=True, COSINE=layout.cosine)
        sums = {name: t[name] for name in ("BLOCK_N", "BLOCK_S", "BLOCK_K")}
        unit = not (layout.weighted or layout.cosine)
        yield make("sum", tiles.sum_pixels, sums, LLOYD=True, UNIT=unit)
