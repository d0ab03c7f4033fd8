"""The cases of each operation and of what surrounds them, defined once for pytest-benchmark and for benchmarks.run.

One file per operation with ``cases(device, tiny)``: the sizes of a GPU, the sizes of a CPU, or with ``tiny`` a few that
take no time and only show that everything works.
"""

from collections.abc import Iterator

import torch

from benchmarks.cases import contrast, kmeans, kmeans_step, loaders, mask, part_pool, particle, perturb, views
from benchmarks.timing import Case

OPERATIONS = {
    "contrast": contrast.cases,
    "kmeans_step": kmeans_step.cases,
    "kmeans": kmeans.cases,
    "part_pool": part_pool.cases,
    "pivotal_mask": mask.cases,
    "perturb": perturb.cases,
}
# Not operations: timed by pytest-benchmark only.
SURROUNDINGS = {"particle": particle.cases, "views": views.cases, "data": loaders.cases}


def planned(device: torch.device, only: str = "", quick: bool = False, tiny: bool = False) -> Iterator[Case]:
    """The cases of all operations or of one; ``quick`` leaves those with a performance goal."""
    for op, cases in OPERATIONS.items():
        if only in ("", op):
            yield from (case for case in cases(device, tiny) if case.quick or tiny or not quick)


def find(device: torch.device, name: str) -> Case:
    """The case of a name.

    Raises:
        KeyError: no such case on the device.
    """
    makers = [*OPERATIONS.values(), *SURROUNDINGS.values()]
    every = [case for cases in makers for case in cases(device)] + list(contrast.batch_sizes(device))
    return {case.name: case for case in every}[name]
