"""Sets of permutations: what they are, and that the greedy ones are further apart than drawn ones."""

import numpy as np
import pytest

from fgfast.errors import UserError
from fgfast.methods.permutations import permutation_set


def smallest_distance(found: np.ndarray) -> int:
    distance = (found[:, None] != found[None]).sum(2)
    return int(distance[~np.eye(len(found), dtype=bool)].min())


@pytest.mark.parametrize("rule", ["greedy", "pairs"])
@pytest.mark.parametrize(
    ("count", "places"),
    [(24, 4), (2, 4), (100, 9), (30, 16)],  # all there are; the fewest; the default; more than can be listed
)
def test_they_are_distinct_permutations(rule: str, count: int, places: int) -> None:
    found = permutation_set(count, places, rule=rule, seed=3)
    assert found.shape == (count, places)
    assert (np.sort(found, 1) == np.arange(places)).all()
    assert len(np.unique(found, axis=0)) == count
    assert np.array_equal(found, permutation_set(count, places, rule=rule, seed=3))


@pytest.mark.parametrize(("count", "places", "least"), [(100, 9, 6), (8, 9, 9), (12, 4, 2), (100, 16, 12)])
def test_greedy_sets_are_far_apart(count: int, places: int, least: int) -> None:
    """No drawn set of that size has a larger smallest distance, and it is not under what the rule reached before."""
    found = smallest_distance(permutation_set(count, places, seed=1))
    rng = np.random.default_rng(0)
    drawn = [rng.permuted(np.tile(np.arange(places), (count, 1)), axis=1) for _ in range(20)]
    assert found >= max(least, *map(smallest_distance, drawn))


def test_greedy_choices_are_the_farthest() -> None:
    """Each permutation of a set is as far from those before it as any permutation there is (4 places: all 24)."""
    everything = permutation_set(24, 4)
    for k in range(1, 24):
        nearest = (everything[k:, None] != everything[None, :k]).sum(2).min(1)
        assert nearest[0] == nearest.max()


def test_pairs_differ_nearly_everywhere() -> None:
    found = permutation_set(40, 9, rule="pairs")
    assert (found[::2] != found[1::2]).all()
    assert smallest_distance(found) < 6  # of different pairs nothing is asked


@pytest.mark.parametrize(("count", "places", "match"), [(25, 4, "24 permutations, not 25"), (1, 9, "at least 2")])
def test_impossible_sets_are_named(count: int, places: int, match: str) -> None:
    with pytest.raises(UserError, match=match):
        permutation_set(count, places)


def test_pairs_that_cannot_be_found_are_named() -> None:
    """Three places: each permutation is far from two others, so six of them hold two pairs and no third."""
    with pytest.raises(UserError, match="permutation-rule greedy"):
        permutation_set(5, 3, rule="pairs")
