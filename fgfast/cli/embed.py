"""``fgfast embed``: the features of every image of a set, as a file for NumPy, pandas or a spreadsheet."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from fgfast.cli.network import NetworkArgs
from fgfast.cli.parse import parse
from fgfast.errors import UserError
from fgfast.files import check_folder, write_atomic
from fgfast.info import require


class Table(NamedTuple):
    """The columns of a file of features, one row per image.

    Args:
        path: paths relative to the folder of the set.
        split: "train" or "test".
        target: number of the class, int64 [N]; -1 where it is not known.
        names: the class; "" where it is not known.
        features: float32 [N, D].
    """

    path: list[str]
    split: list[str]
    target: np.ndarray
    names: list[str]
    features: np.ndarray


def embed(argv: list[str]) -> None:
    """Write the features of every image of a set to a file, one row per image."""
    import tyro

    @dataclass(kw_only=True)
    class Args(NetworkArgs):
        data: Annotated[Path, tyro.conf.Positional]
        """Data set: an image folder, with classes or without, or a data set in its official layout."""
        run: Path | None = None
        """Run folder; or no run: give --model and --init."""
        out: Path
        """File, of a format by its ending: .npz (arrays path, split, target, class, features), .parquet or .csv."""
        split: Literal["all", "train", "test"] = "all"
        """Images to take; a set without splits is all for training."""
        force: bool = False
        """Replace an existing file."""

    args = parse(Args, argv, "embed", embed.__doc__)
    args.check(args.run)
    write = _writer(args.out)
    if args.out.is_dir():
        raise UserError(f"{args.out} is a folder: give the file of the features.")
    if args.out.exists() and not args.force:
        raise UserError(f"{args.out} exists: give another --out, or --force to replace it.")
    check_folder(args.out.parent)
    from fgfast.data.layouts import open_images
    from fgfast.evaluate.features import extract_rows

    images = open_images(args.data)
    inside = images.root.resolve().relative_to(args.data.resolve()).as_posix()
    if args.split != "all":
        images = images.subset(images.train == (args.split == "train"))
    if not len(images):
        raise UserError(f"{args.data} has no images in the split {args.split}: choose another --split.")
    encoder, config, name, _ = args.load(args.run)
    features, rows = extract_rows(
        encoder, images, config.size, device=next(encoder.parameters()).device, threads=config.threads,
        loader=config.loader,
    )  # fmt: skip
    images = images.subset(rows)
    target = images.targets if images.has_labels else np.full(len(images), -1)
    table = Table(
        path=[path if inside == "." or images.slices is not None else f"{inside}/{path}" for path in images.paths],
        split=["train" if train else "test" for train in images.train],
        target=target,
        names=["" if i < 0 else images.classes[i] for i in target],
        features=features.numpy(),
    )
    write_atomic(args.out, lambda partial: write(partial, table))
    size = "" if args.run is None else f", size {config.size}"  # a name without a run has it
    print(f"{args.out}: {len(rows)} images, {features.shape[1]} features of {name}{size}")


def _writer(out: Path) -> Callable[[Path, Table], None]:
    """What writes a file with this ending.

    Raises:
        UserError: there is no such format, or its package is not installed.
    """
    writers = {".npz": _write_npz, ".parquet": _write_parquet, ".csv": _write_csv}
    if out.suffix not in writers:
        raise UserError(f"{out} has no ending of a known format: give {', '.join(writers)}.")
    if out.suffix == ".parquet":
        require("pyarrow", extra="datasets")
    return writers[out.suffix]


def _write_npz(file: Path, table: Table) -> None:
    columns: dict[str, Any] = {"class" if name == "names" else name: value for name, value in table._asdict().items()}
    with file.open("wb") as stream:  # to a path without the ending, savez would add it
        np.savez(stream, **columns)


def _write_csv(file: Path, table: Table) -> None:
    from fgfast.formats import csv_text

    columns = ["path", "split", "target", "class", *(f"feature_{i}" for i in range(table.features.shape[1]))]
    rows = (
        dict(zip(columns, (path, split, target if name else "", name, *x), strict=True))
        for path, split, target, name, x in zip(*table, strict=True)
    )
    text = csv_text(columns, rows)
    file.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def _write_parquet(file: Path, table: Table) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    width = table.features.shape[1]
    known = table.target >= 0
    columns = {
        "path": table.path,
        "split": table.split,
        "target": pa.array(table.target, pa.int64(), mask=~known),
        "class": pa.array(table.names, pa.string(), mask=~known),
        "features": pa.FixedSizeListArray.from_arrays(pa.array(table.features.reshape(-1)), width),
    }
    try:
        parquet.write_table(pa.table(columns), file)
    except UnicodeEncodeError:
        raise UserError(
            "The name of an image is not valid UTF-8, which Parquet cannot hold: give .npz or .csv."
        ) from None
