"""Readers of data sets, id maps, images and the manifest, given damaged inputs; see ``tests.fuzz``."""

import atexit
import contextlib
import importlib.util
import random
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from fgfast.data.decode import read_image
from fgfast.data.layouts import ImageSet, open_images
from fgfast.data.manifest import cache_folder, check_file, check_images
from fgfast.data.maps import map_path, map_sizes, read_map, read_maps_info, save_maps, write_maps_info
from fgfast.data.shards.scan import index_shards
from fgfast.data.shards.write import ShardWriter
from fgfast.data.slices import Slice, read_file
from tests.data import tables, trees
from tests.fuzz import Reader, damage, damage_file

FORMATS = {"JPEG": "RGB", "PNG": "RGBA", "BMP": "RGB", "GIF": "P", "TIFF": "I;16", "WEBP": "RGB", "PPM": "RGB"}
FORMATS |= {"JPEG2000": "RGB"}


@cache
def _sound(tree: Callable[[Path], Path]) -> Path:
    """The set as it is without damage, written once."""
    top = Path(tempfile.mkdtemp(prefix="fgfast-fuzz-"))
    atexit.register(shutil.rmtree, top)
    return tree(top / "set")


def cassava(root: Path) -> Path:
    """The set with the lists of a split."""
    names = [f"{c}/train-{c}-{i}.jpg" for c in ("cbb", "healthy") for i in range(5)]
    trees.lists(
        trees.cassava(root),
        images="".join(f"{i} {name}\n" for i, name in enumerate(names, 1)),
        train_test_split="".join(f"{i} {i % 2}\n" for i in range(1, 11)),
    )
    return root


def inaturalist(root: Path) -> Path:
    """The set with names and boxes in files of their own."""
    trees.inaturalist(root, "2017")
    (root / "categories.json").write_text('[{"id": 2, "name": "Common toad"}, {"id": 4, "name": "Teal"}]')
    (root / "train_2017_bboxes.json").write_text('{"annotations": [{"image_id": 12, "bbox": [1, 2, 3, 4]}]}')
    return root


def folders(root: Path) -> Path:
    """A folder of classes, in splits."""
    rels = [f"{split}/{c}/{i}.png" for split in ("train", "test") for c in "ab" for i in range(3)]
    trees.write_images(root, rels)
    return root


def _read_set(pattern: str, tree: Callable[[Path], Path], rng: random.Random, folder: Path) -> None:
    """Damage one or two lists of a set and open it: every image that it names lies in the folder."""
    root = folder / "set"
    shutil.copytree(_sound(tree), root)
    lists = sorted(path for path in root.rglob("*") if path.suffix in pattern.split())
    for path in rng.sample(lists, rng.choice((1, 1, 1, 2))):
        damage_file(rng, path)
    _check(open_images(root), root)


def _check(images: ImageSet, root: Path) -> None:
    assert all(Path(file).resolve().is_relative_to(root.resolve()) for file in images.files())
    assert len(images) == len(images.targets) == len(images.train)
    assert images.targets.max() < len(images.classes)
    assert images.boxes is None or not np.isinf(images.boxes).any()


def _read_folders(rng: random.Random, folder: Path) -> None:
    """Rename, link, remove or add what a folder of classes has."""
    root = folder / "set"
    shutil.copytree(_sound(folders), root)
    for _ in range(rng.randrange(1, 5)):
        found = sorted(root.rglob("*"))
        path = rng.choice(found)
        names = (
            "train",
            "test",
            "val",
            "..x",
            "a b",
            "\udcff.jpg",
            "x\n.png",
            "-",
            "@unlabelled",
            "part_masks",
            "images",
        )
        target = path.with_name(rng.choice((*names, "images.txt", "train.json", "imagelabels.mat", "jpg", "devkit")))
        action = rng.randrange(4)
        if action == 0 and not target.exists():
            path.rename(target)
        elif action == 1 and not target.is_symlink() and not target.exists():
            target.symlink_to(rng.choice((path, root, rng.choice(found))))
        elif action == 2:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        elif action == 3 and not target.is_symlink() and not target.exists():
            target.write_bytes(rng.randbytes(20))
        if not any(root.iterdir()):
            return
    _check(open_images(root), root)


def shards(root: Path) -> Path:
    """Six images in three shards, with boxes."""
    return ShardWriter(open_images(trees.aircraft(root.with_name("aircraft"))), root, shard_mb=0.002).write()


def saved(root: Path) -> Path:
    """A data set of Hugging Face `datasets`, with two splits in Arrow files."""
    rows = tables.table(tables.jpegs(4), [0, 1, 2, 0])
    return tables.save_dict(root, {"train": rows, "test": rows})


def parquet(root: Path) -> Path:
    """The same in Parquet files."""
    rows = tables.table(tables.jpegs(4), [0, 1, 2, 0])
    return tables.parquet(root, {"train": rows, "test": rows})


def _read_shards(rng: random.Random, folder: Path) -> None:
    """Damage an index or a shard: every image that can be read is one that was stored."""
    root = folder / "set"
    shutil.copytree(_sound(shards), root)
    for path in rng.sample(sorted(root.iterdir()), rng.choice((1, 1, 1, 2))):
        damage_file(rng, path)
    images = open_images(root)
    assert len(images) == len(images.targets) == len(images.train) == 6
    check_images(images, lenient=True, quiet=True)
    sound = open_images(_sound(shards))
    stored = {read_file(file) for file in sound.files()}
    for file in images.files():
        with contextlib.suppress(OSError):
            assert read_file(file) in stored


def _index_shards(rng: random.Random, folder: Path) -> None:
    """Damage a tar file of another program and index it: every image lies inside it."""
    root = folder / "set"
    shutil.copytree(_sound(shards), root, ignore=shutil.ignore_patterns("*.json", "*.idx"))
    damage_file(rng, rng.choice(sorted(root.iterdir())))
    images = open_images(index_shards(root))
    for file in images.files():
        assert isinstance(file, Slice)
        assert len(read_file(file)) == file.size > 0


def _read_table(tree: Callable[[Path], Path], rng: random.Random, folder: Path) -> None:
    """Damage a file of Hugging Face `datasets`: every image lies inside a file."""
    root = folder / "set"
    shutil.copytree(_sound(tree), root)
    damage_file(rng, rng.choice(sorted(path for path in root.rglob("*") if path.is_file())))
    images = open_images(root)
    assert len(images) == len(images.targets) == len(images.train)
    assert images.targets.max() < len(images.classes)
    for file in images.files():
        assert isinstance(file, Slice)
        assert len(read_file(file)) == file.size >= 0


def _read_maps(rng: random.Random, folder: Path) -> None:
    """Damage maps.json or a map: what is read are the ids that were saved."""
    rels = ["a/1.jpg", "a/2.jpg", "b/3.png"]
    ids = np.random.default_rng(rng.randrange(100)).integers(0, 9, (3, 6, 8), dtype=np.uint8)
    save_maps(folder, rels, ids)
    write_maps_info(folder, 9, (6, 8), "origin")
    rel = rng.choice(rels)
    path = rng.choice((folder / "maps.json", map_path(folder, rel)))
    damage_file(rng, path)
    assert 1 <= read_maps_info(folder)["n_parts"] <= 255
    assert map_sizes(folder, rels).tolist() == [[6, 8]] * 3
    for saved, name in zip(ids, rels, strict=True):
        assert np.array_equal(read_map(folder, name), saved)


def _read_manifest(rng: random.Random, folder: Path) -> None:
    """Damage the cache of the manifest: the images are checked again."""
    trees.write_images(folder, ["a/1.jpg", "a/2.jpg"])
    Image.new("CMYK", (8, 6)).save(folder / "a" / "3.tif")
    images = open_images(folder)
    expected = check_images(images)
    (saved,) = (cache_folder() / "manifests").iterdir()
    damage_file(rng, saved)
    found = check_images(images)
    assert (found.files, found.sizes.tolist()) == (expected.files, expected.sizes.tolist())
    assert (found.stamps, found.orientations.tolist()) == (expected.stamps, expected.orientations.tolist())


@cache
def _encoded(kind: str) -> bytes:
    values = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    mode = FORMATS[kind]
    image = (
        Image.fromarray(values[..., 0].astype(np.uint16)) if mode == "I;16" else Image.fromarray(values).convert(mode)
    )
    stream, exif = BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.save(stream, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
    return stream.getvalue()


def _read_image(rng: random.Random, folder: Path) -> None:
    """Damage an image file: it decodes or raises OSError, and the manifest's verdict says which."""
    path = folder / "image.jpg"
    path.write_bytes(damage(rng, _encoded(rng.choice(list(FORMATS)))))
    verdict = check_file(str(path))
    try:
        pixels = read_image(path)
    except OSError:
        assert verdict.reason
    else:
        assert not verdict.reason or verdict.passing
        assert verdict.reason or pixels.shape == (verdict.height, verdict.width, 3)


READERS: dict[str, Reader] = {
    "CUB-200-2011": partial(_read_set, ".txt", trees.cub),
    "NABirds": partial(_read_set, ".txt", trees.nabirds),
    "cassava": partial(_read_set, ".txt", cassava),
    "FGVC-Aircraft": partial(_read_set, ".txt", trees.aircraft),
    "Oxford-IIIT Pet": partial(_read_set, ".txt .png", trees.pets),
    "iNaturalist": partial(_read_set, ".json", inaturalist),
    "image folders": _read_folders,
    "shards": _read_shards,
    "shards of others": _index_shards,
    "id maps": _read_maps,
    "manifest": _read_manifest,
    "images": _read_image,
}
if importlib.util.find_spec("pyarrow") is not None:
    READERS |= {"Hugging Face": partial(_read_table, saved), "Parquet": partial(_read_table, parquet)}
"""The readers of this module by name; the .mat ones, which start a process for each input, are in MATLAB."""

MATLAB: dict[str, Reader] = {
    "Stanford Cars": partial(_read_set, ".mat", trees.cars),
    "Oxford Flowers 102": partial(_read_set, ".mat", trees.flowers),
}
