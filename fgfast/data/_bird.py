"""One bird: its shapes and key points in body coordinates.

Points are complex numbers (x + iy, y down, the bird faces +x, its body is one unit long): rotation and scaling are one
multiplication.
"""

import colorsys
import math
from dataclasses import dataclass, field

import numpy as np

from fgfast.data._attributes import COLOURS, RGB, Traits
from fgfast.data.maps import ABSENT

PARTS = ("beak", "crest", "head", "breast", "body", "wing", "tail", "legs")
BEAK, CREST, HEAD, BREAST, BODY, WING, TAIL, LEGS = range(len(PARTS))
# A key point is visible if the pixel at its position shows its part.
KEYPOINTS = {
    "back": BODY, "beak": BEAK, "belly": BODY, "breast": BREAST, "crest": CREST, "crown": HEAD, "eye": HEAD,
    "forehead": HEAD, "leg": LEGS, "nape": HEAD, "tail": TAIL, "throat": HEAD, "wing": WING,
}  # fmt: skip

CIRCLE = np.exp(1j * np.linspace(0, 2 * np.pi, 26, endpoint=False))
Shape = tuple[np.ndarray, int, float]  # points, ink, line width (0 = filled)


@dataclass
class Sketch:
    """Shapes in drawing order, and key points; an ink is the index of a colour and of the part that it belongs to."""

    colours: list[RGB] = field(default_factory=lambda: [(0.0, 0.0, 0.0)])
    parts: list[int] = field(default_factory=lambda: [ABSENT])
    shapes: list[Shape] = field(default_factory=list)
    points: dict[str, complex] = field(default_factory=dict)

    def ink(self, colour: RGB, part: int = ABSENT) -> int:
        self.colours.append(colour)
        self.parts.append(part)
        return len(self.colours) - 1

    def fill(self, points: np.ndarray, ink: int) -> None:
        self.shapes.append((points, ink, 0.0))

    def line(self, points: np.ndarray, ink: int, width: float) -> None:
        self.shapes.append((points, ink, width))


def _mix(a: RGB, b: RGB, weight: float) -> RGB:
    return (a[0] + weight * (b[0] - a[0]), a[1] + weight * (b[1] - a[1]), a[2] + weight * (b[2] - a[2]))


def hsv(h: float, s: float, v: float) -> RGB:
    r, g, b = colorsys.hsv_to_rgb(h % 1.0, min(max(s, 0.0), 1.0), min(max(v, 0.0), 1.0))
    return (255 * r, 255 * g, 255 * b)


def _plumage(nuisance: float, rng: np.random.Generator) -> dict[str, RGB]:
    """Base colours of one bird, from the same distribution for every class."""
    hue, shift, wing, head, tail = rng.uniform(-1, 1, 5)
    sat, value, dark, light = rng.uniform(size=4)
    hue = 0.09 + 0.5 * nuisance * hue * abs(hue)
    sat, value = 0.32 + 0.2 * nuisance * (sat - 0.5) * 2, 0.56 + 0.14 * nuisance * (value - 0.5) * 2
    return {
        "body": hsv(hue, sat, value),
        "breast": hsv(hue + 0.06 * nuisance * shift, 0.6 * sat, value + 0.2 + 0.05 * nuisance * light),
        "head": hsv(hue + 0.08 * nuisance * head, 1.2 * sat, 0.92 * value + 0.1 * nuisance * head),
        "wing": hsv(hue + 0.08 * nuisance * wing, sat, (0.6 + 0.12 * nuisance * dark) * value),
        "tail": hsv(hue + 0.08 * nuisance * tail, 0.9 * sat, (0.72 + 0.15 * nuisance * tail) * value),
    }


def rotation(degrees: float) -> complex:
    """The unit complex number that rotates a point by an angle."""
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
        turn = rotation(14 * pose[i])
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
    front = np.concatenate([CIRCLE[20:], CIRCLE[:8]])
    inner = 0.2 - 1j * np.array([-0.62, -0.2, 0.3, 0.66]) * depth
    region = np.concatenate([0.5 * front.real + 1j * depth * front.imag, inner]) * frame
    s.fill(region, s.ink(colour, BREAST))
    kind = traits.shapes["breast"]
    mark = s.ink(_mix(colour, (70, 28, 24), 0.2 + 0.8 * traits.strength), BREAST)
    if kind == "bib":
        s.fill((0.4 - 0.12j + (0.085 * CIRCLE.real + 0.12j * CIRCLE.imag)) * frame, mark)
    elif kind == "band":
        ring = np.array([0.26 + 0.06j, 0.36 + 0.1j, 0.47 + 0.06j])
        s.line(ring * frame, mark, 0.075 * (0.5 + 0.5 * traits.strength))
    elif kind == "spots":
        for centre in (0.3 - 0.08j, 0.41 - 0.05j, 0.33 + 0.03j, 0.43 + 0.05j, 0.27 + 0.11j, 0.36 + 0.13j):
            s.fill((centre + 0.028 * CIRCLE[::3]) * frame, mark)
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
        turn = rotation(angle) * frame
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
    s.fill(radius * CIRCLE * frame + root, s.ink(colour, HEAD))
    if "cap" in traits.colours:
        arc = radius * np.exp(1j * np.radians(np.linspace(-178, -28, 12)))
        ink = s.ink(_mix(colour, traits.colours["cap"], 0.3 + 0.7 * traits.strength), HEAD)
        s.fill(np.concatenate([arc, [0.1 - 0.085j, -0.04 - 0.07j]]) * frame + root, ink)
    eye = 0.075 - 0.03j
    if "eye_ring" in traits.colours:
        ink = s.ink(_mix(colour, traits.colours["eye_ring"], 0.3 + 0.7 * traits.strength), HEAD)
        s.fill((eye + 0.088 * CIRCLE[::2]) * frame + root, ink)
    s.fill((eye + 0.046 * CIRCLE[::2]) * frame + root, s.ink((16, 14, 18), HEAD))
    s.fill((eye + 0.012 - 0.014j + 0.013 * CIRCLE[::4]) * frame + root, s.ink((250, 250, 250), HEAD))
    for name, at in {"eye": eye, "crown": -0.15j - 0.01, "forehead": 0.14 - 0.1j, "nape": -0.16 + 0j,
                     "throat": 0.04 + 0.15j}.items():  # fmt: skip
        s.points[name] = at * frame + root


def sketch_bird(traits: Traits, nuisance: float, rng: np.random.Generator) -> tuple[Sketch, complex]:
    """One bird in body units: its shapes and key points, and the position of its foot."""
    s = Sketch()
    plumage = _plumage(nuisance, rng)
    pose = np.clip(rng.standard_normal(8), -2, 2) * nuisance
    raised = rng.uniform() < 0.15 * nuisance
    crest = list(COLOURS.values())[int(rng.integers(4))]  # drawn per bird: independent of the class
    crest = _mix(plumage["head"], crest, 0.75)
    frame = rotation(-14 + 11 * pose[0])
    depth = 0.27 + 0.02 * float(pose[1])
    head_frame = rotation(-3 + 5 * pose[0] + 11 * pose[2])
    head_at = (0.5 + 0.015 * pose[3] - (0.31 + 0.02 * pose[4]) * 1j) * frame

    _draw_tail(s, traits, plumage["tail"], frame * rotation(-8 + 9 * pose[5]), -0.4 * frame - 0.02j * frame)
    foot = _draw_legs(s, traits, pose[3:5], frame)
    neck = s.ink(plumage["breast"], BREAST)
    s.fill(np.array([(0.1 - 0.2j) * frame, head_at - 0.17 * head_frame, head_at + (0.1 + 0.15j) * head_frame,
                     (0.48 + 0.02j) * frame]), neck)  # fmt: skip
    egg = 0.5 * CIRCLE.real + 1j * depth * CIRCLE.imag * (1 + 0.12 * CIRCLE.real)
    s.fill(egg * frame, s.ink(plumage["body"], BODY))
    _draw_breast(s, traits, plumage["breast"], frame, depth)
    scallop = s.ink(_mix(plumage["body"], (0, 0, 0), 0.28), BODY)
    for x, y in zip(rng.uniform(-0.36, 0.14, 12), rng.uniform(0.3, 0.78, 12), strict=True):
        s.fill((x + 1j * y * depth * (1 - 1.2 * x * x) + np.array([-0.022, 0.028j, 0.022])) * frame, scallop)
    s.points["back"] = (-0.06 - 0.88j * depth) * frame
    s.points["belly"] = (-0.02 + 0.86j * depth) * frame
    wing_turn = rotation(60 + 25 * rng.uniform() if raised else -2 + 6 * pose[6])
    _draw_wing(s, traits, plumage["wing"], frame * wing_turn, (0.2 - 0.05j) * frame, 0.15 + 0.01 * float(pose[7]))
    _draw_head(s, traits, plumage, crest, head_frame, head_at)
    return s, foot
