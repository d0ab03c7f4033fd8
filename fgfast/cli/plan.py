"""``fgfast plan``: the memory of a training step before a card is bought or waited for."""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from fgfast.cli.parse import parse, parse_method, pop_flag
from fgfast.config import TrainConfig, validate
from fgfast.errors import UserError
from fgfast.info import require

if TYPE_CHECKING:
    from fgfast.train.memory import Plan

CARDS = {
    "t4": 16, "v100": 32, "l4": 24, "a10": 24, "rtx3090": 24, "rtx4090": 24, "rtx5090": 32, "a6000": 48, "a40": 48,
    "l40s": 48, "a100": 80, "h100": 80, "h200": 141, "b200": 180,
}  # fmt: skip  # gigabytes by their data sheets
UNITS = {"gb": 10**9, "gib": 2**30}
MIB = 2**20


@dataclass
class Args:
    """The options of a plan that a training does not have."""

    gpus: int = 1
    """Number of GPUs, each a rank."""
    batch: int | None = None
    """Images of a step on all GPUs together; by default --batch-size on each of them."""
    card: str | None = None
    """Memory of a GPU, as 80GB, 80GiB or the name of one, such as a100: the largest batch for it is searched."""


def plan_memory(argv: list[str]) -> None:
    """Say what memory a training step takes on each GPU, and the largest batch of a card; no GPU is needed."""
    if argv[:1] in (["-h"], ["--help"]):
        usage = "Give fgfast plan METHOD, these options, and those of fgfast pretrain METHOD but --compile."
        parse(Args, argv, "plan", f"{plan_memory.__doc__} {usage}")
    own: list[str] = []
    for name in ("--gpus", "--batch", "--card"):
        value, argv = pop_flag(argv, name)
        own += [] if value is None else [name, value]
    args = parse(Args, own, "plan")
    if args.gpus < 1:
        raise UserError(f"--gpus is {args.gpus}: give at least 1.")
    if args.batch is not None and (args.batch < 1 or args.batch % args.gpus):
        raise UserError(f"--batch is {args.batch} on {args.gpus} GPUs: give a positive multiple of {args.gpus}.")
    if args.batch is not None and pop_flag(argv, "--batch-size")[0] is not None:
        raise UserError("--batch counts the images of all GPUs and --batch-size those of each: leave one of them out.")
    capacity = None if args.card is None else bytes_of(args.card)
    method, config = parse_method(argv, "plan")
    if args.batch is not None:
        config = replace(config, batch_size=args.batch // args.gpus)
    _check(config)
    require("timm")
    from fgfast.methods.base import method_class
    from fgfast.train.memory import KINDS
    from fgfast.train.plan import largest_batch, plan_step

    @cache
    def step(images: int) -> "Plan":
        return plan_step(method_class(method), replace(config, batch_size=images), args.gpus)

    n, plan = config.batch_size, step(config.batch_size)
    on_each = f" on each of {args.gpus} GPUs" if args.gpus > 1 else ""
    print(f"{method}, {config.model}, {config.size} px, {n:,} images{on_each}")
    print(f"{'MiB':<26} {'most':>12} {'at the peak':>12}")
    for kind in KINDS:
        if plan.most[kind]:
            print(f"{kind:<26} {plan.most[kind] / MIB:>12,.1f} {plan.at_peak[kind] / MIB:>12,.1f}")
    print(f"{'all, at the peak':<26} {'':>12} {plan.peak / MIB:>12,.1f}")
    if capacity is None:
        return
    least = max(2, config.micro_batch, config.accumulate)
    most = largest_batch(lambda images: step(images).peak, least, n, capacity)
    if not most:
        print(f"no batch fits {args.card}: {least} images take {step(least).peak / MIB:,.1f} MiB")
        return
    total = f", {most * args.gpus:,} in all" if args.gpus > 1 else ""
    print(f"the largest batch of {args.card}: {most:,} images{total} ({step(most).peak / MIB:,.1f} MiB)")


def bytes_of(card: str) -> int:
    """The memory of a card in bytes.

    Example:
        >>> bytes_of("80GB"), bytes_of("24 GiB"), bytes_of("H100")
        (80000000000, 25769803776, 80000000000)
    """
    name = re.sub("[ _-]", "", card.lower())
    if name in CARDS:
        return CARDS[name] * UNITS["gb"]
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(gb|gib)", name)
    if match is None or not float(match[1]):
        raise UserError(f"--card is {card!r}: give its memory, as in 80GB or 80GiB, or one of {', '.join(CARDS)}.")
    return int(float(match[1]) * UNITS[match[2]])


def _check(config: TrainConfig) -> None:
    """Raise a UserError as a training would, but for the data set and the run folder, which most plans do not need."""
    parts, classes = getattr(config, "parts", ""), getattr(config, "n_classes", None)
    if not config.data and (parts in ("truth", "keypoints") or classes == 0):
        raise UserError("The networks depend on the data set here: give it by --data DIR.")
    validate(replace(config, data=config.data or "-", out=config.out or "-"))
