"""The commands of ``fgfast``: the arguments of each and the function that it calls."""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from fgfast.cli.data import bench_data, shard_data
from fgfast.cli.embed import embed
from fgfast.cli.evaluate import evaluate_run
from fgfast.cli.export import export_encoder
from fgfast.cli.finished import finished
from fgfast.cli.parse import parse, parse_method, parse_settings
from fgfast.cli.parts import discover_parts, draw_pictures
from fgfast.cli.plan import plan_memory
from fgfast.cli.settings import settings_text
from fgfast.config import read_toml
from fgfast.errors import UserError
from fgfast.files import check_folder


def _generate(argv: list[str]) -> None:
    """Draw the synthetic data set: birds whose classes differ only in their parts."""
    import tyro

    @dataclass
    class Args:
        out: Annotated[Path, tyro.conf.Positional]
        """Output folder."""
        classes: int = 20
        """Number of classes."""
        images: int = 2000
        """Number of images; half of each class is for training."""
        size: int = 128
        """Side of the square images in pixels."""
        seed: int = 0
        """Random seed; the same settings and seed give the same files, byte for byte."""
        difficulty: float = 0.5
        """Similarity of the classes, from 0 (easy) to 1 (hard)."""
        nuisance: float = 1.0
        """Variation of pose, light and background, from 0 (none) to 3."""
        workers: int | None = None
        """Worker processes; by default 1, or one per core (at most 8) for more than 2,000 images of 128 pixels."""
        force: bool = False
        """Replace an existing synthetic set in the output folder."""

    from fgfast.data.synthetic import generate

    args = dataclasses.asdict(parse(Args, argv, "generate", _generate.__doc__))
    print(generate(args.pop("out"), **args))


def _pretrain(argv: list[str]) -> None:
    """Train an encoder with one of the methods and write a run folder."""
    name, config = parse_method([word for word in argv if word != "--show-config"])
    if "--show-config" in argv:
        print(settings_text(name, config), end="")
        return
    from fgfast.methods.run_folder import Checkpoint
    from fgfast.report.draw import draw_run
    from fgfast.report.html import write_report
    from fgfast.run import has_checkpoint
    from fgfast.train.distributed import choose_device, is_first, will_be_first
    from fgfast.train.loop import pretrain

    first = will_be_first()
    if first and config.resume and config.out and not has_checkpoint(Path(config.out)):
        print(f"{config.out} has no checkpoint to resume from: training starts from the beginning.", file=sys.stderr)

    if first and config.out:
        check_folder(Path(config.out))
    run = pretrain(name, config)
    if is_first():
        with finished(run, f"its figures: fgfast pictures {run} --data {config.data} draws them"):
            for checkpoint in get_args(Checkpoint):
                draw_run(run, Path(config.data), checkpoint=checkpoint, device=choose_device(config.device))
        with finished(run, f"its report: fgfast report {run} writes it"):
            print(write_report(run))


def _upscale(argv: list[str]) -> None:
    """Enlarge images four times with the generator of an srgan run."""
    import tyro

    @dataclass
    class Args:
        run: Annotated[Path, tyro.conf.Positional]
        """Run folder."""
        images: Annotated[list[Path], tyro.conf.Positional]
        """Image files of any size."""
        out: Path
        """Output folder; each image becomes NAME.png."""
        checkpoint: Literal["init", "last"] = "last"
        """Weights to use: before training (init) or after it (last)."""
        device: str = "auto"
        """auto, cpu, cuda or cuda:N; auto uses CUDA if available."""

    args = parse(Args, argv, "upscale", _upscale.__doc__)
    from fgfast.train.distributed import choose_device
    from fgfast.upscale import upscale

    if not args.images:
        raise UserError("fgfast upscale needs images: name them after the run.")
    check_folder(args.out)
    for path in upscale(args.run, args.images, args.out, checkpoint=args.checkpoint, device=choose_device(args.device)):
        print(path)


def _compare(argv: list[str]) -> None:
    """Train and score methods x data sets x seeds; resumable, with one row of compare.csv per finished run."""
    import tyro

    @dataclass
    class Args:
        out: Path
        """Output folder of the comparison."""
        data: list[Path]
        """Data sets: image folders, or data sets in their official layout."""
        methods: list[str]
        """Methods with settings, as in simclr particle:parts=truth,lr=0.002; also random (weights), start (init)."""
        seeds: list[int] = field(default_factory=lambda: [0])
        """Random seeds; each is one run per method and data set."""
        config: Path | None = None
        """TOML file of settings for all runs."""
        lrs: list[float] = field(default_factory=list)
        """Learning rates to choose from for each method, by linear top-1 on 20% of the training split, held out."""
        tune_share: float = 0.3
        """Length of a tuning run as a fraction of the budget, 0 to 1."""
        baseline: str = ""
        """Method that the others are compared with, paired by image; by default the first."""
        protocols: list[str] = field(default_factory=lambda: ["linear", "knn"])
        """Evaluation protocols, such as linear,knn,mlp,retrieval,finetune:stages=all,epochs=5."""
        set: Annotated[list[str], tyro.conf.UseAppendAction] = field(default_factory=list)
        """Set an option of all runs: name=value; may be repeated."""

    args = parse(Args, argv, "compare", _compare.__doc__)
    from fgfast.compare import Comparison

    shared = (read_toml(args.config) if args.config else {}) | parse_settings(args.set)
    comparison = Comparison(
        out=args.out, data=args.data, methods=args.methods, seeds=args.seeds, shared=shared, lrs=args.lrs,
        tune_share=args.tune_share, baseline=args.baseline or next(iter(args.methods), ""), protocols=args.protocols,
    )  # fmt: skip
    comparison.run()
    print(comparison.table())


def _report(argv: list[str]) -> None:
    """Write report.html of a run folder again from its files."""
    import tyro

    @dataclass
    class Args:
        run: Annotated[Path, tyro.conf.Positional]
        """Run folder."""

    args = parse(Args, argv, "report", _report.__doc__)
    from fgfast.methods.run_folder import read_run
    from fgfast.report.html import write_report

    read_run(args.run)
    check_folder(args.run)
    print(write_report(args.run))


def _demo(argv: list[str]) -> None:
    """A complete run in minutes: draw a synthetic set, train PARTICLE, score before and after, write a report."""

    @dataclass
    class Args:
        out: Path = Path("runs/demo")
        """Output folder."""
        minutes: float = 5.0
        """Approximate training time on 2 CPU cores, in minutes."""
        device: str = "auto"
        """auto, cpu, cuda or cuda:N; auto uses CUDA if available."""

    from fgfast.demo import demo

    demo(**dataclasses.asdict(parse(Args, argv, "demo", _demo.__doc__)))


def _info(argv: list[str]) -> None:
    """Print versions, devices and backends, with the reason why a backend is missing."""

    @dataclass
    class Args:
        json: bool = False
        """Print as JSON."""

    from fgfast.info import as_text, info

    args = parse(Args, argv, "info", _info.__doc__)
    print(json.dumps(info(), indent=2) if args.json else as_text(info()))


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "generate": _generate, "shard": shard_data, "data-bench": bench_data, "pretrain": _pretrain, "plan": plan_memory,
    "discover": discover_parts, "pictures": draw_pictures, "embed": embed, "eval": evaluate_run, "upscale": _upscale,
    "compare": _compare, "report": _report, "export": export_encoder, "demo": _demo, "info": _info,
}  # fmt: skip
