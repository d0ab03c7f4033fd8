"""The part attributes that distinguish the drawn classes: each class is one combination of levels."""

import math
from dataclasses import dataclass

import numpy as np

RGB = tuple[float, float, float]

COLOURS: dict[str, RGB] = {
    "yellow": (246, 202, 40),
    "red": (214, 44, 40),
    "black": (26, 25, 30),
    "blue": (72, 112, 206),
    "white": (246, 246, 240),
}

# Lengths are in units of the body's length; "none" is always the first level of an attribute that can be absent.
ATTRIBUTES: dict[str, tuple[float, ...] | tuple[str, ...]] = {
    "beak_length": (0.16, 0.29, 0.44),
    "beak_depth": (0.05, 0.105),
    "beak_curve": (-0.32, 0.0, 0.5),
    "beak_colour": ("yellow", "red", "black", "blue"),
    "crest": ("none", "tuft", "spike", "fan"),
    "cap": ("none", "black", "red", "white"),
    "eye_ring": ("none", "white", "yellow", "red"),
    "breast": ("none", "bib", "band", "spots"),
    "wing_bars": ("none", "one", "two", "three"),
    "wing_tip": ("none", "white", "black"),
    "tail_length": (0.28, 0.5, 0.76),
    "tail_fork": (-0.38, 0.0, 0.48),
    "tail_band": ("none", "tip", "middle", "double"),
    "leg_length": (0.17, 0.29, 0.43),
    "leg_colour": ("yellow", "red", "black", "blue"),
}


def design_classes(classes: int, seed: int, difficulty: float) -> np.ndarray:
    """Levels of every attribute for every class; no two classes are equal.

    A difficult set varies fewer attributes (all 15 at 0, 6 at 1, more if the number of classes needs them); the others
    have one level in the full set. Classes are picked greedily from random candidates: always the one with the largest
    minimum Hamming distance to those already picked.

    Args:
        classes: number of classes, at least 2.
        seed: determines which attributes vary and which combinations are picked.
        difficulty: in [0, 1].

    Returns:
        int64 [classes, 15], columns in the order of ATTRIBUTES.

    Example:
        >>> levels = design_classes(20, seed=0, difficulty=0.5)
        >>> len({tuple(row) for row in levels.tolist()})
        20
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    counts = np.array([len(levels) for levels in ATTRIBUTES.values()])
    order = rng.permutation(len(counts))
    shared = rng.integers(counts)
    free = round(len(counts) - 9 * difficulty)
    while math.prod(counts[order[:free]].tolist()) < 4 * classes and free < len(counts):
        free += 1
    candidates = rng.integers(counts, size=(max(4096, 8 * classes), len(counts)))
    candidates[:, order[free:]] = shared[order[free:]]
    candidates = np.unique(candidates, axis=0)
    picked = [int(rng.integers(len(candidates)))]
    nearest = (candidates != candidates[picked[0]]).sum(axis=1)
    while len(picked) < classes:
        picked.append(int(nearest.argmax()))
        np.minimum(nearest, (candidates != candidates[picked[-1]]).sum(axis=1), out=nearest)
    return candidates[picked]


def level_names(row: np.ndarray) -> dict[str, str | float]:
    """The levels of one class by attribute, for the settings file."""
    return {name: levels[int(level)] for (name, levels), level in zip(ATTRIBUTES.items(), row, strict=True)}


@dataclass(frozen=True)
class Traits:
    """Part attributes of one bird: lengths in body lengths, colours in 0..255."""

    lengths: dict[str, float]  # beak_length, beak_depth, beak_curve, tail_length, tail_fork, leg_length
    colours: dict[str, RGB]  # beak, leg, and cap, eye_ring, wing_tip if the class has one
    shapes: dict[str, str]  # crest, breast, wing_bars, tail_band
    strength: float  # in (0, 1]: contrast of the marks


def draw_traits(row: np.ndarray, difficulty: float, nuisance: float, rng: np.random.Generator) -> Traits:
    """The traits of one bird: the levels of its class, moved closer together by difficulty, jittered by nuisance."""
    strength = 1.0 - 0.6 * difficulty
    named = level_names(row)
    lengths, colours, shapes = {}, {}, {}
    for name, value in named.items():
        levels = ATTRIBUTES[name]
        if isinstance(value, float):
            mean = sum(float(level) for level in levels) / len(levels)
            lengths[name] = mean + strength * (value - mean)
            if name not in ("beak_curve", "tail_fork"):
                lengths[name] *= math.exp(0.06 * nuisance * rng.standard_normal())
            else:
                lengths[name] += 0.03 * nuisance * rng.standard_normal()
        elif name in ("crest", "breast", "wing_bars", "tail_band"):
            shapes[name] = value
        elif value != "none":
            palette = np.array([COLOURS[str(level)] for level in levels if level != "none"])
            mixed = palette.mean(axis=0) + (0.35 + 0.65 * strength) * (np.array(COLOURS[value]) - palette.mean(axis=0))
            mixed = np.clip(mixed + 10 * nuisance * rng.standard_normal(3), 0, 255)
            colours[name.removesuffix("_colour")] = (float(mixed[0]), float(mixed[1]), float(mixed[2]))
    return Traits(lengths, colours, shapes, strength)
