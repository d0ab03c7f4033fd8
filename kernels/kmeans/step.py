"""The host side of a step of k-means: tile sizes of a problem, and the launches.

Half-precision pixels with contiguous channels, the euclidean metric and no weights take the kernel whose tiles stay in
shared memory (:mod:`fgfast.kernels.kmeans.resident`) where the table has a row for it.

A step is one launch if a program has an entire problem: it also prepares the centroids and, in Lloyd's loop, updates
them. This is so for batches of about as many problems as there are processors, with sums that fit the registers of a
program. A problem that is split among programs takes three launches: the centroids, the step, the sum of the partial
results of its programs. Sums that do not fit the registers take one more.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fgfast.kernels.common import (
    MOST_REGISTERS,
    cdiv,
    interpreted,
    launch_options,
    on_device_of,
    output_dtype,
    power_of_2,
    wide,
)
from fgfast.kernels.configs import Row, config, find, processors, row_kind
from fgfast.kernels.kmeans import fused, resident, tiles
from fgfast.kernels.kmeans.centroids import prepare_centroids_kernel, update_centroids_kernel
from fgfast.kernels.launches import launch

PARTIAL_FRACTION = 0.08  # of the bytes of x: the most that writing and reading partial sums may cost
WIDEST = 8192  # channels
MOST_CHUNKS = 8  # tiles of sums that a program holds: each takes registers for its addresses too
GROUPS, LANES = 8, 32  # warps of a program of the resident kernel, and channels of each in every 256
STEP_BLOCKS = ("BLOCK_N", "BLOCK_D", "BLOCK_S", "BLOCK_K", "CHUNKS", "BLOCK_C")
UPDATE_BLOCKS: dict[str, Any] = {"BLOCK": 1024, "BLOCK_K": 16}


def power(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least n and at least ``least``."""
    return max(least, power_of_2(n))


def kinds(dtype: torch.dtype, aligned: bool, flat: bool) -> tuple[str, ...]:
    """The kinds of rows of the table for ``dtype``, from the most specific to the most general.

    ``aligned``: rows of pixels or channels start at multiples of 16 elements; ``flat``: no gaps between rows of pixels.
    """
    kind, special = row_kind(dtype), " aligned" if aligned else "" if flat else " gaps"
    return (kind + special, kind)


def tile(row: Row, channels: int, clusters: int, narrow: bool = False) -> dict[str, int]:
    """Tile sizes of a row of the table for D channels and K clusters; HELD: whether the sums fit the registers.

    ``narrow``: fewer channels of scores at a time, to save registers where pixels have factors in the sums (weights or
    inverse norms) and rows have no gaps. A tile of BLOCK_C channels of all centroids has at least as many numbers as a
    program has threads: no two threads hold the same number.
    """
    t = row.tiles | {"num_warps": row.warps, "num_stages": row.stages, "registers": row.registers}
    t["BLOCK_S"] = min(t["BLOCK_S"], power(channels))
    t["BLOCK_D"] = min(t["BLOCK_D"], t["BLOCK_S"])
    t["BLOCK_K"] = power(clusters)
    t["CHUNKS"] = max(1, cdiv(channels, t["BLOCK_S"]))
    sums = t["CHUNKS"] * t["BLOCK_S"] * t["BLOCK_K"]
    # Half precision splits factors into two bfloat16; with small tiles that leaves too few registers for addresses.
    scarce = narrow and t["BLOCK_N"] == 16 and not row.kind.startswith("fp32")
    scarce = scarce and (t["CHUNKS"] == MOST_CHUNKS or (channels % t["BLOCK_S"] > 0 and sums > 16 << 10))
    if t["BLOCK_K"] > t.pop("MOST_K") or t["CHUNKS"] > MOST_CHUNKS or sums > t["HELD"] or scarce:
        t["PIECES"] = int(t["HELD"] == 0)
        if t["HELD"]:
            t |= {"HELD": 0, "BLOCK_N": 32, "BLOCK_S": min(64, t["BLOCK_S"])}
            t["BLOCK_D"] = min(16 if row.kind.startswith("fp32") else 32, t["BLOCK_S"])
        elif narrow and t["BLOCK_K"] >= 64:
            t["BLOCK_N"] = min(32, t["BLOCK_N"])
        t["BLOCK_K"] = min(64, t["BLOCK_K"])
        t["CHUNKS"] = cdiv(channels, t["BLOCK_S"])
        return t
    if sums > 16 << 10:
        t["BLOCK_N"] = min(32, t["BLOCK_N"])
    if t["BLOCK_K"] == 128:
        t["BLOCK_N"] = 16
    if narrow and t["BLOCK_N"] == 16 and sums > 16 << 10:
        t["BLOCK_D"] = min(16, t["BLOCK_D"])
    numbers = 2048 if t["BLOCK_N"] == 16 else 1024
    plain = (
        min(32, t["BLOCK_D"]) if narrow and sums <= 24 << 10 else t["BLOCK_D"]
    )  # for launches that neither prepare nor move centroids
    return t | {"HELD": 1, "BLOCK_C": min(t["BLOCK_S"], numbers // t["BLOCK_K"]), "PLAIN_D": plain}


def resident_tile(row: Row, channels: int, clusters: int) -> dict[str, int] | None:
    """Tile sizes of the resident kernel for D channels and K clusters; None where it does not serve.

    It does not if the sums do not fit the registers, or tiles, centroids and the exchanged scores the shared memory;
    nor if channels are not whole groups, or a third of the padded channels were empty.
    """
    wide, chunks = GROUPS * LANES, cdiv(channels, GROUPS * LANES)
    spare, clusters = clusters < power(clusters) and chunks < 4, power(clusters)  # with 4 chunks registers run out
    padded, pixels, ahead = chunks * wide, row.tiles["BLOCK_N"], row.stages - 1
    needed = padded * (2 * (ahead * pixels + clusters) + 4 * ahead) + 4 * GROUPS * pixels * clusters
    if channels % LANES or 2 * padded > 3 * channels or padded * clusters > row.tiles["HELD"]:
        return None
    if needed > (row.shared - 1) << 10:
        return None
    return row.tiles | {
        "num_warps": row.warps, "num_stages": row.stages, "registers": row.registers, "BLOCK_D": 32, "BLOCK_S": wide,
        "BLOCK_K": clusters, "CHUNKS": chunks, "BLOCK_C": min(wide, 2048 // clusters), "HELD": 1, "RESIDENT": 1,
        "SPARE": int(spare),
    }  # fmt: skip


def resident_blocks(t: dict[str, int]) -> dict[str, int]:
    """Tile sizes of a launch of `step_resident`."""
    names = ("BLOCK_N", "BLOCK_K", "CHUNKS", "BLOCK_C", "SPARE")
    return {name: t[name] for name in names} | {"STAGES": t["num_stages"]}


def described(x: Tensor, flat: bool, across: int) -> bool:
    """Whether a tensor descriptor takes pixels x: contiguous channels, rows that start at multiples of 16 bytes."""
    strides = (x.stride(0), across)
    aligned = x.data_ptr() % 16 == 0 and all(0 < s < 1 << 38 and s * x.element_size() % 16 == 0 for s in strides)
    return flat and x.stride(1) == 1 and aligned


def step_blocks(t: dict[str, int], plain: bool) -> dict[str, int]:
    """Tile sizes of a launch of `step`; ``plain``: it neither prepares nor moves centroids."""
    return {name: t[name] for name in STEP_BLOCKS} | ({"BLOCK_D": t["PLAIN_D"]} if plain else {})


def assign_blocks(t: dict[str, int], precision: str) -> dict[str, Any]:
    """Tile sizes of a launch of `assign`, and whether it makes float32 products of three pieces on tensor cores."""
    return {"PIECES": bool(t["PIECES"]) and precision == "ieee"} | {n: t[n] for n in ("BLOCK_N", "BLOCK_D", "BLOCK_K")}


def splits(batch: int, tiles: int, affordable: int, processors: int) -> int:
    """Programs per problem: the smallest number for which the waves of programs take the fewest tiles in total."""
    most = max(1, min(tiles, affordable, cdiv(4 * processors, max(1, batch))))
    return min(range(1, most + 1), key=lambda s: (cdiv(batch * s, processors) * cdiv(tiles, s), s))


def sum_registers(dtype: torch.dtype, unit: bool) -> int:
    """The register budget of `sum_pixels`: the default of ptxas spills, except for half precision without factors."""
    return 0 if unit and dtype != torch.float32 else MOST_REGISTERS


def check_centroids(clusters: int, channels: int) -> None:
    """Raise for more centroids of a problem, padded to full tiles, than 32-bit offsets reach."""
    if clusters * channels >= 1 << 31:
        raise ValueError(
            f"{clusters} centroids of {channels} channels are 2^31 numbers or more, which the Triton kernels do not "
            "take: choose backend 'torch'."
        )


class Move(NamedTuple):
    """The state of `lloyd`: centroids [B, K, D], counts after the repair [B, K], done and steps int32 [B].

    A problem is done when its centroids moved by at most limit [B]; ``empty`` is "farthest" or "keep".
    """

    centroids: Tensor
    repaired: Tensor
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
    """The launches for a batch of problems: x [B, D, N] or [B, D, H, W] with any strides, K centroids each."""

    def __init__(
        self, x: Tensor, clusters: int, weight: Tensor | None, metric: str, precision: str, deterministic: bool
    ) -> None:
        self.x, self.K = x, clusters
        self.batch, self.D = x.shape[:2]
        self.N = math.prod(x.shape[2:])
        if self.D > WIDEST:
            raise ValueError(f"x has {self.D} channels and the Triton kernels take {WIDEST}: choose backend 'torch'.")
        if self.N > 1 << 30:  # the tiles of all splits extend past N, at most to 1.5 N
            raise ValueError(f"x has {self.N} pixels and the Triton kernels take 2^30: choose backend 'torch'.")
        self.weight = None if weight is None else weight.to(torch.float32).contiguous()
        across = x.stride(3) if x.dim() == 4 else x.stride(2)
        width = x.shape[3] if x.dim() == 4 else self.N
        down = x.stride(2) if x.dim() == 4 else 0
        flat = width == self.N or down == width * across
        aligned = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 or stride == 1 for stride in x.stride())
        self.cosine = metric == "cosine"
        self.shifted = x.dtype == torch.float32 and not self.cosine
        row, t = None, None
        if x.dtype != torch.float32 and weight is None and not self.cosine and described(x, flat, across):
            row = find("kmeans_resident", x.device, row_kind(x.dtype))
            t = row and resident_tile(row, self.D, clusters)
        if t is None:
            row = config("kmeans_step", x.device, *kinds(x.dtype, aligned, flat))
            t = tile(row, self.D, clusters, flat and (self.cosine or weight is not None))
        self.tile, self.resident = t, "RESIDENT" in t
        self.DP = t["CHUNKS"] * t["BLOCK_S"]
        self.KP = cdiv(clusters, t["BLOCK_K"]) * t["BLOCK_K"]
        check_centroids(self.KP, self.DP)
        short = t["BLOCK_N"] * across + t["BLOCK_S"] * x.stride(1) < 1 << 31
        self.strides = (x.stride(0), x.stride(1), 0 if flat else down, across)
        self.width = self.N if flat else width
        n_tiles = cdiv(self.N, t["BLOCK_N"])
        affordable = int(PARTIAL_FRACTION * self.N * x.element_size() / (8 * clusters))
        self.splits = splits(self.batch, n_tiles, affordable, processors(x.device) * t.get("PROGRAMS", 1))
        self.program_tiles = cdiv(n_tiles, self.splits)
        self.splits = max(1, cdiv(n_tiles, max(1, self.program_tiles)))
        self.single = self.splits == 1 and bool(t["HELD"])  # one program per problem, in one launch
        self.atomic = not deterministic and self.splits > 1 and bool(t["HELD"])
        self.common = {
            "FLAT": flat and short,
            "EVEN": self.D % t["BLOCK_S"] == 0,
            "SHIFT": self.shifted,
            "WEIGHTED": weight is not None,
            "PRECISION": precision,
            "UPCAST": interpreted(),
        }
        if self.resident:
            self.pixels = TensorDescriptor(
                x, [self.batch, self.D // LANES, self.N, LANES], [x.stride(0), LANES, across, 1],
                [1, GROUPS, t["BLOCK_N"], LANES],
            )  # fmt: skip
        self.m = torch.empty(self.batch, self.DP * self.KP, dtype=output_dtype(x.dtype), device=x.device)
        self.bias = torch.empty(self.batch, self.KP, dtype=torch.float32, device=x.device)
        self.mu = torch.zeros(self.batch, self.DP, dtype=torch.float32, device=x.device)
        self.labels = torch.empty(self.batch, self.N, dtype=torch.int64, device=x.device)
        rows = self.batch if self.atomic else self.batch * self.splits
        self.parts = _totals(rows, clusters, self.D, x.device)
        self.totals = self.parts if rows == self.batch else _totals(self.batch, clusters, self.D, x.device)
        if not t["HELD"]:
            self.scale = torch.empty(self.batch, self.N, dtype=torch.float32, device=x.device)

    def prepare(self, centroids: Tensor, given: bool = False) -> None:
        """Set m, bias and (unless ``given``) mu for centroids [B, K, D], relative to mu if that is given and shifts."""
        blocks = {name: min(32, self.tile[name]) for name in ("BLOCK_K", "BLOCK_D")}
        launch(
            prepare_centroids_kernel, (self.batch * self.KP // blocks["BLOCK_K"],),
            centroids, self.m, self.bias, self.mu, self.K, self.D, self.DP, self.KP, *centroids.stride(),
            COSINE=self.cosine, SHIFT=self.shifted, GIVEN=given, TURNED=self.resident, **blocks,
        )  # fmt: skip

    def step(
        self, distances: Tensor | None = None, done: Tensor | None = None, first: Tensor | None = None,
        move: Move | None = None,
    ) -> Totals:  # fmt: skip
        """Labels and totals for the prepared centroids or, if given, ``first``.

        ``distances`` [B, N] and ``done`` are given in a step of `lloyd`, whose sums are relative to mu if ``shifted``.
        With ``move`` the centroids are then updated
        and the next ones prepared.
        """
        out, lloyd = self.parts, distances is not None
        if first is not None and not self.single:
            self.prepare(first)
        if self.atomic:
            for part in out:
                part.zero_()
        distances = out.inertia if distances is None else distances
        done = out.changed if done is None else done
        if self.tile["HELD"]:
            self._launch_fused(distances, done, lloyd, *((first, move) if self.single else (None, None)))
        else:
            self._launch_two_reads(distances, done, lloyd)
        if self.totals is not out:
            size = self.K * self.D
            block = min(1024, power(size))
            launch(
                tiles.reduce_rows, (self.batch * cdiv(size, block),), *out, done, *self.totals, size, self.K,
                self.splits, LLOYD=lloyd, BLOCK=block,
            )  # fmt: skip
        if move is not None and not self.single:
            self._update(distances, move)
        return self.totals

    def _launch_fused(
        self, distances: Tensor, done: Tensor, lloyd: bool, first: Tensor | None, move: Move | None
    ) -> None:
        t, out = self.tile, self.parts
        weight = out.inertia if self.weight is None else self.weight
        if move is None:
            c, repaired, limit, steps = (out.sums if first is None else first), out.counts, out.inertia, out.changed
        else:
            c, repaired, limit, steps = move.centroids, move.repaired, move.limit, move.steps
        flags = {
            "LLOYD": lloyd, "ATOMIC": self.atomic, "PREPARE": first is not None, "MOVE": move is not None,
            "FARTHEST": move is not None and move.empty == "farthest",
        } | launch_options(t["num_warps"], t["num_stages"], t["registers"])  # fmt: skip
        if self.resident:
            launch(
                resident.step_resident, (self.batch * self.splits,),
                self.pixels, self.x, self.m, self.bias, self.mu, weight, done, self.labels, distances, *out, c,
                repaired, limit, steps, self.N, self.D, self.K, self.splits, self.program_tiles, self.strides[0],
                self.strides[3], *c.stride(), EVEN=self.common["EVEN"], UPCAST=self.common["UPCAST"], **flags,
                **resident_blocks(t),
            )  # fmt: skip
            return
        launch(
            fused.step, (self.batch * self.splits,),
            self.x, self.m, self.bias, self.mu, weight, done, self.labels, distances, *out, c, repaired, limit, steps,
            self.N, self.width, self.D, self.K, self.splits, self.program_tiles, *self.strides, *c.stride(),
            **self.common, COSINE=self.cosine, **flags, **step_blocks(t, first is None and move is None),
        )  # fmt: skip

    def _launch_two_reads(self, distances: Tensor, done: Tensor, lloyd: bool) -> None:
        t, out, rows = self.tile, self.parts, self.batch * self.splits
        weight = out.inertia if self.weight is None else self.weight
        sizes = (self.N, self.width, self.D, self.K, self.DP, self.KP, self.splits, self.program_tiles, *self.strides)
        options = partial(launch_options, t["num_warps"], t["num_stages"])
        unit = not (self.cosine or self.common["WEIGHTED"])
        launch(
            tiles.assign, (rows,),
            self.x, self.m, self.bias, self.mu, weight, done, self.labels, distances, self.scale, out.inertia,
            out.changed, *sizes, **self.common, LLOYD=lloyd, COSINE=self.cosine, **options(MOST_REGISTERS),
            **assign_blocks(t, self.common["PRECISION"]),
        )  # fmt: skip
        launch(
            tiles.sum_pixels, (rows * (self.DP // t["BLOCK_S"]) * (self.KP // t["BLOCK_K"]),),
            self.x, self.mu, weight, done, self.labels, self.scale, out.sums, out.counts, *sizes, **self.common,
            LLOYD=lloyd, UNIT=unit, **options(sum_registers(self.x.dtype, unit)),
            **{name: t[name] for name in ("BLOCK_N", "BLOCK_S", "BLOCK_K")},
        )  # fmt: skip

    def _update(self, distances: Tensor, move: Move) -> None:
        totals = self.totals
        launch(
            update_centroids_kernel, (self.batch,),
            self.x, distances if self.weight is None else self.weight, self.labels, distances, totals.sums,
            totals.counts, move.repaired, totals.changed, move.centroids, self.m, self.bias, self.mu, move.limit,
            move.done, move.steps, self.N, self.width, self.D, self.K, self.DP, self.KP, *self.strides,
            COSINE=self.cosine, SHIFT=self.shifted, WEIGHTED=self.weight is not None,
            FARTHEST=move.empty == "farthest", TURNED=self.resident, **UPDATE_BLOCKS, BLOCK_D=min(32, self.DP),
            **launch_options(4, 3, MOST_REGISTERS),
        )  # fmt: skip


def kmeans_step(
    x: Tensor, centroids: Tensor, weight: Tensor | None, metric: str, precision: str, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels int64 [B, N], sums [B, K, D], counts [B, K] and inertia [B] of x [B, D, N] or [B, D, H, W], not empty."""
    with on_device_of(x):
        solver = Solver(x, centroids.shape[1], weight, metric, precision, deterministic)
        totals = solver.step(first=centroids.contiguous() if wide(centroids) else centroids)
    return solver.labels, totals.sums, totals.counts, totals.inertia
