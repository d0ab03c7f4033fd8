"""The options of k-means that every backend takes."""

from typing import NamedTuple

from torch import Tensor


class KMeansOptions(NamedTuple):
    """How B problems are clustered; :func:`fgfast.kmeans` describes each option."""

    n_clusters: int
    n_iter: int
    init: str  # "k-means++", "random" or "given"
    first: Tensor | None  # the initial centroids [B, K, D] where init is "given"
    init_samples: int
    n_init: int
    tol: float
    metric: str
    empty: str
    precision: str
    deterministic: bool
