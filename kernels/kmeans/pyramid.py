"""k-means of feature pyramids by Triton kernels: two launches a step, and no hypercolumn in memory.

Bilinear resizing is linear and the same for each channel, so <up(f), m> = up(<f, m>), and the sums of resized features
are the features times what the resizing's adjoint makes of the one-hot labels (:mod:`fgfast.pixels.pyramid`).
    score   reads every level once: scores of its cells, [cells, K] in float32. The program that completes what a strip
            of rows of pixels waits for resizes the scores there and writes labels, distances and counts.
    sums    reads every level once more: what a row of cells stands for in each cluster, from the labels around it,
            times the features; one float32 partial sum a level, channel and share of rows.
    move    new centroids, empty clusters repaired, and whether the problem has converged (two launches for cosine).
Everything is summed in a fixed order. |x - mu|^2 of the pixels is made once, from inner products of neighbouring cells.
k-means++ has the pixels that it draws from at hand, :data:`SAMPLED` numbers at a time, and their inner products.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fgfast.kernels.common import MOST_REGISTERS, AotCase, interpreted, launch_options, on_device_of, output_dtype
from fgfast.kernels.configs import Row, config, row_kind, served, table
from fgfast.kernels.kmeans import pyramid_kernels as device_side
from fgfast.kernels.kmeans.launch import GRAM, SAMPLES, Outcome, drawn, inner_products, sample
from fgfast.kernels.kmeans.step import power
from fgfast.kernels.tune import TuneCase
from fgfast.pixels.init import start
from fgfast.pixels.pyramid import Pyramid
from fgfast.reference.draws import uniform

SHARE = 0.04  # of the bytes of a level: the most that its partial sums may cost, written and read
UNIT_BYTES = 512 << 10  # of features that a program reads, about
STRIP = 1024  # pixels that are labelled together
SAMPLED = 1 << 25
HELD = 4096  # sums, or scores, in the registers of a program
ON_CHIP = 128 << 10  # bytes that a program may count on reading again for nothing
GRAM_TILE = 32  # cells
LONGEST = 1 << 14  # rows or columns: products of two sides are 32-bit


def held(row: Row, KP: int) -> int:
    """Channels whose sums a program holds in its registers."""
    return max(16, min(row.tiles["HELD"], HELD // KP))


def blocks(row: Row, KP: int) -> dict[str, int]:
    """Tiles for KP padded clusters: cells and pixels that are scored together, channels of sums and of centroids."""
    t = row.tiles
    return {
        "BLOCK_C": min(t["BLOCK_C"], max(16, 1024 // KP)), "BLOCK_N": max(16, min(64, 1024 // KP)),
        "BLOCK_S": min(t["BLOCK_S"], held(row, KP)), "BLOCK_M": 16, "MOVE_WARPS": max(1, min(4, KP // 16)),
        "warps": row.warps * (2 if KP > 32 else 1), "stages": row.stages if KP <= 128 else 1,
    }  # fmt: skip


def score_tile(row: Row, KP: int, pad: int, size: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Cells and channels of a tile of scores of a level (D, h, w).

    Each tile reads the centroids of all channels: so it is a wide one where they cannot stay on chip beside a narrow.
    """
    channels, height, width = size
    narrow = min(row.tiles["BLOCK_C"], max(16, 1024 // KP))
    if channels * (4 * KP + narrow * itemsize) < ON_CHIP:
        return narrow, pad
    most = min(256, 2 * HELD // (KP * itemsize), UNIT_BYTES // (channels * itemsize), power(height * width))
    return max(narrow, 1 << most.bit_length() - 1), max(16, pad // 2)


class Levels:
    """The maps [B, D_l, h_l, w_l] seen at size (H, W), and the launches that concern no centroid."""

    def __init__(self, maps: Sequence[Tensor], size: tuple[int, int]) -> None:
        x = maps[0]
        self.xs, self.size, self.device, self.dtype = tuple(maps), size, x.device, x.dtype
        self.batch, self.pixels = x.shape[0], math.prod(size)
        self.sizes = tuple(tuple(m.shape[1:]) for m in maps)
        self.strides = tuple(m.stride() for m in maps)
        self.channels = sum(d for d, _, _ in self.sizes)
        self.cells = sum(h * w for _, h, w in self.sizes)
        longest = max(*size, *(n for _, h, w in self.sizes for n in (h, w)))
        if longest > LONGEST:
            raise ValueError(f"A side of {longest} is too long for the Triton kernels ({LONGEST}): choose 'torch'.")
        self.row = config("kmeans_pyramid", x.device, row_kind(x.dtype))
        self.pad = min(self.row.tiles["BLOCK_D"], power(max(d for d, _, _ in self.sizes)))
        self.padded = tuple(triton.cdiv(d, self.pad) * self.pad for d, _, _ in self.sizes)
        self.DP = sum(self.padded)
        self.known: dict[str, Any] = {
            "LEVELS": len(maps),
            "WIDE": any(
                sum((n - 1) * abs(s) for n, s in zip(m.shape[1:], m.stride()[1:], strict=True)) >= 1 << 31 for m in maps
            ),
        }
        self.flats = tuple(m.shape[2] == 1 or m.stride(2) == m.shape[3] * m.stride(3) for m in maps)

    def wide(self, mu: Tensor | None) -> Tensor:
        """Mu [B, D], or zeros, with each level padded [B, DP]."""
        out = torch.zeros(self.batch, self.DP, dtype=torch.float32, device=self.device)
        if mu is not None:
            parts = mu.split([d for d, _, _ in self.sizes], 1)
            for target, part in zip(out.split(self.padded, 1), parts, strict=True):
                target[:, : part.shape[1]] = part
        return out

    def squares(self, mu: Tensor) -> Tensor:
        """|x_n - mu|^2 [B, N] for mu [B, DP]; not finite for a pixel that is not."""
        tiles = sum(triton.cdiv(h * w, GRAM_TILE) for _, h, w in self.sizes)
        products = torch.empty(self.batch, 4, self.cells, dtype=torch.float32, device=self.device)
        device_side.grams[(self.batch * tiles,)](
            self.xs, self.strides, self.sizes, mu, products, tiles, self.cells, self.DP,
            FLATS=self.flats, **self.known, PAD=self.pad, BLOCK_C=GRAM_TILE, BLOCK_D=16,
            **launch_options(4, 3, MOST_REGISTERS),
        )  # fmt: skip
        out = torch.empty(self.batch, self.pixels, dtype=torch.float32, device=self.device)
        block = min(256, power(self.pixels))
        tiles = triton.cdiv(self.pixels, block)
        device_side.squares[(self.batch * tiles,)](
            self.sizes, products, out, *self.size, tiles, self.cells, LEVELS=len(self.xs), BLOCK_N=block
        )
        return out

    def rows(self, index: Tensor, mu: Tensor, dtype: torch.dtype) -> Tensor:
        """Pixels index [B, m] less mu [B, DP] as [B, m, D]; zeros in place of what is not finite."""
        count, blocks = index.shape[1], self.DP // self.pad
        out = torch.empty(self.batch, count, self.channels, dtype=output_dtype(dtype), device=self.device)
        device_side.rows[(self.batch * triton.cdiv(count, 16) * blocks,)](
            self.xs, self.strides, self.sizes, index.contiguous(), mu, out, *self.size, count, blocks, self.DP,
            self.channels, **self.known, BLOCK=16, BLOCK_D=self.pad,
        )  # fmt: skip
        return out

    def part(self, b: slice) -> "Levels":
        """Some of the problems."""
        return Levels([x[b] for x in self.xs], self.size)

    def total(self, scale: Tensor) -> Tensor:
        """Sum of scale_n x_n [B, D]; a pixel of scale 0 reaches nothing."""
        adder = Adder(self, 1)
        labels = torch.zeros(self.batch, self.pixels, dtype=torch.int8, device=self.device)
        adder.sums(labels, scale.contiguous(), torch.zeros_like(labels[:, 0], dtype=torch.int32), False, "ieee")
        return torch.cat([part.sum(1)[:, 0] for part in adder.parts], 1)


class Adder:
    """Sums of pixels by cluster: how the levels are shared among programs, and the partial sums [B, splits, K, D_l]."""

    def __init__(self, levels: Levels, clusters: int) -> None:
        self.levels, self.K, self.KP = levels, clusters, power(clusters)
        most, itemsize = held(levels.row, self.KP), levels.dtype.itemsize
        self.blocks = blocks(levels.row, self.KP)
        self.BLOCK_S = min(self.blocks["BLOCK_S"], levels.pad)
        self.chunks = tuple(min(triton.cdiv(d, self.BLOCK_S), most // self.BLOCK_S) for d, _, _ in levels.sizes)
        shares = []
        for (_, h, w), chunks in zip(levels.sizes, self.chunks, strict=True):
            size = h * w * itemsize
            wanted = size * chunks * self.BLOCK_S // UNIT_BYTES
            shares.append(max(1, min(wanted, h, int(SHARE * size / (8 * clusters)))))
        self.splits = tuple(shares)
        groups = (triton.cdiv(d, c * self.BLOCK_S) for (d, _, _), c in zip(levels.sizes, self.chunks, strict=True))
        self.units = sum(s * g for s, g in zip(self.splits, groups, strict=True))
        self.parts = tuple(
            torch.empty(levels.batch, s, clusters, d, dtype=torch.float32, device=levels.device)
            for s, (d, _, _) in zip(self.splits, levels.sizes, strict=True)
        )

    def sums(self, labels: Tensor, scale: Tensor, done: Tensor, unit: bool, precision: str) -> None:
        """Fill the parts with sums of scale_n x_n by label; ``unit``: every scale is 1."""
        x = self.levels
        device_side.sums[(x.batch * self.units,)](
            x.xs, x.strides, x.sizes, self.parts, self.splits, labels, scale, done, *x.size, self.units, self.K,
            FLATS=x.flats, **x.known, UNIT=unit, PRECISION=precision, UPCAST=interpreted(), CHUNKS=self.chunks,
            BLOCKS_C=tuple(min(self.blocks["BLOCK_C"], power(w)) for _, _, w in x.sizes), BLOCK_S=self.BLOCK_S,
            BLOCK_X=min(self.blocks["BLOCK_C"], power(x.size[1])), KP=self.KP, **x.row.launch,
        )  # fmt: skip


def waiting(
    sizes: Sequence[tuple[int, ...]], spans: Sequence[int], height: int, rows: int, device: torch.device
) -> Tensor:
    """How many programs of ``score`` each strip of rows waits for, int32 [strips]: the rule of `_rows_of`."""
    strip = torch.arange(triton.cdiv(height, rows), device=device)
    total = torch.zeros_like(strip)
    for (_, h, w), span in zip(sizes, spans, strict=True):
        program = torch.arange(triton.cdiv(h * w, span), device=device)
        top, bottom = program * span // w, (((program + 1) * span).clamp_max(h * w) - 1) // w
        low = ((2 * top - 1).clamp_min(0) * height // (2 * h) - 1).clamp_min(0)
        high = ((2 * bottom + 3) * height // (2 * h) + 1).clamp_max(height - 1)
        total += ((low[:, None] // rows <= strip) & (strip <= high[:, None] // rows)).sum(0)
    return total.to(torch.int32)


class Solver:
    """The launches of one batch of problems that concern K centroids each."""

    def __init__(
        self, levels: Levels, clusters: int, weight: Tensor | None, scale: Tensor, sq: Tensor, mu: Tensor, metric: str,
        precision: str,
    ) -> None:  # fmt: skip
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(levels.batch, *shape, dtype=dtype, device=levels.device)

        self.levels, self.K, self.KP = levels, clusters, power(clusters)
        self.weight, self.scale, self.sq, self.mu = weight, scale, sq, mu
        self.cosine, self.precision = metric == "cosine", precision
        height, width = levels.size
        self.rows = max(1, STRIP // width)
        self.strips = triton.cdiv(height, self.rows)
        self.adder = Adder(levels, clusters)
        self.cut = self.adder.blocks
        itemsize = levels.dtype.itemsize
        self.tiles = tuple(score_tile(levels.row, self.KP, levels.pad, size, itemsize) for size in levels.sizes)
        self.spans = tuple(
            cells * max(1, UNIT_BYTES // (cells * size[0] * itemsize))
            for (cells, _), size in zip(self.tiles, levels.sizes, strict=True)
        )
        self.programs = sum(triton.cdiv(h * w, s) for (_, h, w), s in zip(levels.sizes, self.spans, strict=True))
        self.needed = waiting(levels.sizes, self.spans, height, self.rows, levels.device)
        self.BLOCK_M = min(self.cut["BLOCK_M"], levels.pad)
        self.blocks = levels.DP // self.BLOCK_M
        self.scores, self.m = empty(levels.cells, self.KP), empty(levels.DP, self.KP, dtype=output_dtype(levels.dtype))
        self.bias, self.lengths = empty(self.blocks, self.KP), empty(self.blocks, self.KP)
        self.labels = empty(levels.pixels, dtype=torch.int8 if clusters < 128 else torch.int16)
        self.near = empty(levels.pixels)
        self.counts, self.inertia = empty(self.strips, self.KP), empty(self.strips)
        self.changed, self.shift = empty(self.strips, dtype=torch.int32), empty(self.blocks)
        self.arrived = torch.zeros(levels.batch, self.strips, dtype=torch.int32, device=levels.device)
        self.moved = torch.zeros(levels.batch, dtype=torch.int32, device=levels.device)

    def score(self, done: Tensor) -> None:
        """Labels, distances, counts and inertia at what `move` prepared."""
        x = self.levels
        device_side.score[(x.batch * self.programs,)](
            x.xs, x.strides, x.sizes, self.m, self.scores, self.bias, self.sq,
            self.sq if self.weight is None else self.weight, done, self.needed, self.arrived,
            self.labels, self.near, self.counts, self.inertia, self.changed,
            *x.size, self.rows, self.strips, self.spans, self.programs, x.cells, self.blocks, x.DP, self.K,
            FLATS=x.flats, **x.known, COSINE=self.cosine, WEIGHTED=self.weight is not None, PRECISION=self.precision,
            UPCAST=interpreted(), TILES=self.tiles, PAD=x.pad, BLOCK_N=self.cut["BLOCK_N"], KP=self.KP,
            **launch_options(self.cut["warps"], self.cut["stages"], x.row.registers),
        )  # fmt: skip

    def sums(self, done: Tensor) -> None:
        """Partial sums of the labels that `score` found."""
        self.adder.sums(self.labels, self.scale, done, self.weight is None and not self.cosine, self.precision)

    def move(self, c: Tensor, limit: Tensor, done: Tensor, steps: Tensor, empty: str, begin: bool = False) -> None:
        """Centroids c [B, K, D] from the sums, in place, and whether they have converged; ``begin``: as they are."""
        x = self.levels
        for lengths in (True, False) if self.cosine and not begin else (False,):
            device_side.move[(x.batch * self.blocks,)](
                x.xs, x.strides, x.sizes, self.adder.parts, self.adder.splits,
                self.sq if self.weight is None else self.weight, self.scale, self.labels, self.near, self.counts,
                self.changed, self.lengths, self.shift, self.bias, c, self.m, self.mu, limit, done, steps, self.moved,
                *x.size, self.strips, self.blocks, x.DP, x.channels, self.K,
                START=begin, LENGTHS=lengths, COSINE=self.cosine, WEIGHTED=self.weight is not None,
                FARTHEST=empty == "farthest", **x.known, PAD=x.pad, BLOCK=256, BLOCK_D=self.BLOCK_M, KP=self.KP,
                **launch_options(self.cut["MOVE_WARPS"], x.row.stages, x.row.registers),
            )  # fmt: skip

    def lloyd(self, centroids: Tensor, n_iter: int, limit: Tensor, empty: str) -> Outcome:
        """Iterate as `fgfast.ops.kmeans.lloyd` does: three launches an iteration, four for cosine."""
        c, device = centroids.contiguous(), self.levels.device
        done, steps, never = (torch.zeros(len(c), dtype=torch.int32, device=device) for _ in range(3))
        self.labels.fill_(-2)  # no pixel's: the first step changes every label
        self.move(c, limit, never, steps, empty, begin=True)
        for _ in range(n_iter):
            self.score(done)
            self.sums(done)
            self.move(c, limit, done, steps, empty)
        self.score(never)
        counts = self.counts.sum(1)[:, : self.K]
        return Outcome(c, self.labels.to(torch.int64), counts, self.inertia.sum(1), steps)


# ---------------------------------------------------------------- the host side


def starts(
    levels: Levels, w: Tensor, mean: Tensor, n_clusters: int, init: str, samples: int, metric: str, seed: Tensor,
    run: int,
) -> Tensor:  # fmt: skip
    """Centroids [B, K, D] in float32, with the draws of `fgfast.pixels.init`; mean is [B, DP]."""
    keys = uniform(seed, 3 * run + 1, w.shape[1])
    zero = torch.zeros_like(mean)
    if init == "random":
        keys = torch.log(keys + 2**-33) / w.double().clamp_min(1e-30)
        return levels.rows(sample(w, keys, n_clusters), zero, torch.float32)
    samples = min(samples, w.shape[1])
    if samples > SAMPLES:
        source = Pyramid(list(levels.xs), levels.size)
        source.prepare(metric, w, None)
        return start(source, n_clusters, init, samples, seed, run)
    trials = 2 + int(math.log(n_clusters))
    u = uniform(seed, 3 * run + 2, n_clusters * trials).view(n_clusters, trials)
    if samples < w.shape[1]:
        chosen = sample(w, keys, samples)
    else:
        chosen = torch.arange(samples, device=w.device).expand(len(w), -1).contiguous()
    weight = w.gather(1, chosen).to(torch.float32)
    at_once, together = max(1, SAMPLED // (samples * levels.channels)), max(1, GRAM // samples**2)
    found = []
    for first in range(0, levels.batch, together):
        last = min(first + together, levels.batch)
        grams = []
        for b in range(first, last, at_once):
            part = slice(b, min(b + at_once, last))
            points = levels.part(part).rows(
                chosen[part], zero[part] if metric == "cosine" else mean[part], levels.dtype
            )
            points = F.normalize(points.float(), dim=2, eps=1e-12).to(points.dtype) if metric == "cosine" else points
            grams.append(inner_products(points))
        group = slice(first, last)
        found.append(drawn(torch.cat(grams), weight[group], u, n_clusters, metric))
    return levels.rows(chosen.gather(1, torch.cat(found)), zero, torch.float32)


def kmeans(
    maps: Sequence[Tensor],
    size: tuple[int, int],
    n_clusters: int,
    n_iter: int,
    init: str,
    first: Tensor | None,
    init_samples: int,
    n_init: int,
    tol: float,
    weight: Tensor | None,
    metric: str,
    empty: str,
    seed: Tensor,
    precision: str,
) -> Outcome:
    """The best of n_init runs of each problem of maps [B, D_l, h_l, w_l] seen at ``size``, which are not empty."""
    with on_device_of(maps[0]):
        levels = Levels(maps, size)
        zero = levels.wide(None)
        sq = levels.squares(zero)
        finite = sq.isfinite()
        weight = None if weight is None else weight.to(torch.float32).contiguous()
        w = finite.to(torch.float32) if weight is None else torch.where(finite, weight, 0)
        counted = (w > 0).to(torch.float32)
        n = counted.sum(1).clamp_min(1)
        if metric == "cosine":
            r = torch.where(finite, sq, 1).sqrt().clamp_min(1e-12).reciprocal()
            mu, scale = zero, w * r
            mean = levels.total(counted * r) / n[:, None]
            spread = torch.where(finite, sq * r.square() * counted, 0).sum(1) / n - mean.square().sum(1)
        else:
            mu, scale = levels.wide(levels.total(counted) / n[:, None]), w
            sq = torch.where(finite, levels.squares(mu), math.inf)
            spread = torch.where(finite, sq * counted, 0).sum(1) / n
        limit = tol * spread.clamp_min(0) / levels.channels
        solver = Solver(levels, n_clusters, weight, scale, sq, mu, metric, precision)
        best: Outcome | None = None
        least = torch.full((levels.batch,), math.inf, device=levels.device)
        for run in range(n_init):
            if first is None:
                c = starts(levels, w, mu, n_clusters, init, init_samples, metric, seed, run)
            else:
                c = first.to(torch.float32, copy=True)
            if metric == "cosine":
                c = F.normalize(c, dim=2, eps=1e-12)
            new = solver.lloyd(c, n_iter, limit, empty)
            if n_init == 1:
                return new
            inertia = (solver.near.clamp_min(0) * w).sum(1)  # new.inertia is NaN where a pixel is not finite
            better = inertia < least
            least = torch.where(better, inertia, least)
            pairs = zip(new, new if best is None else best, strict=True)
            best = Outcome(*(torch.where(better.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))
        assert best is not None
        return best


# ---------------------------------------------------------------- ahead of time

SIZES = ((256, 56, 56), (1024, 14, 14))  # a narrow and a wide tile of scores stand for any number of levels
LAYOUTS = {  # the stride that is 1 (or none), whether rows follow each other, pixels weighted, cosine, padded clusters
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
        seed, n = torch.zeros(1, dtype=torch.int64), side * side
        fixed = (maps, (side, side), 15, 4, "random", None, n, 1, 0.0, None, "euclidean", "farthest", seed, "ieee")
        yield TuneCase("kmeans_pyramid", rows, partial(kmeans, *fixed))


def aot_cases() -> Iterator[AotCase]:
    """Every kernel, dtype and table row, for both memory orders, gaps between rows, and the most clusters."""
    for (arch, name, row), kind in product(table("kmeans_pyramid"), ("bf16", "fp16", "fp32")):
        if (row.kind == "fp32") != (kind == "fp32"):
            continue
        archs = served("kmeans_pyramid", arch, row)
        for layout, (unit, flat, weighted, cosine, KP) in LAYOUTS.items():
            if kind == "fp16" and layout not in ("maps", "gaps"):
                continue  # the code of bfloat16, with one other instruction
            t, cut = row.tiles, blocks(row, KP)
            BLOCK_S, BLOCK_C = cut["BLOCK_S"], cut["BLOCK_C"]
            tiles = tuple(score_tile(row, KP, t["BLOCK_D"], size, 4 if kind == "fp32" else 2) for size in SIZES)
            flags: dict[str, Any] = {
                "LEVELS": 2, "FLATS": (flat, flat), "WIDE": False, "COSINE": cosine, "WEIGHTED": weighted, "KP": KP,
                "UNIT": not (weighted or cosine), "PRECISION": "ieee", "UPCAST": False, "PAD": t["BLOCK_D"],
                "BLOCK_C": BLOCK_C, "BLOCKS_C": (BLOCK_C, 16), "BLOCK_S": BLOCK_S, "BLOCK_X": BLOCK_C, "START": False,
                "CHUNKS": tuple(min(triton.cdiv(d, BLOCK_S), held(row, KP) // BLOCK_S) for d, _, _ in SIZES),
                "LENGTHS": False,
                "FARTHEST": True, "BLOCK_N": cut["BLOCK_N"],
            }  # fmt: skip
            rare = kind == "fp16" or layout in ("channels", "many")
            for kernel, own in (
                (device_side.score, {"TILES": tiles}),
                (device_side.sums, {}),
                (device_side.move, {"BLOCK": 256, "BLOCK_D": cut["BLOCK_M"]}),
                (device_side.grams, {"BLOCK_C": GRAM_TILE, "BLOCK_D": 16}),
                (device_side.rows, {"BLOCK": 16, "BLOCK_D": t["BLOCK_D"]}),
                (device_side.squares, {"BLOCK_N": 256}),
            ):
                once = kernel in (device_side.grams, device_side.rows, device_side.squares)
                if once and (layout in ("channels", "many") or (kernel is device_side.squares and kind != "fp32")):
                    continue
                full = f"kmeans_pyramid {name} {kernel.__name__} {kind} {layout}"
                warps = {
                    device_side.score: cut["warps"], device_side.sums: row.warps, device_side.move: cut["MOVE_WARPS"],
                }.get(kernel)  # fmt: skip
                budget = row.registers if warps else MOST_REGISTERS if kernel is device_side.grams else 0
                stages = cut["stages"] if kernel is device_side.score else row.stages
                launch = row._replace(warps=warps or 4, stages=stages, registers=budget)
                yield _case(full, kernel, kind, unit, flags | own, launch, archs, rare, "tuned" in name)


def _case(
    name: str, kernel: Any, kind: str, unit: int | None, flags: dict[str, Any], row: Row, archs: tuple[str, ...],
    rare: bool, tuned: bool,
) -> AotCase:  # fmt: skip
    """A case with the types that the host passes; of two levels the first is aligned where its pixels have an order."""
    aligned = "" if unit is None else ":16"
    strides = tuple(
        tuple("constexpr=1" if i == unit else f"i32{a}" for i in range(4)) for a in (aligned, "")
    )  # fmt: skip
    types: dict[str, Any] = {
        "xs": (f"*{kind}{aligned}", f"*{kind}"), "strides": strides, "parts": ("*fp32:16", "*fp32:16"),
        "sizes": (("i32:16", f"i32{aligned}", f"i32{aligned}"), ("i32:16", "i32", "i32")), "splits": ("i32", "i32"),
    } | {"index_ptr": "*i64:16", "spans": ("i32:16", "i32:16"), "m_ptr": f"*{kind}:16"}  # fmt: skip
    types |= dict.fromkeys(("done_ptr", "steps_ptr", "arrived_ptr", "needed_ptr", "changed_ptr"), "*i32:16")
    types["labels_ptr"] = "*i8:16" if flags["KP"] < 128 else "*i16:16"
    if kernel is device_side.rows:
        types["out_ptr"] = f"*{kind}:16"
    constants = {n: v for n, v in flags.items() if n in kernel.arg_names}
    signature = {
        n: "constexpr" if n in constants else types.get(n, "*fp32:16" if n.endswith("_ptr") else "i32")
        for n in kernel.arg_names
    }
    return AotCase(
        name, kernel, signature, constants, row.warps, row.stages, archs, rare, tuned, row.registers, row.shared
    )
