"""The commands of ``fgfast``: what each takes, and what it calls."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from fgfast.cli.parse import pairs, parse, parse_method
from fgfast.config import read_toml
from fgfast.errors import UserError

MAPS_FILES = ("maps.json", "begun.json")  # one of which a folder of id maps has


def _generate(words: list[str]) -> None:
    """Draw the synthetic set: birds whose classes differ in parts alone."""
    import tyro

    @dataclass
    class Args:
        out: Annotated[Path, tyro.conf.Positional]
        """Folder that is written."""
        classes: int = 20
        """Number of classes."""
        images: int = 2000
        """Number of images, half of each class for training."""
        size: int = 128
        """Side of the images, pixels."""
        seed: int = 0
        """Seed; the same bytes for a seed."""
        difficulty: float = 0.5
        """How alike the classes are, 0 to 1."""
        nuisance: float = 1.0
        """How much pose, light and background vary, 0 to 3, usually 1."""
        workers: int | None = None
        """Processes; all cores by default."""
        force: bool = False
        """Replace a synthetic set that is in the folder."""

    from fgfast.data.synthetic import generate

    args = dataclasses.asdict(parse(Args, words, "generate"))
    print(generate(args.pop("out"), **args))


def _pretrain(words: list[str]) -> None:
    """Train a method on images without labels and write a run folder."""
    name, config = parse_method(words)
    from fgfast.report.draw import draw_run
    from fgfast.report.html import write_report
    from fgfast.train.distributed import choose_device, is_first
    from fgfast.train.loop import pretrain

    first = os.environ.get("RANK", "0") == "0"  # as torchrun says, before the ranks have met
    if first and config.resume and config.out and not (Path(config.out) / "last.pt").is_file():
        print(f"{config.out} holds no checkpoint to go on from: the run begins anew.", file=sys.stderr)

    run = pretrain(name, config)
    if is_first():
        draw_run(run, Path(config.data), device=choose_device(config.device))
        print(write_report(run))


def _discover(words: list[str]) -> None:
    """Cluster the pixels of every image with a run's encoder and write id maps."""
    import tyro

    @dataclass
    class Args:
        run: Annotated[Path, tyro.conf.Positional]
        """Run folder."""
        data: Path
        """Folder of the images."""
        out: Path
        """Folder of maps that is written."""
        checkpoint: Literal["init", "last"] = "last"
        """Which weights."""
        n_parts: int | None = None
        """Clusters an image; by default the run's setting, or 15."""
        levels: int | None = None
        """Last maps that the hypercolumns take; by default the run's setting, or 4."""
        metric: Literal["euclidean", "cosine"] | None = None
        """Distance of pixels (CNN); by default the run's setting, or euclidean."""
        border: float | None = None
        """Clusters touching the border by more than border x sqrt(area) are background; by default as the run, or 0."""
        position: float | None = None
        """Variance of the coordinates that join the features (CNN), in their units; by default as the run, or 0."""
        image_size: int = 0
        """Side to which the whole image is squashed; 0 is twice the training size."""
        map_size: int = 64
        """Side of the id maps."""
        device: str = "auto"
        """auto, cpu, cuda."""

    args = parse(Args, words, "discover")
    from fgfast.config import check_ranges
    from fgfast.data.layouts import open_images
    from fgfast.methods.particle import PARTICLEConfig
    from fgfast.methods.stored import load_encoder_of
    from fgfast.parts.clustering import ClusteringConfig
    from fgfast.parts.discover import discover
    from fgfast.train.distributed import choose_device

    given = {name: value for name, value in vars(args).items() if hasattr(PARTICLEConfig, name) and value is not None}
    check_ranges(PARTICLEConfig(**given))
    if args.image_size < 0:
        raise UserError(f"--image-size is {args.image_size}: give at least 0.")
    if args.out.is_dir() and any(args.out.iterdir()) and not any((args.out / f).is_file() for f in MAPS_FILES):
        raise UserError(f"{args.out} holds other files: give another --out.")
    device = choose_device(args.device)
    encoder, config = load_encoder_of(args.run, args.checkpoint, device)
    images = open_images(args.data)
    names = [f.name for f in dataclasses.fields(ClusteringConfig)]
    own = {name: getattr(config, name) for name in names if hasattr(config, name)}
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    clustering = ClusteringConfig(**own | given)
    print(
        discover(
            encoder, images, args.out, clustering, image_size=args.image_size or 2 * config.size,
            map_size=args.map_size, run=f"{args.run.name}, {args.checkpoint}", device=device, threads=config.threads,
        )
    )  # fmt: skip


def _eval(words: list[str]) -> None:
    """Score the encoder of a run with labels: knn, linear, parts, mlp, finetune, retrieval."""
    import tyro

    from fgfast.evaluate.mlp import ClassWeights

    @dataclass
    class Args:
        protocol: Annotated[Literal["knn", "linear", "parts", "mlp", "finetune", "retrieval"], tyro.conf.Positional]
        """On frozen features: knn, linear, parts (linear, of each true part), mlp, retrieval. With them: finetune."""
        run: Annotated[Path, tyro.conf.Positional]
        """Run folder."""
        data: Path
        """A labelled set."""
        checkpoint: Literal["init", "last"] = "last"
        """Which weights."""
        set: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
        """A setting in place of the run's, name=value, such as drop=3 of srgan; may be repeated."""
        json: bool = False
        """Print JSON."""
        device: str = "auto"
        """auto, cpu, cuda."""
        stages: str | None = None
        """finetune: how many of the last stages (blocks of a ViT) are trained, 0 for none, or all (default 1)."""
        epochs: int | None = None
        """mlp: epochs at most (100); finetune: epochs (20)."""
        hidden: int | None = None
        """mlp: width of the hidden layer (256)."""
        patience: int | None = None
        """mlp: epochs without gain on a held-out tenth after which training ends (5)."""
        lr: float | None = None
        """mlp (0.0003), finetune (0.0001): learning rate of Adam."""
        weight_decay: float | None = None
        """mlp (0), finetune (0.0005): weight decay of Adam."""
        batch_size: int | None = None
        """mlp (16), finetune (32): images a step."""
        class_weights: ClassWeights | None = None
        """mlp, finetune: weight classes inverse to their frequency, or proportional to it (default none)."""
        seed: int | None = None
        """mlp, finetune: seed (0)."""

    args = parse(Args, words, "eval")
    from fgfast.evaluate.protocols import OPTIONS, evaluate, parse_options
    from fgfast.report.html import write_report
    from fgfast.train.distributed import choose_device

    names = sorted({f.name for kind in OPTIONS.values() for f in dataclasses.fields(kind)})
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = parse_options(args.protocol, given, f"fgfast eval {args.protocol}")
    device = choose_device(args.device)
    score = evaluate(
        args.run, args.protocol, args.data, checkpoint=args.checkpoint, device=device, options=options,
        settings=pairs(args.set),
    )  # fmt: skip
    write_report(args.run)
    if args.json:
        print(json.dumps(score.row()))
    else:
        more = "".join(
            f", {name} {score.more[key]:.2%}"
            for name, key in (("rank 5", "rank5"), ("mAP", "map"))
            if key in score.more
        )
        print(
            f"{args.protocol} {'rank 1' if more else 'top-1'} of {args.run} ({args.checkpoint}): {score.top1:.2%} "
            f"(95% interval {score.low:.2%} to {score.high:.2%}, {len(score.correct)} images){more}, "
            f"macro-F1 {score.macro_f1:.2%}, weighted-F1 {score.weighted_f1:.2%}"
        )


def _pictures(words: list[str]) -> None:
    """Draw what a run's method sees: parts over photographs, its views, nearest neighbours."""
    import tyro

    @dataclass
    class Args:
        run: Annotated[Path, tyro.conf.Positional]
        """Run folder."""
        data: Path
        """Folder of the images."""
        checkpoint: Literal["init", "last"] = "last"
        """Which weights."""
        device: str = "auto"
        """auto, cpu, cuda."""

    args = parse(Args, words, "pictures")
    from fgfast.report.draw import draw_run
    from fgfast.report.html import write_report
    from fgfast.train.distributed import choose_device

    for path in draw_run(args.run, args.data, checkpoint=args.checkpoint, device=choose_device(args.device)):
        print(path)
    print(write_report(args.run))


def _upscale(words: list[str]) -> None:
    """Enlarge images by four with the generator of an srgan run."""
    import tyro

    @dataclass
    class Args:
        run: Annotated[Path, tyro.conf.Positional]
        """Run folder."""
        images: Annotated[list[Path], tyro.conf.Positional]
        """Images of any size."""
        out: Path
        """Folder that is written, NAME.png for each image."""
        checkpoint: Literal["init", "last"] = "last"
        """Which weights."""
        device: str = "auto"
        """auto, cpu, cuda."""

    args = parse(Args, words, "upscale")
    from fgfast.train.distributed import choose_device
    from fgfast.upscale import upscale

    if not args.images:
        raise UserError("fgfast upscale needs images: name them after the run.")
    for path in upscale(args.run, args.images, args.out, checkpoint=args.checkpoint, device=choose_device(args.device)):
        print(path)


def _compare(words: list[str]) -> None:
    """Run methods x data x seeds, resumable, one row of compare.csv for each finished run."""
    import tyro

    @dataclass
    class Args:
        out: Path
        """Folder of the comparison."""
        data: list[Path]
        """Data sets."""
        methods: list[str]
        """Methods with their settings, such as simclr particle:parts=truth,lr=0.002 random supervised."""
        seeds: list[int] = field(default_factory=lambda: [0])
        """Seeds."""
        config: Path | None = None
        """TOML of settings that all runs share."""
        lrs: list[float] = field(default_factory=list)
        """Learning rates among which each method's is chosen, on 20% of the training split, with the first seed."""
        tune_share: float = 0.3
        """Share of the budget that a tuning run takes."""
        baseline: str = ""
        """Method that the others are compared with in pairs; the first by default."""
        protocols: list[str] = field(default_factory=lambda: ["linear", "knn"])
        """How runs are scored, such as linear,knn,mlp,retrieval,finetune:stages=all,epochs=5."""
        set: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
        """A setting that all runs share, name=value; may be repeated."""

    args = parse(Args, words, "compare")
    from fgfast.compare import Comparison

    shared = (read_toml(args.config) if args.config else {}) | pairs(args.set)
    comparison = Comparison(
        out=args.out, data=args.data, methods=args.methods, seeds=args.seeds, shared=shared, lrs=args.lrs,
        tune_share=args.tune_share, baseline=args.baseline or args.methods[0], protocols=args.protocols,
    )  # fmt: skip
    comparison.run()
    print(comparison.table())


def _report(words: list[str]) -> None:
    """Write report.html of a run folder anew."""
    import tyro

    @dataclass
    class Args:
        run: Annotated[Path, tyro.conf.Positional]
        """Run folder."""

    args = parse(Args, words, "report")
    from fgfast.methods.stored import read_run
    from fgfast.report.html import write_report

    read_run(args.run)
    print(write_report(args.run))


def _demo(words: list[str]) -> None:
    """The main job in minutes: draw the set, train PARTICLE, score before and after, report."""

    @dataclass
    class Args:
        out: Path = Path("runs/demo")
        """Folder that is written."""
        minutes: float = 5.0
        """About how long to train on 2 CPU cores."""
        device: str = "auto"
        """auto, cpu, cuda."""

    from fgfast.demo import demo

    demo(**dataclasses.asdict(parse(Args, words, "demo")))


def _info(words: list[str]) -> None:
    """Versions, devices, backends, and why one is missing."""

    @dataclass
    class Args:
        json: bool = False
        """Print JSON."""

    from fgfast.info import as_text, info

    args = parse(Args, words, "info")
    print(json.dumps(info(), indent=2) if args.json else as_text(info()))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "generate": _generate, "pretrain": _pretrain, "discover": _discover, "pictures": _pictures, "eval": _eval,
    "upscale": _upscale, "compare": _compare, "report": _report, "demo": _demo, "info": _info,
}  # fmt: skip
