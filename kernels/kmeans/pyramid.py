"""k-means of feature pyramids by Triton kernels: two launches per step, and no hypercolumns in memory.

Bilinear resizing is linear and the same for each channel: <up(f), m> = up(<f, m>), and the sums of resized features
are the features times the adjoint of the resizing applied to the one-hot labels (:mod:`fgfast.pixels.pyramid`).
    score   reads every level once: scores of its cells, [cells, K] in float32. The last program that a strip of rows of
            pixels waits for resizes the scores there and writes labels, distances and counts.
    sums    reads every level once more: the weights of cells in each cluster, from the labels around them, times the
            features; one float32 partial sum per level, channel and split of cells.
    move    new centroids, empty clusters repaired, and whether the problem has converged (two launches for cosine).
Everything is summed in a fixed order. |x - mu|^2 of the pixels is computed once, from inner products of neighbouring
cells. k-means++ resizes the pixels that it samples, :data:`SAMPLED` numbers at a time, and uses their inner products.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast.kernels.common import MOST_REGISTERS, cdiv, interpreted, launch_options, on_device_of, output_dtype, wide
from fgfast.kernels.configs import config, processors, row_kind
from fgfast.kernels.kmeans import pyramid_move, pyramid_score, pyramid_squares, pyramid_sums
from fgfast.kernels.kmeans.launch import GRAM, SAMPLES, choose_samples, inner_products
from fgfast.kernels.kmeans.pyramid_tiles import UNIT_BYTES, blocks, held_blocks, score_tile
from fgfast.kernels.kmeans.step import check_centroids, power
from fgfast.kernels.launches import launch
from fgfast.pixels.init import random_pixels, sample_pixels, start, trial_numbers
from fgfast.pixels.options import KMeansOptions
from fgfast.pixels.pyramid import Pyramid
from fgfast.pixels.result import LloydResult, best_of
from fgfast.pixels.source import from_relative, middle, to_relative
from fgfast.reference.draws import spaced_pixels

PARTIAL_FRACTION = 0.04  # of the bytes of a level: the most that writing and reading its partial sums may cost
STRIP = 1024  # pixels that are labelled together
SAMPLED = 1 << 25  # numbers of sampled pixels in memory at a time
GRAM_TILE = 32  # cells
LONGEST = 1 << 14  # rows or columns: the product of two sides is a 32-bit integer


class Levels:
    """The maps [B, D_l, h_l, w_l] resized to (H, W), and the launches that involve no centroids."""

    def __init__(self, maps: Sequence[Tensor], size: tuple[int, int]) -> None:
        x = maps[0]
        self.xs, self.size, self.device, self.dtype = tuple(maps), size, x.device, x.dtype
        self.batch, self.pixels = x.shape[0], math.prod(size)
        self.sizes = tuple(tuple(m.shape[1:]) for m in maps)
        self.strides = tuple(m.stride() for m in maps)
        self.channels = sum(d for d, _, _ in self.sizes)
        longest = max(*size, *(n for _, h, w in self.sizes for n in (h, w)))
        if longest > LONGEST:
            raise ValueError(f"A side of {longest} is too long for the Triton kernels ({LONGEST}): choose 'torch'.")
        self.row = config("kmeans_pyramid", x.device, row_kind(x.dtype))
        self.pad = min(self.row.tiles["BLOCK_D"], power(max(d for d, _, _ in self.sizes)))
        self.padded = tuple(cdiv(d, self.pad) * self.pad for d, _, _ in self.sizes)
        self.DP = sum(self.padded)
        self.known: dict[str, Any] = {
            "LEVELS": len(maps),
            "WIDE": wide(*maps),
        }
        cells = [h * w for _, h, w in self.sizes]
        self.cells = sum(cells)
        self.aligns = tuple(  # powers of two that divide cells and the strides of images and channels
            math.gcd(8, n, *s[:2]) if s[3] == 1 else 1 for n, s in zip(cells, self.strides, strict=True)
        )
        self.flats = tuple(m.shape[2] == 1 or m.stride(2) == m.shape[3] * m.stride(3) for m in maps)

    def pad_channels(self, mu: Tensor | None) -> Tensor:
        """Mu [B, D], or zeros, with the channels of each level padded, [B, DP]."""
        out = torch.zeros(self.batch, self.DP, dtype=torch.float32, device=self.device)
        if mu is not None:
            parts = mu.split([d for d, _, _ in self.sizes], 1)
            for target, part in zip(out.split(self.padded, 1), parts, strict=True):
                target[:, : part.shape[1]] = part
        return out

    def unpad(self, mu: Tensor) -> Tensor:
        """The inverse of `pad_channels`: [B, D] of [B, DP]."""
        parts = zip(mu.split(self.padded, 1), self.sizes, strict=True)
        return torch.cat([part[:, :d] for part, (d, _, _) in parts], 1)

    def squares(self, mu: Tensor) -> Tensor:
        """|x_n - mu|^2 [B, N] for mu [B, DP]; not finite where a pixel is not finite."""
        tiles = sum(cdiv(h * w, GRAM_TILE) for _, h, w in self.sizes)
        products = torch.empty(self.batch, 4, self.cells, dtype=torch.float32, device=self.device)
        launch(
            pyramid_squares.grams, (self.batch * tiles,),
            self.xs, self.strides, self.sizes, mu, products, tiles, self.cells, self.DP,
            FLATS=self.flats, **self.known, PAD=self.pad, BLOCK_C=GRAM_TILE, BLOCK_D=16,
            **launch_options(4, 3, MOST_REGISTERS),
        )  # fmt: skip
        out = torch.empty(self.batch, self.pixels, dtype=torch.float32, device=self.device)
        block = min(256, power(self.pixels))
        tiles = cdiv(self.pixels, block)
        launch(
            pyramid_squares.squares, (self.batch * tiles,), self.sizes, products, out, *self.size, tiles, self.cells,
            LEVELS=len(self.xs), BLOCK_N=block,
        )  # fmt: skip
        return out

    def rows(self, index: Tensor, mu: Tensor, dtype: torch.dtype) -> Tensor:
        """Pixels index [B, m] minus mu [B, DP] as [B, m, D]; values that are not finite become 0."""
        count, blocks = index.shape[1], self.DP // self.pad
        out = torch.empty(self.batch, count, self.channels, dtype=output_dtype(dtype), device=self.device)
        launch(
            pyramid_squares.rows, (self.batch * cdiv(count, 16) * blocks,),
            self.xs, self.strides, self.sizes, index.contiguous(), mu, out, *self.size, count, blocks, self.DP,
            self.channels, **self.known, BLOCK=16, BLOCK_D=self.pad,
        )  # fmt: skip
        return out

    def problems(self, b: slice) -> "Levels":
        """The levels of some of the problems."""
        return Levels([x[b] for x in self.xs], self.size)

    def total(self, scale: Tensor, mu: Tensor, shifted: bool) -> Tensor:
        """Sum of scale_n x_n [B, D], of x_n - mu if ``shifted``; pixels of scale 0 are left out, even if not finite."""
        adder = Adder(self, 1)
        labels = torch.zeros(self.batch, self.pixels, dtype=torch.int8, device=self.device)
        done = torch.zeros_like(labels[:, 0], dtype=torch.int32)
        adder.sums(labels, scale.contiguous(), done, False, "ieee", mu, shifted)
        return torch.cat([part.sum(1)[:, 0] for part in adder.parts], 1)


class Adder:
    """Sums of pixels by cluster: the splits of each level and the partial sums [B, splits, K, D_l].

    A program weighs the cells of a split once for as many channels as leave two programs per processor.
    """

    def __init__(self, levels: Levels, clusters: int) -> None:
        self.levels, self.K, self.KP = levels, clusters, power(clusters)
        itemsize, float16 = levels.dtype.itemsize, levels.dtype == torch.float16
        self.blocks = blocks(levels.row, self.KP)
        self.BLOCK_S = min(self.blocks["BLOCK_S"], levels.pad)
        self.chunks = tuple(held_blocks(levels.row, self.KP, self.BLOCK_S, d, float16) for d, _, _ in levels.sizes)
        splits = []
        for (_, h, w), chunks in zip(levels.sizes, self.chunks, strict=True):
            size = h * w * itemsize
            wanted = size * chunks * self.BLOCK_S // UNIT_BYTES
            splits.append(max(1, min(wanted, h, int(PARTIAL_FRACTION * size / (8 * clusters)))))
        cells, block = [h * w for _, h, w in levels.sizes], self.blocks["BLOCK_C"]
        self.spans = tuple(cdiv(cdiv(n, s), block) * block for n, s in zip(cells, splits, strict=True))
        self.splits = tuple(cdiv(n, span) for n, span in zip(cells, self.spans, strict=True))
        groups = [cdiv(d, c * self.BLOCK_S) for (d, _, _), c in zip(levels.sizes, self.chunks, strict=True)]
        for most in range(1, max(groups) + 1):
            self.copies = tuple(min(g, most) for g in groups)
            self.units = sum(s * c for s, c in zip(self.splits, self.copies, strict=True))
            if levels.batch * self.units >= 2 * processors(levels.device):
                break
        self.same = tuple((h, w) == levels.size for _, h, w in levels.sizes)
        weighed = sum(n * c for n, c, same in zip(cells, self.copies, self.same, strict=True) if not same)
        self.weights = torch.empty(levels.batch, weighed, self.KP, dtype=torch.float32, device=levels.device)
        self.parts = tuple(
            torch.empty(levels.batch, s, clusters, d, dtype=torch.float32, device=levels.device)
            for s, (d, _, _) in zip(self.splits, levels.sizes, strict=True)
        )

    def sums(
        self, labels: Tensor, scale: Tensor, done: Tensor, unit: bool, precision: str, mu: Tensor, shifted: bool
    ) -> None:
        """Fill the parts with sums of scale_n x_n by label, of x_n - mu if ``shifted``; ``unit``: every scale is 1."""
        x = self.levels
        launch(
            pyramid_sums.sums, (x.batch * self.units,),
            x.xs, x.strides, x.sizes, self.parts, self.splits, self.spans, self.copies, self.weights, mu, labels, scale,
            done, *x.size, self.units, self.weights.shape[1], x.DP, self.K,
            FLATS=x.flats, SAME=self.same, ALIGNS=x.aligns, **x.known, SHIFT=shifted, UNIT=unit, PAD=x.pad,
            PRECISION=precision, UPCAST=interpreted(), CHUNKS=self.chunks,
            BLOCKS_C=tuple(min(self.blocks["BLOCK_C"], power(w)) for _, _, w in x.sizes),
            BLOCK_C=self.blocks["BLOCK_C"], BLOCK_S=self.BLOCK_S,
            BLOCK_X=min(2 * self.blocks["BLOCK_C"], power(x.size[1])), KP=self.KP, **x.row.launch,
        )  # fmt: skip


def count_programs(
    sizes: Sequence[tuple[int, ...]], spans: Sequence[int], height: int, rows: int, device: torch.device
) -> Tensor:
    """How many programs of ``score`` each strip of rows waits for, int32 [strips]; as in `_pixel_rows`."""
    strip = torch.arange(cdiv(height, rows), device=device)
    total = torch.zeros_like(strip)
    for (_, h, w), span in zip(sizes, spans, strict=True):
        program = torch.arange(cdiv(h * w, span), device=device)
        top, bottom = program * span // w, (((program + 1) * span).clamp_max(h * w) - 1) // w
        low = ((2 * top - 1).clamp_min(0) * height // (2 * h) - 1).clamp_min(0)
        high = ((2 * bottom + 3) * height // (2 * h) + 1).clamp_max(height - 1)
        total += ((low[:, None] // rows <= strip) & (strip <= high[:, None] // rows)).sum(0)
    return total.to(torch.int32)


class Solver:
    """The launches for a batch of problems with K centroids each."""

    def __init__(
        self, levels: Levels, clusters: int, weight: Tensor | None, scale: Tensor, squared_norms: Tensor, mu: Tensor,
        metric: str, precision: str,
    ) -> None:  # fmt: skip
        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(levels.batch, *shape, dtype=dtype, device=levels.device)

        self.levels, self.K, self.KP = levels, clusters, power(clusters)
        check_centroids(self.KP, levels.DP)
        self.weight, self.scale, self.squared_norms, self.mu = weight, scale, squared_norms, mu
        self.cosine, self.precision = metric == "cosine", precision
        self.shifted = levels.dtype == torch.float32 and not self.cosine
        height, width = levels.size
        self.rows = max(1, STRIP // width)
        self.strips = cdiv(height, self.rows)
        self.adder = Adder(levels, clusters)
        self.tile_sizes = self.adder.blocks
        itemsize = levels.dtype.itemsize
        self.tiles = tuple(score_tile(levels.row, self.KP, levels.pad, size, itemsize) for size in levels.sizes)
        self.spans = tuple(
            cells * max(1, UNIT_BYTES // (cells * size[0] * itemsize))
            for (cells, _), size in zip(self.tiles, levels.sizes, strict=True)
        )
        self.programs = sum(cdiv(h * w, s) for (_, h, w), s in zip(levels.sizes, self.spans, strict=True))
        self.needed = count_programs(levels.sizes, self.spans, height, self.rows, levels.device)
        self.BLOCK_M = min(self.tile_sizes["BLOCK_M"], levels.pad)
        self.blocks = levels.DP // self.BLOCK_M
        self.scores, self.m = empty(levels.cells, self.KP), empty(levels.DP, self.KP, dtype=output_dtype(levels.dtype))
        self.bias, self.lengths = empty(self.blocks, self.KP), empty(self.blocks, self.KP)
        self.labels = empty(levels.pixels, dtype=torch.int8 if clusters < 128 else torch.int16)
        self.distances = empty(levels.pixels)
        self.counts, self.inertia = empty(self.strips, self.KP), empty(self.strips)
        self.changed, self.shift = empty(self.strips, dtype=torch.int32), empty(self.blocks)
        self.arrived = torch.zeros(levels.batch, self.strips, dtype=torch.int32, device=levels.device)
        self.moved = torch.zeros(levels.batch, dtype=torch.int32, device=levels.device)

    def score(self, done: Tensor) -> None:
        """Labels, distances, counts and inertia for the centroids that `move` prepared."""
        x = self.levels
        launch(
            pyramid_score.score, (x.batch * self.programs,),
            x.xs, x.strides, x.sizes, self.m, self.mu, self.scores, self.bias, self.squared_norms,
            self.squared_norms if self.weight is None else self.weight, done, self.needed, self.arrived,
            self.labels, self.distances, self.counts, self.inertia, self.changed,
            *x.size, self.rows, self.strips, self.spans, self.programs, x.cells, self.blocks, x.DP, self.K,
            FLATS=x.flats, SAME=self.adder.same, ALIGNS=x.aligns, **x.known, COSINE=self.cosine, SHIFT=self.shifted,
            WEIGHTED=self.weight is not None, PRECISION=self.precision, UPCAST=interpreted(), TILES=self.tiles,
            PAD=x.pad, BLOCK_N=self.tile_sizes["BLOCK_N"], KP=self.KP,
            **launch_options(self.tile_sizes["warps"], self.tile_sizes["stages"], x.row.registers),
        )  # fmt: skip

    def sums(self, done: Tensor) -> None:
        """Partial sums for the labels of `score`."""
        unit = self.weight is None and not self.cosine
        self.adder.sums(self.labels, self.scale, done, unit, self.precision, self.mu, self.shifted)

    def move(self, c: Tensor, limit: Tensor, done: Tensor, steps: Tensor, empty: str, begin: bool = False) -> None:
        """Update centroids c [B, K, D] in place from the sums, and ``done``; ``begin``: only prepare the c given."""
        x = self.levels
        for lengths in (True, False) if self.cosine and not begin else (False,):
            launch(
                pyramid_move.move, (x.batch * self.blocks,),
                x.xs, x.strides, x.sizes, self.adder.parts, self.adder.splits,
                self.squared_norms if self.weight is None else self.weight, self.scale, self.labels, self.distances,
                self.counts, self.changed, self.lengths, self.shift, self.bias, c, self.m, self.mu, limit, done, steps,
                self.moved, *x.size, self.strips, self.blocks, x.DP, x.channels, self.K,
                START=begin, LENGTHS=lengths, COSINE=self.cosine, SHIFT=self.shifted, WEIGHTED=self.weight is not None,
                FARTHEST=empty == "farthest", **x.known, PAD=x.pad, BLOCK=256, BLOCK_D=self.BLOCK_M, KP=self.KP,
                **launch_options(self.tile_sizes["MOVE_WARPS"], x.row.stages, x.row.registers),
            )  # fmt: skip

    def distances_from(self, centre: Tensor) -> Tensor:
        """1 - cosine of each pixel with one vector [B, D], 0 where none counts, [B, N]."""
        c = F.normalize(centre, dim=1, eps=1e-12)[:, None].contiguous()
        never = torch.zeros(len(c), dtype=torch.int32, device=c.device)
        self.move(c, self.inertia, never, never, "keep", begin=True)
        self.score(never)
        return self.distances.clamp_min(0)

    def lloyd(self, centroids: Tensor, n_iter: int, limit: Tensor, empty: str) -> LloydResult:
        """Iterate as `fgfast.ops.kmeans.lloyd` does, with three launches per iteration, four for cosine."""
        shift = self.levels.unpad(self.mu) if self.shifted else None
        c, device = to_relative(centroids, shift, None).contiguous(), self.levels.device
        done, steps, never = (torch.zeros(len(c), dtype=torch.int32, device=device) for _ in range(3))
        self.labels.fill_(-2)  # no label: the first step changes every one
        self.move(c, limit, never, steps, empty, begin=True)
        for _ in range(n_iter):
            self.score(done)
            self.sums(done)
            self.move(c, limit, done, steps, empty)
        self.score(never)
        counts = self.counts.sum(1)[:, : self.K]
        return LloydResult(
            from_relative(c, shift, None), self.labels.to(torch.int64), counts, self.inertia.sum(1), steps
        )


# ---------------------------------------------------------------- the host side


def initial_centroids(
    levels: Levels, w: Tensor, spread: Tensor, mu: Tensor, seed: Tensor, run: int, options: KMeansOptions
) -> Tensor:
    """Centroids [B, K, D] in float32, with the random numbers of `fgfast.pixels.init`.

    The weight w and the distance from the centre, ``spread``, are [B, N]; the centre mu is [B, DP].
    """
    n_clusters, init, metric = options.n_clusters, options.init, options.metric
    zero = torch.zeros_like(mu)
    if init == "random":
        return levels.rows(random_pixels(w, n_clusters, seed, run), zero, torch.float32)
    samples = min(options.init_samples, w.shape[1])
    if samples > SAMPLES:
        source = Pyramid(list(levels.xs), levels.size)
        source.prepare(metric, w)
        return source.as_given(start(source, n_clusters, init, samples, seed, run))
    numbers = trial_numbers(seed, run, n_clusters)
    chosen, weight = sample_pixels(w, spread, samples, seed, run)
    rows_size, group_size = max(1, SAMPLED // (samples * levels.channels)), max(1, GRAM // samples**2)
    positions = []
    for first in range(0, levels.batch, group_size):
        last = min(first + group_size, levels.batch)
        grams = []
        for b in range(first, last, rows_size):
            part = slice(b, min(b + rows_size, last))
            points = levels.problems(part).rows(
                chosen[part], zero[part] if metric == "cosine" else mu[part], levels.dtype
            )
            points = F.normalize(points.float(), dim=2, eps=1e-12).to(points.dtype) if metric == "cosine" else points
            grams.append(inner_products(points))
        group = slice(first, last)
        positions.append(choose_samples(torch.cat(grams), weight[group].float(), numbers, n_clusters, metric))
    return levels.rows(chosen.gather(1, torch.cat(positions)), zero, torch.float32)


def kmeans(
    maps: Sequence[Tensor], size: tuple[int, int], weight: Tensor | None, seed: Tensor, options: KMeansOptions
) -> LloydResult:
    """The best of n_init runs of each problem of maps [B, D_l, h_l, w_l] resized to ``size``, not empty."""
    first, metric = options.first, options.metric
    with on_device_of(maps[0]):
        levels = Levels(maps, size)
        zero = levels.pad_channels(None)
        squared_norms = levels.squares(zero)
        finite = squared_norms.isfinite()
        weight = None if weight is None else weight.to(torch.float32).contiguous()
        w = finite.to(torch.float32) if weight is None else torch.where(finite, weight, 0)
        counted = (w > 0).to(torch.float32)
        n = counted.sum(1).clamp_min(1)
        few = spaced_pixels(torch.ones_like(w) if weight is None else weight)
        rows = levels.rows(few, zero, torch.float32).float()
        rows = F.normalize(rows, dim=2, eps=1e-12) if metric == "cosine" else rows
        centre = middle(rows, w.gather(1, few))
        mu, scale, factors = zero, w, counted
        if metric == "cosine":
            inverse_norms = torch.where(finite, squared_norms, 1).sqrt().clamp_min(1e-12).reciprocal()
            scale, factors = w * inverse_norms, counted * inverse_norms
        else:
            mu = levels.pad_channels(centre)
            squared_norms = torch.where(finite, levels.squares(mu), math.inf)
        shifted = levels.dtype == torch.float32 and metric != "cosine"
        mean = levels.total(factors, mu, shifted) / n[:, None]
        mean = mean if shifted or metric == "cosine" else mean - centre
        squares = torch.where(finite, squared_norms * factors.square(), 0)
        variance = squares.sum(1) / n - mean.square().sum(1)
        limit = options.tol * variance.clamp_min(0) / levels.channels
        solver = Solver(levels, options.n_clusters, weight, scale, squared_norms, mu, metric, options.precision)
        spread = squares
        if metric == "cosine" and first is None and options.init_samples < levels.pixels:
            spread = Solver(levels, 1, weight, scale, squared_norms, mu, metric, options.precision).distances_from(
                centre
            )

        def run(number: int) -> LloydResult:
            if first is None:
                c = initial_centroids(levels, w, spread, mu, seed, number, options)
            else:
                c = first.to(torch.float32, copy=True)
            if metric == "cosine":
                c = F.normalize(c, dim=2, eps=1e-12)
            return solver.lloyd(c, options.n_iter, limit, options.empty)

        # The inertia of a result is NaN where a pixel is not finite; this is that of the finite pixels.
        return best_of(options.n_init, run, lambda _: (solver.distances.clamp_min(0) * w).sum(1))
