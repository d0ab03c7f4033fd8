"""The launches of an operation: its host code runs on tensors without memory, Triton compiles, no kernel runs.

Whatever the host code decides (kernel, row of the table, number of programs, constants, library calls) is taken from
what it does, not repeated here.
"""

import hashlib
import importlib
import math
import pkgutil
import subprocess
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.static.disassembly import Missing
from benchmarks.static.rates import RATES

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "matmul")


class Launch(NamedTuple):
    """A launch of a Triton kernel, or a call of PyTorch.

    ``arguments``: by name, of a kernel; ``key``: a hash of all that its code depends on; ``cubin``: empty if it is not
    compiled, and for a call of PyTorch, which has ``flops`` if it is a matrix product and the ``bytes`` of all that it
    reads and writes.
    """

    name: str
    programs: int
    warps: int
    shared: int
    arguments: dict[str, Any]
    cubin: bytes = b""
    dialect: str = ""  # Triton's GPU dialect
    grid: tuple[int, ...] = ()
    flops: int = 0
    bytes: int = 0
    dtype: torch.dtype | None = None
    key: str = ""


class Driver:
    """What Triton asks of a driver of a GPU."""

    def __init__(self, arch: str, shared: int) -> None:
        self.arch, self.shared, self.utils = arch, shared, self

    def get_current_device(self) -> int:
        return list(RATES).index(self.arch)  # Triton keeps what it compiled by this number

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)

    def get_device_properties(self, _device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared * 1024}


class _Library(TorchDispatchMode):
    """Records calls of PyTorch that move bytes of a GPU."""

    def __init__(self, found: list[Launch]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = (kwargs or {}).get("out")
        if out is not None and any(isinstance(x, torch.dtype) for x in args):  # fails without memory in torch 2.11
            result = out
        else:
            result = function(*args, **(kwargs or {}))
        read = list(_tensors([*args, *(kwargs or {}).values()]))
        written = [x for x in _tensors([result]) if x.is_cuda]
        name = function._schema.name.removeprefix("aten::")
        own = {x.untyped_storage()._cdata for x in read}
        view = all(x.untyped_storage()._cdata in own for x in written) and not function._schema.is_mutable
        idle = name.startswith(("empty", "new_empty", "_local_scalar", "detach", "alias"))
        if written and not view and not idle:
            fills = name.startswith(("zero", "new_zeros", "fill", "ones", "full", "new_full", "new_ones", "arange"))
            sizes = sum(x.numel() * x.element_size() for x in [*([] if fills else read), *written] if x.is_cuda)
            flops = _flops(name, read) if name in PRODUCTS else 0
            self.found.append(Launch(f"torch.{name}", 0, 0, 0, {}, flops=flops, bytes=sizes, dtype=written[0].dtype))
        return result


def _flops(name: str, read: list[torch.Tensor]) -> int:
    a, b = read[-2:]
    return 2 * a.numel() * b.shape[-1]


def _tensors(given: Any) -> Iterator[torch.Tensor]:
    for x in given:
        if isinstance(x, tuple | list):
            yield from _tensors(x)
        elif isinstance(x, torch.Tensor):
            yield x


def check_arch(arch: str) -> None:
    """Raise unless there are rates of the architecture and this Triton's assembler knows it.

    Raises:
        Missing: one of the two is not so.
    """
    from triton.backends.nvidia.compiler import get_ptxas

    if arch not in RATES:
        raise Missing(f"There are no rates of the architecture {arch!r}: choose one of {', '.join(RATES)}.")
    assembler = get_ptxas(int(arch.removeprefix("sm_"))).path
    if f"'{arch}'" not in subprocess.run([assembler, "--help"], capture_output=True, text=True).stdout:
        raise Missing(
            f"This Triton ({triton.__version__}) does not know the architecture {arch!r}: install a newer one."
        )


def _import_kernels() -> None:
    """Import every module of the kernels: what they ask of a device is replaced in each."""
    import fgfast.kernels

    for module in pkgutil.walk_packages(fgfast.kernels.__path__, "fgfast.kernels."):
        importlib.import_module(module.name)


def _plain(value: Any) -> Any:
    """What the code of a kernel depends on of an argument."""
    if isinstance(value, tuple | list):
        return [_plain(x) for x in value]
    if hasattr(value, "block_shape"):  # a descriptor
        return ["descriptor", str(value.base.dtype), list(value.block_shape)]
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.storage_offset() * value.element_size() % 16 == 0]
    return value if isinstance(value, int | float | bool | None) else str(value)


def _key(kernel: Any, arch: str, arguments: dict[str, Any], options: dict[str, Any]) -> str:
    from fgfast.kernels import aot

    known = [(name, _plain(value)) for name, value in sorted((arguments | options).items())]
    parts = (triton.__version__, aot._source(kernel), arch, known)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@contextmanager
def pretend(arch: str, processors: int, shared: int, known: Collection[str] = ()) -> Iterator[list[Launch]]:
    """Within this context tensors of "cuda" have no memory and launches are appended to the list.

    Kernels with ``known`` keys are not compiled.
    """
    _import_kernels()
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from fgfast.kernels import configs

    found: list[Launch] = []
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        names = [p.name for p in self.params]
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
        sizes = grid(arguments) if callable(grid) else grid
        number = tuple(int(n) for n in (sizes if isinstance(sizes, tuple | list) else (sizes,)))
        made = Launch(self.fn.__name__, math.prod(number), 0, 0, arguments, grid=number)
        made = made._replace(key=_key(self, arch, arguments, options))
        if made.key in known:
            found.append(made)
            return None
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        kernel = kernel if hasattr(kernel, "asm") else kernel.result()
        meta, code = kernel.metadata, kernel.asm
        found.append(
            made._replace(warps=meta.num_warps, shared=meta.shared, cubin=code["cubin"], dialect=code["ttgir"])
        )
        return kernel

    answers = {
        "processors": lambda *_: processors, "architecture": lambda *_: arch, "shared_memory": lambda *_: shared,
    }  # fmt: skip
    replaced = [
        (module, name, getattr(module, name))
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("fgfast.kernels")
        for name in answers.keys() & vars(module).keys()
    ]
    configs._find.cache_clear()  # of another architecture
    before = driver._active
    exchange = torch.cuda._exchange_device, torch.cuda._maybe_exchange_device
    try:
        JITFunction.run = run
        driver.set_active(Driver(arch, shared))
        torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda device: 0
        for module, name, _ in replaced:
            setattr(module, name, answers[name])
        with warnings.catch_warnings(), FakeTensorMode(), torch.no_grad(), _Library(found):
            warnings.simplefilter("ignore")
            yield found
    finally:
        JITFunction.run = original
        driver._active = before
        torch.cuda._exchange_device, torch.cuda._maybe_exchange_device = exchange
        for module, name, value in replaced:
            setattr(module, name, value)
        configs._find.cache_clear()
