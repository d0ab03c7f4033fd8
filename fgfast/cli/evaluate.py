"""``fgfast eval``: its arguments, and its line for each kind of score."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from fgfast.cli.finished import finished
from fgfast.cli.parse import parse, parse_settings

if TYPE_CHECKING:
    from fgfast.evaluate.protocols import Score


def evaluate_run(argv: list[str]) -> None:
    """Evaluate the encoder of a run on a labelled data set."""
    import tyro

    from fgfast.evaluate.mlp import ClassWeights
    from fgfast.evaluate.options import OPTIONS, RECIPES, Protocol, parse_options

    @dataclass
    class Args:
        protocol: Annotated[Protocol, tyro.conf.Positional]
        """With a frozen encoder: knn, linear, parts (linear, on true parts; on key points: of discovered parts), mlp,
        retrieval; training it: finetune, segmentation (of parts, from a few images with masks)."""
        run: Annotated[Path, tyro.conf.Positional]
        """Run folder."""
        data: Path
        """Labelled data set."""
        checkpoint: Literal["init", "last"] = "last"
        """Weights to use: before training (init) or after it (last)."""
        set: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
        """Override a setting of the run: name=value, such as drop=3 for srgan; may be repeated."""
        json: bool = False
        """Print the score as JSON."""
        device: str = "auto"
        """auto, cpu, cuda or cuda:N; auto uses CUDA if available."""
        recipe: str | None = None
        """linear: logistic (regression, the default), sweep (its L2 weight chosen on some of the training images), lcr
        or lodisc (SGD on views drawn anew in every epoch, as in those papers)."""
        val: float | None = None
        """linear, recipe=sweep: fraction of the training images on which the weight is chosen (default 0.2)."""
        standardise: str | None = None
        """linear, recipe=sweep: yes to standardise every feature (default no)."""
        augment: str | None = None
        """linear, recipe=lcr, lodisc: no to take one view of every image, whose features are computed once."""
        normalise: str | None = None
        """linear, recipe=lcr (default yes), lodisc (no): divide features by their norm."""
        report: str | None = None
        """linear, recipe=lcr, lodisc: epoch that is scored, last, or best on the test images (default last)."""
        maps: str | None = None
        """parts, on a set with key points and no masks: folder of id maps of its images (default: those of the run's
        clustering, with shared ids)."""
        background: int | None = None
        """parts: id of --maps that is background, such as 0 for maps of a ViT (default: only pixels without an id)."""
        stages: str | None = None
        """finetune: number of final stages (ViT: blocks) to train, 0 for none, or all (default 1)."""
        epochs: int | None = None
        """mlp: largest number of epochs (default 100); finetune (20), segmentation (200), linear (100): number of
        epochs."""
        hidden: int | None = None
        """mlp: width of the hidden layer (default 256)."""
        patience: int | None = None
        """mlp: stop after this many epochs without improvement on a held-out tenth (default 5)."""
        lr: float | None = None
        """Learning rate: of Adam in mlp (default 0.0003), finetune (0.0001), segmentation (0.00001); of SGD in linear,
        recipe=lcr (30) and lodisc (0.5 for 256 images a step)."""
        weight_decay: float | None = None
        """mlp, linear (default 0), finetune (0.0005): weight decay."""
        batch_size: int | None = None
        """mlp (default 16), finetune (32), segmentation (8), linear (256): images per step."""
        class_weights: ClassWeights | None = None
        """mlp, finetune: weight classes by their inverse frequency, or in proportion to it (default none)."""
        seed: int | None = None
        """mlp, finetune, segmentation, linear: random seed (default 0)."""
        n_labelled: int | None = None
        """segmentation: number of labelled training images, drawn at random (default 150)."""
        folds: int | None = None
        """segmentation: folds of the test images; each chooses a checkpoint for the rest (default 5)."""
        every: int | None = None
        """segmentation: epochs between two checkpoints (default 5)."""

    args = parse(Args, argv, "eval", evaluate_run.__doc__)
    from fgfast.evaluate.protocols import evaluate
    from fgfast.report.html import write_report
    from fgfast.train.distributed import choose_device

    kinds = [*OPTIONS.values(), *RECIPES.values()]
    names = ["recipe", *sorted({f.name for kind in kinds for f in dataclasses.fields(kind)})]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = parse_options(args.protocol, given, f"fgfast eval {args.protocol}")
    device = choose_device(args.device)
    score = evaluate(
        args.run, args.protocol, args.data, checkpoint=args.checkpoint, device=device, options=options,
        settings=parse_settings(args.set),
    )  # fmt: skip
    print(score.images, file=sys.stderr)
    if args.json:
        print(json.dumps(score.row()))
    else:
        print(f"{args.protocol} {describe(score, f'{args.run} ({args.checkpoint})')}")
    with finished(args.run, f"a new report: fgfast report {args.run} writes it"):
        write_report(args.run)


def describe(score: "Score", of: str) -> str:
    """A score in words, after the name of its protocol.

    Args:
        score: the score.
        of: what was scored.
    """
    more = score.more
    if "miou" in more:
        iou = ", ".join(f"{name} {value:.1%}" for name, value in more["iou"].items())
        return (
            f"mIoU of {of}: {more['miou']:.2%} (deviation {more['deviation']:.2%} over {len(more['folds'])} folds, "
            f"{score.n_train} labelled images, {more['n']} test images); {iou}"
        )
    if "nmi" in more:
        names = (("ARI", "ari"), ("key-point error", "keypoint_error"), ("box IoU", "box_iou"))
        rest = "".join(f", {name} {more[key]:.4f}" for name, key in names if more[key] is not None)
        return f"under key points: NMI of {of}: {more['nmi']:.4f}{rest} ({more['points']} points, {more['n']} images)"
    named = (("rank 5", "rank5"), ("mAP", "map"), ("top-5", "top5"))
    ranks = "".join(f", {name} {more[key]:.2%}" for name, key in named if key in more)
    chosen = f", L2 weight {more['l2']:.2g}" if "l2" in more else ""
    chosen += f", epoch {more['epoch']}" if "epoch" in more else ""
    return (
        f"{'rank 1' if 'rank5' in more else 'top-1'} of {of}: {score.top1:.2%} "
        f"(95% interval {score.low:.2%} to {score.high:.2%}, {len(score.correct)} images){ranks}{chosen}, "
        f"macro-F1 {score.macro_f1:.2%}, weighted-F1 {score.weighted_f1:.2%}"
    )
