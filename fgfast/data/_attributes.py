"""What tells the drawn classes apart: a table of part attributes, and one combination of levels a class."""

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

# Lengths are in units of the body's length; "none" is always the first level where an attribute can be absent.
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
    """Levels of every attribute for every class, all classes different.

    A difficult set varies fewer attributes (all 15 at 0, 6 at 1, more where the classes need them); the others have one
    level in the whole set. Classes are picked one by one from random candidates: always the one whose smallest Hamming
    distance to the classes already picked is largest.

    Args:
        classes: number of classes, at least 2.
        seed: decides which attributes vary and which combinations are picked.
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
    """One class's levels by name, for the settings file."""
    return {name: levels[int(level)] for (name, levels), level in zip(ATTRIBUTES.items(), row, strict=True)}


@dataclass(frozen=True)
class Traits:
    """One individual's part attributes as they are drawn: lengths in body lengths, colours in 0..255."""

    lengths: dict[str, float]  # beak_length, beak_depth, beak_curve, tail_length, tail_fork, leg_length
    colours: dict[str, RGB]  # beak, legs, and cap, eye_ring, wing_tip where the class has one
    shapes: dict[str, str]  # crest, breast, wing_bars, tail_band
    strength: float  # in (0, 1]: how far marks stand out


def individual(row: np.ndarray, difficulty: float, nuisance: float, rng: np.random.Generator) -> Traits:
    """Draw one bird's traits: its class's levels pulled together by difficulty, jittered by nuisance."""
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
