"""Triton kernels of fgfast, one file an operation, imported as ``fgfast.kernels``.

``OPERATIONS`` names the operations that have a kernel here. Kernels register nothing: :mod:`fgfast.ops` checks the
arguments, chooses a backend and calls them.
"""

OPERATIONS: tuple[str, ...] = (
    "assign_and_pool",
    "contrast",
    "kmeans",
    "kmeans_step",
    "labels_to_grid",
    "part_pool",
    "perturb",
)
