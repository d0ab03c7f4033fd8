"""``fgfast eval``: its arguments, and its line for each kind of score."""

import dataclasses
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fgfast.cli.finished import finished
from fgfast.cli.network import NetworkArgs
from fgfast.cli.parse import parse, parse_settings
from fgfast.errors import UserError

if TYPE_CHECKING:
    from fgfast.evaluate.protocols import Score


def evaluate_run(argv: list[str]) -> None:
    """Evaluate the encoder of a run, or a network without one, on a labelled data set."""
    import tyro

    from fgfast.evaluate.mlp import ClassWeights
    from fgfast.evaluate.options import OPTIONS, RECIPES, Protocol, parse_options

    @dataclass(kw_only=True)
    class Args(NetworkArgs):
        protocol: Annotated[Protocol, tyro.conf.Positional]
        """Frozen encoder: knn, linear, mlp, retrieval, parts (true or, on key points, discovered); else trained."""
        run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
        """Run folder, to whose eval.json the score is added; or no run: give --model and --init."""
        data: Path
        """Labelled data set."""
        out: Path | None = None
        """Without a run: folder to whose eval.json the score is added; by default it is only printed."""
        set: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
        """Override a setting of the run: name=value, such as drop=3 for srgan; may be repeated."""
        json: bool = False
        """Print the score as JSON."""
        recipe: str | None = None
        """linear: logistic (default), sweep (L2 weight chosen on training images), lcr or lodisc (SGD, new views)."""
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
        """parts, on key points without masks: folder of id maps (default: the run's clustering, with shared ids)."""
        background: int | None = None
        """parts: id of --maps that is background, such as 0 for maps of a ViT (default: only pixels without an id)."""
        stages: str | None = None
        """finetune: number of final stages (ViT: blocks) to train, 0 for none, or all (default 1)."""
        epochs: int | None = None
        """Number of epochs: mlp (at most; default 100), finetune (20), segmentation (200), linear (100)."""
        hidden: int | None = None
        """mlp: width of the hidden layer (default 256)."""
        patience: int | None = None
        """mlp: stop after this many epochs without improvement on a held-out tenth (default 5)."""
        lr: float | None = None
        """Learning rate: mlp (default 0.0003), finetune (1e-4), segmentation (1e-5), recipe=lcr (30), lodisc (0.5)."""
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
    args.check(args.run)
    from fgfast.evaluate.protocols import evaluate_encoder
    from fgfast.evaluate.scores import read_scores
    from fgfast.report.confused import draw_confused
    from fgfast.report.html import write_report

    kinds = [*OPTIONS.values(), *RECIPES.values()]
    names = ["recipe", *sorted({f.name for kind in kinds for f in dataclasses.fields(kind)})]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = parse_options(args.protocol, given, f"fgfast eval {args.protocol}")
    if args.run is not None and args.out is not None:
        raise UserError(f"The scores of a run are stored in its folder {args.run}: leave out --out.")
    settings = parse_settings(args.set)
    with tempfile.TemporaryDirectory() as scratch:
        out = args.run or args.out or Path(scratch)
        read_scores(out)  # a damaged file is refused before the work
        network = args.load(args.run, settings)
        score = evaluate_encoder(
            network.encoder, network.config, args.protocol, args.data, out, checkpoint=network.checkpoint,
            network="" if args.run else network.name, options=options, settings=settings,
        )  # fmt: skip
    print(score.images, file=sys.stderr)
    if args.json:
        print(json.dumps(score.row()))
    else:
        print(f"{args.protocol} {describe(score, network.name)}")
    if args.run is not None:
        with finished(args.run, "the figure of its confused classes"):
            draw_confused(args.run, args.data, score.row())
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
