"""Sets of permutations that differ in many places: the classes of a jigsaw puzzle."""

import math

import numpy as np

from fgfast.errors import UserError

RULES = ("greedy", "pairs")
_MAX_LISTED = 9  # largest number of places of which all permutations are listed (362,880)
_N_DRAWN = 50_000  # candidates of the greedy rule for more places


def permutation_set(count: int, places: int, *, rule: str = "greedy", seed: int = 0) -> np.ndarray:
    """``count`` different permutations of ``places`` places, far from each other in Hamming distance.

    "greedy": the first one is random, and each next one maximises the smallest distance to those chosen before, with
    ties broken at random. Up to 9 places all permutations are candidates, above that 50,000 random ones.
    "pairs": both permutations of a random pair are taken if more than 0.9 of their places differ; permutations of
    different pairs only have to be different.

    Args:
        count: number of permutations, 2 to places!.
        places: length of each.
        rule: "greedy" or "pairs".
        seed: seed of the draws; the same seed gives the same set.

    Returns:
        int64 [count, places].

    Raises:
        UserError: there are fewer permutations, or no pairs that are far enough from each other.

    Example:
        >>> a, b = permutation_set(2, 9)
        >>> int((a != b).sum())
        9
    """
    if rule not in RULES:
        raise ValueError(f"The rule is {rule!r}: choose one of {', '.join(RULES)}.")
    if count < 2:
        raise UserError(f"--n-permutations is {count}: give at least 2.")
    if places <= 20 and math.factorial(places) < count:
        raise UserError(
            f"{places} tiles have {math.factorial(places)} permutations, not {count}: "
            "give a larger --grid or fewer --n-permutations."
        )
    rng = np.random.default_rng([seed, places, count])
    return (_greedy if rule == "greedy" else _pairs)(count, places, rng)


def _draw(count: int, places: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permuted(np.tile(np.arange(places, dtype=np.int64), (count, 1)), axis=1)


def _list_all(places: int) -> np.ndarray:
    permutations = np.zeros((1, 0), np.int64)
    for n in range(places):
        permutations = np.concatenate([np.insert(permutations, at, n, axis=1) for at in range(n + 1)])
    return permutations


def _greedy(count: int, places: int, rng: np.random.Generator) -> np.ndarray:
    listed = places <= _MAX_LISTED
    candidates = rng.permutation(_list_all(places)) if listed else _draw(max(_N_DRAWN, 2 * count), places, rng)
    columns = np.ascontiguousarray(candidates.T.astype(np.int16))
    nearest = np.full(len(candidates), places + 1, np.int16)  # distance to the nearest chosen one
    chosen = []
    for _ in range(count):
        chosen.append(int(nearest.argmax()))
        distance = np.zeros(len(candidates), np.int16)
        for column in columns:
            distance += column != column[chosen[-1]]
        np.minimum(nearest, distance, out=nearest)
    return candidates[chosen]


def _pairs(count: int, places: int, rng: np.random.Generator) -> np.ndarray:
    chosen: dict[tuple[int, ...], None] = {}
    for _ in range(100):
        first, second = (_draw(max(64, 4 * count), places, rng) for _ in range(2))
        far = (first != second).sum(1) > 0.9 * places
        for pair in zip(map(tuple, first[far].tolist()), map(tuple, second[far].tolist()), strict=True):
            if chosen.keys().isdisjoint(pair):
                chosen |= dict.fromkeys(pair)
            if len(chosen) >= count:
                return np.array(list(chosen)[:count])
    raise UserError(
        f"Pairs of permutations of {places} tiles that differ in nearly all places do not give {count} permutations: "
        "give a larger --grid, fewer --n-permutations, or --permutation-rule greedy."
    )
