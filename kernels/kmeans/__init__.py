"""k-means. Host side: :mod:`launch` (the algorithm), :mod:`step` (one step of dense pixels), :mod:`pyramid`.

Device side: :mod:`tiles` (common functions, and the step that reads the pixels twice), :mod:`fused` (the step that
reads them once), :mod:`resident` (the same from shared memory), :mod:`centroids` (before and after a step); of pyramids
:mod:`pyramid_cells` (common functions), :mod:`pyramid_score`, :mod:`pyramid_sums`, :mod:`pyramid_move` and
:mod:`pyramid_squares`. Compiled ahead of time and tuned: :mod:`cases`, :mod:`pyramid_cases`.
"""
