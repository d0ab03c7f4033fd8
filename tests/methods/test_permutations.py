"""Sets of permutations: they are distinct, and greedy ones are farther apart than random ones."""

import numpy as np
import pytest

from fgfast.errors import UserError
from fgfast.methods.permutations import permutation_set


def smallest_distance(permutations: np.ndarray) -> int:
    distance = (permutations[:, None] != permutations[None]).sum(2)
    return int(distance[~np.eye(len(permutations), dtype=bool)].min())


@pytest.mark.parametrize("rule", ["greedy", "pairs"])
@pytest.mark.parametrize(
    ("count", "places"),
    [(24, 4), (2, 4), (100, 9), (30, 16)],  # all permutations; the smallest set; the default; too many to list
)
def test_they_are_distinct_permutations(rule: str, count: int, places: int) -> None:
    permutations = permutation_set(count, places, rule=rule, seed=3)
    assert permutations.shape == (count, places)
    assert (np.sort(permutations, 1) == np.arange(places)).all()
    assert len(np.unique(permutations, axis=0)) == count
    assert np.array_equal(permutations, permutation_set(count, places, rule=rule, seed=3))


@pytest.mark.parametrize(("count", "places", "least"), [(100, 9, 6), (8, 9, 9), (12, 4, 2), (100, 16, 12)])
def test_greedy_sets_are_far_apart(count: int, places: int, least: int) -> None:
    """The smallest distance is at least that of random sets of the same size, and a known bound."""
    permutations = smallest_distance(permutation_set(count, places, seed=1))
    rng = np.random.default_rng(0)
    drawn = [rng.permuted(np.tile(np.arange(places), (count, 1)), axis=1) for _ in range(20)]
    assert permutations >= max(least, *map(smallest_distance, drawn))


def test_greedy_choices_are_the_farthest() -> None:
    """No permutation is farther from the earlier ones of a set than the one chosen next (4 places: all 24)."""
    everything = permutation_set(24, 4)
    for k in range(1, 24):
        nearest = (everything[k:, None] != everything[None, :k]).sum(2).min(1)
        assert nearest[0] == nearest.max()


def test_pairs_differ_nearly_everywhere() -> None:
    permutations = permutation_set(40, 9, rule="pairs")
    assert (permutations[::2] != permutations[1::2]).all()
    assert smallest_distance(permutations) < 6  # only pairs have to be far apart


@pytest.mark.parametrize(("count", "places", "match"), [(25, 4, "24 permutations, not 25"), (1, 9, "at least 2")])
def test_impossible_sets_are_refused(count: int, places: int, match: str) -> None:
    with pytest.raises(UserError, match=match):
        permutation_set(count, places)


def test_pairs_that_do_not_exist_are_refused() -> None:
    """With three places each permutation is far from two others: six permutations contain two pairs and no third."""
    with pytest.raises(UserError, match="permutation-rule greedy"):
        permutation_set(5, 3, rule="pairs")
