"""contrastive_loss, forward and backward: pairs (M = T), two views (T = 2 M) and NT-Xent (query is key).

Operations count the products of a row, a column and D channels that run: 1 forward and 4 backward, 2 where query is
key. An implementation that keeps the logits needs 1 and 2: its share of this limit may be 5/3 of that of its own.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.common import DTYPES, TOLERANCES, compiled, generator, need_gpu, ours, peer, precision, sizes
from benchmarks.timing import Answer, Case, Judge, Judged, Run, Variant, distance
from fgfast import Ids, contrastive_loss
from fgfast.reference import contrast as reference
from fgfast.tensors import exact

TEMPERATURE, PARTS = 0.1, 10
LOGITS = 1 << 26  # of the reference, at a time
TF32 = TOLERANCES["tf32"]


class Field(NamedTuple):
    """Query [M, D], key [T, D] (the query itself for "self") and their ids."""

    kind: str
    query: Tensor
    key: Tensor
    query_ids: Ids
    key_ids: Ids

    @property
    def leaves(self) -> list[Tensor]:
        return [self.query] if self.kind == "self" else [self.query, self.key]


def field(kind: str, m: int, d: int, dtype: torch.dtype, device: torch.device, seed: int) -> Field:
    """Rows of images of ten parts; the columns that belong to a row are near it."""
    g = generator(device, seed)
    made = torch.randn(m, d, device=device, generator=g)
    rows = torch.arange(m, device=device)
    if kind == "self":
        rows = rows % (m // 2)
        made = made[rows] + torch.randn(m, d, device=device, generator=g)
        query = made.to(dtype).requires_grad_()
        ids = Ids(rows // PARTS, rows % PARTS, torch.arange(m, device=device) // (m // 2))
        return Field(kind, query, query, ids, ids)
    copies = 2 if kind == "views" else 1
    noise = torch.randn(copies * m, d, device=device, generator=g)
    key = (made.repeat(copies, 1) + noise).to(dtype).requires_grad_()
    columns = rows.repeat(copies)
    view = torch.arange(copies * m, device=device) < m  # the first M columns are the other view
    query_ids = Ids(rows // PARTS, rows % PARTS, torch.zeros_like(rows))
    key_ids = Ids(columns // PARTS, columns % PARTS, view.long())
    return Field(kind, made.to(dtype).requires_grad_(), key, query_ids, key_ids)


def gradients(loss: Tensor, f: Field) -> Answer:
    return [loss.detach(), *torch.autograd.grad(loss, f.leaves)]


def fgfast(f: Field, backend: str, precision: str) -> Answer:
    loss = contrastive_loss(
        f.query, f.key, query_ids=f.query_ids, key_ids=f.key_ids, temperature=TEMPERATURE, precision=precision,
        backend=backend,
    )  # fmt: skip
    return gradients(loss, f)


def plain(query: Tensor, key: Tensor, kind: str) -> Tensor:
    """Normalise, multiply, cross-entropy: what one writes by hand, with the logits in memory."""
    m, t = len(query), len(key)
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / TEMPERATURE
    row = torch.arange(m, device=query.device)
    if kind == "pairs":
        return F.cross_entropy(logits, row)
    own = torch.arange(t, device=query.device) == (row if kind == "self" else row + m)[:, None]
    target = (row + m // 2) % m if kind == "self" else row
    return F.cross_entropy(logits.masked_fill(own, -torch.inf), target)


def eager(f: Field, loss: Callable[..., Tensor], precision: str) -> Answer:
    with exact(f.query.device, precision):
        return gradients(loss(f.query, f.key, f.kind), f)


def inf_cl(d: int, device: torch.device) -> Run:
    """Inf-CL: one positive a row, no column left out, products in tf32 whatever the dtype."""
    need_gpu(device, "inf-cl")
    loss = peer("inf_cl", "inf-cl").cal_inf_loss

    def run(f: Field) -> Answer:
        query, key = (F.normalize(x.float(), dim=1) for x in (f.query, f.key))
        return gradients(loss(query / TEMPERATURE, key, head_dim=min(d, 256)), f)

    return run


def cut_cross_entropy(device: torch.device) -> Run:
    """Apple's linear cross-entropy with the keys as classifier; half precision alone."""
    need_gpu(device, "cut-cross-entropy")
    loss = peer("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy

    def run(f: Field) -> Answer:
        query, key = (F.normalize(x, dim=1) for x in (f.query, f.key))
        return gradients(loss(query / TEMPERATURE, key, torch.arange(len(query), device=query.device)), f)

    return run


def lightly() -> Run:
    loss = peer("lightly.loss", "lightly").NTXentLoss(temperature=TEMPERATURE)
    return lambda f: gradients(loss(*f.query.chunk(2)), f)


def expected(f: Field) -> Answer:
    """The reference in float64, rows at a time."""
    query = f.query.detach().double().requires_grad_()
    key = query if f.kind == "self" else f.key.detach().double().requires_grad_()
    leaves = [query] if f.kind == "self" else [query, key]
    total = torch.zeros((), dtype=torch.float64, device=query.device)
    grads = [torch.zeros_like(x) for x in leaves]
    step = max(1, LOGITS // len(key))
    for start in range(0, len(query), step):
        rows = slice(start, start + step)
        loss = reference.contrastive_loss(
            query[rows], key, query_ids=Ids(*(x[rows] for x in f.query_ids)), key_ids=f.key_ids,
            temperature=TEMPERATURE, reduction="sum",
        )  # fmt: skip
        for grad, more in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
            grad += more
        total += loss.detach()
    return [x / len(query) for x in (total, *grads)]


def judge(f: Field) -> Judge:
    right = expected(f)
    return lambda answer: Judged(distance(answer, right), f"gradient error {distance(answer[1:], right[1:]):.2g}")


def case(kind: str, m: int, d: int, dtype: str, device: torch.device, quick: bool) -> Case:
    t = 2 * m if kind == "views" else m
    p, itemsize = precision(dtype), DTYPES[dtype].itemsize
    backend = ours(device)
    vectors = (m if kind == "self" else m + t) * d * itemsize
    variants = [
        Variant(f"fgfast {backend}", lambda: partial(fgfast, backend=backend, precision=p)),
        Variant("eager", lambda: partial(eager, loss=plain, precision=p)),
        Variant("torch.compile", lambda: partial(eager, loss=compiled(plain), precision=p)),
    ]
    if kind == "pairs" and d % 16 == 0:
        variants.append(Variant("Inf-CL", lambda: inf_cl(d, device), slack=max(1.0, TF32 / TOLERANCES[dtype])))
    if kind == "pairs" and dtype in ("fp16", "bf16"):
        variants.append(Variant("cut-cross-entropy", lambda: cut_cross_entropy(device)))
    if kind == "self":
        variants.append(Variant("lightly", lightly))
    return Case(
        "contrast", f"{kind} {sizes(M=m, T=t, D=d)}", dtype, partial(field, kind, m, d, DTYPES[dtype], device),
        variants, judge, TOLERANCES[dtype], bytes=2 * vectors + 3 * 8 * (m + t),
        operations=(3 if kind == "self" else 5) * 2 * m * t * d, input_bytes=vectors, quick=quick,
    )  # fmt: skip


def cases(device: torch.device, tiny: bool = False) -> Iterator[Case]:
    if tiny:
        for kind in ("pairs", "views", "self"):
            yield case(kind, 48, 16, "fp32", device, True)
        yield case("pairs", 48, 16, "bf16", device, True)
        return
    for dtype in ("bf16", "fp16", "tf32", "fp32"):
        yield case("pairs", 65536, 256, dtype, device, dtype == "bf16")
    yield case("self", 65536, 256, "bf16", device, True)
    for dtype in ("bf16", "fp32"):
        yield case("views", 3200, 256, dtype, device, True)
        yield case("views", 48, 256, dtype, device, True)
    for m in (256, 1024, 4096, 16384, 131072, 262144):
        yield case("pairs", m, 256, "bf16", device, False)
    for d in (64, 128, 512):
        yield case("pairs", 65536, d, "bf16", device, False)
