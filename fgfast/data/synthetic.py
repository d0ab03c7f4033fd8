"""The synthetic set: drawn birds whose classes differ only in part attributes, with exact part masks and key points.

Body shape, base plumage, pose, scale, light, background and clutter vary between birds independently of the class. On
disk it is a folder in CUB-200-2011's layout plus ``part_masks/`` (8-bit grey, 255 = no part) and ``synthetic.json``.
"""

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fgfast.data._attributes import design_classes, draw_traits, level_names
from fgfast.data._bird import KEYPOINTS, PARTS
from fgfast.data._drawing import draw_image
from fgfast.data.maps import ABSENT
from fgfast.errors import UserError
from fgfast.formats import read_json
from fgfast.interrupt import shielding_children

VERSION = 2  # incremented when the same settings give other images
# Amount of variation in the drawing at nuisance 1: a linear probe of a ResNet-18 with random weights then has about
# twice the accuracy of chance, a probe of mean colours about that of chance. At 1.0 random weights are at chance.
_USUAL_NUISANCE = 0.6
_SETTINGS_FILE = "synthetic.json"
# fmt: off
_KINDS = (
    "Northern", "Southern", "Eastern", "Western", "River", "Meadow", "Forest", "Hill", "Marsh", "Island", "Desert",
    "Coast", "Valley", "Alpine", "Steppe", "Prairie", "Heath", "Lake", "Canyon", "Garden",
)
_BIRDS = (
    "Finch", "Warbler", "Thrush", "Jay", "Bunting", "Tanager", "Starling", "Lark", "Pipit", "Wren", "Shrike", "Oriole",
    "Flycatcher", "Sparrow", "Crake", "Plover", "Cuckoo", "Robin", "Magpie", "Crow",
)
# fmt: on


@dataclass(frozen=True)
class Settings:
    """The settings that determine the bytes of a set."""

    classes: int = 20
    images: int = 2000
    size: int = 128
    seed: int = 0
    difficulty: float = 0.5
    nuisance: float = 1.0
    version: int = VERSION

    def check(self) -> None:
        """Raise a UserError for a value out of range."""
        for name in ("classes", "images", "size", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise UserError(f"{name} is {value!r}: give a whole number.")
        if not 2 <= self.classes <= 1000:
            raise UserError(f"classes is {self.classes}: give a number from 2 to 1000.")
        if self.images < 2 * self.classes:
            raise UserError(
                f"images is {self.images}, too few for {self.classes} classes: give at least {2 * self.classes}, "
                "one for training and one for testing per class."
            )
        if not 32 <= self.size <= 4096:
            raise UserError(f"size is {self.size}: give a side from 32 to 4096 pixels.")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: give 0 or more.")
        if not 0 <= self.difficulty <= 1:
            raise UserError(f"difficulty is {self.difficulty}: give a number from 0 (easy) to 1 (hard).")
        if not (math.isfinite(self.nuisance) and 0 <= self.nuisance <= 3):
            raise UserError(f"nuisance is {self.nuisance}: give a number from 0 (none) to 3, where 1 is usual.")


def generate(
    out: Path | str,
    *,
    classes: int = 20,
    images: int = 2000,
    size: int = 128,
    seed: int = 0,
    difficulty: float = 0.5,
    nuisance: float = 1.0,
    workers: int | None = None,
    force: bool = False,
) -> Path:
    """Draw a set of birds into a new folder in CUB-200-2011's layout.

    Every class has the same number of images (the first ones one more if the number does not divide); every second
    image is for training. With the same library versions the same settings give the same bytes for any number of
    workers. The folder appears only when it is complete; a set with the same settings already there is returned at
    once.

    Args:
        out: the folder to create.
        classes: number of classes, 2 to 1000.
        images: total number of images, at least two per class.
        size: side of the square images in pixels, 32 to 4096.
        seed: random seed, 0 or more.
        difficulty: 0 to 1; higher values let fewer attributes distinguish the classes, with closer levels.
        nuisance: 0 to 3, usually 1: how much pose, plumage, light, background and clutter vary.
        workers: processes; None = one per core, at most 8, for more than 2,000 images of 128 px (or an equal number of
            pixels), else only this process. More than one needs ``if __name__ == "__main__":`` in a script.
        force: replace another synthetic set at ``out``. A non-empty folder of other content is never touched.

    Returns:
        The folder, with images/, images.txt, image_class_labels.txt, classes.txt, train_test_split.txt,
        bounding_boxes.txt, parts/, part_masks/ (``part_masks/<path in images.txt>.png``, maps.json) and synthetic.json
        (the settings and the attributes of every class).

    Raises:
        UserError: a value out of range, a folder in the way, no space or no permission.

    Example:
        >>> import tempfile
        >>> root = generate(Path(tempfile.mkdtemp()) / "birds", classes=2, images=4, size=32)
        >>> len((root / "images.txt").read_text().splitlines())
        4
    """
    settings = Settings(classes, images, size, seed, float(difficulty), float(nuisance))
    settings.check()
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}: give 1 or more.")
    out = Path(os.path.abspath(Path(out).expanduser()))
    if _holds_set(out, settings, force):
        return out
    with _readable_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.part"
        draft.mkdir()
        try:
            _write_set(draft, settings, workers)
            _move_into_place(draft, out, settings, force)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return out


def _holds_set(out: Path, settings: Settings, force: bool) -> bool:
    """Whether ``out`` holds this set; False if it is free or may be replaced, else an error."""
    if not out.exists() and not out.is_symlink():
        return False
    if not out.is_dir():
        raise UserError(f"{out} is not a folder: choose another place for the synthetic set.")
    if not any(out.iterdir()):
        return False
    try:
        found = read_json(out / _SETTINGS_FILE, dict[str, Any], strict=False)["settings"]
    except (UserError, KeyError):
        raise UserError(
            f"{out} holds something that is not a synthetic set: choose an empty or a new folder."
        ) from None
    if found == asdict(settings):
        return True
    if not force:
        raise UserError(
            f"{out} holds a synthetic set with other settings: choose another folder or replace it with force."
        )
    return False


@contextmanager
def _readable_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"No space is left for the synthetic set at {out}: free some or choose another disk."
            ) from error
        raise UserError(
            f"The synthetic set cannot be written to {out} ({error.strerror or error}): choose another folder."
        ) from error
    except BrokenProcessPool as error:
        raise UserError(
            "A drawing process ended early: call generate under if __name__ == '__main__': or with workers=1."
        ) from error


def _move_into_place(draft: Path, out: Path, settings: Settings, force: bool) -> None:
    if _holds_set(out, settings, force):  # another process has written the same set in the meantime
        return
    old = draft.with_suffix(".old")
    if out.exists():
        out.rename(old)
    try:
        draft.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _class_name(index: int) -> str:
    """A name without meaning, unique for every index below 1000: 001.Northern_Finch."""
    kind, bird, repeat = index % 20, (index + index // 20) % 20, index // 400
    return f"{index + 1:03d}.{_KINDS[kind]}_{_BIRDS[bird]}" + (f"_{repeat + 1}" if repeat else "")


def _write_set(root: Path, settings: Settings, workers: int | None) -> None:
    levels = design_classes(settings.classes, settings.seed, settings.difficulty)
    names = [_class_name(i) for i in range(settings.classes)]
    per_class, remainder = divmod(settings.images, settings.classes)
    items = [(c, n) for c in range(settings.classes) for n in range(per_class + (c < remainder))]
    files = [f"{names[c]}/{names[c][4:]}_{n + 1:04d}.jpg" for c, n in items]
    (root / "parts").mkdir()
    for name in names:
        (root / "images" / name).mkdir(parents=True)
        (root / "part_masks" / name).mkdir(parents=True)

    boxes, points = _draw_all(root, settings, levels, items, files, workers)

    def write_lines(name: str, rows: list[str]) -> None:
        (root / name).write_bytes(("\n".join(rows) + "\n").encode())

    write_lines("images.txt", [f"{i} {file}" for i, file in enumerate(files, 1)])
    write_lines("image_class_labels.txt", [f"{i} {c + 1}" for i, (c, _) in enumerate(items, 1)])
    write_lines("classes.txt", [f"{c} {name}" for c, name in enumerate(names, 1)])
    write_lines("train_test_split.txt", [f"{i} {(n + 1) % 2}" for i, (_, n) in enumerate(items, 1)])
    box_lines = [f"{i} {x:.2f} {y:.2f} {w:.2f} {h:.2f}" for i, (x, y, w, h) in enumerate(boxes, 1)]
    write_lines("bounding_boxes.txt", box_lines)
    write_lines("parts/parts.txt", [f"{p} {name}" for p, name in enumerate(KEYPOINTS, 1)])
    write_lines(
        "parts/part_locs.txt",
        [
            f"{i} {p} {x:.2f} {y:.2f} {int(v)}"
            for i, rows in enumerate(points, 1)
            for p, (x, y, v) in enumerate(rows, 1)
        ],
    )
    maps = {"n_parts": len(PARTS), "size": [settings.size] * 2, "run": f"truth-{settings.seed}", "parts": list(PARTS)}
    write_lines("part_masks/maps.json", [json.dumps(maps, indent=1)])
    attributes = {name: level_names(row) for name, row in zip(names, levels, strict=True)}
    write_lines(_SETTINGS_FILE, [json.dumps({"settings": asdict(settings), "attributes": attributes}, indent=1)])


def _draw_all(
    root: Path,
    settings: Settings,
    levels: np.ndarray,
    items: list[tuple[int, int]],
    files: list[str],
    workers: int | None,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    if workers is None:
        heavy = settings.images * (settings.size / 128) ** 2 > 2000
        workers = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        workers = workers if heavy else 1
    chunk = max(1, min(256, math.ceil(len(items) / (4 * workers))))
    slices = [slice(start, start + chunk) for start in range(0, len(items), chunk)]
    jobs = [(root, settings, [levels[c] for c, _ in items[s]], items[s], files[s]) for s in slices]
    if workers == 1:
        done = [_draw_some(*job) for job in jobs]
    else:
        context = multiprocessing.get_context("spawn")
        ignore = (signal.SIGINT, signal.SIG_IGN)  # only this process reports an interruption
        with ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=ignore) as pool:
            with shielding_children():
                futures = [pool.submit(_draw_some, *job) for job in jobs]
            try:
                done = [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    return [box for boxes, _ in done for box in boxes], [rows for _, points in done for rows in points]


def _draw_some(
    root: Path, settings: Settings, levels: list[np.ndarray], items: list[tuple[int, int]], files: list[str]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Draw and write some images; each has its own random number generator, whichever process draws it."""
    boxes, points = [], []
    for row, item, file in zip(levels, items, files, strict=True):
        rng = np.random.default_rng(np.random.SeedSequence(settings.seed, spawn_key=(1, *item)))
        nuisance = _USUAL_NUISANCE * settings.nuisance
        traits = draw_traits(row, settings.difficulty, nuisance, rng)
        image, labels, keypoints = draw_image(traits, settings.size, nuisance, rng)
        quality = 90 - int(rng.integers(0, 1 + round(25 * min(nuisance, 1.0))))
        image.save(root / "images" / file, "JPEG", quality=quality)
        Image.fromarray(labels).save(root / "part_masks" / f"{file}.png", "PNG", compress_level=1)
        boxes.append(_box(labels))
        points.append(keypoints)
    return boxes, points


def _box(labels: np.ndarray) -> np.ndarray:
    """The bounding box (x, y, w, h) of all pixels with a part."""
    bird = labels != ABSENT
    xs, ys = np.flatnonzero(bird.any(axis=0)), np.flatnonzero(bird.any(axis=1))
    return np.array([xs[0], ys[0], xs[-1] + 1 - xs[0], ys[-1] + 1 - ys[0]], np.float64)
