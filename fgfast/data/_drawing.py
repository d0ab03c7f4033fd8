"""Draw one bird: shapes in body coordinates, a scene around it, light over it, its part map and key points.

Points are complex numbers (x + iy, y down, the bird looks to +x, its body is one unit long), so that turning and
scaling are one multiplication. Everything is drawn once into an 8-bit image of ink numbers at twice the size; colours
and part ids are look-ups in it, which makes the part map exact and costs no second drawing.
"""

import colorsys
import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from fgfast.data._attributes import COLOURS, RGB, Traits
from fgfast.data.maps import ABSENT

PARTS = ("beak", "crest", "head", "breast", "body", "wing", "tail", "legs")
BEAK, CREST, HEAD, BREAST, BODY, WING, TAIL, LEGS = range(len(PARTS))
# A key point is visible where its own part shows at its pixel.
KEYPOINTS = {
    "back": BODY, "beak": BEAK, "belly": BODY, "breast": BREAST, "crest": CREST, "crown": HEAD, "eye": HEAD,
    "forehead": HEAD, "leg": LEGS, "nape": HEAD, "tail": TAIL, "throat": HEAD, "wing": WING,
}  # fmt: skip

_CIRCLE = np.exp(1j * np.linspace(0, 2 * np.pi, 26, endpoint=False))
# How strongly the speckle of the plumage shows in each part, the last entry being the background.
_SPECKLE = np.zeros(256, np.float32)
_SPECKLE[[BREAST, BODY, WING, TAIL, HEAD]] = (0.05, 0.16, 0.07, 0.05, 0.03)
_ROUND = np.zeros(256, np.float32)
_ROUND[[HEAD, BREAST, BODY]] = (0.5, 1.0, 1.0)


@dataclass
class Sketch:
    """Shapes and key points in the order of drawing; an ink is a colour with the part it belongs to."""

    colours: list[RGB] = field(default_factory=lambda: [(0.0, 0.0, 0.0)])
    parts: list[int] = field(default_factory=lambda: [ABSENT])
    shapes: list[tuple[np.ndarray, int, float]] = field(default_factory=list)  # points, ink, line width (0 = filled)
    points: dict[str, complex] = field(default_factory=dict)

    def ink(self, colour: RGB, part: int = ABSENT) -> int:
        self.colours.append(colour)
        self.parts.append(part)
        return len(self.colours) - 1

    def fill(self, points: np.ndarray, ink: int) -> None:
        self.shapes.append((points, ink, 0.0))

    def line(self, points: np.ndarray, ink: int, width: float) -> None:
        self.shapes.append((points, ink, width))


def _mix(a: RGB, b: RGB, share: float) -> RGB:
    return (a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1]), a[2] + share * (b[2] - a[2]))


def _hsv(h: float, s: float, v: float) -> RGB:
    r, g, b = colorsys.hsv_to_rgb(h % 1.0, min(max(s, 0.0), 1.0), min(max(v, 0.0), 1.0))
    return (255 * r, 255 * g, 255 * b)


def _plumage(nuisance: float, rng: np.random.Generator) -> dict[str, RGB]:
    """Base colours of one individual: the same distribution for every class."""
    hue, shift, wing, head, tail = rng.uniform(-1, 1, 5)
    sat, value, dark, light = rng.uniform(size=4)
    hue = 0.09 + 0.5 * nuisance * hue * abs(hue)
    sat, value = 0.32 + 0.2 * nuisance * (sat - 0.5) * 2, 0.56 + 0.14 * nuisance * (value - 0.5) * 2
    return {
        "body": _hsv(hue, sat, value),
        "breast": _hsv(hue + 0.06 * nuisance * shift, 0.6 * sat, value + 0.2 + 0.05 * nuisance * light),
        "head": _hsv(hue + 0.08 * nuisance * head, 1.2 * sat, 0.92 * value + 0.1 * nuisance * head),
        "wing": _hsv(hue + 0.08 * nuisance * wing, sat, (0.6 + 0.12 * nuisance * dark) * value),
        "tail": _hsv(hue + 0.08 * nuisance * tail, 0.9 * sat, (0.72 + 0.15 * nuisance * tail) * value),
    }


def _turn(degrees: float) -> complex:
    return complex(np.exp(1j * math.radians(degrees)))


def _draw_tail(s: Sketch, traits: Traits, colour: RGB, frame: complex, root: complex) -> None:
    length, fork = traits.lengths["tail_length"], traits.lengths["tail_fork"]

    def across(u: float) -> np.ndarray:
        half = 0.07 + 0.07 * u
        ends = -u * length
        return np.array([ends - 1j * half, -u * length * (1 - fork * u), ends + 1j * half]) * frame + root

    def band(u0: float, u1: float) -> np.ndarray:
        return np.concatenate([across(u0), across(u1)[::-1]])

    s.fill(band(0, 1), s.ink(colour, TAIL))
    mark = s.ink(_mix(colour, (244, 240, 225), 0.25 + 0.75 * traits.strength), TAIL)
    at = {"none": [], "tip": [0.84], "middle": [0.5], "double": [0.42, 0.76]}[traits.shapes["tail_band"]]
    width = 0.16 * (0.4 + 0.6 * traits.strength)
    for u in at:
        s.fill(band(u, min(u + width, 1.0)), mark)
    shaft = s.ink(_mix(colour, (0, 0, 0), 0.4), TAIL)
    for side in (-0.5, 0.0, 0.5):
        s.line(np.array([-0.12 + 0.06j * side, (-0.95 + 0.2j * side) * length * (1 - max(fork, 0))]) * frame + root,
               shaft, 0.012)  # fmt: skip
    s.points["tail"] = -0.62 * length * (1 - max(0.62 * fork, 0)) * frame + root + 0.02j * frame


def _draw_legs(s: Sketch, traits: Traits, pose: np.ndarray, frame: complex) -> complex:
    length = traits.lengths["leg_length"]
    foot = 0j
    for i, x in enumerate((0.06, -0.08)):
        colour = traits.colours["leg"] if i else _mix(traits.colours["leg"], (0, 0, 0), 0.25)
        ink = s.ink(colour, LEGS)
        hip = (x + 0.2j) * frame
        turn = _turn(14 * pose[i])
        foot = hip + (0.1 + length) * 1j * turn
        s.line(np.array([hip, foot]), ink, 0.05)
        s.line(np.array([foot - 0.08 * turn, foot, foot + 0.12 * turn]), ink, 0.042)
        s.line(np.array([foot, foot + (0.1 + 0.05j) * turn]), ink, 0.036)
        s.points["leg"] = hip + (0.1 + 0.6 * length) * 1j * turn
    return foot


def _draw_wing(s: Sketch, traits: Traits, colour: RGB, frame: complex, root: complex, width: float) -> None:
    length = 0.74

    def across(u: float) -> np.ndarray:
        half = width * 1.75 * u**0.5 * (1 - u) ** 0.75 + 0.004
        bend = 0.05 * (1 - u)
        return np.array([-u * length - 1j * half, -u * length - bend, -u * length + 1j * half]) * frame + root

    edge = [across(u) for u in (0.0, 0.06, 0.15, 0.3, 0.45, 0.6, 0.75, 0.88, 1.0)]
    outline = np.concatenate([[a[0] for a in edge], [a[2] for a in edge[::-1]]])
    s.fill(outline, s.ink(colour, WING))
    if "wing_tip" in traits.colours:
        tip = [across(u) for u in (0.66, 0.75, 0.88, 1.0)]
        ink = s.ink(_mix(colour, traits.colours["wing_tip"], 0.3 + 0.7 * traits.strength), WING)
        s.fill(np.concatenate([[a[0] for a in tip], [a[2] for a in tip[::-1]], [tip[0][1]]]), ink)
    feather = s.ink(_mix(colour, (0, 0, 0), 0.42), WING)
    for v in (-0.5, 0.0, 0.5):
        a, b = across(0.55), across(0.93)
        s.line(np.array([a[1] + v * (a[2] - a[0]) / 2, b[1] + v * (b[2] - b[0]) / 2]), feather, 0.014)
    bar = s.ink(_mix(colour, (244, 240, 225), 0.25 + 0.75 * traits.strength), WING)
    thick = 0.075 * (0.5 + 0.5 * traits.strength)
    for u in {"none": (), "one": (0.36,), "two": (0.26, 0.46), "three": (0.16, 0.33, 0.5)}[traits.shapes["wing_bars"]]:
        s.fill(np.concatenate([across(u), across(u + thick)[::-1]]), bar)
    dot = s.ink(_mix(colour, (0, 0, 0), 0.25), WING)
    s.line(outline, dot, 0.014)
    s.points["wing"] = -0.42 * length * frame + root


def _draw_breast(s: Sketch, traits: Traits, colour: RGB, frame: complex, depth: float) -> None:
    front = np.concatenate([_CIRCLE[20:], _CIRCLE[:8]])
    inner = 0.2 - 1j * np.array([-0.62, -0.2, 0.3, 0.66]) * depth
    region = np.concatenate([0.5 * front.real + 1j * depth * front.imag, inner]) * frame
    s.fill(region, s.ink(colour, BREAST))
    kind = traits.shapes["breast"]
    mark = s.ink(_mix(colour, (70, 28, 24), 0.2 + 0.8 * traits.strength), BREAST)
    if kind == "bib":
        s.fill((0.4 - 0.12j + (0.085 * _CIRCLE.real + 0.12j * _CIRCLE.imag)) * frame, mark)
    elif kind == "band":
        ring = np.array([0.26 + 0.06j, 0.36 + 0.1j, 0.47 + 0.06j])
        s.line(ring * frame, mark, 0.075 * (0.5 + 0.5 * traits.strength))
    elif kind == "spots":
        for centre in (0.3 - 0.08j, 0.41 - 0.05j, 0.33 + 0.03j, 0.43 + 0.05j, 0.27 + 0.11j, 0.36 + 0.13j):
            s.fill((centre + 0.028 * _CIRCLE[::3]) * frame, mark)
    s.points["breast"] = (0.37 - 0.01j) * frame


def _draw_crest(s: Sketch, traits: Traits, colour: RGB, frame: complex, root: complex) -> None:
    kind = traits.shapes["crest"]
    if kind == "none":
        return
    ink = s.ink(colour, CREST)
    size = 0.35 + 0.65 * traits.strength
    spikes = {"tuft": [(-152, 0.36), (-166, 0.3)], "spike": [(-98, 0.36), (-112, 0.44), (-126, 0.34)],
              "fan": [(-60, 0.27), (-82, 0.31), (-104, 0.33), (-126, 0.32), (-148, 0.28)]}[kind]  # fmt: skip
    tips = []
    for angle, reach in spikes:
        turn = _turn(angle) * frame
        tips.append(root + turn * (0.17 + (reach - 0.14) * size))
        s.fill(np.array([root + turn * (0.12 + 0.075j), tips[-1], root + turn * (0.12 - 0.075j)]), ink)
    middle = tips[len(tips) // 2] if kind != "tuft" else tips[0]
    s.points["crest"] = root + (middle - root) * (1 - 0.4 * (abs(middle - root) - 0.2) / abs(middle - root))


def _draw_head(s: Sketch, traits: Traits, plumage: dict[str, RGB], crest: RGB, frame: complex, root: complex) -> None:
    colour, radius = plumage["head"], 0.205
    _draw_crest(s, traits, crest, frame, root)
    length, depth, curve = (traits.lengths[f"beak_{k}"] for k in ("length", "depth", "curve"))
    u = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    middle = 0.15 + (length + 0.04) * u + 1j * (0.02 + curve * length * u**2)
    half = 1j * (0.02 + depth) * (1 - u) ** 0.8
    upper, lower = (middle - half) * frame + root, (middle + half) * frame + root
    s.fill(np.concatenate([upper, lower[::-1]]), s.ink(traits.colours["beak"], BEAK))
    s.line(middle[:4] * frame + root, s.ink(_mix(traits.colours["beak"], (0, 0, 0), 0.45), BEAK), 0.014)
    s.points["beak"] = (0.205 + 0.35 * length + 1j * (0.02 + curve * length * 0.16)) * frame + root
    s.fill(radius * _CIRCLE * frame + root, s.ink(colour, HEAD))
    if "cap" in traits.colours:
        arc = radius * np.exp(1j * np.radians(np.linspace(-178, -28, 12)))
        ink = s.ink(_mix(colour, traits.colours["cap"], 0.3 + 0.7 * traits.strength), HEAD)
        s.fill(np.concatenate([arc, [0.1 - 0.085j, -0.04 - 0.07j]]) * frame + root, ink)
    eye = 0.075 - 0.03j
    if "eye_ring" in traits.colours:
        ink = s.ink(_mix(colour, traits.colours["eye_ring"], 0.3 + 0.7 * traits.strength), HEAD)
        s.fill((eye + 0.088 * _CIRCLE[::2]) * frame + root, ink)
    s.fill((eye + 0.046 * _CIRCLE[::2]) * frame + root, s.ink((16, 14, 18), HEAD))
    s.fill((eye + 0.012 - 0.014j + 0.013 * _CIRCLE[::4]) * frame + root, s.ink((250, 250, 250), HEAD))
    for name, at in {"eye": eye, "crown": -0.15j - 0.01, "forehead": 0.14 - 0.1j, "nape": -0.16 + 0j,
                     "throat": 0.04 + 0.15j}.items():  # fmt: skip
        s.points[name] = at * frame + root


def sketch_bird(traits: Traits, nuisance: float, rng: np.random.Generator) -> tuple[Sketch, complex]:
    """One bird in body units: its shapes, its key points, and where its foot stands."""
    s = Sketch()
    plumage = _plumage(nuisance, rng)
    pose = np.clip(rng.standard_normal(8), -2, 2) * nuisance
    raised = rng.uniform() < 0.15 * nuisance
    crest = list(COLOURS.values())[int(rng.integers(4))]  # an individual's own: says nothing about the class
    crest = _mix(plumage["head"], crest, 0.75)
    frame = _turn(-14 + 11 * pose[0])
    depth = 0.27 + 0.02 * float(pose[1])
    head_frame = _turn(-3 + 5 * pose[0] + 11 * pose[2])
    head_at = (0.5 + 0.015 * pose[3] - (0.31 + 0.02 * pose[4]) * 1j) * frame

    _draw_tail(s, traits, plumage["tail"], frame * _turn(-8 + 9 * pose[5]), -0.4 * frame - 0.02j * frame)
    foot = _draw_legs(s, traits, pose[3:5], frame)
    neck = s.ink(plumage["breast"], BREAST)
    s.fill(np.array([(0.1 - 0.2j) * frame, head_at - 0.17 * head_frame, head_at + (0.1 + 0.15j) * head_frame,
                     (0.48 + 0.02j) * frame]), neck)  # fmt: skip
    egg = 0.5 * _CIRCLE.real + 1j * depth * _CIRCLE.imag * (1 + 0.12 * _CIRCLE.real)
    s.fill(egg * frame, s.ink(plumage["body"], BODY))
    _draw_breast(s, traits, plumage["breast"], frame, depth)
    scallop = s.ink(_mix(plumage["body"], (0, 0, 0), 0.28), BODY)
    for x, y in zip(rng.uniform(-0.36, 0.14, 12), rng.uniform(0.3, 0.78, 12), strict=True):
        s.fill((x + 1j * y * depth * (1 - 1.2 * x * x) + np.array([-0.022, 0.028j, 0.022])) * frame, scallop)
    s.points["back"] = (-0.06 - 0.88j * depth) * frame
    s.points["belly"] = (-0.02 + 0.86j * depth) * frame
    wing_turn = _turn(60 + 25 * rng.uniform() if raised else -2 + 6 * pose[6])
    _draw_wing(s, traits, plumage["wing"], frame * wing_turn, (0.2 - 0.05j) * frame, 0.15 + 0.01 * float(pose[7]))
    _draw_head(s, traits, plumage, crest, head_frame, head_at)
    return s, foot


def _scene_colour(plumage: list[RGB], rng: np.random.Generator) -> RGB:
    """Background colours: foliage and earth, and as often the bird's own and the marks' colours."""
    pick = rng.uniform()
    if pick < 0.3:
        return plumage[int(rng.integers(1, len(plumage)))]
    if pick < 0.45:
        return list(COLOURS.values())[int(rng.integers(5))]
    return _hsv(rng.uniform(0.05, 0.65), rng.uniform(0.1, 0.6), rng.uniform(0.2, 0.9))


def _clutter(s: Sketch, own: list[RGB], foot: complex, nuisance: float, rng: np.random.Generator) -> Sketch:
    """What lies behind the bird, in picture units (0..1): a perch, leaves, stems, stray beak-like wedges."""
    behind = Sketch(colours=s.colours, parts=s.parts)
    for _ in range(int(rng.poisson(9 * nuisance))):
        centre = complex(*rng.uniform(-0.05, 1.05, 2))
        kind, reach, angle, thin = rng.uniform(size=4)
        ink = behind.ink(_scene_colour(own, rng))
        turn = _turn(360 * angle) * (0.03 + 0.13 * reach * reach)
        if kind < 0.55:
            behind.fill(centre + turn * (_CIRCLE[::2].real + (0.25 + 0.5 * thin) * 1j * _CIRCLE[::2].imag), ink)
        elif kind < 0.8:
            behind.line(centre + turn * np.array([-4, 0.3j, 4 + 1j * thin]), ink, 0.008 + 0.03 * thin)
        else:
            behind.fill(centre + turn * np.array([-0.4j * thin - 0.2j, 1.6, 0.4j * thin + 0.2j]), ink)
    if rng.uniform() < 0.75:
        slope = complex(1, 0.25 * nuisance * rng.standard_normal())
        ink = behind.ink(_hsv(rng.uniform(0.04, 0.12), rng.uniform(0.1, 0.5), rng.uniform(0.2, 0.7)))
        behind.line(foot + 0.012j + np.array([-1.5, 1.5]) * slope, ink, rng.uniform(0.02, 0.05))
    return behind


def _occluders(s: Sketch, own: list[RGB], nuisance: float, rng: np.random.Generator) -> Sketch:
    front = Sketch(colours=s.colours, parts=s.parts)
    if rng.uniform() < 0.35 * nuisance:
        ink = front.ink(_scene_colour(own, rng))
        start = complex(*rng.uniform(0, 1, 2))
        turn = _turn(rng.uniform(0, 360))
        front.line(start + turn * np.array([-2, 0, 2 + 0.4j]), ink, rng.uniform(0.008, 0.02))
        for t in rng.uniform(-0.5, 0.5, 3):
            leaf = 0.045 * (_CIRCLE[::2].real + 0.4j * _CIRCLE[::2].imag)
            front.fill(start + turn * (t + leaf * _turn(50)), ink)
    return front


def _backdrop(size: int, own: list[RGB], nuisance: float, rng: np.random.Generator) -> Image.Image:
    """Two smooth random fields of random coarseness that mix three colours."""
    first = np.array(_scene_colour(own, rng))
    layers = []
    for _ in range(2):
        away = min(nuisance, 1.0) * (np.array(_scene_colour(own, rng)) - first)
        grid = int(rng.choice([2, 3, 6, 12, 24]))
        coarse = np.clip(first + away * rng.uniform(-0.2, 1.4, (grid, grid, 1)), 0, 255).astype(np.uint8)
        layers.append(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
    return Image.blend(layers[0], layers[1], 0.5)


def _paint(draw: ImageDraw.ImageDraw, shapes: list[tuple[np.ndarray, int, float]], scale: float) -> None:
    for points, ink, width in shapes:
        flat = (points * scale).view(np.float64).tolist()
        if width:
            draw.line(flat, fill=ink, width=max(1, round(width * scale)), joint="curve" if len(flat) > 4 else None)
        else:
            draw.polygon(flat, fill=ink)


def _place(s: Sketch, nuisance: float, rng: np.random.Generator) -> tuple[complex, complex, bool]:
    """Scale (with the camera's roll), shift and flip that put the bird into the unit square, sometimes a little cut."""
    flip = bool(rng.uniform() < 0.5)
    turn = _turn(4 * nuisance * float(rng.uniform(-1, 1)))
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


def _light(labels: np.ndarray, centre: complex, nuisance: float, rng: np.random.Generator) -> np.ndarray:
    """Factor of every pixel, float32 [S, S]: slope of the light, a cast shadow, round bodies, speckled plumage."""
    size = len(labels)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle, strength, shadow, where, depth = rng.uniform(size=5)
    along = math.cos(2 * math.pi * angle) * (x - 0.5) + math.sin(2 * math.pi * angle) * (y - 0.5)
    light = 1 + 0.5 * nuisance * (strength - 0.2) * along
    if shadow < 0.3 * nuisance:
        light *= 1 - 0.45 * depth * np.clip((along - 0.6 * (where - 0.5)) * 12 + 0.5, 0, 1)
    light -= _ROUND[labels] * np.clip((y - centre.imag) * 1.6, -0.18, 0.22)
    coarse = Image.fromarray(rng.integers(0, 256, ((size + 1) // 2, (size + 1) // 2), dtype=np.uint8))
    grain = np.asarray(coarse.resize((size, size), Image.Resampling.BILINEAR), np.float32) / 127.5 - 1
    return (light * (1 + _SPECKLE[labels] * grain)).astype(np.float32)


def _camera(picture: np.ndarray, nuisance: float, rng: np.random.Generator) -> Image.Image:
    """Sensor noise, exposure, gamma and colour cast, blur."""
    size = len(picture)
    noise = rng.integers(0, 256, (size, size, 1), dtype=np.uint8).astype(np.float32) - 127.5
    picture += noise * np.float32(0.05 * nuisance * rng.uniform())
    image = Image.fromarray(np.clip(picture, 0, 255, out=picture).astype(np.uint8))
    gain = np.exp(nuisance * (0.18 * rng.uniform(-1, 1) + 0.09 * rng.uniform(-1, 1, 3)))
    gamma = math.exp(0.22 * nuisance * rng.uniform(-1, 1))
    ramp = (np.arange(256) / 255) ** gamma
    image = image.point(np.clip(255 * gain[:, None] * ramp, 0, 255).astype(np.uint8).ravel().tolist())
    blur = rng.uniform(0.2, 0.9) * nuisance * size / 128
    return image.filter(ImageFilter.GaussianBlur(blur)) if rng.uniform() < 0.35 else image


def draw(
    traits: Traits, size: int, nuisance: float, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """One picture with its truth.

    Args:
        traits: the bird's part attributes.
        size: side of the picture in pixels.
        nuisance: 0 = one pose on one backdrop; 1 = full variation; more is allowed.
        rng: the only source of chance.

    Returns:
        The RGB picture; part ids uint8 [S, S] (255 = no part); key points float64 [P, 3] (x, y, visible) in pixels
        from the upper left corner, in the order of KEYPOINTS, zeros where not visible.
    """
    bird, foot = sketch_bird(traits, nuisance, rng)
    zoom, shift, flip = _place(bird, nuisance, rng)

    def to_picture(points: np.ndarray) -> np.ndarray:
        turned = points * (zoom / abs(zoom))
        return abs(zoom) * (-turned.conj() if flip else turned) + shift

    own = list(bird.colours)
    behind = _clutter(bird, own, complex(to_picture(np.array(foot))), nuisance, rng)
    front = _occluders(bird, own, nuisance, rng)
    canvas = Image.new("L", (2 * size, 2 * size))
    pen = ImageDraw.Draw(canvas)
    _paint(pen, behind.shapes, 2 * size)
    _paint(pen, [(to_picture(points), ink, width * abs(zoom)) for points, ink, width in bird.shapes], 2 * size)
    _paint(pen, front.shapes, 2 * size)

    parts = np.full(256, ABSENT, np.uint8)
    parts[: len(bird.parts)] = bird.parts
    labels = parts[np.asarray(canvas)[1::2, 1::2]]
    clear = canvas.point([255] + [0] * 255).reduce(2)
    canvas.putpalette(np.clip(np.array(bird.colours), 0, 255).astype(np.uint8).tobytes())
    backdrop = ImageChops.multiply(_backdrop(size, own, nuisance, rng), Image.merge("RGB", (clear, clear, clear)))
    picture = np.asarray(ImageChops.add(canvas.convert("RGB").reduce(2), backdrop), np.float32)
    centre = complex(to_picture(np.array(0j)))
    image = _camera(picture * _light(labels, centre, nuisance, rng)[..., None], nuisance, rng)

    points = np.zeros((len(KEYPOINTS), 3))
    for row, (name, part) in enumerate(KEYPOINTS.items()):
        if name not in bird.points:
            continue
        at = complex(to_picture(np.array(bird.points[name]))) * size
        inside = 0 <= at.real < size and 0 <= at.imag < size
        if inside and labels[int(at.imag), int(at.real)] == part:
            points[row] = at.real, at.imag, 1
    return image, labels, points
