"""Launches that skip Triton's binding take the kernel that Triton takes, with the same arguments.

A driver that runs nothing stands for a GPU, and a kernel for each of Triton's decisions for a compiled one.
"""

import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("triton")
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fgfast.kernels import launches
from tests.kernels.launches import Driver

launched: list[tuple[Any, ...]] = []


def takes_all_kinds(a, b, c, n, m, k, seed, scale, flag, SIZE: tl.constexpr, KIND: tl.constexpr = "half"):
    """Its body is never compiled."""


class Compiled(CompiledKernel):
    """What Triton compiles for one key."""

    def __init__(self, key: str):
        self.key, self.module, self.function, self.packed_metadata = key, None, key, None

    @property
    def run(self) -> Any:
        return lambda *given: launched.append((*given[:6], *given[9:]))  # without the hooks and what is for them

    def launch_metadata(self, *_: Any) -> None:
        """For the hooks."""


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> JITFunction[Any]:
    """A kernel on two devices, none of whose launches is remembered."""

    def compile_nothing(self: Any, key: str, _signature: Any, device: int, *_: Any) -> Compiled:
        made = self.device_caches[device][0][key] = Compiled(key)
        return made

    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(driver, "_active", Driver("sm_90"))
    monkeypatch.setattr(launches, "_decisions", {})
    launched.clear()
    return JITFunction(takes_all_kinds, do_not_specialize=["seed"])


MEMORY = torch.zeros(64, dtype=torch.uint8)
DTYPES = (torch.float32, torch.bfloat16, torch.int64)
INTEGERS = (0, 1, 2, 15, 16, 17, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**40)
SEEDS = (0, 1, 16, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63)


def draw_tensor(draw: random.Random) -> torch.Tensor | None:
    """A tensor, or none, at any address that suits its dtype."""
    dtype = draw.choice(DTYPES)
    offset = dtype.itemsize * draw.randrange(5)
    x = MEMORY[offset : offset + dtype.itemsize].view(dtype)
    return draw.choice([x, x, nn.Parameter(x, requires_grad=False), None, torch.empty(0, dtype=dtype)])


def draw_launch(draw: random.Random) -> tuple[tuple[Any, ...], dict[str, Any], int]:
    """Arguments, options and device."""
    numbers = (*INTEGERS, True, False, None, 0.5, 1.0)
    given = (draw.choice(INTEGERS), draw.choice(numbers), draw.choice(numbers), draw.choice(SEEDS))
    options = {"SIZE": draw.choice((16, 32)), "KIND": draw.choice(("half", "full")), "num_warps": draw.choice((4, 8))}
    for name in draw.sample(("KIND", "num_warps"), draw.randrange(3)):
        del options[name]
    tensors = (draw_tensor(draw) for _ in range(3))
    return (*tensors, *given, draw.choice((0.5, 2.0, 1)), draw.choice((True, False, None))), options, draw.randrange(2)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_the_kernel_and_arguments_are_those_of_triton(seed: int, kernel: JITFunction[Any]) -> None:
    draw = random.Random(seed)
    made = [draw_launch(draw) for _ in range(5)]
    args, options, device = made[0]
    for i, other in ((i, draw_launch(draw)[0][i]) for i in range(len(args))):  # one argument differs
        made.append(((*args[:i], other, *args[i + 1 :]), options, device))
    made += [(args, draw_launch(draw)[1], device) for _ in range(4)]  # the options
    for args, options, device in made * 2:  # the second time they are remembered
        driver.active.device = device
        launched.clear()
        found = launches.launch(kernel, (3, 2), *args, **options)
        assert found is kernel[3, 2](*args, **options)
        ours, theirs = launched
        assert all(a is b or a == b for a, b in zip(ours, theirs, strict=True))


def one(kernel: JITFunction[Any], n: int = 5, seed: int = 0) -> Any:
    x = MEMORY.view(torch.float32)
    return launches.launch(kernel, (1,), x, x, None, n, 1, 16, seed, 0.5, True, SIZE=16)


def test_a_launch_like_one_before_is_not_bound(kernel: JITFunction[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = one(kernel)
    monkeypatch.setattr(JITFunction, "run", None)
    assert one(kernel) is one(kernel, seed=7) is first
    with pytest.raises(TypeError, match="not callable"):
        one(kernel, n=6)


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_launches_are_called(name: str, kernel: JITFunction[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    one(kernel)
    chain = getattr(knobs.runtime, name)
    asked = []
    monkeypatch.setattr(chain, "calls", [print])
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: asked.append(True))  # whose launcher calls them
    one(kernel)
    assert asked


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("hook", [print, None])
def test_a_function_or_none_in_place_of_the_chain_of_hooks(
    hook: Any, name: str, kernel: JITFunction[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one(kernel)
    monkeypatch.setitem(vars(knobs.runtime), name, hook)
    asked = []
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: asked.append(True))
    one(kernel)
    assert asked


def test_hooks_of_a_kernel_are_called(kernel: JITFunction[Any]) -> None:
    one(kernel)
    asked = []
    kernel.add_pre_run_hook(lambda *_, **__: asked.append(True))
    one(kernel)
    assert asked


def test_a_setting_that_changes_the_kernel_counts(kernel: JITFunction[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = one(kernel)
    monkeypatch.setitem(vars(knobs.runtime), "debug", True)
    assert one(kernel) is not plain
    monkeypatch.setitem(vars(knobs.runtime), "debug", False)
    assert one(kernel) is plain


def test_only_so_many_decisions_are_kept(kernel: JITFunction[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "MOST", 3)
    for n in range(2, 9):
        one(kernel, n=n)
        assert 0 < len(launches._decisions) <= 3
