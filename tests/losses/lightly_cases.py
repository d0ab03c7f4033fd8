"""The losses beside lightly's: each documented argument, its edges, and where ours differ on purpose."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.peers import Case, Comparison
from fgfast import losses
from tests.losses.peers import Cases, lightly, randint, randn

HALF = "Half precision is computed and returned in float32."
TEMPERATURE = "A temperature below 0 is refused."
ABSENT = "Region id -1 is absent."
ALONE = "A single row, which has no neighbour, gives 0."
TEACHER = "The teacher gets no gradient."


def plain(loss: nn.Module, *x: Tensor) -> Tensor:
    """The loss itself."""
    return loss(*x)


def ntxent() -> list[Case]:
    """NTXentLoss."""
    cases = Cases(losses.NTXentLoss, lightly.NTXentLoss)
    x, y = randn(0, 12, 16), randn(1, 12, 16)
    for b in (1, 2, 24, 200):  # no negative, one negative pair, usual, tiles
        cases.add(f"out0 of {b} images", plain, randn(0, b, 16), randn(1, b, 16))
    cases.add("out1 transposed in memory", lambda loss, a, b: loss(a.T, b.T), randn(0, 16, 12), randn(1, 16, 12))
    cases.add("out1 is out0", lambda loss, a: loss(a, a), x)
    cases.add("out1 of another length", plain, x, y[:5], refused=True)
    cases.add("out0 in float16", plain, x.half(), y.half(), difference=HALF)
    for t in (0.02, 0.1, 7.0):
        cases.add(f"temperature {t}", plain, x, y, temperature=t)
    cases.add("temperature 0", plain, x, y, temperature=0.0, refused=True)
    cases.add("temperature below 0", plain, x, y, temperature=-1.0, difference=TEMPERATURE, refused=True)
    cases.add("gather_distributed in one process", plain, x, y, gather_distributed=True)

    def batches(loss: nn.Module, *x: Tensor) -> tuple[Tensor, ...]:
        """The sum over batches, then one without gradient, which leaves the bank as it is."""
        total = sum(loss(a, b) for a, b in zip(x[::2], x[1::2], strict=True))
        total = total + loss(x[0].detach(), x[1].detach())
        return total, loss.memory_bank.bank, loss.memory_bank.bank_ptr

    queue = [randn(i, 8, 16) for i in range(10)]
    for size in ((20, 16), (16, 16), (5, 16), (40, 16), (0, 16)):  # (20, 16): not a number of full batches
        cases.add(f"memory_bank_size {size}", batches, *queue, memory_bank_size=size)
    cases.add("memory_bank_size 0", plain, x, y, memory_bank_size=0)
    for size in ((8, 5), 5, -1, (3,)):
        cases.add(f"memory_bank_size {size}", batches, *queue, memory_bank_size=size, refused=True)
    cases.add("gather_distributed with a bank", batches, *queue, memory_bank_size=(20, 16), gather_distributed=True)
    return cases.all


def detcon_b() -> list[Case]:
    """DetConBLoss."""
    cases = Cases(losses.DetConBLoss, lightly.DetConBLoss)

    def given(masks: list[Tensor]) -> Callable[..., Tensor]:
        return lambda loss, *x: loss(*x, *masks)

    for b, m, ids in ((4, 5, 3), (3, 6, 20), (1, 1, 1), (40, 8, 4)):  # repeats, most without a partner, one, tiles
        x = [randn(i, b, m, 7) for i in range(4)]
        masks = [randint(i, ids, b, m) for i in range(2)]
        cases.add(f"pred_view0 [{b}, {m}], {ids} ids", given(masks), *x)
    x, masks = [randn(i, 4, 5, 7) for i in range(4)], [randint(i, 6, 4, 5) for i in range(2)]
    cases.add("pred_view1 is a target", lambda loss, a, b, c: loss(a, b, c, b, *masks), *x[:3])
    cases.add("target_view0 of other shape", given(masks), *x[:2], x[2][:, :2], x[3], refused=True)
    cases.add("target_view1 in float16", given(masks), *(v.half() for v in x), difference=HALF)
    cases.add("mask_view0 of int32 and large ids", given([(v * 1000).int() for v in masks]), *x)
    cases.add("mask_view1 with id -1", given([masks[0], masks[1] - 1]), *x, difference=ABSENT)
    for t in (0.05, 1.0):
        cases.add(f"temperature {t}", given(masks), *x, temperature=t)
    cases.add("temperature 0", given(masks), *x, temperature=0.0, refused=True)
    cases.add("gather_distributed is False", given(masks), *x, gather_distributed=False)
    return cases.all


def detcon_s() -> list[Case]:
    """DetConSLoss."""
    cases = Cases(losses.DetConSLoss, lightly.DetConSLoss)
    masks = [randint(i, 6, 4, 5) for i in range(2)]

    def masked(loss: nn.Module, *x: Tensor) -> Tensor:
        return loss(*x, *masks)

    x = [randn(i, 4, 5, 7) for i in range(2)]
    cases.add("view0 and the defaults", masked, *x)
    cases.add("view1 is view0", lambda loss, a: loss(a, a, *masks), x[0])
    cases.add("mask_view0 is mask_view1", lambda loss, *x: loss(*x, masks[0], masks[0]), *x)
    cases.add("mask_view1 without a partner", lambda loss, *x: loss(*x, masks[0], masks[1] + 9), *x)
    cases.add("temperature 0.3", masked, *x, temperature=0.3)
    cases.add("gather_distributed is False", masked, *x, gather_distributed=False)
    return cases.all


def dino() -> list[Case]:
    """DINOLoss."""
    cases = Cases(losses.DINOLoss, lightly.DINOLoss)
    teacher, student = [randn(i, 5, 12) for i in range(2)], [randn(i + 9, 5, 12) for i in range(4)]

    def steps(loss: nn.Module, *student: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        """The sum over three steps, and the centre that they leave."""
        outputs = list(student)
        return sum(loss([i * t for t in teacher], outputs, **options) for i in (1, 2, 3)), loss.center

    cases.add("output_dim and the defaults", steps, *student, output_dim=12)
    cases.add("output_dim of another size", steps, *student, output_dim=9, refused=True)
    for views in ((2, 2), (1, 3), (3, 1), (2, 1), (1, 1)):
        n_teacher, n_student = views
        cases.add(
            f"student_out of {n_student} views, {n_teacher} of the teacher",
            lambda loss, *s, n=n_teacher: loss([randn(i, 5, 12) for i in range(n)], list(s)),
            *student[:n_student],
            output_dim=12,
            refused=views == (1, 1),
        )
    cases.add(
        "teacher_out with a gradient",
        lambda loss, *x: loss(list(x[:2]), list(x[2:])),
        *teacher,
        *student,
        output_dim=12,
        difference=TEACHER,
    )
    cases.add("teacher_temp in the call", lambda loss, *s: steps(loss, *s, teacher_temp=0.5), *student, output_dim=12)
    cases.add("teacher_temp of the loss", steps, *student, output_dim=12, teacher_temp=0.07)
    warm = {"output_dim": 12, "warmup_teacher_temp": 0.03, "teacher_temp": 0.06, "warmup_teacher_temp_epochs": 4}
    for epoch in (0, 1, 3, 4, 9, None):
        cases.add(f"epoch {epoch}", lambda loss, *s, epoch=epoch: steps(loss, *s, epoch=epoch), *student, **warm)
    at_two = lambda loss, *s: steps(loss, *s, epoch=2)  # noqa: E731
    cases.add("warmup_teacher_temp above teacher_temp", at_two, *student, **{**warm, "warmup_teacher_temp": 0.2})
    cases.add("warmup_teacher_temp_epochs 0", at_two, *student, **{**warm, "warmup_teacher_temp_epochs": 0})
    cases.add("student_temp 0.3", steps, *student, output_dim=12, student_temp=0.3)
    cases.add("center_momentum 0", steps, *student, output_dim=12, center_momentum=0.0)
    cases.add("center_mode median", steps, *student, output_dim=12, center_mode="median", refused=True)
    return cases.all


def koleo() -> list[Case]:
    """KoLeoLoss."""
    cases = Cases(losses.KoLeoLoss, lightly.KoLeoLoss)
    x = randn(0, 9, 6)
    for b, d in ((2, 6), (9, 1), (200, 16)):  # one pair, many equal rows, usual
        cases.add(f"x [{b}, {d}]", plain, randn(0, b, d))
    cases.add("x of two equal rows", plain, torch.cat([x, x[:2]]))
    cases.add("x with a row of zeros", plain, torch.cat([x, x[:1] * 0]))
    cases.add("x of one row", plain, x[:1], difference=ALONE)
    cases.add("x in float16", plain, x.half(), difference=HALF)
    cases.add("x [B]", plain, x[0], refused=True)
    for p in (1, 2, 3.5):
        cases.add(f"p {p}", plain, x, p=p)
    for eps in (1e-4, 0.1):
        cases.add(f"eps {eps}", plain, x, eps=eps)
    return cases.all


def comparisons() -> list[Comparison]:
    """The classes of lightly."""
    found = (
        ("NTXentLoss", ntxent),
        ("DetConBLoss", detcon_b),
        ("DetConSLoss", detcon_s),
        ("DINOLoss", dino),
        ("KoLeoLoss", koleo),
    )
    return [Comparison(name, "lightly", cases()) for name, cases in found]
