"""Patches: a window at the original resolution and its bicubic reduction, from every loader."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fgfast.data.layouts import ImageSet, open_images
from fgfast.data.loader import make_loader
from fgfast.data.views import Batch, Crop, Patch, ViewSpec
from fgfast.errors import UserError
from tests.data.conftest import smooth
from tests.data.loading import VARIANTS


def batches(images: ImageSet, spec: ViewSpec, n: int, variant: str, start: dict | None = None, **kw) -> list[Batch]:
    backend, memory_mb = VARIANTS[variant]
    pytest.importorskip("nvidia.dali" if backend == "dali" else "torchvision")
    loader = make_loader(images, spec, n, backend=backend, memory_mb=memory_mb, threads=1, **kw)
    try:
        if start is not None:
            loader.load_state_dict(start)
        return list(loader)
    finally:
        loader.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_patch_holds_the_pixels_of_a_window(coded_set: ImageSet, variant: str) -> None:
    """Red is the column and green the row of each pixel in the image; windows differ between images."""
    corners = set()
    for batch in batches(coded_set, ViewSpec(patch=Patch(32, 4)), 6, variant):
        assert batch.patch is not None
        assert batch.patch.dtype == torch.float32
        assert batch.patch.is_contiguous(memory_format=torch.channels_last)
        pixels = batch.patch * 255
        for i in range(len(batch)):
            x, y = round(float(pixels[i, 0, 0, 0])), round(float(pixels[i, 1, 0, 0]))
            with Image.open(coded_set.root / coded_set.paths[batch.index[i]]) as image:
                assert x + 32 <= image.width
                assert y + 32 <= image.height
            step = torch.arange(32.0)
            torch.testing.assert_close(pixels[i, 0], (x + step)[None, :].expand(32, 32), rtol=0, atol=1e-3)
            torch.testing.assert_close(pixels[i, 1], (y + step)[:, None].expand(32, 32), rtol=0, atol=1e-3)
            corners.add((x, y))
    assert len(corners) > 9


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_copy_is_the_bicubic_reduction_of_the_patch(tmp_path: Path, variant: str) -> None:
    """At most half a value from torch's, and from PIL's by its two roundings, also at the border."""
    rng = np.random.default_rng(0)
    for i in range(6):  # hard edges over colours, for overshoot and clipping
        noise = rng.integers(0, 256, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(np.where(rng.random((64, 80, 1)) < 0.3, noise, np.asarray(smooth(i, 64, 80)))).save(
            tmp_path / f"{i}.png"
        )
    (batch,) = batches(open_images(tmp_path), ViewSpec(patch=Patch(48, 4)), 6, variant)
    assert batch.patch is not None
    assert batch.reduced is not None
    assert batch.reduced.shape == (6, 3, 12, 12)
    small = batch.reduced * 255
    torch.testing.assert_close(small, small.round(), rtol=0, atol=1e-4)
    exact = F.interpolate(batch.patch.double() * 255, size=(12, 12), mode="bicubic", antialias=True).clamp(0, 255)
    assert (small - exact).abs().max() < 0.501
    pixels = (batch.patch * 255).round().byte().permute(0, 2, 3, 1).numpy()
    pil = np.stack([np.asarray(Image.fromarray(p).resize((12, 12), Image.Resampling.BICUBIC)) for p in pixels])
    off = (small - torch.from_numpy(pil).permute(0, 3, 1, 2)).abs()
    assert off.max() < 2.5
    assert off.mean() < 0.3


def test_loaders_deliver_the_same_and_resuming_is_exact(coded_set: ImageSet) -> None:
    """All variants are bit-identical; an epoch that resumes at its second batch has the same patches."""
    spec = ViewSpec(crops=(Crop(size=16),), patch=Patch(64, 2))
    runs = [batches(coded_set, spec, 4, variant, seed=3) for variant in VARIANTS]
    backend, memory_mb = VARIANTS["dali_kept"]
    loader = make_loader(coded_set, spec, 4, backend=backend, memory_mb=memory_mb, threads=1, seed=3)
    next(iter(loader))
    state = loader.state_dict()
    loader.close()
    runs.append([runs[0][0], *batches(coded_set, spec, 4, "dali_kept", state, seed=3)])
    for run in runs[1:]:
        for a, b in zip(runs[0], run, strict=True):
            assert a.patch is not None
            assert b.patch is not None
            assert torch.equal(a.patch, b.patch)
            assert torch.equal(a.reduced, b.reduced)  # type: ignore[arg-type]


def test_crops_are_the_same_with_and_without_a_patch(coded_set: ImageSet) -> None:
    crops = (Crop(size=16, blur=0.5),)
    plain, both = (batches(coded_set, ViewSpec(crops=crops, patch=p), 12, "dali_kept") for p in (None, Patch(32, 4)))
    assert torch.equal(plain[0].views[0], both[0].views[0])
    assert plain[0].patch is None


def test_padding_and_moving(coded_set: ImageSet) -> None:
    (*_, last) = batches(coded_set, ViewSpec(patch=Patch(32, 4)), 5, "dali_kept")
    assert last.patch is not None
    assert (len(last), int(last.valid.sum()), last.patch.shape[0]) == (5, 2, 5)
    assert last.to("meta").patch.device.type == "meta"  # type: ignore[union-attr]


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_smaller_than_the_patch_are_refused(coded_set: ImageSet, variant: str) -> None:
    """The error names the image, its size, the number of such images and a size that fits."""
    with pytest.raises(UserError, match=r"a/03\.png is 80 x 64 pixels.*96 x 96 \(as are 3 of 12.*--size 64"):
        batches(coded_set, ViewSpec(patch=Patch(96, 4)), 4, variant)


@pytest.mark.parametrize("kwargs", [{"size": 30}, {"size": 2}, {"reduce": 0}])
def test_a_patch_that_cannot_be_reduced_is_refused(kwargs: dict) -> None:
    with pytest.raises(ValueError, match=r"Patch\.size"):
        Patch(**kwargs)
