"""k-means. Host side: :mod:`launch` (the algorithm), :mod:`step` (one step of dense pixels), :mod:`pyramid`.

Device side: :mod:`tiles` (what the kernels of dense pixels share), :mod:`fused` (a step that reads the pixels once),
:mod:`centroids` (before and after a step), :mod:`pyramid_kernels`.
"""
