"""The DALI loader: reading, decoding, windows and id maps run in DALI's threads (or on the GPU), colour in torch.

One pipeline serves both devices. A window is fn.resize with a region of interest, so that cropping, flipping (the
region's ends exchanged) and resizing are one pass; an id map goes through the same region with nearest neighbour.
Where all decoded images fit into ``memory_mb``, they are decoded once and stay in memory with halved copies
(mip levels): a view is then cut from the smallest level that is still no smaller than the view, so that the resize
reads at most four pixels for each one it writes. A patch is cut from the image itself; its reduced copy is made in
torch (``photometric.with_reduced``). DALI's own random operators are not used: what happens to an image is drawn on
the host, which is what makes resuming exact.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import nvidia.dali as dali
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fgfast.data.background import Producer
from fgfast.data.base import BatchPlan, Loader, replace_failed
from fgfast.data.manifest import convert, read_image, shown_size
from fgfast.data.maps import ABSENT, map_path, read_map
from fgfast.data.photometric import photometric, with_reduced
from fgfast.data.rearrange import rearrange
from fgfast.data.sampling import Draw
from fgfast.data.views import Batch

fn: Any = dali.fn  # DALI makes its operators and constants at run time: no checker can see them
types: Any = dali.types
Pipeline: Any = dali.pipeline.Pipeline

_LOST: list = []
"""Pipelines that failed: taking one down while its threads still decode ends the process (DALI 2.4)."""


@dataclass
class _Job:
    """One batch between being fed to the pipeline and being delivered; keeps the fed arrays alive."""

    epoch: int
    batch: int
    rows: np.ndarray
    valid: np.ndarray
    draws: list[Draw]
    boxes: np.ndarray
    inputs: dict[str, list[np.ndarray] | np.ndarray] = field(default_factory=dict)


class DaliLoader(Loader):
    """See ``make_loader``; ``memory_mb`` bounds the decoded images kept in memory, 0 keeps none."""

    backend = "dali"

    def __init__(
        self, plan: BatchPlan, *, device: torch.device, threads: int, prefetch: int = 2, memory_mb: int = 1024
    ) -> None:
        """Build nothing yet: pipeline and thread start with the first iteration."""
        super().__init__(plan)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._threads = threads
        self._depth = max(1, prefetch)
        self._files = list(plan.records.files)
        self._sides = [crop.size for crop in plan.spec.crops]
        self._whole = plan.spec.whole
        pixels = int(np.prod(plan.records.sizes, axis=1, dtype=np.int64).sum()) * 4  # RGB and a third for the levels
        # A pass in file order reads each image once: there is nothing to keep.
        self._keep = plan.shuffle and pixels <= memory_mb * 2**20
        self._stamps = list(plan.records.stamps)
        self._levels: list[list[np.ndarray]] = []
        self._maps: list[np.ndarray] = []
        self._maps_read: set[int] = set()
        self._pipe: Pipeline | None = None
        self._jobs: deque[_Job] = deque()
        self._producer: Producer[tuple[_Job, list[Tensor]]] | None = None

    # ---- one epoch -------------------------------------------------------------------------------------------------

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        for batch in range(start, len(self)):
            if self._producer is None or self._producer.next != (epoch, batch):
                self._restart(epoch, batch)
            assert self._producer is not None
            yield self._deliver(*self._producer.get())
        if not self.plan.shuffle:  # nothing is made ahead for a next pass, which may never come
            self._stop()

    def _restart(self, epoch: int, batch: int) -> None:
        self._stop()
        self._producer = Producer(self._run(epoch, batch), (epoch, batch), len(self), self._depth)

    def _stop(self) -> None:
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def load_state_dict(self, state: dict) -> None:
        """Go to where ``state`` was taken; what was prefetched is thrown away."""
        self._stop()
        super().load_state_dict(state)

    def close(self) -> None:
        """Stop the thread and free pipeline and images."""
        self._stop()
        self._pipe, self._levels, self._maps = None, [], []
        self._jobs.clear()

    def _run(self, epoch: int, start: int) -> Iterator[tuple[_Job, list[Tensor]]]:
        """Everything that happens in the background thread: feed the pipeline ahead, hand its outputs on."""
        if self._keep and not self._levels:
            self._decode_all()
        while self._pipe is not None and self._jobs:  # scheduled for an iteration that was given up
            try:
                self._pipe.outputs()
                self._jobs.popleft()
            except RuntimeError as error:
                self._recover(error)
        schedule = self._schedule(epoch, start)
        ahead: deque[tuple[int, int]] = deque()
        while True:
            while len(ahead) < self._depth:
                following = next(schedule, None)
                if following is None:
                    break
                ahead.append(following)
            if not ahead:
                return
            try:
                self._feed(ahead)
                done = self._outputs()
            except RuntimeError as error:
                self._recover(error)
                continue
            ahead.popleft()
            yield done

    def _schedule(self, epoch: int, start: int) -> Iterator[tuple[int, int]]:
        while True:
            yield from ((epoch, batch) for batch in range(start, len(self)))
            if not self.plan.shuffle:
                return
            epoch, start = epoch + 1, 0

    # ---- feeding the pipeline --------------------------------------------------------------------------------------

    def _feed(self, ahead: deque[tuple[int, int]]) -> None:
        """Schedule what is in ``ahead`` and not yet in the pipeline."""
        first = self._pipe is None
        if self._pipe is None:
            self._pipe = self._build()
        waiting = list(ahead)[len(self._jobs) :]
        for epoch, batch in waiting:
            self._push(self._job(epoch, batch))
            if not first:
                self._pipe.schedule_run()
        if first:  # the first call runs the pipeline as often as its queue is deep
            for _ in range(self._depth - len(waiting)):
                self._push(self._job(*ahead[-1]))
                ahead.append(ahead[-1])
            self._pipe.schedule_run()

    def _push(self, job: _Job) -> None:
        assert self._pipe is not None
        for name, values in job.inputs.items():
            self._pipe.feed_input(name, values)
        self._jobs.append(job)

    def _job(self, epoch: int, batch: int) -> _Job:
        plan = self.plan
        rows, valid = plan.rows(epoch, batch)
        if not self._keep:
            self._look(rows)
            while set(rows.tolist()) & self._failed:
                rows, valid = replace_failed(rows, valid, self._failed, len(plan.records))
                self._look(rows)
        else:
            rows, valid = replace_failed(rows, valid, self._failed, len(plan.records))
        draws = plan.draws(epoch, batch, rows)
        boxes = [draw.boxes(plan.records.sizes[rows]) for draw in draws]
        job = _Job(epoch, batch, rows, valid, draws, np.stack(boxes, 1) if boxes else np.zeros((len(rows), 0, 5), "f4"))
        job.boxes[:, plan.spec.moved] = np.nan
        windows = [draw.window.astype(np.float32) for draw in job.draws]
        flips = [draw.flip for draw in job.draws]
        if self._whole is not None:
            windows.append(plan.whole(rows))
            flips.append(np.zeros(len(rows), bool))
        if not self._keep:
            job.inputs["files"] = [_text(self._files[row]) for row in rows]
            if plan.maps is not None:
                job.inputs["map_files"] = [_text(str(map_path(plan.maps, plan.rel(row)))) for row in rows]
        elif plan.maps is not None:
            job.inputs["maps"] = [self._maps[row] for row in rows]
        if plan.spec.patch is not None:
            corners, side = plan.corners(epoch, batch, rows), plan.spec.patch.size
            if self._keep:
                job.inputs["patch"] = [
                    np.ascontiguousarray(self._levels[row][0][y : y + side, x : x + side])
                    for row, (y, x) in zip(rows, corners, strict=True)
                ]
            else:
                job.inputs["corner"] = corners.astype(np.int32)
        for v, (window, flip) in enumerate(zip(windows, flips, strict=True)):
            shrink = np.ones((len(rows), 1), np.float32)
            if self._keep:
                shrink, job.inputs[f"pixels{v}"] = self._pick(rows, window, [*self._sides, self._whole][v] or 1)
            job.inputs[f"low{v}"], job.inputs[f"high{v}"] = _region(window / shrink, flip)
            if self._has_map(v):
                assert plan.map_sizes is not None
                scale = plan.map_sizes[rows] / plan.records.sizes[rows].astype(np.float64)
                job.inputs[f"map_low{v}"], job.inputs[f"map_high{v}"] = _region(
                    window * np.concatenate([scale, scale], 1), flip
                )
        return job

    def _pick(self, rows: np.ndarray, window: np.ndarray, side: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The smallest kept copy of each image whose window is no smaller than the view."""
        level = np.log2(np.maximum(window[:, 2:].min(1) / side, 1)).astype(np.int64)
        level = np.minimum(level, [len(self._levels[row]) - 1 for row in rows])
        shrink = (2.0**level)[:, None].astype(np.float32)
        return shrink, [self._levels[row][at] for row, at in zip(rows, level, strict=True)]

    def _has_map(self, view: int) -> bool:
        return self.plan.spec.masks if view < len(self._sides) else self.plan.spec.whole_masks

    def _build(self) -> Pipeline:
        gpu = self.device.type == "cuda"
        pipe = Pipeline(
            self.plan.batch_size,
            self._threads,
            self.device.index if gpu else None,
            prefetch_queue_depth=self._depth,
        )
        sides = self._sides if self._whole is None else [*self._sides, self._whole]
        patch = self.plan.spec.patch

        def put(name: str, layout: str | None = None) -> Any:
            return fn.external_source(name=name, layout=layout, no_copy=not gpu)

        with pipe:
            outputs = []
            if not self._keep:
                encoded = fn.io.file.read(put("files"))
                pixels = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", output_type=types.RGB)
            if self.plan.maps is not None:
                if self._keep:
                    maps = put("maps", "HWC")
                else:
                    maps = fn.decoders.image(fn.io.file.read(put("map_files")), output_type=types.GRAY)
                maps = maps.gpu() if gpu else maps
            for v, side in enumerate(sides):
                if self._keep:
                    pixels = put(f"pixels{v}", "HWC")
                    pixels = pixels.gpu() if gpu else pixels
                outputs.append(
                    fn.resize(
                        pixels,
                        size=[side, side],
                        roi_start=put(f"low{v}"),
                        roi_end=put(f"high{v}"),
                        interp_type=types.INTERP_LINEAR,
                        antialias=True,
                    )
                )
            for v, side in enumerate(sides):
                if self._has_map(v):
                    outputs.append(
                        fn.resize(
                            maps,
                            size=[side, side],
                            roi_start=put(f"map_low{v}"),
                            roi_end=put(f"map_high{v}"),
                            interp_type=types.INTERP_NN,
                        )
                    )
            if patch is not None:
                if self._keep:
                    pixels = put("patch", "HWC")
                    window = pixels.gpu() if gpu else fn.copy(pixels)  # the fed arrays go when the run is done
                else:
                    window = fn.slice(pixels, put("corner"), [patch.size, patch.size], axes=[0, 1])
                outputs.append(window)
            pipe.set_outputs(*outputs)
        pipe.build()
        return pipe

    # ---- taking its outputs ----------------------------------------------------------------------------------------

    def _outputs(self) -> tuple[_Job, list[Tensor]]:
        assert self._pipe is not None
        tensors = [from_dlpack(out.as_tensor()) for out in self._pipe.outputs()]
        job = self._jobs.popleft()
        job.inputs = {}
        if self.device.type == "cpu":
            tensors = self._finish(job, tensors)
        return job, tensors

    def _finish(self, job: _Job, tensors: list[Tensor]) -> list[Tensor]:
        """What follows the resize; on the CPU in the background thread, on a GPU in the stream of the caller."""
        spec = self.plan.spec
        views = len(self._sides) + (self._whole is not None)
        pair = [] if spec.patch is None else with_reduced(tensors.pop().permute(0, 3, 1, 2), spec.patch.reduce)
        images, labels = tensors[:views], [x.squeeze(-1).to(torch.int64) for x in tensors[views:]]
        labels = [x.masked_fill_(x == ABSENT, -1) for x in labels]
        for v, draw in enumerate(job.draws):
            images[v], moved = rearrange(images[v], draw, labels[v] if spec.masks else None)
            if moved is not None:
                labels[v] = moved
        draws = [*job.draws, None][:views]
        images = [photometric(x, draw, spec.mean, spec.std) for x, draw in zip(images, draws, strict=True)]
        return [*images, *labels, *pair]

    def _deliver(self, job: _Job, tensors: list[Tensor]) -> Batch:
        plan = self.plan
        if self.device.type != "cpu":
            tensors = self._finish(job, tensors)
        reduced, patch = (tensors.pop(), tensors.pop()) if plan.spec.patch is not None else (None, None)
        views = len(self._sides)
        at = views + (self._whole is not None)
        index = plan.records.index[job.rows]
        batch = Batch(
            views=tensors[:views],
            boxes=torch.from_numpy(job.boxes),
            labels=tensors[at : at + views] if plan.spec.masks else [],
            whole=tensors[views] if self._whole is not None else None,
            whole_labels=tensors[-1] if plan.spec.whole_masks else None,
            target=torch.from_numpy(plan.records.images.targets[index]),
            index=torch.from_numpy(index),
            valid=torch.from_numpy(job.valid),
            patch=patch,
            reduced=reduced,
        )
        return batch if self.device.type == "cpu" else batch.to(self.device)

    # ---- images kept in memory, and files that break -------------------------------------------------------------

    def _decode_all(self) -> None:
        """Decode every image once; PIL's JPEG pixels equal DALI's, and a broken file is an ordinary error there."""
        from PIL import Image

        sides = [*self._sides, *([self._whole] if self._whole is not None else [])]
        smallest = min(sides, default=2**31)  # a patch alone is cut from the image itself

        def load(row: int) -> list[np.ndarray] | OSError:
            try:
                levels = [np.ascontiguousarray(read_image(self._files[row]))]
            except OSError as error:
                return error
            image = Image.fromarray(levels[0])
            while min(image.size) >= 2 * smallest:
                image = image.reduce(2)
                levels.append(np.array(image))
            return levels

        with ThreadPoolExecutor(self._threads) as pool:
            loaded = list(pool.map(load, range(len(self._files))))
        for row, levels in enumerate(loaded):
            if isinstance(levels, OSError):
                self._fail(row, str(levels))
            else:
                self._resized(row, levels[0].shape[0], levels[0].shape[1])
        if self.plan.maps is not None:
            self._maps = [read_map(self.plan.maps, self.plan.rel(row))[:, :, None] for row in range(len(self._files))]
        self._levels = [[] if isinstance(levels, OSError) else levels for levels in loaded]

    def _look(self, rows: np.ndarray) -> None:
        """Decode on the host what was never decoded or has changed, before DALI gets it, and each map once.

        DALI 2.4 does not only raise on a broken file: now and then it ends the process (seen in one of three runs).
        """
        for row in {int(row) for row in rows} - self._failed:
            try:
                stat = os.stat(self._files[row])
                if self._stamps[row] != (stat.st_size, stat.st_mtime_ns):
                    height, width = read_image(self._files[row]).shape[:2]
                    self._resized(row, height, width)
                    self._stamps[row] = (stat.st_size, stat.st_mtime_ns)
            except OSError as error:
                self._fail(row, str(error))
            if self.plan.maps is not None and row not in self._maps_read:
                read_map(self.plan.maps, self.plan.rel(row))
                self._maps_read.add(row)

    def _resized(self, row: int, height: int, width: int) -> None:
        self.plan.records.sizes[row] = shown_size(self.plan.records.images, height, width)

    def _recover(self, error: RuntimeError) -> None:
        """The pipeline is lost: find the file, leave it out, and build a new pipeline for the same batches."""
        rows = sorted({int(row) for job in self._jobs for row in job.rows})
        _LOST.append(self._pipe)
        self._pipe = None
        self._jobs.clear()
        if self._keep:  # no file is read any more, so no file is at fault
            raise error
        self._diagnose(rows, error)

    def _diagnose(self, rows: list[int], error: RuntimeError) -> None:
        found = False
        for row in rows:
            try:
                read_image(self._files[row])
                if self.plan.maps is not None:
                    read_map(self.plan.maps, self.plan.rel(row))
            except OSError as reason:
                self._fail(row, str(reason))
                found = True
        if not found:  # PIL is more lenient than DALI: what DALI alone refuses is converted
            for row in rows:
                if not _decodes(self._files[row]):
                    self._files[row] = convert(self._files[row])
                    found = True
        if not found:
            raise RuntimeError(f"DALI failed on a batch in which every file decodes alone: {_first(error)}") from error


def _region(window: np.ndarray, flip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end (y, x) of a window (y, x, h, w); a flip exchanges the ends in x."""
    low, high = window[:, :2], window[:, :2] + window[:, 2:]
    start = np.stack([low[:, 0], np.where(flip, high[:, 1], low[:, 1])], 1)
    end = np.stack([high[:, 0], np.where(flip, low[:, 1], high[:, 1])], 1)
    return start.astype(np.float32), end.astype(np.float32)


def _text(path: str) -> np.ndarray:
    return np.frombuffer(path.encode(), np.uint8)


def _first(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "rror" in line]
    return lines[0] if lines else str(error)


def _decodes(file: str) -> bool:
    pipe = Pipeline(1, 1, None, prefetch_queue_depth=1)
    with pipe:
        encoded = fn.io.file.read(fn.external_source(name="files"))
        pipe.set_outputs(fn.decoders.image(encoded, output_type=types.RGB))
    pipe.build()
    try:
        pipe.feed_input("files", [_text(file)])
        pipe.schedule_run()
        pipe.outputs()
        return True
    except RuntimeError:
        _LOST.append(pipe)
        return False
