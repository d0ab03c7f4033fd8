"""An argument that is not a tensor, or not an integer, is named before anything is computed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fgfast import Ids, assign_and_pool, contrastive_loss, kmeans, kmeans_step, labels_to_grid, part_pool

X, LABELS, Q = torch.randn(2, 6, 4), torch.zeros(2, 6, dtype=torch.int64), torch.randn(4, 8)
IDS = Ids(torch.arange(4), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: part_pool(X.numpy(), LABELS, 3), "features is a ndarray"),
        (lambda: part_pool(X, [[0]], 3), "labels is a list"),
        (lambda: part_pool(X, LABELS, 3, weight=1.0), "weight is a float"),
        (lambda: part_pool(X, LABELS, 3.0), "n_parts is 3.0"),
        (lambda: labels_to_grid(np.zeros((1, 2, 2)), 2, 3), "labels is a ndarray"),
        (lambda: labels_to_grid(LABELS[:, None], 2.5, 3), "size is 2.5"),
        (lambda: kmeans("x", 3), "x is a str"),
        (lambda: kmeans(X, 3.0), "n_clusters is 3.0"),
        (lambda: kmeans(X, 3, n_iter=2.5), "n_iter is 2.5"),
        (lambda: kmeans_step(X, X.tolist()), "centroids is a list"),
        (lambda: kmeans_step(X.tolist(), X), "x is a list"),
        (lambda: assign_and_pool(X.tolist(), X), "features is a list"),
        (lambda: contrastive_loss(Q.numpy(), Q, query_ids=IDS, key_ids=IDS), "query is a ndarray"),
        (lambda: contrastive_loss(Q, Q, query_ids=IDS[:2], key_ids=IDS), "query_ids is not"),
        (lambda: contrastive_loss(Q, Q, query_ids=IDS, key_ids=None), "key_ids is not"),
        (lambda: contrastive_loss(Q, Q, query_ids=([0], [0], [0]), key_ids=IDS), "query_ids.image is a list"),
    ],
)
def test_wrong_type_is_named(call: Callable[[], Any], message: str) -> None:
    """A TypeError that begins with the argument."""
    with pytest.raises(TypeError, match=message):
        call()


def test_numpy_numbers_are_accepted() -> None:
    """Integers and temperatures may come from numpy."""
    assert part_pool(X, LABELS, np.int64(3)).pooled.shape == (2, 3, 4)
    assert kmeans(X, np.int32(2), seed=0).centroids.shape == (2, 2, 4)
    assert contrastive_loss(Q, Q, query_ids=IDS, key_ids=IDS, temperature=np.float32(0.5)).isfinite()
