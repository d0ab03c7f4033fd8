"""``fgfast discover`` and ``fgfast pictures``: their arguments, for a run or a network without one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fgfast.cli.network import DiscoveryArgs, Network, NetworkArgs, files_in
from fgfast.cli.parse import parse
from fgfast.errors import UserError
from fgfast.files import check_folder


def discover_parts(argv: list[str]) -> None:
    """Discover parts: cluster the pixels of every image by the features of a network and write id maps."""
    import tyro

    @dataclass(kw_only=True)
    class Args(NetworkArgs, DiscoveryArgs):
        run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
        """Run folder, or no run: give --model and --init."""
        data: Path
        """Data set: an image folder, or a data set in its official layout."""
        out: Path
        """Output folder for the id maps."""

    args = parse(Args, argv, "discover", discover_parts.__doc__)
    args.check(args.run)
    args.check_clustering()
    from fgfast.data.layouts import open_images
    from fgfast.parts.discover import STARTED, write_maps

    files = files_in(args.out)
    if files and not any((args.out / name).is_file() for name in ("maps.json", STARTED)):
        raise UserError(f"{args.out} holds other files, such as {files[0].name}: give another --out.")
    check_folder(args.out)
    source = args.source(args.load(args.run), args.run)
    images = open_images(args.data)
    source.check()
    print(write_maps(source, images, args.out))


def draw_pictures(argv: list[str]) -> None:
    """Draw parts, principal components of features and nearest neighbours; of a run also its views."""
    import tyro

    @dataclass(kw_only=True)
    class Args(NetworkArgs, DiscoveryArgs):
        run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
        """Run folder, which gets the figures (with options of the clustering also the parts that they find); or no run:
        give --model, --init and --out."""
        data: Path
        """Data set: an image folder, or a data set in its official layout."""
        out: Path | None = None
        """Without a run: output folder of the figures."""
        force: bool = False
        """Without a run: replace the figures in the output folder."""

    args = parse(Args, argv, "pictures", draw_pictures.__doc__)
    args.check(args.run)
    args.check_clustering()
    from fgfast.report.draw import draw_network, draw_run
    from fgfast.report.html import write_report
    from fgfast.train.distributed import choose_device

    if args.run is None:
        if args.out is None:
            raise UserError("The figures of a network without a run need a folder: give --out.")
        if (files := files_in(args.out)) and not args.force:
            raise UserError(f"{args.out} holds files, such as {files[0].name}: give another --out, or --force.")
        check_folder(args.out)
        network = args.load(None)
        for path in draw_network(args.source(network, None), network.config, args.data, args.out, network.name):
            print(path)
        return
    if args.out is not None or args.force:
        raise UserError(f"The figures of a run are written to its folder {args.run}: leave out --out and --force.")
    check_folder(args.run)
    checkpoint = args.checkpoint or "last"
    for path in draw_run(
        args.run, args.data, checkpoint=checkpoint, device=choose_device(args.device),
        source_of=None if not args.has_clustering() else
        lambda encoder, config: args.source(Network(encoder, config, "", checkpoint), args.run),
    ):  # fmt: skip
        print(path)
    print(write_report(args.run))
