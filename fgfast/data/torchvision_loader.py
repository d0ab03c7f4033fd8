"""The torchvision loader: PIL and transforms.v2 in worker processes, for platforms without a wheel of DALI.

It applies the same random numbers as the DALI loader (same windows, flips and factors), with torchvision's formulas
for colour and blur; only the hue (HSV instead of YIQ) and the rounding to 8 bits between the steps differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fgfast.data.base import Loader
from fgfast.data.manifest import reason_of, shown_size
from fgfast.data.maps import ABSENT, read_map
from fgfast.data.photometric import with_reduced
from fgfast.data.plan import BatchPlan
from fgfast.data.read_ahead import ReadAhead
from fgfast.data.rearrange import rearrange
from fgfast.data.sampling import Draw
from fgfast.data.views import Batch, warp_labels
from fgfast.errors import UserError
from fgfast.interrupt import obey_parent_alone


class TorchvisionLoader(Loader):
    """See ``make_loader``; ``threads`` worker processes make one batch each at a time."""

    backend = "torchvision"

    def __init__(self, plan: BatchPlan, *, device: torch.device, threads: int, prefetch: int = 2) -> None:
        """Set up the worker processes; they start with the first iteration."""
        super().__init__(plan)
        self.device = device
        self._order = _Order()
        self._read_ahead = ReadAhead(plan)
        self._waiting = threads * max(1, prefetch)  # batches that the workers make ahead
        self._loader = DataLoader(
            _Batches(plan),
            batch_size=None,
            sampler=self._order,
            num_workers=threads,
            prefetch_factor=max(1, prefetch),
            persistent_workers=True,
            pin_memory=device.type == "cuda",
            collate_fn=_identity,
            worker_init_fn=_obey_parent_alone,
        )

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        self._retry(epoch)
        failed = tuple(self._failed_rows())
        self._order.keys = [(epoch, batch, failed) for batch in range(start, len(self))]
        self._read_ahead.ask(epoch, start)
        for number, item in enumerate(self._loader, start):
            self._read_ahead.ask(epoch, number + self._waiting)
            if isinstance(item, UserError):
                raise item
            batch, broken = item
            for row, reason, passing in broken:
                if row not in self._failed:
                    self._exclude(row, reason, passing)
            yield batch if self.device.type == "cpu" else batch.to(self.device)

    def close(self) -> None:
        """End the worker processes."""
        self._order.keys = []
        self._read_ahead.close()
        del self._loader


_Key = tuple[int, int, tuple[int, ...]]


class _Order(Sampler):
    """The batches of the next epoch; the loader sets ``keys`` before each epoch."""

    def __init__(self) -> None:
        self.keys: list[_Key] = []

    def __iter__(self) -> Iterator[_Key]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def _identity(item: Any) -> Any:
    return item


def _obey_parent_alone(_worker: int) -> None:
    obey_parent_alone()


class _Batches(Dataset):
    """Full batches by (epoch, batch, failed rows)."""

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan
        self.epoch = -1
        self.failed: dict[int, tuple[str, bool]] = {}  # in this epoch

    def __getitem__(self, key: _Key) -> tuple[Batch, list[tuple[int, str, bool]]] | UserError:
        epoch, number, known = key
        if epoch != self.epoch:
            self.epoch, self.failed = epoch, {}
        self.failed |= dict.fromkeys(known, ("", False))
        images: dict[int, Tensor] = {}

        def read(rows: np.ndarray) -> None:
            for row in map(int, rows):
                if row not in images and row not in self.failed:
                    try:
                        images[row] = torch.from_numpy(np.array(self.plan.pixels(row)))
                    except OSError as error:
                        self.failed[row] = reason_of(error)

        try:
            rows, valid = self.plan.fill(epoch, number, self.failed, read)
            black = torch.zeros(*self.plan.black_size(), 3, dtype=torch.uint8)
            pixels = [images.get(int(row), black) for row in rows]
            for row, image in zip(rows, pixels, strict=True):
                self.plan.records.sizes[row] = shown_size(self.plan.records.images, *image.shape[:2])  # as it is now
            broken = [(row, *self.failed[row]) for row in self.failed.keys() - set(known)]
            return self._batch(epoch, number, rows, valid, [p.permute(2, 0, 1) for p in pixels]), broken
        except UserError as error:  # raising it here would show the user a traceback of the worker
            return error

    def _batch(self, epoch: int, number: int, rows: np.ndarray, valid: np.ndarray, images: list[Tensor]) -> Batch:
        plan, spec = self.plan, self.plan.spec
        draws = plan.draw_crops(epoch, number, rows)
        sizes = plan.records.sizes[rows]
        boxes = torch.zeros(len(rows), len(draws), 5)
        for v, draw in enumerate(draws):
            boxes[:, v] = torch.from_numpy(draw.boxes(sizes))
        maps = []
        if plan.maps is not None:
            assert plan.map_sizes is not None
            for row in rows:
                if int(row) in self.failed:  # shown black: its map may be lost with it
                    maps.append(torch.full((1, *plan.map_sizes[row].tolist()), -1))
                    continue
                ids = torch.from_numpy(read_map(plan.maps, plan.relative_path(row), plan.map_sizes[row])).long()
                maps.append(ids.masked_fill_(ids == ABSENT, -1)[None])  # [1, H, W]
        views, labels = [], []
        for v, (crop, draw) in enumerate(zip(spec.crops, draws, strict=True)):
            warped = [warp_labels(m, boxes[i : i + 1, v], crop.size) for i, m in enumerate(maps)] if spec.masks else []
            cropped = torch.stack([_crop(x, draw, i, crop.size, spec.interpolation) for i, x in enumerate(images)])
            pixels, view_labels = rearrange(cropped.permute(0, 2, 3, 1), draw, torch.cat(warped) if warped else None)
            views.append(self._stack([_change_colours(x, draw, i) for i, x in enumerate(pixels.permute(0, 3, 1, 2))]))
            labels += [] if view_labels is None else [view_labels]
        boxes[:, spec.without_box] = torch.nan
        whole, whole_labels = None, None
        if spec.whole is not None:
            windows = plan.whole_windows(rows)
            pairs = zip(images, windows, strict=True)
            whole = self._stack([_crop_and_resize(x, window, spec.whole, spec.interpolation) for x, window in pairs])
            if spec.whole_masks:
                full = np.concatenate([windows / np.concatenate([sizes, sizes], 1), np.zeros((len(rows), 1))], 1)
                box = torch.from_numpy(full.astype(np.float32))
                whole_labels = torch.cat([warp_labels(m, box[i : i + 1], spec.whole) for i, m in enumerate(maps)])
        patch, reduced = None, None
        if spec.patch is not None:
            corners, side = plan.draw_corners(epoch, number, rows), spec.patch.size
            patches = [x[:, i : i + side, j : j + side] for x, (i, j) in zip(images, corners, strict=True)]
            patch, reduced = with_reduced(torch.stack(patches), spec.patch.reduce)
        index = plan.records.index[rows]
        return Batch(
            views=views,
            boxes=boxes,
            labels=labels,
            whole=whole,
            whole_labels=whole_labels,
            target=torch.from_numpy(plan.records.images.targets[index]),
            index=torch.from_numpy(index),
            valid=torch.from_numpy(valid),
            patch=patch,
            reduced=reduced,
        )

    def _stack(self, images: list[Tensor]) -> Tensor:
        """A batch of uint8 images, normalised, float32 [B, 3, S, S], channels_last."""
        batch = F.to_dtype(torch.stack(images), torch.float32, scale=True)
        mean, std = list(self.plan.spec.mean), list(self.plan.spec.std)
        return F.normalize(batch, mean, std).contiguous(memory_format=torch.channels_last)


def _crop_and_resize(image: Tensor, window: np.ndarray, size: int, interpolation: str) -> Tensor:
    y, x, h, w = (round(float(value)) for value in window)
    mode = InterpolationMode(interpolation)
    return F.resized_crop(image, y, x, max(1, h), max(1, w), [size, size], mode, antialias=True)


def _crop(image: Tensor, draw: Draw, i: int, size: int, interpolation: str) -> Tensor:
    """The window of view ``i``, resized and perhaps flipped, uint8 [3, size, size]."""
    view = _crop_and_resize(image, draw.window[i], size, interpolation)
    return F.horizontal_flip(view) if draw.flip[i] else view


def _change_colours(view: Tensor, draw: Draw, i: int) -> Tensor:
    """View ``i``, uint8 [3, size, size], after gamma, colour jitter, blur and solarise."""
    if draw.gamma is not None:
        view = F.adjust_gamma(view, float(draw.gamma[i]))
    brightness, contrast, saturation, hue = (float(value) for value in draw.colour[i])
    if (brightness, contrast, hue) != (1.0, 1.0, 0.0) or saturation not in (0.0, 1.0):
        view = F.adjust_brightness(view, brightness)
        view = F.adjust_contrast(view, contrast)
        view = F.adjust_saturation(view, saturation)
        view = F.adjust_hue(view, hue)
    elif saturation == 0.0:
        view = F.rgb_to_grayscale(view, 3)
    sigma = float(draw.sigma[i])
    if sigma > 0:
        radius = min(math.ceil(3 * sigma), view.shape[-1] - 1)
        view = F.gaussian_blur(view, [2 * radius + 1] * 2, [sigma, sigma])
    return F.solarize(view, 128) if draw.solarize[i] else view
