"""Random vectors and ids that the tests of contrastive_loss share."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fgfast.ids import Ids
from fgfast.ops.contrast import contrastive_loss
from tests.examples import examples

NEGATIVES = ("all", "other_images", "same_image")
BACKENDS = ("torch", "reference")


class Field:
    """Random vectors and ids; ``loss`` evaluates, ``values`` evaluates with gradients."""

    def __init__(self, seed: int, m: int = 21, t: int = 30, d: int = 5, bank: int | None = 9, *, same: bool = False,
                 sort: bool = True, absent: bool = True, dtype: torch.dtype = torch.float64):  # fmt: skip
        g = torch.Generator().manual_seed(seed)

        def ids(n: int) -> Ids:
            image = torch.randint(0, 5, (n,), generator=g)
            part = torch.randint(-1 if absent else 0, 3, (n,), generator=g)
            return Ids(image.sort().values if sort else image, part, torch.randint(0, 2, (n,), generator=g))

        self.query, self.query_ids = torch.randn(m, d, generator=g, dtype=dtype), ids(m)
        self.key, self.key_ids = torch.randn(t, d, generator=g, dtype=dtype), ids(t)
        if same:
            self.key, self.key_ids = self.query, self.query_ids
        self.bank = None if bank is None else torch.randn(bank, d, generator=g, dtype=dtype)
        self.weight = torch.rand(m, generator=g, dtype=dtype) * (torch.rand(m, generator=g) > 0.3)
        self.options: dict[str, Any] = {"temperature": 0.1, "backend": "torch"}

    def loss(self, **options: Any) -> Tensor:
        given = {"query": self.query, "key": self.key, "query_ids": self.query_ids, "key_ids": self.key_ids,
                 "bank": self.bank, "weight": self.weight}  # fmt: skip
        merged = given | self.options | options
        return contrastive_loss(merged.pop("query"), merged.pop("key"), **merged)

    def values(self, **options: Any) -> list[Tensor]:
        """Loss and the gradients of query, key, bank and temperature."""
        query = self.query.clone().requires_grad_()
        key = query if self.key is self.query else self.key.clone().requires_grad_()
        bank = None if self.bank is None else self.bank.clone().requires_grad_()
        temperature = torch.tensor((self.options | options)["temperature"], dtype=query.dtype, requires_grad=True)
        loss = self.loss(**options | {"query": query, "key": key, "bank": bank, "temperature": temperature})
        inputs = [query, temperature] + ([] if key is query else [key]) + ([] if bank is None else [bank])
        return [loss.detach(), *torch.autograd.grad((loss * torch.arange(1, loss.numel() + 1)).sum(), inputs)]


def assert_same(a: list[Tensor], b: list[Tensor], rtol: float = 1e-8) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)


fields = st.builds(
    Field,
    st.integers(0, 10_000),
    st.sampled_from([1, 7, 8, 21]),
    st.sampled_from([1, 9, 30]),
    st.sampled_from([1, 5, 16]),
    st.sampled_from([None, 0, 9]),
    same=st.booleans(),
    sort=st.booleans(),
    absent=st.booleans(),
)
options = st.fixed_dictionaries(
    {
        "negatives": st.sampled_from(NEGATIVES),
        "reduction": st.sampled_from(["mean", "mean_valid", "sum", "none"]),
        "normalize": st.booleans(),
        "temperature": st.sampled_from([1.0, 0.1, 0.01]),  # 0.01 leaves the bounded path
    }
)
quick = examples(60)
few = examples(15)
seeds = st.integers(0, 10_000)
