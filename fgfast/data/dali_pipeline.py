"""The DALI pipeline of a loader, and how to find the file on which one failed."""

import os
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import nvidia.dali as dali
import torch

from fgfast.data.decode import TURNS
from fgfast.data.maps import ABSENT, map_file
from fgfast.data.plan import BatchPlan
from fgfast.data.sampling import Draw
from fgfast.data.slices import File, read_file
from fgfast.data.views import ViewSpec
from fgfast.errors import UserError

fn: Any = dali.fn  # DALI creates its operators and constants at run time, invisible to type checkers
types: Any = dali.types
Pipeline: Any = dali.pipeline.Pipeline

FAILED: list = []
"""Pipelines that failed: destroying one while its threads still decode ends the process (DALI 2.4)."""


@dataclass
class Job:
    """A batch that is in the pipeline; keeps the fed arrays alive."""

    epoch: int
    batch: int
    rows: np.ndarray
    valid: np.ndarray
    draws: list[Draw]
    boxes: np.ndarray
    transposed: np.ndarray
    inputs: dict[str, list[np.ndarray] | np.ndarray] = field(default_factory=dict)


def build_pipeline(
    spec: ViewSpec,
    batch_size: int,
    *,
    device: torch.device,
    threads: int,
    depth: int,
    in_memory: bool,
    contents: bool = False,
) -> Pipeline:
    """Build the pipeline that decodes, crops and resizes the views, id maps and patches of ``spec``.

    Inputs by name: files unless ``in_memory``, else pixelsV of each view V; lowV and highV, the corners of its window
    in pixels as they are stored (DALI reads no orientation from a file); with id maps map_files or maps, map_lowV and
    map_highV; with a patch patch_low and patch_high, or the patch. The unaugmented view comes after the crops.

    Args:
        spec: the views.
        batch_size: B.
        device: a CUDA device decodes and resizes on it.
        threads: threads of the pipeline.
        depth: batches that it prefetches.
        in_memory: decoded images and maps are fed instead of the paths of files.
        contents: the contents of files are fed instead of their paths.

    Returns:
        A built pipeline. Outputs: the views, the id maps of those that have one, the patch; uint8 [B, S, S, C].
    """
    gpu = device.type == "cuda"
    pipe = Pipeline(batch_size, threads, device.index if gpu else None, prefetch_queue_depth=depth)
    sides = [crop.size for crop in spec.crops] + ([] if spec.whole is None else [spec.whole])
    patch = spec.patch

    def put(name: str, layout: str | None = None) -> Any:
        return fn.external_source(name=name, layout=layout, no_copy=not gpu)

    with pipe:
        outputs = []
        if not in_memory:
            pixels = _decode(_read(put("files"), contents), types.RGB, "mixed" if gpu else "cpu")
        if spec.needs_maps:
            maps = put("maps", "HWC") if in_memory else _decode(_read(put("map_files"), contents), types.GRAY)
            maps = maps.gpu() if gpu else maps
        for v, side in enumerate(sides):
            if in_memory:
                pixels = put(f"pixels{v}", "HWC")
                pixels = pixels.gpu() if gpu else pixels
            outputs.append(
                fn.resize(
                    pixels,
                    size=[side, side],
                    roi_start=put(f"low{v}"),
                    roi_end=put(f"high{v}"),
                    interp_type=types.INTERP_CUBIC if spec.interpolation == "bicubic" else types.INTERP_LINEAR,
                    antialias=True,
                )
            )
        for v, side in enumerate(sides):
            if has_map(spec, v):
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
            if in_memory:
                pixels = put("patch", "HWC")
                window = pixels.gpu() if gpu else fn.copy(pixels)  # the fed arrays are freed when the run is done
            else:
                window = fn.resize(
                    pixels,
                    size=[patch.size, patch.size],
                    roi_start=put("patch_low"),
                    roi_end=put("patch_high"),
                    interp_type=types.INTERP_NN,  # copies: the window has that size
                )
            outputs.append(window)
        pipe.set_outputs(*outputs)
    pipe.build()
    return pipe


def _read(files: Any, contents: bool) -> Any:
    return files if contents else fn.io.file.read(files)


def _decode(encoded: Any, colours: Any, device: str = "cpu") -> Any:
    return fn.decoders.image(encoded, device=device, output_type=colours, adjust_orientation=False)


def has_map(spec: ViewSpec, view: int) -> bool:
    """Whether an id map is delivered with a view; the unaugmented one comes after the crops."""
    return spec.masks if view < len(spec.crops) else spec.whole_masks


def window_corners(window: np.ndarray, flip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end (y, x) of windows (y, x, h, w), float32 [B, 2] each; a flip exchanges the ends in x."""
    low, high = window[:, :2], window[:, :2] + window[:, 2:]
    start = np.stack([low[:, 0], np.where(flip, high[:, 1], low[:, 1])], 1)
    end = np.stack([high[:, 0], np.where(flip, low[:, 1], high[:, 1])], 1)
    return start.astype(np.float32), end.astype(np.float32)


def stored_corners(corners: np.ndarray, sizes: np.ndarray, orientations: np.ndarray) -> np.ndarray:
    """Corners (y, x) in upright images of ``sizes`` (H, W) as (y, x) in the pixels that the files store, [B, 2]."""
    turns = TURNS[orientations]
    transposed = turns[:, :1]
    corners, sides = (np.where(transposed, values[:, ::-1], values) for values in (corners, sizes))
    return np.where(turns[:, 1:], sides - corners, corners).astype(np.float32)


def halved(pixels: np.ndarray, smallest: int) -> list[np.ndarray]:
    """An image and its halved copies, as long as no side is below ``smallest``."""
    from PIL import Image

    levels = [np.ascontiguousarray(pixels)]
    image = Image.fromarray(levels[0])
    while min(image.size) >= 2 * smallest:
        image = image.reduce(2)
        levels.append(np.array(image))
    return levels


def feed_of(file: File, content: bool) -> np.ndarray:
    """What the pipeline takes for a file, uint8: its content, or the bytes of its path, which need not be UTF-8."""
    return np.frombuffer(read_file(file) if content or not isinstance(file, str) else os.fsencode(file), np.uint8)


def feed_of_map(plan: BatchPlan, row: int, content: bool, lost: bool) -> np.ndarray:
    """The same for the id map of an image; that of a ``lost`` one, which is shown black, is empty if it is lost too.

    Raises:
        UserError: the map cannot be read, but its image can.
    """
    from PIL import Image

    assert plan.maps is not None
    assert plan.map_sizes is not None
    rel = plan.relative_path(row)
    try:
        return feed_of(map_file(plan.maps, rel), content)
    except OSError as error:
        if not lost:
            what = f"The id map of {rel} can no longer be read ({error.strerror or error})"
            raise UserError(f"{what}: restore it.") from error
        stream = BytesIO()
        Image.fromarray(np.full(plan.map_sizes[row], ABSENT, np.uint8)).save(stream, "PNG")
        return np.frombuffer(stream.getvalue(), np.uint8)


def fetch(file: File) -> np.ndarray | OSError:
    """The content of a file, or why it cannot be read."""
    try:
        return feed_of(file, True)
    except OSError as error:
        return error


def first_error(error: RuntimeError) -> str:
    """The first line of a message of DALI that reports an error."""
    lines = [line.strip() for line in str(error).splitlines() if "rror" in line]
    return lines[0] if lines else str(error)


class Decoder:
    """Decodes the same contents of files again and again, to measure how fast that is."""

    def __init__(self, contents: list[bytes], threads: int, device: torch.device) -> None:
        """Build the pipeline."""
        gpu = device.type == "cuda"
        self._contents = [np.frombuffer(content, np.uint8) for content in contents]
        self._pipe = Pipeline(len(contents), threads, (device.index or 0) if gpu else None, prefetch_queue_depth=1)
        with self._pipe:
            encoded = fn.external_source(name="files", no_copy=not gpu)
            self._pipe.set_outputs(_decode(encoded, types.RGB, "mixed" if gpu else "cpu"))
        self._pipe.build()

    def run(self) -> int:
        """Decode them once; returns how many they are."""
        self._pipe.feed_input("files", self._contents)
        self._pipe.schedule_run()
        self._pipe.outputs()
        return len(self._contents)


def decodes(file: File) -> bool:
    """Whether DALI decodes a file."""
    pipe = Pipeline(1, 1, None, prefetch_queue_depth=1)
    with pipe:
        pipe.set_outputs(_decode(fn.external_source(name="files"), types.RGB))
    pipe.build()
    try:
        pipe.feed_input("files", [feed_of(file, True)])
        pipe.schedule_run()
        pipe.outputs()
        return True
    except RuntimeError:
        FAILED.append(pipe)
        return False
