"""contrastive_loss: the tiled backend against the definition, and the invariants of the definition."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgfast.ids import Ids
from fgfast.ops.contrast import dense, positives, sides, tiled
from fgfast.tensors import accumulation
from tests.ops.contrast_fields import (
    BACKENDS,
    NEGATIVES,
    Field,
    assert_same,
    few,
    fields,
    options,
    quick,
    seeds,
)

pytestmark = pytest.mark.usefixtures("small_tiles")


@quick
@given(fields, options)
def test_tiles_equal_the_definition_in_value_and_every_gradient(field: Field, options: dict[str, Any]) -> None:
    assert_same(field.values(**options, backend="torch"), field.values(**options, backend="reference"))


@few
@given(fields, options)
def test_a_single_tile_equals_the_definition(field: Field, options: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sides.LOGIT_TILE, "cpu", 1024)
        assert_same(field.values(**options, backend="torch"), field.values(**options, backend="reference"))


@pytest.mark.parametrize("compared", [0, 1 << 20], ids=["listed positives", "compared ids"])
@quick
@given(fields, options)
def test_logits_in_memory_equal_the_definition(compared: int, field: Field, options: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "KEPT", 1 << 20)
        patch.setattr(dense, "COMPARED", compared)
        assert_same(field.values(**options, backend="torch"), field.values(**options, backend="reference"))


@pytest.mark.parametrize("ranged", [True, False], ids=["by ranges", "everywhere, as on a GPU"])
@few
@given(fields, options)
def test_ids_that_are_not_listed_are_compared(ranged: bool, field: Field, options: dict[str, Any]) -> None:
    """With too many pairs, or on another device, ids are compared where ranges overlap, or everywhere."""
    expected = field.values(**options)
    make = sides.make_side
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(positives, "MAX_PAIRS", -1)
        patch.setattr(sides, "make_side", lambda x, ids, *rest: make(x, ids, *rest[:3], with_ranges=ranged))
        assert_same(field.values(**options), expected)


@few
@given(field=fields)
def test_pairs_are_those_of_equal_image_and_part(field: Field) -> None:
    """Each pair is listed once, per tile and in total."""
    q, k = field.query_ids, field.key_ids
    same = (q.image[:, None] == k.image) & (q.part[:, None] == k.part) & (q.part[:, None] >= 0)
    pairs = positives.find_pairs(q, None if field.key is field.query else k, 4)
    assert pairs is not None
    assert sorted(zip(pairs.row.tolist(), pairs.column.tolist(), strict=True)) == [
        tuple(place) for place in same.nonzero().tolist()
    ]
    assert torch.equal(pairs.positive, q.view[pairs.row] != k.view[pairs.column])
    found = 0
    for a, c in product(range(0, len(same), 4), range(0, same.shape[1], 4)):
        row, column, _ = pairs.of_tile(a, c)
        assert ((row >= a) & (row < a + 4) & (column >= c) & (column < c + 4)).all()
        found += len(row)
    assert found == len(pairs.row)


@pytest.mark.parametrize("backend", BACKENDS)
@few
@given(seed=seeds, negatives=st.sampled_from(NEGATIVES))
def test_permuting_rows_permutes_losses(backend: str, seed: int, negatives: str) -> None:
    field = Field(seed)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(seed))
    loss = field.loss(negatives=negatives, reduction="none", backend=backend)
    moved = field.loss(
        query=field.query[order], query_ids=Ids(*(i[order] for i in field.query_ids)), weight=field.weight[order],
        negatives=negatives, reduction="none", backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(moved, loss[order])


@pytest.mark.usefixtures("tiles_and_kept")
@pytest.mark.parametrize("backend", BACKENDS)
@few
@given(
    seed=seeds, negatives=st.sampled_from(NEGATIVES), normalize=st.booleans(), temperature=st.sampled_from([0.1, 0.01])
)
def test_contents_of_absent_vectors_are_masked_out(
    backend: str, seed: int, negatives: str, normalize: bool, temperature: float
) -> None:
    field = Field(seed)
    chosen = {"negatives": negatives, "normalize": normalize, "temperature": temperature, "backend": backend}
    expected = field.values(**chosen)
    for junk in (torch.nan, torch.inf, 1e30):
        field.query = torch.where(field.query_ids.part[:, None] < 0, junk, field.query)
        field.key = torch.where(field.key_ids.part[:, None] < 0, junk, field.key)
        got = field.values(**chosen)
        assert_same(got, expected)
        assert not got[1][field.query_ids.part < 0].any()


@pytest.mark.usefixtures("tiles_and_kept")
@pytest.mark.parametrize("backend", BACKENDS)
@few
@given(seed=seeds, same=st.booleans())
def test_absent_vectors_change_only_the_divisor_of_mean(backend: str, seed: int, same: bool) -> None:
    field = Field(seed, absent=False, same=same)
    n = 3
    more = torch.full((n, 5), torch.nan, dtype=torch.float64)
    gone = torch.full((n,), -1)
    query = torch.cat([more, field.query])
    query_ids = Ids(*(torch.cat([gone, i]) for i in field.query_ids))
    added = {
        "query": query,
        "query_ids": query_ids,
        "weight": torch.cat([torch.ones(n), field.weight]),
        "backend": backend,
    }
    added |= {"key": query, "key_ids": query_ids} if same else {}
    for reduction, factor in (("mean", 21 / 24), ("mean_valid", 1.0), ("sum", 1.0)):
        before = field.loss(reduction=reduction, backend=backend)
        torch.testing.assert_close(field.loss(**added, reduction=reduction), before * factor)


@pytest.mark.parametrize("backend", BACKENDS)
@few
@given(seed=seeds)
def test_negatives_moved_from_key_to_bank_change_nothing(backend: str, seed: int) -> None:
    field = Field(seed, absent=False)
    far = torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    ids = Ids(*(torch.cat([i, torch.full((11,), 77)]) for i in field.key_ids))
    in_key = field.loss(key=torch.cat([field.key, far]), key_ids=ids, backend=backend)
    assert field.bank is not None
    torch.testing.assert_close(field.loss(bank=torch.cat([field.bank, far]), backend=backend), in_key)


@pytest.mark.parametrize("backend", BACKENDS)
@few
@given(seed=seeds, factor=st.floats(0.1, 10))
def test_scaling_weights_scales_the_loss(backend: str, seed: int, factor: float) -> None:
    field = Field(seed)
    for reduction in ("mean", "mean_valid", "sum", "none"):
        scaled = field.loss(weight=field.weight * factor, reduction=reduction, backend=backend)
        torch.testing.assert_close(scaled, field.loss(reduction=reduction, backend=backend) * factor)


@pytest.mark.parametrize("backend", BACKENDS)
@few
@given(seed=seeds, negatives=st.sampled_from(NEGATIVES))
def test_ids_may_be_renamed(backend: str, seed: int, negatives: str) -> None:
    field = Field(seed)
    names = torch.tensor([10**12, -4, 7, 2**62, -(2**63)])

    def rename(ids: Ids) -> Ids:
        part = torch.where(ids.part < 0, -1, 100 - ids.part)
        return Ids(names[ids.image], part.to(torch.int32), 9 - ids.view)

    renamed = field.loss(
        query_ids=rename(field.query_ids), key_ids=rename(field.key_ids), negatives=negatives, backend=backend
    )
    torch.testing.assert_close(renamed, field.loss(negatives=negatives, backend=backend))


@few
@given(seed=seeds)
def test_length_of_vectors_does_not_matter_when_normalised(seed: int) -> None:
    field = Field(seed)
    torch.testing.assert_close(field.loss(query=field.query * 7, key=field.key / 3), field.loss())


@pytest.mark.usefixtures("tiles_and_kept")
@few
@given(seed=seeds, same=st.booleans())
def test_no_positive_gives_zero_loss_and_zero_gradient(seed: int, same: bool) -> None:
    field = Field(seed, same=same)
    one = Ids(field.query_ids.image, field.query_ids.part, torch.zeros_like(field.query_ids.view))
    ids = {"query_ids": one, "key_ids": one if same else Ids(*(i * 0 + 50 for i in field.key_ids))}
    for values in (field.values(**ids, backend=backend) for backend in BACKENDS):
        assert not any(v.any() for v in values)


@pytest.mark.usefixtures("tiles_and_kept")
@pytest.mark.parametrize("temperature", [0.5, 0.01], ids=["bounded", "online"])
@pytest.mark.parametrize("same", [False, True])
def test_gradcheck_in_float64(temperature: float, same: bool) -> None:
    field = Field(3, m=10, t=12, d=3, bank=4, same=same)

    def loss(query: Tensor, key: Tensor, bank: Tensor, temperature: Tensor) -> Tensor:
        return field.loss(query=query, key=query if same else key, bank=bank, temperature=temperature)

    assert field.bank is not None
    inputs = [
        x.clone().requires_grad_() for x in (field.query, field.key, field.bank, torch.tensor(temperature).double())
    ]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.usefixtures("tiles_and_kept")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("same", [False, True])
def test_low_precision_is_rounded_only_in_the_returned_gradients(dtype: torch.dtype, same: bool) -> None:
    field = Field(5, dtype=dtype, same=same)
    exact = Field(5, dtype=dtype, same=same)
    exact.query, exact.weight = field.query.double(), field.weight.double()
    exact.key = exact.query if same else field.key.double()
    assert field.bank is not None
    exact.bank = field.bank.double()
    temperature = float(torch.tensor(0.1, dtype=dtype))
    got, expected = field.values(temperature=temperature), exact.values(temperature=temperature)
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-6, atol=1e-6 * 11)  # float32 sums, 1 + 1/T
    half_ulp = torch.finfo(dtype).eps / 2
    for g, e in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(g.double(), e, rtol=1.01 * half_ulp, atol=1e-5 * float(e.abs().max()))


@pytest.mark.usefixtures("tiles_and_kept")
@pytest.mark.parametrize("normalize", [True, False])
def test_float32_keeps_its_stated_error_bound(normalize: bool) -> None:
    field = Field(6, m=200, t=300, d=32, dtype=torch.float32)
    exact = Field(6, m=200, t=300, d=32, dtype=torch.float32)
    exact.query, exact.key, exact.weight = field.query.double(), field.key.double(), field.weight.double()
    assert field.bank is not None
    exact.bank = field.bank.double()
    temperature = float(torch.tensor(0.1))
    got = field.values(temperature=temperature, normalize=normalize)
    expected = exact.values(temperature=temperature, normalize=normalize)
    assert abs(got[0] - expected[0]) <= 1e-6 * (11 + abs(expected[0]))
    for g, e in zip(got[1:], expected[1:], strict=True):
        assert (g - e).abs().max() <= 1e-5 * e.abs().max()


def test_logits_are_kept_in_memory_only_where_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    field = Field(1)
    calls = []
    forward = tiled.forward_tiles
    monkeypatch.setattr(tiled, "forward_tiles", lambda *args: (calls.append(1), forward(*args)))
    monkeypatch.setattr(dense, "KEPT", 21 * 39 * 8)
    field.loss(backend=None)
    assert not calls
    monkeypatch.setattr(dense, "KEPT", 21 * 39 * 8 - 1)
    field.loss(backend=None)
    assert calls


@pytest.mark.usefixtures("tiles_and_kept")
def test_large_logits_do_not_overflow() -> None:
    field = Field(2, dtype=torch.float32)
    for sign in (1, -1):
        values = field.values(temperature=1e-3)
        assert all(v.isfinite().all() for v in values)
        big = field.loss(query=field.query * 100 * sign, key=field.key * 100, normalize=False)
        assert big.isfinite()


# what is the same problem after multiplication by a power of two, whose squares overflow
HUGE = [(torch.bfloat16, 66), (torch.float32, 66), (torch.float32, 125), (torch.bfloat16, 125), (torch.float64, 1020)]


@pytest.mark.usefixtures("tiles_and_kept")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("dtype", "power"), HUGE, ids=str)
def test_vectors_whose_squares_overflow_have_the_direction_that_they_have(
    dtype: torch.dtype, power: int, backend: str
) -> None:
    field, huge = Field(7, bank=4, dtype=dtype), Field(7, bank=4, dtype=dtype)
    factor = 2.0**power
    assert huge.bank is not None
    huge.query, huge.key, huge.bank = huge.query * factor, huge.key * factor, huge.bank * factor
    assert all(x.isfinite().all() for x in (huge.query, huge.key, huge.bank))
    expected, got = field.values(backend="reference"), huge.values(backend=backend)
    wide = accumulation(dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for index, (g, e) in enumerate(zip(got, expected, strict=True)):
        # gradients of vectors are as much smaller as the vectors are longer, below 2^-126 with fewer bits
        smaller = 1 if index in (0, 2) else factor
        rounding = torch.finfo(dtype).eps + torch.finfo(dtype).tiny * torch.finfo(dtype).eps * smaller
        error = (g.to(wide) * smaller - e.to(wide)).abs().max()
        assert error <= (tolerance + 2 * rounding) * (1 + e.to(wide).abs().max()), index


@pytest.mark.usefixtures("tiles_and_kept")
@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("same", [False, True])
def test_a_float16_vector_of_zeros_has_gradient_zero_and_changes_no_other(backend: str, same: bool) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    field, wide = Field(8, same=same, dtype=torch.float16), Field(8, same=same, dtype=torch.float16)
    for x in {id(x): x for x in (field.query, field.key, field.bank)}.values():
        assert x is not None
        x[2] = 0
    wide.query, wide.key, wide.weight = (x.double() for x in (field.query, field.key, field.weight))
    wide.key = wide.query if same else wide.key
    assert field.bank is not None
    wide.bank = field.bank.double()
    temperature = float(torch.tensor(0.1).half())
    got, expected = field.values(backend=backend), wide.values(backend="reference", temperature=temperature)
    tolerance = 2e-2 if backend == "triton" else 2e-3
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    for g, e in zip(got[1:], expected[1:], strict=True):
        if g.dim() == 2:
            assert not g[2].any()
            g, e = (torch.cat([x[:2], x[3:]]).double() for x in (g, e))
            assert (g - e).abs().max() <= tolerance * e.abs().max()


@pytest.mark.usefixtures("tiles_and_kept")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_half_precision_over_the_temperature_does_not_overflow(backend: str, normalize: bool) -> None:
    """Products of float16 up to 60,000, divided by 0.1, are far beyond float16."""
    field, wide = Field(9, dtype=torch.float16), Field(9, dtype=torch.float16)
    field.query = field.query / field.query.abs().max() * 60_000
    wide.query, wide.key, wide.weight = (x.double() for x in (field.query, field.key, field.weight))
    assert field.bank is not None
    wide.bank = field.bank.double()
    options = {"normalize": normalize, "backend": backend}
    got = field.values(**options)
    expected = wide.values(**options, temperature=float(torch.tensor(0.1).half()))
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=2e-3, atol=1e-6)
