"""make_loader: batches of views, from DALI or torchvision."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from fgfast.data.base import Loader, default_threads, make_plan
from fgfast.data.imageset import ImageSet
from fgfast.data.manifest import Records
from fgfast.data.views import ViewSpec
from fgfast.errors import UserError

__all__ = ["BACKENDS", "Loader", "make_loader"]

BACKENDS = ("auto", "dali", "torchvision")


def choose_backend(backend: str) -> str:
    """The loader that "auto" stands for, "dali" if it is installed, or the one that is named.

    Raises:
        UserError: its library is not installed.
    """
    has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if backend == "auto":
        backend = "dali" if has_dali else "torchvision"
    needed = "nvidia.dali" if backend == "dali" else "torchvision"
    if not has_dali if backend == "dali" else importlib.util.find_spec("torchvision") is None:
        raise UserError(f"The {backend} loader needs the package {needed}: pip install 'fgfast[train]'.")
    return backend


def make_loader(
    images: ImageSet,
    spec: ViewSpec,
    batch_size: int,
    *,
    shuffle: bool = True,
    drop_last: bool = False,
    seed: int = 0,
    maps: Path | None = None,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    rank: int = 0,
    world: int = 1,
    backend: str = "auto",
    prefetch: int = 2,
    check: bool = True,
    memory_mb: int = 1024,
    records: Records | None = None,
    lenient: bool = False,
) -> Loader:
    """Create a loader of the views ``spec`` of a set of images.

    Args:
        images: the images; ``Batch.index`` is the position in it.
        spec: the views of a batch.
        batch_size: B on this rank, >= 1.
        shuffle: a new order each epoch, the same on every rank.
        drop_last: leave out an incomplete last batch; otherwise it is padded (valid False).
        seed: seed of order and augmentation, >= 0.
        maps: folder of id maps; needed if the spec asks for masks.
        device: device of the batches; on a CUDA device DALI also decodes and resizes there.
        threads: decoding threads or worker processes; None = one per usable core, at most eight.
        rank: rank of this process.
        world: number of processes; rank r takes every world-th image of the common order.
        backend: "dali", "torchvision" or "auto" (DALI if it is installed).
        prefetch: number of batches prepared ahead, >= 1.
        check: decode every new or changed file in full first, and skip broken ones.
        memory_mb: DALI keeps the decoded images of a shuffled loader in memory if they fit into this many MiB;
            0 decodes them again each epoch.
        records: the usable images for a training run, from ``check_images`` or ``Kept``: ``check`` and ``lenient`` are
            without effect, and lost images never raise, see ``Loader.too_many``.
        lenient: skip missing and broken images, however many, for scores in the course of a run.

    Raises:
        UserError: an image or a map is missing, too many are broken, a library is not installed, or no batch is full.
        ValueError: an unknown backend, an invalid number, or id maps are asked for without ``maps``.

    Example:
        >>> loader = make_loader(open_images("birds"), ViewSpec(crops=(Crop(), Crop())), 128)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     batch.views[0].shape
        torch.Size([128, 3, 64, 64])
    """
    if backend not in BACKENDS:
        raise ValueError(f"The loader backend is {backend!r}: choose one of {', '.join(BACKENDS)}.")
    if seed < 0:
        raise ValueError(f"seed is {seed}: give a number >= 0.")
    backend = choose_backend(backend)
    threads = default_threads(threads)
    plan = make_plan(
        images,
        spec,
        batch_size,
        shuffle=shuffle,
        drop_last=drop_last,
        seed=seed,
        maps=None if maps is None else Path(maps),
        rank=rank,
        world=world,
        check=check,
        threads=threads,
        records=records,
        lenient=lenient,
    )
    if backend == "dali":
        from fgfast.data.dali import DaliLoader

        return DaliLoader(plan, device=torch.device(device), threads=threads, prefetch=prefetch, memory_mb=memory_mb)
    from fgfast.data.torchvision_loader import TorchvisionLoader

    return TorchvisionLoader(plan, device=torch.device(device), threads=threads, prefetch=prefetch)
