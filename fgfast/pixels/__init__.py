"""What k-means reads, on every backend: pixels of a matrix or of a feature pyramid, and the centroids to start from."""
