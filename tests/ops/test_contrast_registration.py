"""contrastive_loss as an operation: strides, autograd, torch.compile, autocast, empty inputs, errors."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fgfast.ids import Ids
from tests.ops.contrast_fields import BACKENDS, Field, assert_same

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "t"), [(0, 0), (0, 5), (5, 0)])
def test_empty_inputs_give_zero(backend: str, m: int, t: int) -> None:
    field = Field(0, m=m, t=t)
    for reduction in ("mean", "mean_valid", "sum"):
        values = field.values(reduction=reduction, backend=backend)
        assert values[0] == 0
        assert not any(v.any() for v in values)


def test_strides_do_not_matter() -> None:
    field = Field(8)
    wide = torch.randn(30, 5, 3, dtype=torch.float64)
    wide[..., 1] = field.key
    strided = field.loss(query=field.query.T.contiguous().T, key=wide[..., 1])
    torch.testing.assert_close(strided, field.loss())


def test_a_detached_key_in_the_same_memory_gets_no_gradient() -> None:
    field = Field(4, same=True)
    for backend in BACKENDS:
        query = field.query.clone().requires_grad_()
        field.loss(query=query, key=query.detach(), backend=backend).backward()
        other = field.query.clone().requires_grad_()
        field.loss(query=other, key=field.query.clone(), backend="reference").backward()
        torch.testing.assert_close(query.grad, other.grad)


@pytest.mark.parametrize("same", [False, True])
def test_opcheck(same: bool) -> None:
    field = Field(1, m=10, t=12, same=same)
    query = field.query.requires_grad_()
    key = (None, None, None, None) if same else (field.key.requires_grad_(), *field.key_ids)
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    args = (query, *field.query_ids, *key, field.bank, temperature, 1.0, "all", True, "ieee", "torch")
    torch.library.opcheck(torch.ops.fgfast.contrast, args)
    grads = [torch.randn(10, dtype=torch.float64), *(x.detach() for x in torch.ops.fgfast.contrast(*args)[1:])]
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    for needs in ([True, not same, True, True], [False, not same, True, False]):
        torch.library.opcheck(torch.ops.fgfast.contrast_backward, (*grads, needs, *detached))
    torch.library.opcheck(torch.ops.fgfast.contrast_backward, (grads[0].requires_grad_(), *grads[1:], needs, *args))


@pytest.mark.parametrize(("same", "dynamic"), [(False, False), (True, False), (True, True)])
def test_compiled_fullgraph_gives_the_same_numbers(same: bool, dynamic: bool) -> None:
    field = Field(9, same=same)

    def loss(query: Tensor, key: Tensor, bank: Tensor | None) -> Tensor:
        return field.loss(query=query, key=key, bank=bank)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    for f in (loss, compiled):
        query = field.query.clone().requires_grad_()
        key = query if same else field.key.clone().requires_grad_()
        value = f(query, key, field.bank)
        results.append([value.detach(), *torch.autograd.grad(value, [query] if same else [query, key])])
    assert_same(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_lower_the_arithmetic(backend: str) -> None:
    field = Field(7, dtype=torch.float32)
    expected = field.loss(backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(field.loss(backend=backend), expected)
        mixed = field.loss(query=field.query.bfloat16(), backend=backend)
    torch.testing.assert_close(mixed, field.loss(query=field.query.bfloat16().float(), backend=backend))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.zeros(21)}, ValueError, "query: expected shape"),
        ({"query": torch.zeros(21, 5, dtype=torch.int64)}, TypeError, "query has dtype"),
        ({"key": torch.zeros(30, 4, dtype=torch.float64)}, ValueError, "key has 4 channels"),
        ({"key": torch.zeros(30, 5)}, TypeError, "convert one of them"),
        ({"key": torch.zeros(30, 5, dtype=torch.float64, device="meta")}, ValueError, "key is on meta"),
        ({"bank": torch.zeros(2, 3, dtype=torch.float64)}, ValueError, "bank has 3 channels"),
        ({"weight": torch.ones(20)}, ValueError, "weight: expected shape"),
        ({"weight": -torch.ones(21)}, ValueError, "negative or non-finite"),
        ({"weight": torch.full((21,), torch.nan)}, ValueError, "negative or non-finite"),
        ({"temperature": 0}, ValueError, "temperature is 0"),
        ({"temperature": -0.1}, ValueError, "temperature is -0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature is -1.0"),
        ({"temperature": torch.ones(2)}, ValueError, "0-d"),
        ({"negatives": "some"}, ValueError, "negatives is 'some'"),
        ({"reduction": "max"}, ValueError, "reduction is 'max'"),
        ({"precision": "bf16"}, ValueError, "precision is 'bf16'"),
        ({"backend": "native"}, (ValueError, RuntimeError), "native"),
        ({"query_ids": Ids(*torch.zeros(3, 20, dtype=torch.int64))}, ValueError, "query_ids.image: expected shape"),
        ({"query_ids": Ids(*torch.zeros(3, 21))}, TypeError, "give integers"),
        ({"query_ids": Ids(*torch.full((3, 21), -2))}, ValueError, "query_ids.part holds -2"),
    ],
)
def test_bad_input_is_one_clear_error(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        Field(0).loss(**change)
    assert str(caught.value).count(".") >= 1
    assert "\n" not in str(caught.value)
