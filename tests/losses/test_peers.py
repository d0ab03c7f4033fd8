"""The losses beside lightly's and pytorch-metric-learning's: values, gradients, arguments and attributes."""

import inspect
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import nn

from benchmarks.peers import Case, Comparison
from fgfast import losses
from tests.losses import lightly_cases, pml_cases
from tests.losses.peers import lightly, pml

COMPARISONS = lightly_cases.comparisons() + pml_cases.comparisons()
CASES = {f"{c.ours}: {case.name}": case for c in COMPARISONS for case in c.cases}
PEERS = {c.ours: getattr(pml if c.ours == "SupConLoss" else lightly, c.ours) for c in COMPARISONS}
# Public attributes of lightly's losses that ours lack.
MISSING = {"NTXentLoss": {"cross_entropy"}}  # it takes logits, which never exist here
LIGHTLY = {
    "NTXentLoss": {"memory_bank_size": (6, 3)}, "DetConBLoss": {}, "DetConSLoss": {}, "DINOLoss": {"output_dim": 4},
    "KoLeoLoss": {},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_case_agrees_with_the_peer_or_has_a_reason(case: Case) -> None:
    """Value and gradients are equal unless the case gives the reason of a difference, and then they differ."""
    assert case.agrees() == (case.difference == "")


def fails(error: type[Exception]) -> Callable[[], list[float]]:
    def call() -> list[float]:
        raise error

    return call


@pytest.mark.parametrize("difference", ["", "They differ."])
@pytest.mark.parametrize(
    ("ours", "refused", "error"),
    [
        (fails(ZeroDivisionError), False, ZeroDivisionError),
        (fails(ZeroDivisionError), True, ZeroDivisionError),
        (fails(ValueError), False, ValueError),
        (lambda: [1.0], True, AssertionError),
    ],
)
def test_a_crash_of_ours_or_a_refusal_that_does_not_come_fails_every_case(
    ours: Callable[[], list[float]], refused: bool, error: type[Exception], difference: str
) -> None:
    case = Case("x", ours, fails(RuntimeError), difference=difference, refused=refused)
    with pytest.raises(error):
        case.agrees()


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: c.ours)
def test_every_argument_of_the_peer_has_a_case(comparison: Comparison) -> None:
    peer = PEERS[comparison.ours]
    functions = [peer.forward, *(c.__init__ for c in peer.__mro__ if c not in (nn.Module, object))]
    arguments = {
        name
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    } - {"mat_based_loss"}  # of pytorch-metric-learning's own subclasses
    assert arguments <= {case.argument for case in comparison.cases}


def public(x: object) -> set[str]:
    return {name for name in dir(x) if not name.startswith("_")}


def modules(package: ModuleType, name: str) -> list[nn.Module]:
    """The loss and what it consists of, with the same random bank for every package."""
    torch.manual_seed(0)
    return [m for m in getattr(package, name)(**LIGHTLY[name]).modules() if not isinstance(m, nn.CrossEntropyLoss)]


@pytest.mark.parametrize("name", LIGHTLY)
def test_every_public_attribute_of_lightly_exists_and_means_the_same(name: str) -> None:
    for ours, theirs in zip(modules(losses, name), modules(lightly, name), strict=True):
        assert public(theirs) - public(ours) == MISSING.get(type(theirs).__name__, set())
        for attribute in public(theirs) & public(ours) - public(nn.Module()):
            value, expected = getattr(ours, attribute), getattr(theirs, attribute)
            if callable(expected):
                assert callable(value)
            else:
                torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(expected))
