"""Sets of permutations that differ in many places: the classes of a jigsaw puzzle."""

import math

import numpy as np

from fgfast.errors import UserError

RULES = ("greedy", "pairs")
_POOL = 50_000  # candidates of the greedy rule where there are more permutations than anyone can list
_ALL = 9  # most places of which all permutations are listed (362,880)


def permutation_set(count: int, places: int, *, rule: str = "greedy", seed: int = 0) -> np.ndarray:
    """``count`` different permutations of ``places`` places, far from each other in Hamming distance.

    "greedy": the first one is drawn, and each next one is that whose smallest distance to all those chosen before is
    largest; ties go to a drawn order. Up to 9 places all permutations are candidates, above that 50,000 drawn ones.
    "pairs": pairs are drawn, and both of a pair are taken when more than 0.9 of their places differ; nothing is asked
    of permutations of different pairs but that they are not the same.

    Args:
        count: how many, 2 to places!.
        places: length of each.
        rule: "greedy" or "pairs".
        seed: what is drawn; the same set for a seed.

    Returns:
        int64 [count, places].

    Raises:
        UserError: there are not so many permutations, or no pairs that are far enough from each other.

    Example:
        >>> a, b = permutation_set(2, 9)
        >>> int((a != b).sum())
        9
    """
    if rule not in RULES:
        raise ValueError(f"The rule is {rule!r}: choose one of {', '.join(RULES)}.")
    if count < 2:
        raise UserError(f"--n-permutations is {count}: give at least 2, a puzzle needs two outcomes.")
    if places <= 20 and math.factorial(places) < count:
        raise UserError(
            f"{places} tiles have {math.factorial(places)} permutations, not {count}: "
            "give a larger --grid or fewer --n-permutations."
        )
    rng = np.random.default_rng([seed, places, count])
    return (_greedy if rule == "greedy" else _pairs)(count, places, rng)


def _drawn(count: int, places: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permuted(np.tile(np.arange(places, dtype=np.int64), (count, 1)), axis=1)


def _all(places: int) -> np.ndarray:
    found = np.zeros((1, 0), np.int64)
    for n in range(places):
        found = np.concatenate([np.insert(found, at, n, axis=1) for at in range(n + 1)])
    return found


def _greedy(count: int, places: int, rng: np.random.Generator) -> np.ndarray:
    candidates = rng.permutation(_all(places)) if places <= _ALL else _drawn(max(_POOL, 2 * count), places, rng)
    columns = np.ascontiguousarray(candidates.T.astype(np.int16))
    nearest = np.full(len(candidates), places + 1, np.int16)  # distance to the nearest of those chosen
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
        first, second = _drawn(max(64, 4 * count), places, rng), _drawn(max(64, 4 * count), places, rng)
        far = (first != second).sum(1) > 0.9 * places
        for pair in zip(map(tuple, first[far].tolist()), map(tuple, second[far].tolist()), strict=True):
            if chosen.keys().isdisjoint(pair):
                chosen |= dict.fromkeys(pair)
            if len(chosen) >= count:
                return np.array(list(chosen)[:count])
    raise UserError(
        f"No {count} permutations of {places} tiles were found in pairs that differ nearly everywhere: "
        "give a larger --grid, fewer --n-permutations, or --permutation-rule greedy."
    )
