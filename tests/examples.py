"""The number of hypothesis examples: a few in ``make test``, FGFAST_EXAMPLES times as many in a sweep."""

import os

from hypothesis import settings

FACTOR = float(os.environ.get("FGFAST_EXAMPLES", "1"))


def examples(number: int) -> settings:
    """Settings for ``number`` fixed examples; in a sweep more, generated from the seed of the command line.

    There is no deadline, as the first launch in Triton's interpreter takes seconds.
    """
    count = max(1, round(number * FACTOR))
    return settings(max_examples=count, deadline=None, **({"derandomize": False} if FACTOR > 1 else {}))
