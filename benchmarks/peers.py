"""Drop-in classes beside the libraries that they replace: how many cases agree, and why the others do not.

``python -m benchmarks.peers`` prints the table of RESULTS.md. A module of REGISTRY defines ``comparisons()``.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

REGISTRY = ("tests.losses.lightly_cases", "tests.losses.pml_cases", "tests.estimator_cases")

Results = Sequence[Any]  # values, gradients, labels, ...: tensors, arrays or numbers


@dataclass(frozen=True)
class Case:
    """One call of both libraries."""

    name: str
    ours: Callable[[], Results]
    theirs: Callable[[], Results]
    argument: str = ""  # of the peer's class, which this case is about
    rtol: float = 1e-6
    atol: float = 1e-8
    difference: str = ""  # why the results differ on purpose
    refused: bool = False  # whether ours raises an error, and the peer too if there is no difference

    def agrees(self) -> bool:
        """Whether both give the same results, or both refuse.

        An error of ours that is not expected is raised, and so is one of the peer where ours should agree.
        """
        ours = _results(self.ours, (ValueError, TypeError) if self.refused else ())
        if self.refused and ours is not None:
            raise AssertionError(f"{self.name}: expected a ValueError or TypeError of ours.")
        theirs = _results(self.theirs, (Exception,) if self.refused or self.difference else ())
        if ours is None or theirs is None:
            return ours is theirs
        return len(ours) == len(theirs) and all(
            a.shape == b.shape and torch.allclose(a, b, self.rtol, self.atol, equal_nan=True)
            for a, b in zip(ours, theirs, strict=True)
        )


@dataclass(frozen=True)
class Comparison:
    """The cases of one class."""

    ours: str
    peer: str  # name of the distribution
    cases: Sequence[Case]

    def row(self) -> str:
        """The line of the table."""
        equal = sum(case.agrees() for case in self.cases)
        reasons = dict.fromkeys(case.difference for case in self.cases if case.difference)
        return (
            f"| `{self.ours}` | {self.peer} {version(self.peer)} | {len(self.cases)} | {equal} | {' '.join(reasons)} |"
        )


def _results(call: Callable[[], Results], refusals: tuple[type[Exception], ...]) -> list[torch.Tensor] | None:
    """The results as float64 tensors; None if the call raises one of these errors."""
    try:
        found = call()
    except refusals:
        return None
    return [torch.as_tensor(x).detach().double() for x in found]


def all_comparisons() -> list[Comparison]:
    """The comparisons of every registered module."""
    return [c for name in REGISTRY for c in importlib.import_module(name).comparisons()]


def table(comparisons: Iterable[Comparison]) -> str:
    """The table in Markdown."""
    head = ("| class | compared with | cases | equal | differences, and why |", "|---|---|---|---|---|")
    return "\n".join((*head, *(c.row() for c in comparisons)))


if __name__ == "__main__":
    print(table(all_comparisons()))
