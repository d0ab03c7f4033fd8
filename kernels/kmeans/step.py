"""The host side of a step of k-means: rows of the table cut to a problem, and the launches.

A step is one launch where a program has a whole problem: what it needs of the centroids it makes itself, and in Lloyd's
loop it moves them. That is a batch of as many problems as there are processors, or about so, with sums that fit the
registers of a program. A problem that is shared takes three: the centroids, the step, the sum of what its programs
found. Sums that do not fit take one more.
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fgfast.kernels.common import MOST_REGISTERS, AotCase, interpreted, launch_options, output_dtype
from fgfast.kernels.configs import SHARED, Row, choose, config, kmeans_row, processors, row_kind
from fgfast.kernels.kmeans import centroids as _kmeans_move
from fgfast.kernels.kmeans import fused as _kmeans_once
from fgfast.kernels.kmeans import tiles as _kmeans_device
from fgfast.kernels.tune import TuneCase
from fgfast.kernels.tuned import TUNED

SHARE = 0.08  # of the bytes of x: the most that partial sums may cost, written and read
WIDEST = 8192  # channels

MOST_CHUNKS = 8  # tiles of sums that a program holds: each takes registers for its addresses too


def power(n: int, least: int = 16) -> int:
    """The least power of two that is at least n and ``least``."""
    return max(least, triton.next_power_of_2(n))


STEP_BLOCKS = ("BLOCK_N", "BLOCK_D", "BLOCK_S", "BLOCK_K", "CHUNKS", "BLOCK_C")
UPDATE_BLOCKS: dict[str, Any] = {"BLOCK": 1024, "BLOCK_K": 16}


def kinds(dtype: torch.dtype, aligned: bool, flat: bool) -> tuple[str, ...]:
    """The kinds of rows of the table that serve ``dtype``, from narrow to wide.

    ``aligned``: rows of pixels or channels start at multiples of 16 elements; ``flat``: no gaps between rows of pixels.
    """
    kind, special = row_kind(dtype), " aligned" if aligned else "" if flat else " gaps"
    return (kind + special, kind)


def tile(row: Row, channels: int, clusters: int, narrow: bool = False) -> dict[str, int]:
    """A row of the table cut to D channels and K clusters; HELD says whether the sums fit the registers.

    ``narrow``: fewer channels of scores at a time. It spares registers where pixels have factors in the sums (weights,
    or their inverse lengths) and rows have no gaps. A tile of BLOCK_C channels of all centroids has no fewer numbers
    than a program has threads: no two threads have the same one.
    """
    t = row.tiles | {"num_warps": row.warps, "num_stages": row.stages, "registers": row.registers}
    t["BLOCK_S"] = min(t["BLOCK_S"], power(channels))
    t["BLOCK_D"] = min(t["BLOCK_D"], t["BLOCK_S"])
    t["BLOCK_K"] = power(clusters)
    t["CHUNKS"] = max(1, triton.cdiv(channels, t["BLOCK_S"]))
    sums = t["CHUNKS"] * t["BLOCK_S"] * t["BLOCK_K"]
    # Factors are split into two bfloat16 there, which with small tiles leaves too few registers for many addresses.
    scarce = narrow and t["BLOCK_N"] == 16 and not row.kind.startswith("fp32")
    scarce = scarce and (t["CHUNKS"] == MOST_CHUNKS or (channels % t["BLOCK_S"] > 0 and sums > 16 << 10))
    if t["BLOCK_K"] > t.pop("MOST_K") or t["CHUNKS"] > MOST_CHUNKS or sums > t["HELD"] or scarce:
        t |= {"HELD": 0, "BLOCK_N": 32, "BLOCK_S": min(64, t["BLOCK_S"])}
        t["BLOCK_D"] = min(16 if row.kind.startswith("fp32") else 32, t["BLOCK_S"])
        t["BLOCK_K"] = min(64, t["BLOCK_K"])
        t["CHUNKS"] = triton.cdiv(channels, t["BLOCK_S"])
        return t
    if sums > 16 << 10:
        t["BLOCK_N"] = min(32, t["BLOCK_N"])
    if t["BLOCK_K"] == 128:
        t["BLOCK_N"] = 16
    if narrow and t["BLOCK_N"] == 16 and sums > 16 << 10:
        t["BLOCK_D"] = min(16, t["BLOCK_D"])
    numbers = 2048 if t["BLOCK_N"] == 16 else 1024
    plain = min(32, t["BLOCK_D"]) if narrow and sums <= 24 << 10 else t["BLOCK_D"]  # neither prepares nor moves
    return t | {"HELD": 1, "BLOCK_C": min(t["BLOCK_S"], numbers // t["BLOCK_K"]), "PLAIN_D": plain}


def step_blocks(t: dict[str, int], plain: bool) -> dict[str, int]:
    """Tile sizes of a launch of `step`; ``plain``: it neither prepares nor moves."""
    return {name: t[name] for name in STEP_BLOCKS} | ({"BLOCK_D": t["PLAIN_D"]} if plain else {})


def splits(batch: int, tiles: int, affordable: int, processors: int) -> int:
    """Programs a problem: the fewest that leave the least work to the last wave of programs."""
    most = max(1, min(tiles, affordable, triton.cdiv(4 * processors, max(1, batch))))
    return min(range(1, most + 1), key=lambda s: (triton.cdiv(batch * s, processors) * triton.cdiv(tiles, s), s))


def sum_registers(dtype: torch.dtype, unit: bool) -> int:
    """The budget of `sum_pixels`: ptxas by itself spills a little, but where half precision needs no factors."""
    return 0 if unit and dtype != torch.float32 else MOST_REGISTERS


class Move(NamedTuple):
    """What an iteration of `lloyd` changes: centroids [B, K, D], counts after the repair [B, K], done and steps [B].

    A problem is done when its centroids moved by no more than limit [B]; ``empty`` is "farthest" or "keep".
    """

    centroids: Tensor
    mass: Tensor
    limit: Tensor
    done: Tensor
    steps: Tensor
    empty: str


class Totals(NamedTuple):
    """sums [B, K, D], counts [B, K], inertia [B] in float32 and changed int32 [B]."""

    sums: Tensor
    counts: Tensor
    inertia: Tensor
    changed: Tensor


def _totals(rows: int, clusters: int, channels: int, device: torch.device) -> Totals:
    shapes = (rows, clusters, channels), (rows, clusters), (rows,)
    sums, counts, inertia = (torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
    return Totals(sums, counts, inertia, torch.empty(rows, dtype=torch.int32, device=device))


class Solver:
    """The launches of one batch of problems: x [B, D, N] or [B, D, H, W] where it lies, and K centroids each."""

    def __init__(
        self, x: Tensor, clusters: int, weight: Tensor | None, metric: str, precision: str, deterministic: bool
    ) -> None:
        self.x, self.K = x, clusters
        self.batch, self.D = x.shape[:2]
        self.N = math.prod(x.shape[2:])
        if self.D > WIDEST:
            raise ValueError(f"x has {self.D} channels and the Triton kernels take {WIDEST}: choose backend 'torch'.")
        if self.N > 1 << 30:  # the tiles that programs share reach past N, at most to 1.5 N
            raise ValueError(f"x has {self.N} pixels and the Triton kernels take 2^30: choose backend 'torch'.")
        self.weight = None if weight is None else weight.to(torch.float32).contiguous()
        across = x.stride(3) if x.dim() == 4 else x.stride(2)
        width = x.shape[3] if x.dim() == 4 else self.N
        down = x.stride(2) if x.dim() == 4 else 0
        flat = width == self.N or down == width * across
        aligned = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 or stride == 1 for stride in x.stride())
        self.cosine = metric == "cosine"
        row = config("kmeans_step", x.device, *kinds(x.dtype, aligned, flat))
        self.tile = t = tile(row, self.D, clusters, flat and (self.cosine or weight is not None))
        self.DP = t["CHUNKS"] * t["BLOCK_S"]
        self.KP = triton.cdiv(clusters, t["BLOCK_K"]) * t["BLOCK_K"]
        short = t["BLOCK_N"] * across + t["BLOCK_S"] * x.stride(1) < 1 << 31
        self.strides = (x.stride(0), x.stride(1), 0 if flat else down, across)
        self.width = self.N if flat else width
        tiles = triton.cdiv(self.N, t["BLOCK_N"])
        affordable = int(SHARE * self.N * x.element_size() / (8 * clusters))
        self.splits = splits(self.batch, tiles, affordable, processors(x.device))
        self.turns = triton.cdiv(tiles, self.splits)
        self.splits = max(1, triton.cdiv(tiles, max(1, self.turns)))
        self.whole = self.splits == 1 and bool(t["HELD"])  # a program has all of a problem
        self.atomic = not deterministic and self.splits > 1 and bool(t["HELD"])
        self.common = {
            "FLAT": flat and short,
            "EVEN": self.D % t["BLOCK_S"] == 0,
            "WEIGHTED": weight is not None,
            "PRECISION": precision,
            "UPCAST": interpreted(),
        }
        self.m = torch.empty(self.batch, self.DP, self.KP, dtype=output_dtype(x.dtype), device=x.device)
        self.bias = torch.empty(self.batch, self.KP, dtype=torch.float32, device=x.device)
        self.mu = torch.zeros(self.batch, self.DP, dtype=torch.float32, device=x.device)
        self.labels = torch.empty(self.batch, self.N, dtype=torch.int64, device=x.device)
        rows = self.batch if self.atomic else self.batch * self.splits
        self.parts = _totals(rows, clusters, self.D, x.device)
        self.totals = self.parts if rows == self.batch else _totals(self.batch, clusters, self.D, x.device)
        if not t["HELD"]:
            self.scale = torch.empty(self.batch, self.N, dtype=torch.float32, device=x.device)

    def prepare(self, centroids: Tensor, given: bool = False) -> None:
        """Set m, bias and (unless ``given``) mu for centroids [B, K, D]."""
        blocks = {name: min(32, self.tile[name]) for name in ("BLOCK_K", "BLOCK_D")}
        _kmeans_move.prepare_centroids_kernel[(self.batch * self.KP // blocks["BLOCK_K"],)](
            centroids, self.m, self.bias, self.mu, self.K, self.D, self.DP, self.KP, *centroids.stride(),
            COSINE=self.cosine, GIVEN=given, **blocks,
        )  # fmt: skip

    def step(
        self, near: Tensor | None = None, done: Tensor | None = None, first: Tensor | None = None,
        move: Move | None = None,
    ) -> Totals:  # fmt: skip
        """Labels and totals at what was prepared, or at centroids ``first``; with near and done as a step of `lloyd`.

        ``move``: then the centroids move, and the next ones are prepared.
        """
        out, lloyd = self.parts, near is not None
        if first is not None and not self.whole:
            self.prepare(first)
        if self.atomic:
            for part in out:
                part.zero_()
        near, done = (out.inertia if near is None else near), (out.changed if done is None else done)
        if self.tile["HELD"]:
            self._once(near, done, lloyd, *((first, move) if self.whole else (None, None)))
        else:
            self._twice(near, done, lloyd)
        if self.totals is not out:
            size = self.K * self.D
            block = min(1024, power(size))
            _kmeans_device.reduce_rows[(self.batch * triton.cdiv(size, block),)](
                *out, done, *self.totals, size, self.K, self.splits, LLOYD=lloyd, BLOCK=block
            )
        if move is not None and not self.whole:
            self._update(near, move)
        return self.totals

    def _once(self, near: Tensor, done: Tensor, lloyd: bool, first: Tensor | None, move: Move | None) -> None:
        t, out = self.tile, self.parts
        weight = out.inertia if self.weight is None else self.weight
        if move is None:
            c, mass, limit, steps = (out.sums if first is None else first), out.counts, out.inertia, out.changed
        else:
            c, mass, limit, steps = move.centroids, move.mass, move.limit, move.steps
        _kmeans_once.step[(self.batch * self.splits,)](
            self.x, self.m, self.bias, self.mu, weight, done, self.labels, near, *out, c, mass, limit, steps,
            self.N, self.width, self.D, self.K, self.splits, self.turns, *self.strides, *c.stride(),
            **self.common, LLOYD=lloyd, COSINE=self.cosine, ATOMIC=self.atomic, PREPARE=first is not None,
            MOVE=move is not None, FARTHEST=move is not None and move.empty == "farthest",
            **step_blocks(t, first is None and move is None),
            **launch_options(t["num_warps"], t["num_stages"], t["registers"]),
        )  # fmt: skip

    def _twice(self, near: Tensor, done: Tensor, lloyd: bool) -> None:
        t, out, rows = self.tile, self.parts, self.batch * self.splits
        weight = out.inertia if self.weight is None else self.weight
        sizes = (self.N, self.width, self.D, self.K, self.DP, self.KP, self.splits, self.turns, *self.strides)
        launch = partial(launch_options, t["num_warps"], t["num_stages"])
        unit = not (self.cosine or self.common["WEIGHTED"])
        _kmeans_device.assign[(rows,)](
            self.x, self.m, self.bias, self.mu, weight, done, self.labels, near, self.scale, out.inertia, out.changed,
            *sizes, **self.common, LLOYD=lloyd, COSINE=self.cosine, **launch(MOST_REGISTERS),
            **{name: t[name] for name in ("BLOCK_N", "BLOCK_D", "BLOCK_K")},
        )  # fmt: skip
        _kmeans_device.sum_pixels[(rows * (self.DP // t["BLOCK_S"]) * (self.KP // t["BLOCK_K"]),)](
            self.x, weight, done, self.labels, self.scale, out.sums, out.counts, *sizes, **self.common, LLOYD=lloyd,
            UNIT=unit, **launch(sum_registers(self.x.dtype, unit)),
            **{name: t[name] for name in ("BLOCK_N", "BLOCK_S", "BLOCK_K")},
        )  # fmt: skip

    def _update(self, near: Tensor, move: Move) -> None:
        totals = self.totals
        _kmeans_move.update_centroids_kernel[(self.batch,)](
            self.x, near if self.weight is None else self.weight, self.labels, near, totals.sums, totals.counts,
            move.mass, totals.changed, move.centroids, self.m, self.bias, self.mu, move.limit, move.done, move.steps,
            self.N, self.width, self.D, self.K, self.DP, self.KP, *self.strides,
            COSINE=self.cosine, WEIGHTED=self.weight is not None, FARTHEST=move.empty == "farthest",
            **UPDATE_BLOCKS, BLOCK_D=min(32, self.DP), **launch_options(4, 3, MOST_REGISTERS),
        )  # fmt: skip


def kmeans_step(
    x: Tensor, centroids: Tensor, weight: Tensor | None, metric: str, precision: str, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels int64 [B, N], sums [B, K, D], counts [B, K] and inertia [B] of x [B, D, N] or [B, D, H, W], not empty."""
    solver = Solver(x, centroids.shape[1], weight, metric, precision, deterministic)
    totals = solver.step(first=centroids)
    return solver.labels, totals.sums, totals.counts, totals.inertia


def tune_cases(device: str = "cuda", images: int = 32, side: int = 64) -> Iterator[TuneCase]:
    """A step with 768 channels and 25 clusters."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(images, 768, side, side, device=device, dtype=dtype)
        centroids = x[:, :, 0, :25].mT.contiguous()
        sizes = product((16, 32, 64), (16, 32, 64), (64, 128), (16 << 10, 24 << 10, 32 << 10), (4, 8), (2, 3, 4))
        rows = [
            kmeans_row(kinds(dtype, aligned=True, flat=True)[0], n, d, s, held, 128, warps, stages, 0)
            for n, d, s, held, warps, stages in sizes
            if d <= s
        ]
        yield TuneCase("kmeans_step", rows, partial(kmeans_step, x, centroids, None, "euclidean", "ieee", True))


# ---------------------------------------------------------------- ahead of time

# D, K: small, at the limits of what is held in registers, beyond them.
SHAPES = ((64, 60), (384, 60), (128, 128), (700, 25), (768, 25), (1024, 10), (1000, 25), (1024, 25), (2048, 256))
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
    """How the pixels of a case lie, and what is done with them."""

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
DEMANDING = ("maps cosine", "gaps")  # the most registers, among aligned layouts and of all


def case(
    name: str, kernel: triton.JITFunction, dtype: str, launch: dict[str, int], aligned: bool = False,
    archs: tuple[str, ...] = (), rare: bool = False, **constants: object,
) -> AotCase:  # fmt: skip
    """A case with the types that the host passes: x and m in ``dtype``, other data float32, sizes and strides i32."""
    types = POINTERS | {"x_ptr": f"*{dtype}", "m_ptr": f"*{dtype}"}
    fallback = {True: "*fp32", False: "i32"}
    signature = {
        a: types.get(a, fallback[a.endswith(("_ptr", "_from"))]) for a in kernel.arg_names if a not in constants
    }
    for a, kind in signature.items():
        ours = kind.startswith("*") and a != "x_ptr"  # allocated by the host side
        if ours or (aligned and (kind.startswith("*") or a in ("N", "DP", "KP") or a.startswith("stride"))):
            signature[a] += ":16"
    return AotCase(name, kernel, signature, constants, launch["num_warps"], launch["num_stages"], archs, rare)


def aot_cases() -> Iterator[AotCase]:
    """Every kernel, dtype and table row: demanding layouts at a shape of each class, the others at two of them."""
    for dtype, (channels, clusters), (name, layout) in product(DTYPES, SHAPES, LAYOUTS.items()):
        rare = (channels, clusters, name) not in TYPICAL
        if dtype == "fp16" and rare:
            continue  # the code of bfloat16, with one other instruction
        if name not in DEMANDING and (channels, clusters) not in ((768, 25), (2048, 256)):
            continue
        tiles: dict[Any, list[str]] = {}  # architectures by tile, shared memory of the row and whether it was measured
        for arch, most in SHARED.items():
            row = choose("kmeans_step", arch, most, kinds(DTYPES[dtype], layout.aligned, layout.flat))
            assert row is not None
            tuned = tuple(row) in TUNED.get(("kmeans_step", arch), ())
            cut = tile(row, channels, clusters, layout.flat and (layout.cosine or layout.weighted))
            tiles.setdefault((tuple(cut.items()), row.shared, tuned), []).append(arch)
        for precision in ("ieee", "tf32") if dtype == "fp32" and name == "channels" else ("ieee",):
            for (items, shared, tuned), archs in tiles.items():
                name_of_row = "default" if archs[0] == next(iter(SHARED)) else archs[0]
                full = f"{name_of_row} {dtype}{' tf32' * (precision == 'tf32')} {channels}x{clusters} {name}"
                for found in _step_cases(full, dtype, dict(items), channels, layout, precision, tuple(archs), rare):
                    yield found._replace(shared=shared, tuned=tuned)
    small = {"num_warps": 4, "num_stages": 3}
    for dtype, cosine in product(("fp32", "fp16", "bf16"), (False, True)):
        name, rare = f"{dtype}{' cosine' * cosine}", dtype == "fp16"
        blocks: dict[str, Any] = {"BLOCK_K": 32, "BLOCK_D": 32}
        prepare, update = _kmeans_move.prepare_centroids_kernel, _kmeans_move.update_centroids_kernel
        yield case(f"kmeans prepare {name}", prepare, dtype, small, rare=rare, COSINE=cosine, GIVEN=False, **blocks)
        blocks = UPDATE_BLOCKS | {"BLOCK_D": 32, "WEIGHTED": True, "FARTHEST": True}
        its = case(f"kmeans update {name}", update, dtype, small, rare=rare, COSINE=cosine, **blocks)
        yield its._replace(registers=MOST_REGISTERS)
    yield case("kmeans reduce", _kmeans_device.reduce_rows, "fp32", small, LLOYD=True, BLOCK=1024)


def _step_cases(
    name: str, dtype: str, t: dict[str, int], channels: int, layout: PixelLayout, precision: str,
    archs: tuple[str, ...], rare: bool,
) -> Iterator[AotCase]:  # fmt: skip
    """The kernels of one step: with the centroids made before, moved after, and neither."""
    known: dict[str, Any] = {
        "archs": archs, "rare": rare, "FLAT": layout.flat, "EVEN": channels % t["BLOCK_S"] == 0,
        "WEIGHTED": layout.weighted, "PRECISION": precision, "UPCAST": False, layout.unit: 1,
    }  # fmt: skip

    def one(which: str, kernel: triton.JITFunction, blocks: dict[str, Any], **flags: Any) -> AotCase:
        found = case(f"kmeans {which} {name}", kernel, dtype, t, layout.aligned, **known, **blocks, **flags)
        of_sum = sum_registers(DTYPES[dtype], flags.get("UNIT", True))
        return found._replace(registers={"assign": MOST_REGISTERS, "sum": of_sum}.get(which, t["registers"]))

    if t["HELD"]:
        flags: dict[str, Any] = {"COSINE": layout.cosine, "ATOMIC": False, "stride_cd": 1}
        alone = flags | {"SPLITS": 1}
        off: dict[str, Any] = {"PREPARE": False, "MOVE": False, "FARTHEST": False}
        fused, plain = step_blocks(t, False), step_blocks(t, True)
        yield one("step", _kmeans_once.step, fused, LLOYD=False, **(off | {"PREPARE": True}), **alone)
        yield one("lloyd", _kmeans_once.step, fused, LLOYD=True, **(off | {"MOVE": True, "FARTHEST": True}), **alone)
        yield one("plain", _kmeans_once.step, plain, LLOYD=True, **off, **flags)
    else:
        pixels, sums = ({n: t[n] for n in ("BLOCK_N", other, "BLOCK_K")} for other in ("BLOCK_D", "BLOCK_S"))
        yield one("assign", _kmeans_device.assign, pixels, LLOYD=True, COSINE=layout.cosine)
        unit = not (layout.weighted or layout.cosine)
        yield one("sum", _kmeans_device.sum_pixels, sums, LLOYD=True, UNIT=unit)
