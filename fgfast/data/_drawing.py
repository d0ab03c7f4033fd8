"""The image of one bird with its scene, light and camera effects; its part map and key points.

Everything is drawn once into an 8-bit image of ink indices at twice the size; colours and part ids are looked up in it:
the part map is exact and needs no second drawing.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from fgfast.data._attributes import COLOURS, RGB, Traits
from fgfast.data._bird import (
    BODY,
    BREAST,
    CIRCLE,
    HEAD,
    KEYPOINTS,
    TAIL,
    WING,
    Shape,
    Sketch,
    hsv,
    rotation,
    sketch_bird,
)
from fgfast.data.maps import ABSENT

# Strength of the plumage's speckle by part id; the last entry is the background.
_SPECKLE = np.zeros(256, np.float32)
_SPECKLE[[BREAST, BODY, WING, TAIL, HEAD]] = (0.05, 0.16, 0.07, 0.05, 0.03)
_ROUND = np.zeros(256, np.float32)
_ROUND[[HEAD, BREAST, BODY]] = (0.5, 1.0, 1.0)


def _scene_colour(plumage: list[RGB], rng: np.random.Generator) -> RGB:
    """A background colour: of the bird's plumage (30%), of the marks (15%), or of foliage and earth."""
    pick = rng.uniform()
    if pick < 0.3:
        return plumage[int(rng.integers(1, len(plumage)))]
    if pick < 0.45:
        return list(COLOURS.values())[int(rng.integers(5))]
    return hsv(rng.uniform(0.05, 0.65), rng.uniform(0.1, 0.6), rng.uniform(0.2, 0.9))


def _clutter(s: Sketch, own: list[RGB], foot: complex, nuisance: float, rng: np.random.Generator) -> Sketch:
    """Shapes behind the bird, in image units (0..1): a perch, leaves, stems, beak-like wedges."""
    behind = Sketch(colours=s.colours, parts=s.parts)
    for _ in range(int(rng.poisson(9 * nuisance))):
        centre = complex(*rng.uniform(-0.05, 1.05, 2))
        kind, reach, angle, thin = rng.uniform(size=4)
        ink = behind.ink(_scene_colour(own, rng))
        turn = rotation(360 * angle) * (0.03 + 0.13 * reach * reach)
        if kind < 0.55:
            behind.fill(centre + turn * (CIRCLE[::2].real + (0.25 + 0.5 * thin) * 1j * CIRCLE[::2].imag), ink)
        elif kind < 0.8:
            behind.line(centre + turn * np.array([-4, 0.3j, 4 + 1j * thin]), ink, 0.008 + 0.03 * thin)
        else:
            behind.fill(centre + turn * np.array([-0.4j * thin - 0.2j, 1.6, 0.4j * thin + 0.2j]), ink)
    if rng.uniform() < 0.75:
        slope = complex(1, 0.25 * nuisance * rng.standard_normal())
        ink = behind.ink(hsv(rng.uniform(0.04, 0.12), rng.uniform(0.1, 0.5), rng.uniform(0.2, 0.7)))
        behind.line(foot + 0.012j + np.array([-1.5, 1.5]) * slope, ink, rng.uniform(0.02, 0.05))
    return behind


def _occluders(s: Sketch, own: list[RGB], nuisance: float, rng: np.random.Generator) -> Sketch:
    front = Sketch(colours=s.colours, parts=s.parts)
    if rng.uniform() < 0.35 * nuisance:
        ink = front.ink(_scene_colour(own, rng))
        start = complex(*rng.uniform(0, 1, 2))
        turn = rotation(rng.uniform(0, 360))
        front.line(start + turn * np.array([-2, 0, 2 + 0.4j]), ink, rng.uniform(0.008, 0.02))
        for t in rng.uniform(-0.5, 0.5, 3):
            leaf = 0.045 * (CIRCLE[::2].real + 0.4j * CIRCLE[::2].imag)
            front.fill(start + turn * (t + leaf * rotation(50)), ink)
    return front


def _backdrop(size: int, own: list[RGB], nuisance: float, rng: np.random.Generator) -> Image.Image:
    """Two smooth random fields of random coarseness that blend three colours."""
    first = np.array(_scene_colour(own, rng))
    layers = []
    for _ in range(2):
        away = min(nuisance, 1.0) * (np.array(_scene_colour(own, rng)) - first)
        grid = int(rng.choice([2, 3, 6, 12, 24]))
        coarse = np.clip(first + away * rng.uniform(-0.2, 1.4, (grid, grid, 1)), 0, 255).astype(np.uint8)
        layers.append(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    return Image.blend(layers[0], layers[1], 0.5)


def _paint(
    pen: ImageDraw.ImageDraw, shapes: list[Shape], move: Callable[[np.ndarray], np.ndarray], zoom: float
) -> None:
    """Draw shapes after transforming all their points at once (once per shape would cost more than the drawing)."""
    if not shapes:
        return
    coordinates = move(np.concatenate([points for points, _, _ in shapes])).view(np.float64).tolist()
    at = 0
    for points, ink, width in shapes:
        corners = coordinates[at : at + 2 * len(points)]
        at += len(corners)
        if width:
            joint = "curve" if len(points) > 2 else None
            pen.line(corners, fill=ink, width=max(1, round(width * zoom)), joint=joint)
        else:
            pen.polygon(corners, fill=ink)


def _place(s: Sketch, nuisance: float, rng: np.random.Generator) -> tuple[complex, complex, bool]:
    """Scale (with the camera's roll), shift and flip that place the bird in the unit square, sometimes cut off."""
    flip = bool(rng.uniform() < 0.5)
    turn = rotation(4 * nuisance * float(rng.uniform(-1, 1)))
    every = np.concatenate([points for points, _, _ in s.shapes]) * turn
    if flip:
        every = -every.conj()
    low, high = complex(every.real.min(), every.imag.min()), complex(every.real.max(), every.imag.max())
    wanted = 0.45 * math.exp(0.14 * nuisance * float(rng.uniform(-1, 1)))
    span = max(high.real - low.real, high.imag - low.imag)
    scale = min(wanted, (0.97 + 0.08 * min(nuisance, 1.0)) / span)
    free = complex(1 - scale * (high.real - low.real), 1 - scale * (high.imag - low.imag))
    spot = 0.5 + 0.48 * min(nuisance, 1.0) * rng.uniform(-1, 1, 2)
    shift = complex(spot[0] * free.real, spot[1] * free.imag) - scale * low
    return scale * turn, shift, flip


@lru_cache(maxsize=2)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    side = (np.arange(size, dtype=np.float32) / size)[None]
    return side, side.T


def _light(labels: np.ndarray, centre: complex, nuisance: float, rng: np.random.Generator) -> np.ndarray:
    """Factor of every pixel, float32 [S, S]: slope of the light, a cast shadow, round bodies, speckled plumage."""
    size = len(labels)
    x, y = _grid(size)
    angle, strength, shadow, where, depth = rng.uniform(size=5)
    turn = rotation(360 * angle)
    along = np.float32(turn.real) * (x - np.float32(0.5)) + np.float32(turn.imag) * (y - np.float32(0.5))
    light = 1 + np.float32(0.5 * nuisance * (strength - 0.2)) * along
    if shadow < 0.3 * nuisance:
        edge = np.clip(12 * along + np.float32(0.5 - 7.2 * (where - 0.5)), 0, 1)
        light *= 1 - np.float32(0.45 * depth) * edge
    light -= _ROUND[labels] * np.clip((y - np.float32(centre.imag)) * np.float32(1.6), -0.18, 0.22)
    coarse = Image.fromarray(rng.integers(0, 256, ((size + 1) // 2, (size + 1) // 2), dtype=np.uint8))
    grain = np.asarray(coarse.resize((size, size), Image.Resampling.BILINEAR), np.float32)
    grain = (grain - np.float32(127.5)) * (_SPECKLE / 127.5)[labels] + 1
    return light * grain


def _camera(pixels: np.ndarray, nuisance: float, rng: np.random.Generator) -> Image.Image:
    """Sensor noise, exposure, gamma and colour cast, blur."""
    size = len(pixels)
    noise = rng.integers(0, 256, (size, size, 1), dtype=np.uint8).astype(np.float32) - 127.5
    pixels += noise * np.float32(0.05 * nuisance * rng.uniform())
    image = Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8))
    gain = np.exp(nuisance * (0.18 * rng.uniform(-1, 1) + 0.09 * rng.uniform(-1, 1, 3)))
    gamma = math.exp(0.22 * nuisance * rng.uniform(-1, 1))
    ramp = (np.arange(256) / 255) ** gamma
    image = image.point(np.clip(255 * gain[:, None] * ramp, 0, 255).astype(np.uint8).ravel().tolist())
    blur = rng.uniform(0.2, 0.9) * nuisance * size / 128
    return image.filter(ImageFilter.GaussianBlur(blur)) if rng.uniform() < 0.35 else image


def draw_image(
    traits: Traits, size: int, nuisance: float, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Draw one image with its ground truth.

    Args:
        traits: the bird's part attributes.
        size: side of the image in pixels.
        nuisance: 0 = one pose, plain light; 1 = wide variation; more is allowed.
        rng: the random number generator.

    Returns:
        The RGB image; part ids uint8 [S, S] (255 = no part); key points float64 [P, 3] (x, y, visible) in pixels
        from the upper left corner, in the order of KEYPOINTS, zeros if not visible.
    """
    bird, foot = sketch_bird(traits, nuisance, rng)
    zoom, shift, flip = _place(bird, nuisance, rng)

    def to_image(points: np.ndarray) -> np.ndarray:
        rolled = points * (zoom / abs(zoom))
        return abs(zoom) * (-rolled.conj() if flip else rolled) + shift

    own = list(bird.colours)
    behind = _clutter(bird, own, complex(to_image(np.array(foot))), nuisance, rng)
    front = _occluders(bird, own, nuisance, rng)
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)
    _paint(pen, behind.shapes, lambda points: 2 * size * points, 2 * size)
    _paint(pen, bird.shapes, lambda points: 2 * size * to_image(points), 2 * size * abs(zoom))
    _paint(pen, front.shapes, lambda points: 2 * size * points, 2 * size)

    parts = np.full(256, ABSENT, np.uint8)
    parts[: len(bird.parts)] = bird.parts
    labels = parts[np.asarray(canvas)[1::2, 1::2]]
    clear = canvas.point([255] + [0] * 255).reduce(2)
    canvas.putpalette(np.clip(np.array(bird.colours), 0, 255).astype(np.uint8).tobytes())
    backdrop = ImageChops.multiply(_backdrop(size, own, nuisance, rng), Image.merge("RGB", (clear, clear, clear)))
    pixels = np.asarray(ImageChops.add(canvas.convert("RGB").reduce(2), backdrop), np.float32)
    centre = complex(to_image(np.array(0j)))
    image = _camera(pixels * _light(labels, centre, nuisance, rng)[..., None], nuisance, rng)

    points = np.zeros((len(KEYPOINTS), 3))
    for row, (name, part) in enumerate(KEYPOINTS.items()):
        if name not in bird.points:
            continue
        at = complex(to_image(np.array(bird.points[name]))) * size
        inside = 0 <= at.real < size and 0 <= at.imag < size
        if inside and labels[int(at.imag), int(at.real)] == part:
            points[row] = at.real, at.imag, 1
    return image, labels, points
