"""``fgfast shard`` and ``fgfast data-bench``: their arguments and what they print."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from fgfast.cli.parse import parse
from fgfast.errors import UserError
from fgfast.files import check_folder, write_atomic


def shard_data(argv: list[str]) -> None:
    """Write a data set to WebDataset tar shards with an index, or index shards that are there."""
    import tyro

    @dataclass
    class Args:
        data: Annotated[Path, tyro.conf.Positional]
        """Data set: an image folder, a data set in its official layout, or shards."""
        out: Annotated[Path | None, tyro.conf.Positional] = None
        """Output folder; the same command goes on after an interruption."""
        shard_mb: float | None = None
        """Megabytes of images in a shard; by default 128, or less for at least 24 shards of each split."""
        maps: Path | None = None
        """Folder of id maps to store with the images; by default the ground-truth ones of the set."""
        workers: int | None = None
        """Threads; by default one per core, at most 8."""
        seed: int = 0
        """Seed of the order of the images."""
        index: bool = False
        """Write only an index, beside the shards in DATA that another program has written."""

    args = parse(Args, argv, "shard", shard_data.__doc__)
    from fgfast.claim import claim_folder
    from fgfast.data.base import default_threads
    from fgfast.data.imageset import describe
    from fgfast.data.layouts import open_images
    from fgfast.data.shards.scan import index_shards
    from fgfast.data.shards.write import ShardWriter

    if args.index != (args.out is None):
        raise UserError("fgfast shard writes to OUT, or with --index beside the shards in DATA: give one of the two.")
    workers = args.workers if args.workers is not None else default_threads(None)
    if workers < 1:
        raise UserError(f"--workers is {workers}: give at least 1.")
    if args.out is None:
        check_folder(args.data)
        with claim_folder(args.data):
            index_shards(args.data, workers=workers)
        print(describe(open_images(args.data)))
        return
    check_folder(args.out)
    writer = ShardWriter(
        open_images(args.data), args.out, shard_mb=args.shard_mb, maps=args.maps, workers=workers, seed=args.seed
    )
    with claim_folder(args.out):
        writer.write()
    print(describe(open_images(args.out)))


def bench_data(argv: list[str]) -> None:
    """Measure reading, decoding, augmenting and copying of images, and which of them a trainer waits for."""
    import tyro

    from fgfast.methods.base import METHODS

    @dataclass
    class Args:
        data: Annotated[Path, tyro.conf.Positional]
        """Data set: an image folder, a data set in its official layout, or shards."""
        method: str = "simclr"
        """Method whose views are made, and whose steps are timed unless --images-per-second is given."""
        images_per_second: float | None = None
        """What the trainer takes; by default that of steps of the method on one batch, on --device."""
        model: str = "resnet18"
        """Name of a timm model, for the steps of the method."""
        size: int = 64
        """Side of the training views in pixels."""
        batch_size: int = 128
        """Images per step."""
        threads: list[int] = field(default_factory=lambda: [1, 2, 4])
        """Numbers of threads, or of worker processes of the torchvision loader."""
        seconds: float = 3.0
        """Time of each measurement."""
        loader: Literal["auto", "dali", "torchvision"] = "auto"
        """Data loader; auto uses DALI if available."""
        device: str = "auto"
        """auto, cpu, cuda or cuda:N; auto uses CUDA if available."""
        csv: Path | None = None
        """Write the table to this file."""

    args = parse(Args, argv, "data-bench", bench_data.__doc__)
    for name, value in (("--images-per-second", args.images_per_second), ("--seconds", args.seconds)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} is {value:g}: give a number above 0.")
    if not args.threads or min(args.threads) < 1:
        raise UserError(f"--threads is {' '.join(map(str, args.threads)) or 'empty'}: give numbers of at least 1.")
    if args.method not in METHODS:
        raise UserError(f"There is no method {args.method!r}: choose one of {', '.join(METHODS)}.")
    from fgfast.data.bench import STAGES, measure
    from fgfast.data.imageset import describe
    from fgfast.data.layouts import open_images
    from fgfast.data.loader import choose_backend
    from fgfast.data.manifest import check_images
    from fgfast.formats import csv_text
    from fgfast.train.distributed import choose_device
    from fgfast.train.speed import new_method, step_rate

    if args.csv is not None:
        check_folder(args.csv.parent)
        if args.csv.is_dir():
            raise UserError(f"{args.csv} is a folder: give the file of the table.")
    device = choose_device(args.device)
    backend = choose_backend(args.loader)
    options = {"model": args.model, "size": args.size, "batch_size": args.batch_size, "data": str(args.data)}
    method = new_method(args.method, device, **options)
    spec = method.normalised_views()
    if spec.needs_maps:
        raise UserError(f"The views of {args.method} need id maps, which are not timed: give another --method.")
    images = open_images(args.data)
    records = check_images(images.subset(images.train))
    print(describe(images))
    needed = args.images_per_second or step_rate(method, records, backend=backend)
    of = "given" if args.images_per_second else f"{args.method}, {args.model}, {device}"
    print(
        f"{backend}, views of {args.size} px, batch {args.batch_size}; the trainer takes {needed:,.0f} images/s ({of})"
    )
    print(f"{'threads':>7} " + " ".join(f"{name:>10}" for name in STAGES) + "  trainer")
    rows = []
    for threads in args.threads:
        speeds = measure(records, spec, args.batch_size, threads, backend=backend, device=device, seconds=args.seconds)
        verdict = speeds.verdict(needed)
        print(f"{threads:>7} " + " ".join(f"{getattr(speeds, name):>10,.0f}" for name in STAGES) + f"  {verdict}")
        rows.append({**asdict(speeds), "trainer": needed, "verdict": verdict, "loader": backend})
    if args.csv is not None:
        text = csv_text(["loader", "threads", *STAGES, "trainer", "verdict"], rows)
        write_atomic(args.csv, lambda path: path.write_text(text))
