"""contrastive_loss, forward and backward: pairs (M = T), two views (T = 2 M), NT-Xent ("self": query is key), losses.

Operations count the products of a row, a column and D channels that run: 1 forward and 4 backward, 2 where query is
key. An implementation that stores the logits needs 1 and 2, so it may reach 5/3 of this limit.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.common import DTYPES, TOLERANCES, compiled, generator, need_gpu, ours, peer, precision, sizes
from benchmarks.timing import Answer, Case, Judge, Run, Variant, Verdict, distance
from fgfast import DetConBLoss, Ids, NTXentLoss, SupConLoss, contrastive_loss, use_backend
from fgfast.reference import contrast as reference
from fgfast.tensors import exact

TEMPERATURE, PARTS = 0.1, 10
LOGITS = 1 << 26  # logits of the reference that are computed at a time
TF32 = TOLERANCES["tf32"]

Negatives = Literal["all", "other_images", "same_image"]


class Field(NamedTuple):
    """Query [M, D], key [T, D] (the query itself for "self"), their ids, and for the plain formula a mask [M, T]."""

    kind: str
    query: Tensor
    key: Tensor
    query_ids: Ids
    key_ids: Ids
    negatives: Negatives = "all"
    masked: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.query] if self.kind == "self" else [self.query, self.key]


def field(
    kind: str, m: int, d: int, dtype: torch.dtype, device: torch.device, seed: int, negatives: Negatives = "all"
) -> Field:
    """Rows of images of ten parts; the positive columns of a row are near it."""
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
    masked = None
    if negatives != "all":
        image, part, same_view = (q[:, None] == k for q, k in zip(query_ids, key_ids, strict=True))
        kept = image if negatives == "same_image" else ~image
        masked = ~(kept | (image & part)) | (image & part & same_view)
    return Field(kind, made.to(dtype).requires_grad_(), key, query_ids, key_ids, negatives, masked)


def gradients(loss: Tensor, f: Field) -> Answer:
    return [loss.detach(), *torch.autograd.grad(loss, f.leaves)]


def fgfast(f: Field, backend: str, precision: str) -> Answer:
    loss = contrastive_loss(
        f.query, f.key, query_ids=f.query_ids, key_ids=f.key_ids, temperature=TEMPERATURE, negatives=f.negatives,
        precision=precision, backend=backend,
    )  # fmt: skip
    return gradients(loss, f)


def plain(query: Tensor, key: Tensor, kind: str, masked: Tensor | None = None) -> Tensor:
    """Normalise, multiply, cross-entropy: what one writes by hand, with the logits in memory."""
    m, t = len(query), len(key)
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / TEMPERATURE
    row = torch.arange(m, device=query.device)
    if kind == "pairs":
        return F.cross_entropy(logits, row)
    if masked is None:
        masked = torch.arange(t, device=query.device) == (row if kind == "self" else row + m)[:, None]
    target = (row + m // 2) % m if kind == "self" else row
    return F.cross_entropy(logits.masked_fill(masked, -torch.inf), target)


def eager(f: Field, loss: Callable[..., Tensor], precision: str) -> Answer:
    with exact(f.query.device, precision):
        return gradients(loss(f.query, f.key, f.kind, f.masked), f)


def inf_cl(d: int, device: torch.device) -> Run:
    """Inf-CL: one positive per row, no masked column, products in tf32 for every dtype."""
    need_gpu(device, "inf-cl")
    loss = peer("inf_cl", "inf-cl").cal_inf_loss

    def run(f: Field) -> Answer:
        query, key = (F.normalize(x.float(), dim=1) for x in (f.query, f.key))
        return gradients(loss(query / TEMPERATURE, key, head_dim=min(d, 256)), f)

    return run


def cut_cross_entropy(device: torch.device) -> Run:
    """Apple's linear cross-entropy with the keys as classifier; half precision only."""
    need_gpu(device, "cut-cross-entropy")
    loss = peer("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy

    def run(f: Field) -> Answer:
        query, key = (F.normalize(x, dim=1) for x in (f.query, f.key))
        return gradients(loss(query / TEMPERATURE, key, torch.arange(len(query), device=query.device)), f)

    return run


def lightly() -> Run:
    loss = peer("lightly.loss", "lightly").NTXentLoss(temperature=TEMPERATURE)
    return lambda f: gradients(loss(*f.query.chunk(2)), f)


def metric_learning() -> Run:
    """It lists all pairs of rows: 6 s and gigabytes for 512 rows."""
    loss = peer("pytorch_metric_learning.losses", "pytorch-metric-learning").NTXentLoss(temperature=TEMPERATURE)
    return lambda f: gradients(loss(f.query, torch.arange(len(f.query) // 2, device=f.query.device).repeat(2)), f)


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
            temperature=TEMPERATURE, negatives=f.negatives, reduction="sum",
        )  # fmt: skip
        for grad, more in zip(grads, torch.autograd.grad(loss, leaves), strict=True):
            grad += more
        total += loss.detach()
    return [x / len(query) for x in (total, *grads)]


def judge(f: Field) -> Judge:
    right = expected(f)
    return lambda answer: Verdict(distance(answer, right), f"gradient error {distance(answer[1:], right[1:]):.2g}")


def case(
    kind: str, m: int, d: int, dtype: str, device: torch.device, *, quick: bool = False, weigh: bool = False,
    negatives: Negatives = "all",
) -> Case:  # fmt: skip
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
    if kind == "self" and 256 <= m <= 512:
        variants.append(Variant("pytorch-metric-learning", metric_learning))
    words = kind if negatives == "all" else f"{kind} {negatives}"
    return Case(
        "contrast", f"{words} {sizes(M=m, T=t, D=d)}", dtype,
        partial(field, kind, m, d, DTYPES[dtype], device, negatives=negatives),
        variants, judge, TOLERANCES[dtype], bytes=2 * vectors + 3 * 8 * (m + t),
        operations=(3 if kind == "self" else 5) * 2 * m * t * d, input_bytes=vectors, quick=quick, weigh=weigh,
        most_memory=3 * vectors + (64 << 20) if weigh else None,  # inputs twice, their gradients, 64 MiB
    )  # fmt: skip


class Arguments(NamedTuple):
    """What a loss module is called with: leaves, then ids."""

    leaves: list[Tensor]
    ids: list[Tensor]


def loss_step(loss: Callable[..., Tensor], x: Arguments) -> Answer:
    value = loss(*x.leaves, *x.ids)
    return [value.detach(), *torch.autograd.grad(value, x.leaves)]


def ntxent(out0: Tensor, out1: Tensor) -> Tensor:
    """NT-Xent as one writes it by hand, with the logits in memory."""
    x = torch.cat([F.normalize(out0, dim=1), F.normalize(out1, dim=1)])
    logits = (x @ x.T / TEMPERATURE).fill_diagonal_(-torch.inf)
    b = len(out0)
    return F.cross_entropy(logits, torch.arange(2 * b, device=x.device).add(b).remainder(2 * b))


def loss_case(name: str, shape: tuple[int, ...], device: torch.device, classes: int = 200) -> Case:
    """A module in float32 against a peer's: NT-Xent of 2 x [B, D], DetCon-B of [images, parts, D], SupCon of [B, D]."""
    leaves = {"ntxent": 2, "detcon": 4, "supcon": 1}[name]

    def make(seed: int) -> Arguments:
        g = generator(device, seed)
        made = [torch.randn(shape, device=device, generator=g).requires_grad_() for _ in range(leaves)]
        if name == "ntxent":
            return Arguments(made, [])
        if name == "supcon":
            return Arguments(made, [torch.randint(classes, shape[:1], device=device, generator=g)])
        drawn = [torch.rand(shape[0], shape[1] + 5, device=device, generator=g).argsort(1) for _ in range(2)]
        return Arguments(made, [ids[:, : shape[1]] for ids in drawn])

    def judge(x: Arguments) -> Judge:
        doubles = Arguments([leaf.detach().double().requires_grad_() for leaf in x.leaves], x.ids)
        with use_backend("reference"):
            right = loss_step(own, doubles)
        return lambda answer: Verdict(distance(answer, right))

    own = {"ntxent": NTXentLoss, "detcon": DetConBLoss, "supcon": SupConLoss}[name](temperature=TEMPERATURE)
    package = "pytorch-metric-learning" if name == "supcon" else "lightly"
    module = "pytorch_metric_learning.losses" if name == "supcon" else "lightly.loss"
    theirs = partial(peer, module, package)
    variants = [
        Variant(f"fgfast {ours(device)}", lambda: partial(loss_step, own)),
        Variant(package, lambda: partial(loss_step, getattr(theirs(), type(own).__name__)(temperature=TEMPERATURE))),
    ]
    if name == "ntxent":
        variants.append(Variant("eager", lambda: partial(loss_step, ntxent)))
    words = sizes(**dict(zip(("B", "K", "D") if name == "detcon" else ("B", "D"), shape, strict=True)))
    return Case(
        "contrast", f"{name} {words}", "fp32", make, variants, judge, TOLERANCES["fp32"],
        input_bytes=leaves * 4 * math.prod(shape),
    )  # fmt: skip


def small_losses(device: torch.device) -> Iterator[Case]:
    """The modules at the sizes of one CPU or GPU batch, where overhead counts: for ``benchmarks.losses``."""
    for d in (128, 512):
        for views in (16, 48, 64, 128, 256, 512, 1024, 2048):
            yield loss_case("ntxent", (views // 2, d), device)
    for b in (64, 128, 256, 512, 1024, 2048):
        yield loss_case("supcon", (b, 128), device, classes=min(b // 8, 200))
    for images, parts in ((2, 24), (8, 16), (32, 10)):
        yield loss_case("detcon", (images, parts, 256), device)


def losses(device: torch.device) -> Iterator[Case]:
    """The modules, at the smallest size and at PARTICLE's own."""
    yield loss_case("detcon", (2, 24, 256), device)
    yield loss_case("detcon", (320, 10, 256), device)
    yield loss_case("supcon", (4096, 128), device)


def batch_sizes(device: torch.device) -> Iterator[Case]:
    """NT-Xent over batch sizes, for the plot of the README."""
    for batch in (256, 512, 1024, 2048, 4096, 8192):
        yield case("self", 2 * batch, 128, "fp32", device, weigh=True)


def cases(device: torch.device, tiny: bool = False) -> Iterator[Case]:
    if tiny:
        for kind in ("pairs", "views", "self"):
            yield case(kind, 48, 16, "fp32", device)
        yield case("views", 48, 16, "fp32", device, negatives="other_images")
        yield case("pairs", 48, 16, "bf16", device)
        yield loss_case("detcon", (2, 5, 8), device)
    elif device.type == "cpu":
        for m, d in ((48, 128), (512, 128), (1024, 128), (8192, 128), (4096, 512)):
            yield case("self", m, d, "fp32", device, weigh=m == 8192)
        for negatives in ("all", "other_images", "same_image"):
            yield case("views", 3200, 256, "fp32", device, negatives=negatives)
        yield from losses(device)
    else:
        for dtype in ("bf16", "fp16", "tf32", "fp32"):
            yield case("pairs", 65536, 256, dtype, device, quick=dtype == "bf16")
        yield case("self", 65536, 256, "bf16", device, quick=True)
        for dtype in ("bf16", "fp32"):
            yield case("views", 3200, 256, dtype, device, quick=True)
            yield case("views", 48, 256, dtype, device, quick=True)
        for m in (256, 1024, 4096, 16384, 131072, 262144):
            yield case("pairs", m, 256, "bf16", device)
        for d in (64, 128, 512):
            yield case("pairs", 65536, d, "bf16", device)
        yield from losses(device)
