"""Images that are lost or seen twice in an epoch, for 1 to 8 ranks, with a stop and a resumption in the middle."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.endurance.report import Part, markdown
from fgfast.errors import UserError

if TYPE_CHECKING:
    from fgfast.data.imageset import ImageSet
    from fgfast.data.loader import Loader

WORLDS = range(1, 9)
BATCHES = (1, 2, 3, 5, 8)
SIZES = (1, 2, 7, 16, 37, 60)
EPOCHS = 3
SIDE = 16


class Seen(NamedTuple):
    """The images of some epochs: how many are due, and how many are missing or repeated."""

    due: int
    lost: int
    twice: int


def measure(folder: Path, *, quick: bool) -> Part:
    """Count the images of every plan, and those that the loaders of both backends deliver for a few of them."""
    from fgfast.data.layouts import open_images

    images = open_images(_draw(folder / "set", max(SIZES)))
    rng = random.Random(0)
    sizes = SIZES[2:4] if quick else SIZES
    rows, faults = [], []
    for world in WORLDS:
        refused: dict[str, None] = {}
        plans: list[Seen] = []
        others: list[Seen] = []
        for batch in BATCHES:
            for n in sizes:
                subset = images.subset(range(n))
                plans.append(of_plans(subset, batch, world, world, rng))
                for other in WORLDS:
                    if other != world and batch * world % other == 0:
                        try:
                            others.append(of_plans(subset, batch, world, other, rng))
                        except UserError as error:
                            refused.setdefault(f"{world} ranks, resumed on {other}: {error}")
        real = [
            of_loaders(images.subset(range(37)), backend, 3, world, rng)
            for backend in ("dali", "torchvision") if not quick or world in (1, 3)
        ]  # fmt: skip
        faults += list(refused)[:1]
        cells = []
        for name, found in (("same ranks", plans), ("other ranks", others), ("loaders", real)):
            due, lost, twice = (sum(part) for part in zip(*found, strict=True)) if found else (0, 0, 0)
            cells.append(f"{lost} / {twice} of {due:,}" if due else "")
            if lost or twice:
                faults.append(f"{world} ranks, {name}: {lost} lost and {twice} seen twice of {due}")
        rows.append([world, *cells])
        print("; ".join(map(str, rows[-1])), flush=True)
    text = (
        f"Images lost / seen twice in an epoch, of those due, in {EPOCHS} epochs with a stop in the middle: "
        f"{len(BATCHES)} batch sizes, {len(sizes)} sizes of the set.\n\n"
    )
    head = ["ranks", "resumed on as many", "resumed on other numbers", "delivered by DALI and torchvision"]
    return Part("images", text + markdown(head, rows), faults)


def _draw(folder: Path, n: int) -> Path:
    """Images of one grey each, which tells their number."""
    from PIL import Image

    for i in range(n):
        file = folder / f"class{i % 2}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), (4 * i,) * 3).save(file)
    return folder


def _loaders(images: "ImageSet", backend: str, batch: int, world: int) -> "list[Loader]":
    from fgfast.data.loader import make_loader
    from fgfast.data.views import ViewSpec

    return [
        make_loader(
            images, ViewSpec(whole=SIDE), batch, seed=1, threads=1, rank=rank, world=world, backend=backend, prefetch=1
        )
        for rank in range(world)
    ]  # fmt: skip


def of_plans(images: "ImageSet", batch: int, world: int, resumed: int, rng: random.Random) -> Seen:
    """What the plans of all ranks give, without reading an image; the run goes on with ``resumed`` ranks."""
    first = [_only_rows(loader) for loader in _loaders(images, "torchvision", batch, world)]
    second = [_only_rows(loader) for loader in _loaders(images, "torchvision", batch * world // resumed, resumed)]
    return count(len(images), epochs(first, second, rng))


def of_loaders(images: "ImageSet", backend: str, batch: int, world: int, rng: random.Random) -> Seen:
    """What the loaders of all ranks deliver, by the pixels."""
    first, second = (_loaders(images, backend, batch, world) for _ in range(2))
    try:
        return count(len(images), epochs(first, second, rng))
    finally:
        for loader in (*first, *second):
            loader.close()


def _only_rows(loader: "Loader") -> "Loader":
    """Let a loader deliver (index, valid) from its plan instead of reading images."""
    from fgfast.data.base import replace_failed

    plan = loader.plan

    def batches(epoch: int, start: int) -> Iterator[Any]:
        for number in range(start, len(plan)):
            rows, valid = plan.batch_rows(epoch, number)
            rows, valid = replace_failed(rows, valid, loader._failed, len(plan.records))
            yield [int(plan.records.index[row]) for row, ok in zip(rows, valid, strict=True) if ok]

    loader._batches = batches  # type: ignore[method-assign]
    return loader


def epochs(first: "Sequence[Loader]", second: "Sequence[Loader]", rng: random.Random) -> Iterator[list[int]]:
    """The numbers of the images of each epoch; at a random batch the second loaders take over, with the state."""
    stop = rng.randrange(EPOCHS * len(first[0]))
    running = first
    done = 0
    for _ in range(EPOCHS):
        seen: list[int] = []
        batches = [iter(loader) for loader in running]
        for _ in range(len(first[0])):
            if done == stop:
                for loader in second:
                    loader.load_state_dict(running[0].state_dict())
                running = second
                batches = [iter(loader) for loader in running]
            for stream in batches:
                seen += _numbers(next(stream))
            done += 1
        for stream in batches:
            assert next(stream, None) is None
        yield seen


def _numbers(batch: Any) -> list[int]:
    """The numbers of the valid images of a batch, from their pixels and from its index, which must agree."""
    if isinstance(batch, list):
        return batch
    from fgfast.data.panels import to_uint8

    found = []
    for i in range(len(batch)):
        if batch.valid[i]:
            number = round(float(to_uint8(batch.whole[i]).mean()) / 4)
            found.append(number if number == _by_index(int(batch.index[i])) else -1)
    return found


def _by_index(index: int) -> int:
    """The number of the image at an index of the set, which lists the classes one after the other."""
    half = -(-max(SIZES) // 2)
    return 2 * index if index < half else 2 * (index - half) + 1


def count(n: int, streams: Iterator[list[int]]) -> Seen:
    """Compare the images of each epoch with the n that are due."""
    lost = twice = due = 0
    for seen in streams:
        counts = Counter(seen)
        due += n
        lost += n - len(counts)
        twice += sum(counts.values()) - len(counts)
    return Seen(due, lost, twice)
