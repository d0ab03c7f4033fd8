"""How many examples a property sees: a few in ``make test``, FGFAST_EXAMPLES times as many in a sweep."""

import os

from hypothesis import settings

FACTOR = float(os.environ.get("FGFAST_EXAMPLES", "1"))


def examples(number: int) -> settings:
    """So many examples; in a sweep more, drawn from the seed of the command instead of the same ones each time.

    An example has no deadline: the interpreter's first launch takes seconds.
    """
    wanted = max(1, round(number * FACTOR))
    return settings(max_examples=wanted, deadline=None, **({"derandomize": False} if FACTOR > 1 else {}))
