"""What k-means reads, on every backend: pixels of a matrix or of a feature pyramid, and the initial centroids."""
