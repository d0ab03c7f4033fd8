"""k-means: :mod:`kmeans` is the full algorithm, :mod:`step` one assignment with the sums of the new centroids."""

from fgfast.ops.kmeans.kmeans import KMeansResult, kmeans
from fgfast.ops.kmeans.step import KMeansStep, kmeans_step

__all__ = ["KMeansResult", "KMeansStep", "kmeans", "kmeans_step"]
