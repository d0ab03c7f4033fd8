"""k-means. Host side: :mod:`launch` (the algorithm), :mod:`step` (one step of dense pixels), :mod:`pyramid`.

Device side: :mod:`tiles` (common functions, and the step that reads the pixels twice), :mod:`fused` (the step that
reads them once), :mod:`centroids` (before and after a step), :mod:`pyramid_kernels`. Compiled ahead of time and tuned:
:mod:`cases`, :mod:`pyramid_cases`.
"""
