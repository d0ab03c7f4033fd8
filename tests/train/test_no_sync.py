"""No step waits for the device: with tensors that have shapes alone, whatever needs a value raises.

Forward passes run on a CUDA device that is not there. PyTorch needs a real one for backward passes: these, and the
optimisers, run on a CPU whose tensors are as empty.
"""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fgfast import backend
from fgfast.data.views import Batch
from fgfast.methods import lodisc
from fgfast.methods.base import Method, Progress
from fgfast.ops import mask
from fgfast.ranks import Ranks
from fgfast.train.optim import FiniteGuard, make_optimizer
from fgfast.train.step import Step
from tests.methods.method_cases import CASES, STEPS, build, joined_batch
from tests.train.test_step import SPLIT

pytestmark = pytest.mark.slow


class NoWaiting(TorchDispatchMode):
    """Raises on a copy to the host that the host waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, waits = func.overloadpacket.__name__, not (kwargs or {}).get("non_blocking", False)
        source = args[1] if name == "copy_" else args[0] if name == "_to_copy" else None
        if isinstance(source, Tensor) and source.device.type == "cuda" and out.device.type == "cpu" and waits:
            raise AssertionError(f"{func} waits for the device")
        return out


def empty(value: Any, device: str) -> Any:
    """A tensor, or a list of them, with the same shapes and no values."""
    if isinstance(value, list):
        return [empty(item, device) for item in value]
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


def emptied(method: Method, device: str) -> Method:
    """The method with tensors without values, also those that are neither parameters nor buffers."""
    for module in method.modules():
        for tensors in (module._parameters, module._buffers, vars(module)):
            for name, value in list(tensors.items()):
                if isinstance(value, nn.Parameter):
                    tensors[name] = nn.Parameter(empty(value, device), requires_grad=value.requires_grad)
                elif isinstance(value, Tensor):
                    tensors[name] = empty(value, device)
    return method


def warm(case: str, **options: Any) -> tuple[Method, Batch]:
    """A method after a step, in which networks are probed once, and its batch."""
    method = build(case)
    method.config = replace(method.config, **options)
    batch = joined_batch(0, getattr(method.config, "local_crops", 0))
    method(batch)
    return method, batch


@pytest.mark.parametrize("case", CASES)
def test_a_forward_pass_on_a_gpu_does_not_wait(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do the updates after it. Gradients inside a forward pass are not computed, see above."""
    for module in (backend, mask):
        monkeypatch.setattr(module, "missing", lambda _: None)
    monkeypatch.setattr(pytest.importorskip("fgfast._native"), "CUDA", True)
    method, batch = warm(case)
    method.after_step(Progress(2, STEPS))  # the second stage of methods that have one
    monkeypatch.setattr(torch.autograd, "grad", lambda _, x, **options: [torch.empty_like(x)])
    with FakeTensorMode(), NoWaiting():
        batch = Batch(**{name: empty(value, "cuda") for name, value in vars(batch).items()})
        method = emptied(method, "cuda")
        assert method(batch)["loss"].device.type == "cuda"
        method.after_step(Progress(1, STEPS))


@pytest.mark.parametrize("case", ["lodisc sample", "lodisc random"])
def test_masks_that_are_drawn_for_all_ranks_do_not_wait(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seed, which all ranks share, comes from the host."""
    for module in (backend, mask):
        monkeypatch.setattr(module, "missing", lambda _: None)
    monkeypatch.setattr(pytest.importorskip("fgfast._native"), "CUDA", True)
    monkeypatch.setattr(lodisc, "rank_and_world", lambda group: (1, 2))
    method, batch = warm(case)
    with FakeTensorMode(), NoWaiting():
        method = emptied(method, "cuda")
        method.set_group(SimpleNamespace())
        method.set_rng(SimpleNamespace(device=torch.device("cuda")))  # drawing from it raises
        assert method.pivots(empty(batch.views[0], "cuda"))[1].mask.device.type == "cuda"


@pytest.mark.parametrize(
    ("case", "options"),
    [*((case, {}) for case in CASES), *((case, {"micro_batch": 5}) for case in SPLIT),
     ("byol", {"accumulate": 3}), ("simclr", {"grad_checkpoint": True}), ("simclr", {"optimizer": "lars"}),
     ("simclr", {"optimizer": "sgd"})],
)  # fmt: skip
def test_a_step_needs_no_value(case: str, options: dict[str, Any]) -> None:
    """Forward and backward passes, gradient norm, guard, optimiser, momentum copies and queues."""
    method, batch = warm(case, **options)
    steps = 1 if "synthpair" in case else 2  # its second stage selects features by NumPy, but on a GPU
    if options.get("grad_checkpoint"):
        method.checkpoint_activations()
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16) if options else nullcontext():
        batch = Batch(**{name: empty(value, "cpu") for name, value in vars(batch).items()})
        step = Step(emptied(method, "cpu"), Ranks())
        optimiser = make_optimizer(method, method.config)
        guard = FiniteGuard(method, optimiser)
        for number in range(steps):
            method.before_step(Progress(number, STEPS))
            terms = step(batch)
            params = [p for p in method.parameters() if p.grad is not None]
            assert params
            norm = nn.utils.clip_grad_norm_(params, 5.0, foreach=True)
            guard.step(terms["loss"], norm, batch.index, number)
            optimiser.zero_grad(set_to_none=True)
            method.after_step(Progress(number + 1, STEPS))
            guard.mark()


def test_what_waits_is_found() -> None:
    """A value that is read, positions that are counted, and a copy to the host."""
    waiting = [lambda x: x.sum().item(), lambda x: bool(x.any()), torch.nonzero, lambda x: x[x > 0], lambda x: x.cpu()]
    for call in waiting:
        with FakeTensorMode(), NoWaiting(), pytest.raises(Exception, match=r"waits|aten\.|data-dependent"):
            call(torch.ones(3, device="cuda"))
