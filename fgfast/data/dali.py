"""The DALI loader: reading, decoding, windows and id maps run in DALI's threads (or on the GPU), colour in torch.

One pipeline serves both devices. A window is fn.resize with a region of interest: cropping, flipping (the region's ends
exchanged) and resizing are one pass; an id map goes through the same region with nearest neighbour. If all decoded
images fit into ``memory_mb``, they are decoded once and stay in memory with halved copies (mip levels): a view is then
cropped from the smallest level whose window is no smaller than the view, and the resize reads at most four pixels per
pixel that it writes. A patch is cropped from the full resolution; its downscaled copy is computed in torch
(``photometric.with_reduced``). DALI's random operators are not used: all random numbers are drawn on the host, which
makes resuming exact.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fgfast.data.background import Producer
from fgfast.data.base import BatchPlan, Loader
from fgfast.data.dali_pipeline import (
    FAILED,
    Job,
    Pipeline,
    build_pipeline,
    decodes,
    feed_of,
    feed_of_map,
    fetch,
    first_error,
    halved,
    has_map,
    stored_corners,
    window_corners,
)
from fgfast.data.decode import TURNS, read_image
from fgfast.data.manifest import Verdict, black_image, convert, file_stamp, reason_of, shown_size
from fgfast.data.maps import ABSENT, is_packed, map_file, read_map
from fgfast.data.photometric import photometric, with_reduced
from fgfast.data.read_ahead import ReadAhead
from fgfast.data.rearrange import rearrange
from fgfast.data.slices import File, Slice
from fgfast.data.views import Batch


class DaliLoader(Loader):
    """See ``make_loader``; ``memory_mb`` limits the decoded images in memory, 0 stores none."""

    backend = "dali"

    def __init__(
        self, plan: BatchPlan, *, device: torch.device, threads: int, prefetch: int = 2, memory_mb: int = 1024
    ) -> None:
        """Prepare the state; pipeline and thread start with the first iteration."""
        super().__init__(plan)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self._threads = threads
        self._depth = max(1, prefetch)
        self._files: list[File] = list(plan.records.files)
        self._sides = [crop.size for crop in plan.spec.crops]
        self._whole = plan.spec.whole
        whole = [] if self._whole is None else [self._whole]
        self._smallest = min([*self._sides, *whole], default=2**31)  # without crops only the full resolution is needed
        pixels = int(np.prod(plan.records.sizes, axis=1, dtype=np.int64).sum()) * 4  # RGB and a third for the levels
        # A pass in file order reads each image once: there is nothing to store.
        self._in_memory = plan.shuffle and pixels <= memory_mb * 2**20
        self._stamps = list(plan.records.stamps)
        self._by_content = plan.records.images.slices is not None or (plan.maps is not None and is_packed(plan.maps))
        self._contents: dict[int, np.ndarray] = {}  # of the batch that is being made: DALI reads no slices
        self._pool = ThreadPoolExecutor(threads)
        self._read_ahead = ReadAhead(plan)
        stored = plan.records.orientations  # what is kept in memory is upright
        self._orientations = np.ones_like(stored) if self._in_memory else stored.copy()
        self._levels: list[list[np.ndarray]] = []
        self._maps: list[np.ndarray] = []
        self._checked_maps: dict[int, tuple[int, int] | None] = {}
        self._pipe: Pipeline | None = None
        self._jobs: deque[Job] = deque()
        self._producer: Producer[tuple[Job, list[Tensor]]] | None = None

    # ---- one epoch -------------------------------------------------------------------------------------------------

    def _batches(self, epoch: int, start: int) -> Iterator[Batch]:
        for batch in range(start, len(self)):
            if self._producer is None or self._producer.next != (epoch, batch):
                self._restart(epoch, batch)
            assert self._producer is not None
            yield self._deliver(*self._producer.get())
        if not self.plan.shuffle:  # no batches are prefetched for a next pass, which may never come
            self._stop()

    def _restart(self, epoch: int, batch: int) -> None:
        self._stop()
        self._producer = Producer(self._produce(epoch, batch), (epoch, batch), len(self), self._depth)

    def _stop(self) -> None:
        if self._producer is not None:
            self._producer.close()
            self._producer = None

    def load_state_dict(self, state: dict) -> None:
        """Restore the position that ``state_dict`` returned; prefetched batches are discarded."""
        self._stop()
        super().load_state_dict(state)

    def close(self) -> None:
        """Stop the thread and free pipeline and images."""
        self._stop()
        self._pipe, self._levels, self._maps = None, [], []
        self._jobs.clear()
        self._pool.shutdown(wait=False)
        self._read_ahead.close()

    def _produce(self, epoch: int, start: int) -> Iterator[tuple[Job, list[Tensor]]]:
        """The work of the background thread: feed the pipeline ahead and yield its outputs."""
        if self._in_memory and not self._levels:
            self._decode_all()
        while self._pipe is not None and self._jobs:  # scheduled for an iteration that was abandoned
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
                done = self._take_outputs()
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
        """Schedule the batches of ``ahead`` that are not yet in the pipeline."""
        first = self._pipe is None
        if self._pipe is None:
            self._pipe = build_pipeline(
                self.plan.spec, self.plan.batch_size, device=self.device, threads=self._threads, depth=self._depth,
                in_memory=self._in_memory, contents=self._by_content,
            )  # fmt: skip
        waiting = list(ahead)[len(self._jobs) :]
        for epoch, batch in waiting:
            self._push(self._make_job(epoch, batch))
            if not first:
                self._pipe.schedule_run()
        if first:  # the first call runs the pipeline as often as its queue is deep
            for _ in range(self._depth - len(waiting)):
                self._push(self._make_job(*ahead[-1]))
                ahead.append(ahead[-1])
            self._pipe.schedule_run()

    def _push(self, job: Job) -> None:
        assert self._pipe is not None
        for name, values in job.inputs.items():
            self._pipe.feed_input(name, values)
        self._jobs.append(job)

    def _make_job(self, epoch: int, batch: int) -> Job:
        plan = self.plan
        self._retry(epoch)
        if not self._in_memory:
            self._read_ahead.ask(epoch, batch)
        self._contents = {}
        rows, valid = plan.fill(epoch, batch, self._failed, self._read)
        for row in {int(row) for row in rows[~valid]} & self._failed.keys():
            self._show_black(row)
        draws = plan.draw_crops(epoch, batch, rows)
        boxes = [np.zeros((len(rows), 0, 5), "f4"), *(draw.boxes(plan.records.sizes[rows])[:, None] for draw in draws)]
        orientations = self._orientations[rows]
        job = Job(epoch, batch, rows, valid, draws, np.concatenate(boxes, 1), TURNS[orientations, 0])
        full = np.stack([plan.records.heights[rows], plan.records.sizes[rows, 1]], 1)
        stored = partial(stored_corners, sizes=full, orientations=orientations)
        job.boxes[:, plan.spec.without_box] = np.nan
        windows = [draw.window.astype(np.float32) for draw in job.draws]
        flips = [draw.flip for draw in job.draws]
        if self._whole is not None:
            windows.append(plan.whole_windows(rows))
            flips.append(np.zeros(len(rows), bool))
        if not self._in_memory:
            given, known = self._files, self._contents
            job.inputs["files"] = [known[r] if r in known else feed_of(given[r], self._by_content) for r in rows]
            if plan.maps is not None:
                job.inputs["map_files"] = [feed_of_map(plan, int(r), self._by_content, r in self._failed) for r in rows]
        elif plan.maps is not None:
            job.inputs["maps"] = [self._maps[row] for row in rows]
        if plan.spec.patch is not None:
            corners, side = plan.draw_corners(epoch, batch, rows), plan.spec.patch.size
            if self._in_memory:
                job.inputs["patch"] = [
                    np.ascontiguousarray(self._levels[row][0][y : y + side, x : x + side])
                    for row, (y, x) in zip(rows, corners, strict=True)
                ]
            else:
                job.inputs["patch_low"], job.inputs["patch_high"] = stored(corners), stored(corners + side)
        for v, (window, flip) in enumerate(zip(windows, flips, strict=True)):
            shrink = np.ones((len(rows), 1), np.float32)
            if self._in_memory:
                side = [*self._sides, self._whole][v] or 1
                shrink, job.inputs[f"pixels{v}"] = self._choose_levels(rows, window, side)
            job.inputs[f"low{v}"], job.inputs[f"high{v}"] = map(stored, window_corners(window / shrink, flip))
            if has_map(plan.spec, v):
                assert plan.map_sizes is not None
                scale = plan.map_sizes[rows] / plan.records.sizes[rows].astype(np.float64)
                job.inputs[f"map_low{v}"], job.inputs[f"map_high{v}"] = window_corners(
                    window * np.concatenate([scale, scale], 1), flip
                )
        return job

    def _choose_levels(self, rows: np.ndarray, window: np.ndarray, side: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The smallest mip level of each image whose window is no smaller than the view, and its reduction factor."""
        level = np.log2(np.maximum(window[:, 2:].min(1) / side, 1)).astype(np.int64)
        level = np.minimum(level, [len(self._levels[row]) - 1 for row in rows])
        shrink = (2.0**level)[:, None].astype(np.float32)
        return shrink, [self._levels[row][at] for row, at in zip(rows, level, strict=True)]

    # ---- taking its outputs ----------------------------------------------------------------------------------------

    def _take_outputs(self) -> tuple[Job, list[Tensor]]:
        assert self._pipe is not None
        tensors = [from_dlpack(out.as_tensor()) for out in self._pipe.outputs()]
        job = self._jobs.popleft()
        job.inputs = {}
        if self.device.type == "cpu":
            tensors = self._postprocess(job, tensors)
        return job, tensors

    def _postprocess(self, job: Job, tensors: list[Tensor]) -> list[Tensor]:
        """Apply what follows the resize; on the CPU in the background thread, on a GPU in the caller's stream."""
        spec = self.plan.spec
        views = len(self._sides) + (self._whole is not None)
        if job.transposed.any():  # the files store these images lying on their side; id maps are upright
            mask = torch.from_numpy(job.transposed).to(tensors[0].device)[:, None, None, None]
            turned = [*range(views), *([-1] if spec.patch is not None else [])]
            for v in turned:
                tensors[v] = torch.where(mask, tensors[v].transpose(1, 2), tensors[v])
        pair = [] if spec.patch is None else with_reduced(tensors.pop().permute(0, 3, 1, 2), spec.patch.reduce)
        images, labels = tensors[:views], [x.squeeze(-1).to(torch.int64) for x in tensors[views:]]
        labels = [x.masked_fill_(x == ABSENT, -1) for x in labels]
        for v, draw in enumerate(job.draws):
            images[v], ids = rearrange(images[v], draw, labels[v] if spec.masks else None)
            if ids is not None:
                labels[v] = ids
        draws = [*job.draws, None][:views]
        images = [photometric(x, draw, spec.mean, spec.std) for x, draw in zip(images, draws, strict=True)]
        return [*images, *labels, *pair]

    def _deliver(self, job: Job, tensors: list[Tensor]) -> Batch:
        plan = self.plan
        if self.device.type != "cpu":
            tensors = self._postprocess(job, tensors)
        reduced, patch = (tensors.pop(), tensors.pop()) if plan.spec.patch is not None else (None, None)
        views = len(self._sides)
        first_map = views + (self._whole is not None)
        index = plan.records.index[job.rows]
        batch = Batch(
            views=tensors[:views],
            boxes=torch.from_numpy(job.boxes),
            labels=tensors[first_map : first_map + views] if plan.spec.masks else [],
            whole=tensors[views] if self._whole is not None else None,
            whole_labels=tensors[-1] if plan.spec.whole_masks else None,
            target=torch.from_numpy(plan.records.images.targets[index]),
            index=torch.from_numpy(index),
            valid=torch.from_numpy(job.valid),
            patch=patch,
            reduced=reduced,
        )
        return batch if self.device.type == "cpu" else batch.to(self.device)

    # ---- images in memory, and files that break --------------------------------------------------------------------

    def _decode_all(self) -> None:
        """Decode every image once with PIL: JPEG pixels equal DALI's, and a broken file raises an ordinary error."""

        def load(row: int) -> list[np.ndarray] | OSError:
            try:
                return halved(self.plan.pixels(row), self._smallest)
            except OSError as error:
                return error

        rows = [row for row in range(len(self._files)) if row not in self._failed]
        self._levels = [[] for _ in self._files]
        for row, levels in zip(rows, self._pool.map(load, rows), strict=True):
            if isinstance(levels, OSError):
                self._exclude(row, *reason_of(levels))
            else:
                self._keep(row, levels)
        if self.plan.maps is not None:
            self._maps = [self._read_map(row)[:, :, None] for row in range(len(self._files))]

    def _keep(self, row: int, levels: list[np.ndarray]) -> None:
        height, width = levels[0].shape[:2]
        self.plan.records.sizes[row] = shown_size(self.plan.records.images, height, width)
        self._levels[row] = levels

    def _read_map(self, row: int) -> np.ndarray:
        if self.plan.maps is None or not self.plan.has_map(row):
            return np.full((1, 1), ABSENT, np.uint8)  # never shown
        assert self.plan.map_sizes is not None
        return read_map(self.plan.maps, self.plan.relative_path(row), self.plan.map_sizes[row])

    def _read(self, rows: np.ndarray) -> None:
        """Decode new and changed images and maps on the host before DALI reads them.

        A broken file does not always raise an error in DALI 2.4: it may end the process (seen in one of three runs).
        """
        if self._in_memory:
            return
        for row in {int(row) for row in rows}:
            stamp = self._stamps[row]
            if row not in self._failed and (stamp is None or stamp != file_stamp(self._files[row])):
                self._check(row)
        wanted = [row for row in {*map(int, rows)} - self._failed.keys() if isinstance(self._files[row], Slice)]
        fed = self._pool.map(fetch, [self._files[row] for row in wanted])
        for row, content in zip(wanted, fed, strict=True):
            if isinstance(content, OSError):
                self._exclude(row, *reason_of(content))
            else:
                self._contents[row] = content
        for row in {int(row) for row in rows}:
            if self.plan.maps is not None and row not in self._failed:
                found = file_stamp(map_file(self.plan.maps, self.plan.relative_path(row)))
                if row not in self._checked_maps or self._checked_maps[row] != found:
                    self._read_map(row)
                    self._checked_maps[row] = found

    def _accept(self, row: int, verdict: Verdict) -> None:
        super()._accept(row, verdict)
        self._files[row], self._stamps[row] = verdict.source or self.plan.original(row), verdict.stamp()
        if not self._in_memory:
            self._orientations[row] = verdict.orientation
        elif self._levels:
            try:
                self._keep(row, halved(read_image(self._files[row]), self._smallest))
            except OSError as error:  # it broke since the check
                self._exclude(row, *reason_of(error))

    def _show_black(self, row: int) -> None:
        """Let a lost image, which is padding, be black: too many are lost to show others in their place."""
        height, width = self.plan.black_size()
        self.plan.records.heights[row] = height
        self.plan.records.sizes[row] = shown_size(self.plan.records.images, height, width)
        if self._in_memory:
            self._levels[row] = [np.zeros((height, width, 3), np.uint8)]
        else:
            self._files[row], self._orientations[row] = black_image(height, width), 1

    def _recover(self, error: RuntimeError) -> None:
        """Find and exclude the file on which the pipeline failed; a new pipeline gets the same batches."""
        rows = sorted({int(row) for job in self._jobs for row in job.rows})
        FAILED.append(self._pipe)
        self._pipe = None
        self._jobs.clear()
        if self._in_memory:  # no file is read any more: none is at fault
            raise error
        self._diagnose(rows, error)

    def _diagnose(self, rows: list[int], error: RuntimeError) -> None:
        found = False
        for row in rows:
            try:
                read_image(self._files[row])
                if self.plan.maps is not None:
                    read_map(self.plan.maps, self.plan.relative_path(row))
            except OSError as reason:
                self._exclude(row, *reason_of(reason))
                found = True
        if not found:  # PIL is more lenient than DALI: convert the files that only DALI refuses
            for row in rows:
                if not decodes(self._files[row]):
                    self._files[row] = convert(self._files[row], read_image(self._files[row]))
                    self._orientations[row] = 1
                    found = True
        if not found:
            raise RuntimeError(f"DALI failed on a batch whose files all decode: {first_error(error)}") from error
