"""Launches of kernels, without Triton's work for each argument where a launch like it was made before.

Triton decides at every launch, from types and values of all arguments, which compiled kernel it takes: 0.2 us an
argument, and kernels here have 20 to 50. :func:`launch` remembers the decision. Whatever it depends on is in the key:

- the kernel, the current device, the constants and options
- the type of each argument, the dtype of each tensor, and whether its address is a multiple of 16
- each integer, of which Triton tells apart 1, multiples of 16 and those that need 64 bits

Triton itself makes every other launch, those of its interpreter, all on ROCm, where the size of a tensor's memory
counts too, and all while a hook or a setting for developers is at work.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import nn
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

MOST = 4096  # decisions remembered; calls whose sizes are new each time gain nothing from them
HOOKS = (
    "runtime.launch_enter_hook.calls", "runtime.launch_exit_hook.calls", "runtime.add_stages_inspection_hook",
    "runtime.debug", "compilation.instrumentation_mode", "compilation.fpsan_homomorphic_casts",
)  # fmt: skip
PLAIN = (torch.Tensor, nn.Parameter, int, float, bool, type(None))

_dtype = attrgetter("dtype")
_hooks = attrgetter(*HOOKS[:5], *(name for name in HOOKS[5:] if hasattr(knobs.compilation, name.split(".")[1])))


def _watched() -> bool:
    """Whether a hook or a setting for developers is at work."""
    try:
        return any(_hooks(knobs))
    except AttributeError:  # a function or None in place of a chain of hooks, which Triton takes too
        return True


class Form:
    """Where tensors and integers stand among the arguments of a kernel that have these types.

    ``plain``: whether the key says everything about them. ``long``: integers of which only the number of bits counts.
    """

    def __init__(self, kernel: Any, types: Sequence[type]):
        given, named = kernel.params[: len(types)], kernel.params[len(types) :]
        self.plain = all(kind in PLAIN for kind in types) and [p for p in kernel.params if p.is_constexpr] == named
        tensors = [i for i, kind in enumerate(types) if kind in (torch.Tensor, nn.Parameter)]
        long = [i for i, kind in enumerate(types) if kind is int and given[i].do_not_specialize]
        integers = [i for i, kind in enumerate(types) if kind is int and not given[i].do_not_specialize]
        self.tensors, self.integers, self.long = _pick(tensors), _pick(integers), long
        self.named = [(p.name, p.default) for p in named]


def _pick(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """The function that takes the elements at these positions."""
    if len(positions) < 2:  # for which itemgetter returns no tuple
        return lambda x: [x[i] for i in positions]
    return itemgetter(*positions)


_forms: dict[tuple[Any, ...], Form] = {}
_decisions: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
    """``kernel[grid](*args, **options)``; returns the compiled kernel, None in the interpreter.

    ``args`` are the kernel's arguments that are not constants, ``options`` its constants and those of the launch.
    """
    if not isinstance(kernel, JITFunction) or torch.version.hip or kernel.pre_run_hooks or _watched():
        return kernel[grid](*args, **options)
    kind = kernel.fn, *map(type, args)
    form = _forms.get(kind)
    if form is None:
        form = _forms[kind] = Form(kernel, kind[1:])
    if not form.plain:
        return kernel[grid](*args, **options)
    tensors, addresses = form.tensors(args), 0
    for x in tensors:
        addresses |= x.data_ptr()
    active = driver.active
    device = active.get_current_device()
    key = (
        form, device, addresses % 16 and tuple(x.data_ptr() % 16 == 0 for x in tensors), *map(_dtype, tensors),
        *form.integers(args), *options, *options.values(),
    )  # fmt: skip
    if form.long:
        key += tuple((-(2**31) <= args[i] < 2**31, args[i] < 2**63) for i in form.long)
    decision = _decisions.get(key)
    if decision is not None:
        compiled, constants = decision
        x, y, z, *_ = *grid, 1, 1
        compiled.run(
            x, y, z, active.get_current_stream(device), compiled.function, compiled.packed_metadata, None, None, None,
            *args, *constants,
        )  # fmt: skip
        return compiled
    compiled = kernel[grid](*args, **options)
    if isinstance(compiled, CompiledKernel):  # not where a hook kept Triton from compiling
        if len(_decisions) >= MOST:
            _decisions.clear()
        _decisions[key] = compiled, tuple(options.get(name, default) for name, default in form.named)
    return compiled
