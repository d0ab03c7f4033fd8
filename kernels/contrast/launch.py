r"""Triton kernels of the contrastive loss: the host side, which :mod:`fgfast.ops.contrast.contrast` calls.

.. math:: \ell_i = \log \sum_{j \in P_i \cup N_i \cup \text{bank}} e^{s_{ij}} - \frac{1}{|P_i|} \sum_{j \in P_i}
          s_{ij}, \qquad s_{ij} = \langle q_i, k_j \rangle / T, \qquad q\,[M, D],\ k\,[T, D],\ \text{bank}\,[Q, D]

Forward: ``prepare`` for each operand (inverse norms, ranges of image ids), then ``forward``, in which a program keeps
rows and walks over columns. Backward: ``prepare`` again, then for each gradient ``gradient``, in which a program keeps
the vectors whose gradient it makes and computes the tiles anew, and ``finish`` (1/T and the normalisation). A row's
share of dL/dT is its inner product with its own gradient (``inner``). Where query is key and logits are bounded, one
``gradient`` serves both sides. Where there are few rows the columns are divided into
shares, one program each, whose results are joined in a fixed order. There is no atomic: results do not vary.

Where query is key and logits are bounded, ``forward`` makes half the square if that pays (:func:`groups_and_shares`):
M^2 D multiplications and additions in place of 2 M^2 D, and M^2 / 2 exponentials. Each tile behind the diagonal goes
into the sums of its rows and of its columns. These are kept in float32 [slots, 3, M]: beside one read of x 12 M slots
bytes are written, and read, two or three times.

Beside inputs and results there are one float32 buffer of the size of one gradient (or :data:`SHARE_BYTES` for the
shares of a small one; in forward at most that and the bytes of x) and a few numbers a vector. Vectors are multiplied in
the dtype in which they are stored; in backward dL/ds is rounded to bfloat16 for bfloat16 and float16 vectors, and sums
are float32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor

from fgfast.ids import Ids
from fgfast.kernels.common import MOST_REGISTERS, AotCase, interpreted, launch_options, on_device_of, output_dtype
from fgfast.kernels.configs import Row, config, contrast_row, processors, served, table
from fgfast.kernels.contrast import kernels as device_side
from fgfast.kernels.tune import TuneCase
from fgfast.tensors import BOUNDED, LOG2E

LARGEST_D = 8192
LARGEST_N = 2**31 - 2**10  # indices of vectors and blocks are 32-bit on the way to the kernels
SHARE_BYTES = 32 << 20
TRIANGULAR_TILES = 8  # tiles of a program of ``forward`` from which half the square pays: a guess, to be measured
FINISH_ROWS = 16  # vectors of a program of ``finish``
JOINED = 64  # rows of a program of ``join``
INNER = launch_options(4, 3, MOST_REGISTERS)  # of ``inner``: ptxas by itself spills
CHUNK = 256  # blocks whose ranges of image ids a program looks at together
NEGATIVES = ("all", "other_images", "same_image")


@dataclass(frozen=True)
class TileShape:
    """How one kernel is cut: vectors kept, vectors a step, of them compared at a time, channels; warps, stages."""

    x: int
    y: int
    compared: int
    d: int  # channels at a time; every channel where ``whole``
    whole: bool
    warps: int
    stages: int
    registers: int = 0

    @classmethod
    def of(cls, row: Row) -> "TileShape":
        """A row of the table."""
        t = row.tiles
        sizes = (t["BLOCK_X"], t["BLOCK_Y"], t["BLOCK_S"], t["BLOCK_D"], bool(t["WHOLE"]))
        return cls(*sizes, row.warps, row.stages, row.registers)

    @property
    def options(self) -> dict[str, Any]:
        return {"BLOCK_X": self.x, "BLOCK_Y": self.y, "BLOCK_S": self.compared, "BLOCK_D": self.d, "WHOLE": self.whole}


def arithmetic(dtype: torch.dtype, precision: str) -> str:
    """How products are made, for the table: "fp16", "half" (bfloat16, and float16 too), "tf32" or "ieee"."""
    return precision if dtype == torch.float32 else "fp16" if dtype == torch.float16 else "half"


def forward_registers(row: int, bounded: bool, half: bool) -> int:
    """The budget of ``forward``, from that of its row: ptxas spills for occupancy where sums or maxima are kept too."""
    return MOST_REGISTERS if half or not bounded else row


def programs_wanted(device: torch.device) -> int:
    """How many programs keep the device busy."""
    return 2 * processors(device) if device.type == "cuda" else 1


def tile(kernel: str, device: torch.device, kind: str, channels: int) -> TileShape:
    """How ``kernel`` ("forward" or "gradient") is cut for vectors of so many channels."""
    kinds = ("fp16", "half") if kind == "fp16" else (kind,)
    return TileShape.of(config(f"contrast {kernel}", device, *kinds, channels=channels))


@dataclass
class _Side:
    """Vectors and what ``prepare`` finds out about them."""

    x: Tensor  # [N, D]
    ids: Ids | None  # None for a bank
    inverse: Tensor  # float32 [N]
    low: Tensor  # int64 [blocks]
    high: Tensor

    def arguments(self) -> tuple[Any, ...]:
        """What the kernels take of a side."""
        ids = (None, None, None, 0, 0, 0) if self.ids is None else (*self.ids, *(i.stride(0) for i in self.ids))
        return self.x, *self.x.stride(), self.inverse, *ids


class _Operands:
    """One call: its sides, its temperature and how it is cut."""

    def __init__(
        self, kernel: str, query: Tensor, query_ids: Ids, key: Tensor | None, key_ids: Ids | None, bank: Tensor | None,
        temperature_tensor: Tensor | None, temperature: float, negatives: str, normalize: bool, precision: str,
        rows: tuple[Tensor, Tensor, Tensor] | None = None,
    ):  # fmt: skip
        check_sizes(query, key, bank)
        self.negatives, self.normalize, self.same = negatives, normalize, key is None
        self.number, self.pointer = temperature, None
        if temperature_tensor is not None:
            if on_device(temperature_tensor):
                self.pointer = temperature_tensor.detach()
            else:
                self.number = float(temperature_tensor)
        self.scale = LOG2E / self.number
        self.bounded = normalize and self.pointer is None and self.scale <= BOUNDED
        kind = arithmetic(query.dtype, precision)
        self.precision = "tf32" if kind == "tf32" else "ieee"
        self.tile = tile(kernel, query.device, kind, query.shape[1])
        self.coefficients = self._coefficients(query, rows)
        self.rows = self.prepare(query, query_ids, rows)
        self.keys = self.rows if key is None else self.prepare(key, key_ids)
        self.bank = None if bank is None or len(bank) == 0 else self.prepare(bank, None)

    def _coefficients(
        self, query: Tensor, rows: tuple[Tensor, Tensor, Tensor] | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if rows is None:
            return None, None, None
        values = query.new_empty(2 if self.bounded else 3, len(query), dtype=torch.float32)
        return values[0], values[1], None if self.bounded else values[2]

    def prepare(self, x: Tensor, ids: Ids | None, rows: tuple[Tensor, Tensor, Tensor] | None = None) -> _Side:
        """Norms and ranges of x; with ``rows`` (upstream gradient, lse, count) also the coefficients."""
        n, d = x.shape
        blocks = triton.cdiv(n, self.tile.y)
        inverse = x.new_empty(n, dtype=torch.float32)
        low, high = x.new_empty(2, blocks if ids is not None else 0, dtype=torch.int64)
        side = _Side(x, ids, inverse, low, high)
        of_ids = (None, None, 0, 0) if ids is None else (ids.image, ids.part, ids.image.stride(0), ids.part.stride(0))
        grad, lse, count = (None, None, None) if rows is None else rows
        if n:
            device_side.prepare[(blocks,)](
                x, *x.stride(), *of_ids, inverse, low, high, grad, 0 if grad is None else grad.stride(0), lse, count,
                *(self.coefficients if rows is not None else (None, None, None)), n, d,
                NORMALIZE=self.normalize, BOUNDED=self.bounded, BLOCK=self.tile.y, BLOCK_D=_channels(d, 128),
                UPCAST=interpreted(), num_warps=4,
            )  # fmt: skip
        return side

    def shares(self, rows: int, columns: int, width: int = 0) -> int:
        """Into how many shares the columns go, so that there are programs for the whole device.

        ``width``: float32 numbers that each share keeps of a row.
        """
        blocks = triton.cdiv(rows, self.tile.x)
        count = min(programs_wanted(self.rows.x.device) // blocks, triton.cdiv(columns, self.tile.y))
        if width:
            count = min(count, SHARE_BYTES // (4 * rows * width))
        return max(count, 1)

    def halves(self) -> tuple[int, int] | None:
        """What :func:`groups_and_shares` says, None for the whole square.

        With "same_image" there are few tiles where ids are sorted, which only the device knows.
        """
        if not (self.same and self.bounded) or self.negatives == "same_image":
            return None
        x = self.rows.x
        return groups_and_shares(len(x), x.shape[1] * x.element_size(), self.tile, programs_wanted(x.device))

    def options(self, registers: int) -> dict[str, Any]:
        """Arguments by name that ``forward`` and ``gradient`` share, with a budget of registers."""
        cut = self.tile.options
        if self.tile.whole:
            cut["BLOCK_D"] = _channels(self.rows.x.shape[1], cut["BLOCK_D"])
        return cut | {
            "NEGATIVES": self.negatives, "BOUNDED": self.bounded, "CHUNK": CHUNK, "PRECISION": self.precision,
            "UPCAST": interpreted(), **launch_options(self.tile.warps, self.tile.stages, registers),
        }  # fmt: skip


def groups_and_shares(rows: int, row_bytes: int, tile: TileShape, programs: int) -> tuple[int, int] | None:
    """Groups of rows and shares of columns for half the square of x, None where ``forward`` makes the whole of it.

    The sums of columns need a slot for each group, those of rows one for each share: 12 bytes a row and slot, in all at
    most SHARE_BYTES and the bytes of x. A group has an even number of blocks of rows, so that each has as many tiles.
    Of the pairs that keep the device busy, the one with the longest walks is taken; few tiles are not worth the slots.

    Example:
        >>> groups_and_shares(65_536, 512, TileShape(128, 128, 32, 256, True, 8, 2), 264)
        (64, 4)
    """
    blocks = triton.cdiv(rows, tile.x)
    if blocks * triton.cdiv(rows, tile.y) < TRIANGULAR_TILES * programs:
        return None
    slots = (SHARE_BYTES + rows * row_bytes) // (12 * rows)
    for shares in range(1, programs + 1):
        turns = 2 * triton.cdiv(blocks, 2 * (programs // shares))
        groups = triton.cdiv(blocks, turns)
        if groups + shares <= slots and 8 * groups * shares >= 7 * programs:
            return groups, shares
    return None


def on_device(temperature: Tensor) -> bool:
    """Whether looking at the temperature would cost a device sync."""
    return temperature.device.type != "cpu"


def _channels(d: int, most: int) -> int:
    """Channels of a tile: a power of two that holds d, at least 16 (the smallest product), at most ``most``."""
    return min(max(triton.next_power_of_2(d), 16), most)


def check_sizes(query: Tensor, key: Tensor | None, bank: Tensor | None) -> None:
    """Raise where the kernels cannot count the channels or the vectors.

    Raises:
        ValueError: D over 8,192, or 2^31 vectors.
    """
    for name, x in (("query", query), ("key", key), ("bank", bank)):
        if x is not None and x.shape[1] > LARGEST_D:
            raise ValueError(
                f"{name} has {x.shape[1]} channels and the Triton kernels take {LARGEST_D}: choose backend 'torch'."
            )
        if x is not None and x.shape[0] > LARGEST_N:
            raise ValueError(
                f"{name} has {x.shape[0]} rows and the Triton kernels take {LARGEST_N}: choose backend 'torch'."
            )


def forward(
    query: Tensor, query_ids: Ids, key: Tensor | None, key_ids: Ids | None, bank: Tensor | None,
    temperature_tensor: Tensor | None, temperature: float, negatives: str, normalize: bool, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, log2-sum-exp2 and number of positives of each query, float32 [M]; key None means the query itself."""
    m, d = query.shape
    loss, lse, count = (query.new_zeros(m, dtype=torch.float32) for _ in range(3))
    if m == 0:
        check_sizes(query, key, bank)
        return loss, lse, count
    with on_device_of(query):
        problem = _Operands(
            "forward", query, query_ids, key, key_ids, bank, temperature_tensor, temperature, negatives, normalize,
            precision,
        )  # fmt: skip
        half = problem.halves()
        groups, share = half or (0, problem.shares(m, len(problem.keys.x)))
        launches = [(problem.keys, share, half is not None)]
        if problem.bank is not None:
            launches.append((problem.bank, problem.shares(m, len(problem.bank.x)), False))
        slots = groups + sum(share for _, share, _ in launches)
        fields = 3 if problem.bounded else 4
        partial = None if slots == 1 else query.new_empty(slots, fields, m, dtype=torch.float32)
        if partial is not None and half:
            partial[:groups].zero_()
        slot = groups
        for side, share, halved in launches:
            device_side.forward[(groups if halved else triton.cdiv(m, problem.tile.x), share)](
                *problem.rows.arguments(), *side.arguments(), side.low, side.high, problem.pointer, problem.scale,
                loss, lse, count, partial, slot, m, len(side.x), d, TRIANGULAR=halved, SPLITS=share,
                **problem.options(forward_registers(problem.tile.registers, problem.bounded, halved)),
            )  # fmt: skip
            slot += share
        if partial is not None:
            device_side.join[(triton.cdiv(m, JOINED),)](
                partial, loss, lse, count, slots, m, BOUNDED=problem.bounded, BLOCK_SLOTS=16, BLOCK=JOINED, num_warps=4
            )
    return loss, lse, count


@dataclass
class _Pass:
    """One launch of ``gradient``: what is walked over, and whose losses count."""

    side: _Side
    x_rows: bool
    y_rows: bool


def _gradient(problem: _Operands, x: _Side, passes: list[_Pass], inner: bool = False) -> tuple[Tensor, Tensor]:
    """dL/dx [X, D]; with ``inner`` T sum_ij s_ij dL/ds_ij over the rows of x, 0-d, else 0.

    Of that sum a row has the inner product of its vector with its own gradient. A pass in which y has rows too, which
    are the same vectors, adds every pair twice; one of y alone comes last and adds none.
    """
    n, d = x.x.shape
    out = x.x.new_empty(n, d, dtype=output_dtype(x.x.dtype))
    dots = x.x.new_zeros((), dtype=torch.float32)
    if n == 0:
        return out, dots
    splits = problem.shares(n, max(len(p.side.x) for p in passes), d)
    in_place = splits == 1 and out.dtype == torch.float32
    raw = out.view(n, 1, d) if in_place else x.x.new_empty(n, splits, d, dtype=torch.float32)
    if not problem.tile.whole:
        raw.zero_()
    small: dict[str, Any] = {
        "SPLITS": splits, "BLOCK": FINISH_ROWS, "BLOCK_D": _channels(d, 128), "UPCAST": interpreted(), "num_warps": 4
    }  # fmt: skip
    seen = dots
    for number, p in enumerate(passes):
        device_side.gradient[(triton.cdiv(n, problem.tile.x), splits)](
            *x.arguments(), *p.side.arguments(), *problem.coefficients, p.side.low, p.side.high, problem.pointer,
            problem.scale, raw, n, len(p.side.x), d, X_ROWS=p.x_rows, Y_ROWS=p.y_rows, ADD=number > 0, SPLITS=splits,
            **problem.options(problem.tile.registers),
        )  # fmt: skip
        last = number + 1 == len(passes) or not passes[number + 1].x_rows
        if inner and p.x_rows and (last or p.y_rows):
            rows = x.x.new_empty(n, dtype=torch.float32)
            device_side.inner[(triton.cdiv(n, FINISH_ROWS),)](
                x.x, *x.x.stride(), x.inverse, raw, rows, n, d, **(small | INNER)
            )  # fmt: skip
            total = rows.sum()
            dots = dots + (total - seen) * (0.5 if p.y_rows else 1)
            seen = total
    device_side.finish[(triton.cdiv(n, FINISH_ROWS),)](
        x.x, *x.x.stride(), x.inverse, problem.pointer, problem.scale, raw, out, n, d, NORMALIZE=problem.normalize,
        **small,
    )  # fmt: skip
    return out, dots


def backward(
    grad: Tensor, lse: Tensor, count: Tensor, needs: list[bool],
    query: Tensor, query_ids: Ids, key: Tensor | None, key_ids: Ids | None, bank: Tensor | None,
    temperature_tensor: Tensor | None, temperature: float, negatives: str, normalize: bool, precision: str,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of query, key, bank and temperature, None where ``needs`` says no."""
    need_query, need_key, need_bank, need_temperature = needs
    need_key, need_bank = need_key and key is not None, need_bank and bank is not None
    if len(query) == 0:
        zeros = ((need_query, query), (need_key, key), (need_bank, bank), (need_temperature, temperature_tensor))
        return [torch.zeros_like(x) if need and x is not None else None for need, x in zeros]
    with on_device_of(query):
        problem = _Operands(
            "gradient", query, query_ids, key, key_ids, bank, temperature_tensor, temperature, negatives, normalize,
            precision, (grad.to(torch.float32), lse, count),
        )  # fmt: skip
        rows, keys = problem.rows, problem.keys
        d_query = d_key = d_bank = d_temperature = None
        if need_query or need_temperature:
            joined = problem.same and need_query
            passes = [_Pass(keys, True, joined and problem.bounded)]
            if problem.bank is not None:
                passes.append(_Pass(problem.bank, True, False))
            if joined and not problem.bounded:
                passes.append(_Pass(keys, False, True))
            result, dots = _gradient(problem, rows, passes, need_temperature)
            d_query = result if need_query else None
            if need_temperature and temperature_tensor is not None:
                d_temperature = -dots.to(temperature_tensor.device) / temperature_tensor.detach().float().square()
        if need_key:
            d_key, _ = _gradient(problem, keys, [_Pass(rows, False, True)])
        if need_bank and bank is not None:
            if problem.bank is None:
                d_bank = torch.zeros_like(bank)
            else:
                d_bank, _ = _gradient(problem, problem.bank, [_Pass(rows, False, True)])
    return [d_query, d_key, d_bank, d_temperature]


def _signature(kernel: Any, dtype: str, constexprs: dict[str, Any]) -> dict[str, str]:
    """Types of the arguments of ``kernel``, for aligned vectors of ``dtype``, contiguous in D, and int64 ids."""
    types = {}
    for name in kernel.arg_names:
        if name in constexprs:
            types[name] = "constexpr"
        elif name in ("x", "y"):
            types[name] = f"*{dtype}:16"
        elif "stride" not in name and (name in ("low", "high") or name.endswith(("image", "part", "view"))):
            types[name] = "*i64:16"
        elif name in ("N", "X", "Y", "D") or name.endswith("stride_n"):
            types[name] = "i32:16"
        elif "stride" in name or name.startswith("slot"):
            types[name] = "i32"
        else:
            types[name] = "fp32" if name == "scale" else "*fp32:16"
    return types


def _case(
    name: str, kernel: Any, dtype: str, constexprs: dict[str, Any], warps: int = 4, stages: int = 3,
    archs: tuple[str, ...] = (), rare: bool = False, registers: int = 0,
) -> AotCase:  # fmt: skip
    contiguous = [n for n in kernel.arg_names if n.endswith(("stride_d", "stride_image", "stride_part", "stride_view"))]
    absent = {"temperature"} & set(kernel.arg_names)
    known = constexprs | dict.fromkeys(contiguous, 1) | dict.fromkeys(absent)
    types = _signature(kernel, dtype, known)
    return AotCase(f"contrast {name}", kernel, types, known, warps, stages, archs, rare, registers=registers)


def tune_cases(device: str = "cuda", number: int = 1 << 14) -> Iterator[TuneCase]:
    """Query and key of up to 256 channels, held whole, and of 1,024."""
    sizes = list(product((64, 128), (32, 64, 128), (16, 32), (16, 32, 64, 0), (4, 8), (2, 3), (0, MOST_REGISTERS)))
    for dtype, (channels, most) in product(
        (torch.bfloat16, torch.float32), ((128, 128), (256, 256), (1024, LARGEST_D))
    ):
        query, key = (torch.randn(number, channels, device=device, dtype=dtype) for _ in range(2))
        image = torch.arange(number, device=device)
        one, two = (Ids(image, torch.zeros_like(image), torch.full_like(image, view)) for view in (0, 1))
        call: tuple[Any, ...] = (query, one, key, two, None, None, 0.1, "all", True, "ieee")
        _, lse, count = forward(*call)
        runs = {
            "forward": partial(forward, *call),
            "gradient": partial(backward, torch.ones_like(lse), lse, count, [True, True, False, False], *call),
        }
        rows = [
            contrast_row(arithmetic(dtype, "ieee"), most, x, y, compared, d or channels, warps, stages, 0, registers)
            for x, y, compared, d, warps, stages, registers in sizes
            if compared <= y and (d or channels) <= 256
        ]
        for kernel, run in runs.items():
            yield TuneCase(f"contrast {kernel}", rows, run)


def aot_cases() -> Iterator[AotCase]:
    """Every kernel, dtype and table row."""
    common = {"NORMALIZE": True, "UPCAST": False}
    for dtype in ("bf16", "fp16", "fp32"):
        for block in (32, 64, 128):
            prepare = common | {"BOUNDED": True, "BLOCK": block, "BLOCK_D": 128}
            rare = dtype == "fp16" or block < 128
            yield _case(f"prepare {dtype} {block}", device_side.prepare, dtype, prepare, rare=rare)
        for splits in (1, 4):
            finish = common | {"SPLITS": splits, "BLOCK": FINISH_ROWS, "BLOCK_D": 128}
            rare = dtype == "fp16" or splits == 1
            yield _case(f"finish {dtype} {splits}", device_side.finish, dtype, finish, rare=rare)
            inner = {key: value for key, value in finish.items() if key != "NORMALIZE"}
            yield _case(f"inner {dtype} {splits}", device_side.inner, dtype, inner, rare=rare, registers=MOST_REGISTERS)
    for bounded in (True, False):
        join = {"BOUNDED": bounded, "BLOCK_SLOTS": 16, "BLOCK": JOINED}
        yield _case(f"join {'bounded' if bounded else 'online'}", device_side.join, "fp32", join)
    for kernel in ("forward", "gradient"):
        found = list(table(f"contrast {kernel}"))
        for arch, row_name, row in found:
            dtypes = {"half": ("bf16", "fp16"), "fp16": ("fp16",)}.get(row.kind, ("fp32",))
            if row.kind == "half" and any(a == arch and r.kind == "fp16" for a, _, r in found):
                dtypes = ("bf16",)
            archs, tuned = served(f"contrast {kernel}", arch, row), "tuned" in row_name
            for dtype in dtypes:
                name = f"{kernel} {arch} {dtype} {row.kind} D{row.channels}{' tuned' * tuned}"
                for case in _tile_cases(name, kernel, dtype, row.kind, TileShape.of(row), archs):
                    yield case._replace(tuned=tuned, registers=case.registers or row.registers, shared=row.shared)


def _tile_cases(
    name: str, kernel: str, dtype: str, kind: str, row: TileShape, archs: tuple[str, ...]
) -> Iterator[AotCase]:
    """The variants of one row."""
    rare = dtype == "fp16" and kind != "fp16"  # the code of bfloat16, with one other instruction
    fixed = row.options | {
        "NEGATIVES": "all", "SPLITS": 1, "CHUNK": CHUNK, "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "UPCAST": False,
    }  # fmt: skip
    for bounded in (True, False):
        full = f"{name} {'bounded' if bounded else 'online'}"
        if kernel == "forward":
            for half in (False, True) if bounded else (False,):
                flags = (
                    fixed | {"BOUNDED": bounded, "TRIANGULAR": half} | ({"SPLITS": 4} if half else {"partial": None})
                )
                its = f"{full} half" if half else full
                registers = forward_registers(row.registers, bounded, half)
                yield _case(its, device_side.forward, dtype, flags, row.warps, row.stages, archs, rare, registers)
            continue
        for sides in ("x", "y", "xy") if bounded else ("x", "y"):
            flags = fixed | {
                "BOUNDED": bounded, "X_ROWS": "x" in sides, "Y_ROWS": "y" in sides, "ADD": False,
            }  # fmt: skip
            yield _case(f"{full} {sides}", device_side.gradient, dtype, flags, row.warps, row.stages, archs, rare)
