"""The DALI pipeline of a loader, and how to find the file on which one failed."""

import os
from typing import Any

import numpy as np
import nvidia.dali as dali
import torch

from fgfast.data.decode import TURNS
from fgfast.data.views import ViewSpec

fn: Any = dali.fn  # DALI creates its operators and constants at run time, invisible to type checkers
types: Any = dali.types
Pipeline: Any = dali.pipeline.Pipeline

FAILED: list = []
"""Pipelines that failed: destroying one while its threads still decode ends the process (DALI 2.4)."""


def build_pipeline(
    spec: ViewSpec, batch_size: int, *, device: torch.device, threads: int, depth: int, in_memory: bool
) -> Pipeline:
    """Build the pipeline that decodes, crops and resizes the views, id maps and patches of ``spec``.

    Inputs by name: files (paths) unless ``in_memory``, else pixelsV of each view V; lowV and highV, the corners of its
    window in pixels as they are stored (DALI reads no orientation from a file); with id maps map_files or maps,
    map_lowV and map_highV; with a patch patch_low and patch_high, or the patch. The unaugmented view comes after the
    crops.

    Args:
        spec: the views.
        batch_size: B.
        device: a CUDA device decodes and resizes on it.
        threads: threads of the pipeline.
        depth: batches that it prefetches.
        in_memory: decoded images and maps are fed instead of the paths of files.

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
            encoded = fn.io.file.read(put("files"))
            pixels = _decode(encoded, types.RGB, "mixed" if gpu else "cpu")
        if spec.needs_maps:
            maps = put("maps", "HWC") if in_memory else _decode(fn.io.file.read(put("map_files")), types.GRAY)
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


def encode_path(path: str) -> np.ndarray:
    """A path as DALI's file reader takes it: its bytes, which need not be UTF-8."""
    return np.frombuffer(os.fsencode(path), np.uint8)


def first_error(error: RuntimeError) -> str:
    """The first line of a message of DALI that reports an error."""
    lines = [line.strip() for line in str(error).splitlines() if "rror" in line]
    return lines[0] if lines else str(error)


def decodes(file: str) -> bool:
    """Whether DALI decodes a file."""
    pipe = Pipeline(1, 1, None, prefetch_queue_depth=1)
    with pipe:
        encoded = fn.io.file.read(fn.external_source(name="files"))
        pipe.set_outputs(_decode(encoded, types.RGB))
    pipe.build()
    try:
        pipe.feed_input("files", [encode_path(file)])
        pipe.schedule_run()
        pipe.outputs()
        return True
    except RuntimeError:
        FAILED.append(pipe)
        return False
