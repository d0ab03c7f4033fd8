"""Operations run without the dispatcher where nothing is traced, and give what the custom op gives."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fgfast import part_pool
from fgfast.ops.part_pool.part_pool import _part_pool
from fgfast.ops.registration import observed


class Names(TorchDispatchMode):
    """Collects the names of the operations that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def given() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True), torch.randint(0, 3, (2, 3, 3))


def derivatives(run: Any, x: Tensor, labels: Tensor) -> list[Tensor]:
    """The sums of the parts, their gradient, and the derivative of that."""
    pooled = run(x, labels, 3, None, True, "torch")[0]
    (first,) = torch.autograd.grad(pooled.square().sum(), x, create_graph=True)
    return [pooled, first, *torch.autograd.grad(first.pow(3).sum(), x)]


def test_a_plain_call_gives_what_the_custom_op_gives(given: tuple[Tensor, Tensor]) -> None:
    plain, through = (derivatives(run, *given) for run in (_part_pool, torch.ops.fgfast.part_pool))
    assert type(plain[0].grad_fn).__name__ != type(through[0].grad_fn).__name__
    torch.testing.assert_close(plain, through, rtol=0, atol=0)


def test_a_mode_sees_one_operation(given: tuple[Tensor, Tensor]) -> None:
    with Names() as names:
        part_pool(*given, 3, backend="torch").pooled.sum().backward()
    ours = [name for name in names.seen if "fgfast" in name]
    assert ours == ["fgfast.part_pool.default", "fgfast.part_pool_backward.default"]
    assert not any("bmm" in name for name in names.seen if name not in ours)


def test_saved_tensors_pass_the_hooks(given: tuple[Tensor, Tensor]) -> None:
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        part_pool(*given, 3, backend="torch")
    assert len(packed) == 2  # labels and area


def test_without_gradients_there_is_no_graph(given: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        assert part_pool(*given, 3, backend="torch").pooled.grad_fn is None
    with torch.inference_mode():
        assert part_pool(*given, 3, backend="torch").pooled.is_inference()


class Special(Tensor):
    """A tensor with behaviour of its own."""


def test_special_tensors_are_observed() -> None:
    x = torch.ones(2)
    assert not observed((x, torch.nn.Parameter(x), [x], 3, None))
    assert observed((x, x.as_subclass(Special)))
    assert observed(([x, x.to("meta")],))
    with Names():
        assert observed((3,))
    assert torch.func.vmap(lambda v: v * observed((3,)))(x).all()
