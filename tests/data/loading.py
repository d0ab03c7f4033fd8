"""A loader that is closed after use, in every variant, and the comparison of its batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import pytest
import torch

from fgfast.data.base import Loader
from fgfast.data.layouts import ImageSet
from fgfast.data.loader import make_loader
from fgfast.data.views import Batch, ViewSpec

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
VARIANTS = {"dali_kept": ("dali", 1024), "dali_files": ("dali", 0), "torchvision": ("torchvision", 0)}


@contextmanager
def loading(
    images: ImageSet, spec: ViewSpec, batch_size: int, variant: str = "dali_kept", **kwargs
) -> Iterator[Loader]:
    backend, memory_mb = VARIANTS[variant]
    pytest.importorskip("nvidia.dali" if backend == "dali" else "torchvision")
    loader = make_loader(images, spec, batch_size, backend=backend, memory_mb=memory_mb, threads=1, **kwargs)
    try:
        yield loader
    finally:
        loader.close()


def same(a: Batch, b: Batch) -> bool:
    def flat(batch: Batch) -> list[torch.Tensor]:
        values = [getattr(batch, f.name) for f in fields(batch)]
        return [t for v in values if v is not None for t in (v if isinstance(v, list) else [v])]

    return all(torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)) for x, y in zip(flat(a), flat(b), strict=True))
