"""Data sets of Hugging Face `datasets`: folders of `save_to_disk`, and Parquet files, with images and labels inside.

Nothing is decoded, and no image is copied out of an Arrow file: a loader reads its bytes where they lie. The images of
Parquet files, which are compressed, are written once to an Arrow file in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fgfast.data.imageset import EXTENSIONS, UNLABELLED, ImageSet, LeftOut
from fgfast.data.inside import leads_out
from fgfast.data.layouts.folders import split_of
from fgfast.data.slices import Slices
from fgfast.errors import UserError, one_line
from fgfast.files import write_atomic
from fgfast.formats import read_json
from fgfast.info import require

log = logging.getLogger("fgfast")

REMEDY = "save the data set again"
_IMAGES = ("image", "img", "jpg", "png", "pixels")
_LABELS = ("label", "labels", "fine_label", "target", "class")
_ROWS = 500  # that are converted at a time


def is_hugging_face(root: Path) -> bool:
    """Whether a folder was written by `save_to_disk`, or holds Parquet files and neither images nor class folders."""
    saved = (root / "dataset_dict.json").exists() or (
        (root / "state.json").exists() and (root / "dataset_info.json").exists()
    )
    return saved or bool(_parquet_files(root))


def read_hugging_face(root: Path) -> ImageSet:
    """The images of all splits; the test split is scored, the validation split only if there is none.

    The column of images is that of the feature Image, else one of binary values named image, img, jpg, png or pixels;
    the labels are those of the only ClassLabel, else of a column named label, labels, fine_label, target or class.

    Raises:
        UserError: a file is missing or damaged, a column is missing or could be one of two, an image is not in the
            file, or pyarrow is not installed.
    """
    require("pyarrow", extra="datasets")
    import pyarrow as pa

    parts: dict[str, list[_Part]] = {}
    for split, path in _files(root):
        try:
            parts.setdefault(split, []).append(_read(_as_arrow(path), path))
        except (pa.ArrowException, ValueError, OverflowError, OSError) as error:
            raise UserError(f"{path} cannot be read ({one_line(str(error))[:200]}): {REMEDY}.") from error
    return _image_set(root, parts)


@dataclass
class _Part:
    """The images of a file: their places and labels, and the names of the classes if the file has them."""

    file: str
    origin: Path
    start: list[np.ndarray] = field(default_factory=list)
    size: list[np.ndarray] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    names: list[str] | None = None

    def __len__(self) -> int:
        return sum(map(len, self.start))


def _parquet_files(root: Path) -> list[Path]:
    for folder in (root, root / "data"):
        found = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")] if folder.is_dir() else []
        tables = [path for path in found if path.suffix == ".parquet"]
        if tables and not any(path.suffix.lower() in EXTENSIONS or path.is_dir() for path in found):
            return tables
    return []


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """The files of the set, each with its split."""
    if (root / "dataset_dict.json").exists():
        for split in read_json(root / "dataset_dict.json", dict[str, list[str]], remedy=REMEDY).get("splits", []):
            if leads_out(split):
                raise UserError(f"{root / 'dataset_dict.json'} names {split!r}, which is outside: {REMEDY}.")
            yield from ((split, path) for path in _saved_files(root / split))
    elif (root / "state.json").exists():
        yield from (("train", path) for path in _saved_files(root))
    else:
        for path in _parquet_files(root):
            if not path.is_file():
                raise UserError(f"{path} is no file: remove it.")
            yield re.split(r"[-.]", path.name)[0], path


def _saved_files(folder: Path) -> Iterator[Path]:
    state = read_json(folder / "state.json", dict[str, Any], remedy=REMEDY)
    listed = state.get("_data_files")
    names = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if not names:
        raise UserError(f"{folder / 'state.json'} names no file: {REMEDY}.")
    for name in names:
        if not isinstance(name, str) or leads_out(name):
            raise UserError(f"{folder / 'state.json'} names {name!r}, which is no file of the folder: {REMEDY}.")
        if not os.path.isfile(folder / name):  # a name that no file can have is a missing file too
            raise UserError(f"{folder / name} is missing: {REMEDY}.")
        yield folder / name


def _as_arrow(path: Path) -> Path:
    """The file itself, or the copy of a Parquet file in the cache, which is written if it is missing."""
    if path.suffix != ".parquet":
        return path
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fgfast.data.manifest import cache_folder

    found = path.stat()
    key = f"1:{path.resolve()}:{found.st_size}:{found.st_mtime_ns}"
    copy = cache_folder() / "arrow" / f"{hashlib.sha1(os.fsencode(key)).hexdigest()}.arrow"
    if copy.exists():
        return copy
    log.info("converting %s to %s, once", path, copy)

    def write(partial: Path) -> None:
        with pq.ParquetFile(path) as table:
            columns = [name for name in _columns(table.schema_arrow, path) if name is not None]
            schema = pa.schema([table.schema_arrow.field(name) for name in columns], table.schema_arrow.metadata)
            with pa.ipc.new_stream(str(partial), schema) as out:
                for batch in table.iter_batches(_ROWS, columns=columns):
                    out.write_batch(pa.record_batch([batch.column(name) for name in columns], schema=schema))

    write_atomic(copy, write)
    return copy


def _read(file: Path, origin: Path) -> _Part:
    """The places of the images in an Arrow file (the stream format, as `datasets` writes it, or the file format)."""
    import pyarrow as pa

    part = _Part(str(file.resolve()), origin)
    whole = pa.memory_map(str(file)).read_buffer()
    batches = _batches(whole)
    column, label = _columns(batches.schema, origin)
    for batch in batches:
        batch.validate(full=True)
        start, size = _places(batch.column(column), whole, origin)
        part.start.append(start)
        part.size.append(size)
        if label is not None:
            part.labels += batch.column(label).to_pylist()
    part.names = _features(batches.schema).get(label or "", {}).get("names")
    return part


def _batches(whole: Any) -> Any:
    import pyarrow as pa

    if whole.size >= 6 and whole.slice(0, 6).to_pybytes() == b"ARROW1":
        file = pa.ipc.open_file(pa.BufferReader(whole))
        return _FileBatches(file)
    return pa.ipc.open_stream(pa.BufferReader(whole))


class _FileBatches:
    """The batches of Arrow's file format, as those of its stream format are given."""

    def __init__(self, file: Any) -> None:
        self.schema, self._file = file.schema, file

    def __iter__(self) -> Iterator[Any]:
        return map(self._file.get_batch, range(self._file.num_record_batches))


def _places(values: Any, whole: Any, origin: Path) -> tuple[np.ndarray, np.ndarray]:
    """First byte in the file and size of each image of a column."""
    import pyarrow as pa

    if pa.types.is_struct(values.type) and values.type.get_field_index("bytes") >= 0:
        values = values.field("bytes")
    if values.null_count or values.type not in (pa.binary(), pa.large_binary()):
        raise UserError(f"{origin} has images outside the file: save them inside (save_to_disk and to_parquet do).")
    if not len(values):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    _, offsets, data = values.buffers()
    kind = np.int32 if values.type == pa.binary() else np.int64
    places = np.frombuffer(offsets, kind)[values.offset : values.offset + len(values) + 1].astype(np.int64)
    first = data.address - whole.address
    if not 0 <= first <= first + data.size <= whole.size:
        raise UserError(f"{origin} is compressed, so its images cannot be read where they lie: save it uncompressed.")
    return first + places[:-1], np.diff(places)


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The features that `datasets` notes in the metadata of a schema."""
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(text).get("info", {}).get("features", {})
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (ValueError, AttributeError):
        return {}


def _columns(schema: Any, origin: Path) -> tuple[str, str | None]:
    """The names of the column of images and of that of labels, None if there is none."""
    features = {name: str(value.get("_type")) for name, value in _features(schema).items() if name in schema.names}
    images = [name for name, kind in features.items() if kind == "Image"]
    images = images or [name for name in _IMAGES if name in schema.names]
    if len(images) != 1:
        what = f"the columns {images[0]} and {images[1]} of images" if images else "no column of images"
        raise UserError(f"{origin} has {what} ({', '.join(schema.names[:8])}): keep one, named image.")
    labels = [name for name, kind in features.items() if kind == "ClassLabel"]
    if len(labels) != 1:
        labels = [name for name in _LABELS if name in (labels or schema.names)][:1] or labels
    if len(labels) > 1:
        raise UserError(f"{origin} has the labels {labels[0]} and {labels[1]}: keep one, named label.")
    return images[0], labels[0] if labels else None


def _image_set(root: Path, parts: dict[str, list[_Part]]) -> ImageSet:
    kinds = {split: split_of(split) for split in parts}
    counts = {split: sum(map(len, files)) for split, files in parts.items()}
    by_kind = {kind: [split for split in parts if kinds[split] == kind] for kind in ("train", "val", "test")}
    if len(parts) == 1:
        (only,) = parts
        by_kind = {"train": [only], "val": [], "test": []}
    for kind, splits in by_kind.items():
        if len(splits) > 1:
            raise UserError(f"{root} has two splits for {kind}, {splits[0]} and {splits[1]}: keep one of them.")
    if not by_kind["train"]:
        raise UserError(f"{root} has no split train: name the split for training so.")
    scored = by_kind["test"] or by_kind["val"]
    used = [*by_kind["train"], *scored]
    left_out = tuple(
        LeftOut(split, counts[split], f"{scored[0]} is scored" if kinds[split] == "val" and scored else "no split")
        for split in parts
        if split not in used
    )
    files = [(split, part) for split in used for part in parts[split] if len(part)]
    if not files:
        raise UserError(f"{root} holds no image: save a data set with images.")
    targets, classes = _targets(root, [part for _, part in files])
    which = np.repeat(np.arange(len(files), dtype=np.int32), [len(part) for _, part in files])
    start = np.concatenate([start for _, part in files for start in part.start])
    numbers = np.concatenate([np.arange(sum(len(p) for s, p in files if s == split)) for split in used])
    names = [split for split in used for _ in range(sum(len(p) for s, p in files if s == split))]
    return ImageSet(
        root=root,
        paths=tuple(f"{split}/{number:08d}" for split, number in zip(names, numbers.tolist(), strict=True)),
        targets=targets,
        classes=classes,
        train=np.array([split in by_kind["train"] for split in names], bool),
        left_out=left_out,
        slices=Slices(
            files=tuple((part.file, -1) for _, part in files),
            which=which,
            start=start.astype(np.int64),
            size=np.concatenate([size for _, part in files for size in part.size]).astype(np.int64),
            crc=np.full(len(which), -1, np.int64),
            shape=np.zeros((len(which), 3), np.int64),
        ),
    )


def _targets(root: Path, parts: list[_Part]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class of every image, and the names of the classes; -1 for none."""
    if not any(part.labels for part in parts):
        return np.full(sum(map(len, parts)), -1, np.int64), (UNLABELLED,)
    without = next((part for part in parts if len(part.labels) != len(part)), None)
    if without is not None:
        raise UserError(f"{without.origin} has no labels, other files of {root} have: save it with labels.")
    labels = [label for part in parts for label in part.labels]
    odd = next((x for x in labels if x is not None and (isinstance(x, bool) or not isinstance(x, int | str))), None)
    if odd is not None or len({type(label) for label in labels if label is not None}) > 1:
        raise UserError(f"{root} has labels that are neither numbers nor names, such as {odd!r}: save one of the two.")
    names = next((part.names for part in parts if part.names), None)
    if any(part.names not in (None, names) for part in parts):
        raise UserError(f"The files of {root} give their classes different names: save them with the same.")
    if names is None or any(isinstance(label, str) for label in labels):
        known = sorted({label for label in labels if label is not None})
        index = {label: i for i, label in enumerate(known)}
        return np.array([index.get(label, -1) for label in labels], np.int64), tuple(map(str, known))
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise UserError(f"The classes of {root} have names that are no text or given twice: save it with others.")
    wrong = next((label for label in labels if label is not None and not -1 <= label < len(names)), None)
    if wrong is not None:
        raise UserError(f"{root} has the label {wrong}, but {len(names)} classes: save it with the right ones.")
    return np.array([-1 if label is None else label for label in labels], np.int64), tuple(names)
