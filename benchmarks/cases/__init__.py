"""The cases of each operation: the shapes of the performance table, and series over one size.

A file an operation, each with ``cases(device, tiny)``: the sizes that a GPU is asked for, or a few that a CPU does at
once, which show that everything works and nothing else.
"""

from collections.abc import Iterator

import torch

from benchmarks.cases import contrast, kmeans, kmeans_step, mask, part_pool, perturb
from benchmarks.timing import Case

OPERATIONS = {
    "contrast": contrast.cases,
    "kmeans_step": kmeans_step.cases,
    "kmeans": kmeans.cases,
    "part_pool": part_pool.cases,
    "pivotal_mask": mask.cases,
    "perturb": perturb.cases,
}


def planned(device: torch.device, only: str = "", quick: bool = False, tiny: bool = False) -> Iterator[Case]:
    """The cases to measure: all, those of one operation, or those that a goal belongs to."""
    for op, cases in OPERATIONS.items():
        if only in ("", op):
            yield from (case for case in cases(device, tiny) if case.quick or tiny or not quick)
