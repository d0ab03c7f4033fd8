"""The Triton kernels of the contrastive loss against the definition in float64, interpreted without a GPU."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgfast.ids import Ids
from fgfast.kernels.contrast import problem as kernels
from fgfast.ops.contrast import contrastive_loss
from tests.examples import examples
from tests.kernels.contrast_fields import (
    CHANNELS,
    COPIED,
    DEVICE,
    FAR,
    HELD,
    NEGATIVES,
    WHOLE,
    Field,
    assert_within_bounds,
    cut,
    fields,
    seeds,
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, WHOLE)


options = st.fixed_dictionaries(
    {
        "negatives": st.sampled_from(NEGATIVES),
        "normalize": st.booleans(),
        "temperature": st.sampled_from([1.0, 0.1, 0.01]),  # 0.01 is beyond the bounded path
    }
)


@pytest.mark.quick
@examples(10)
@given(fields, options, st.sampled_from([WHOLE, CHANNELS, COPIED, HELD]), st.sampled_from([1, 9]))
def test_values_and_every_gradient_are_those_of_the_definition(
    field: Field, options: dict[str, Any], tile: kernels.TileShape, programs: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, tile, programs)
        assert_within_bounds(field, **options)


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("same", [False, True], ids=["key", "same"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tile", [WHOLE, COPIED, HELD], ids=["masked", "copied", "held"])
def test_each_path_of_the_kernels(
    negatives: str, same: bool, normalize: bool, tile: kernels.TileShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, tile)
    assert_within_bounds(Field(3, d=90 if tile.held else 21, same=same), negatives=negatives, normalize=normalize)


@pytest.mark.parametrize("same", [False, True], ids=["key", "same"])
@pytest.mark.parametrize("tile", [WHOLE, CHANNELS, COPIED, HELD], ids=["whole", "channels", "copied", "held"])
def test_splits_of_columns_change_nothing(same: bool, tile: kernels.TileShape, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, tile, programs=16)
    assert_within_bounds(Field(4, t=130, bank=70, same=same, images=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("same", [False, True], ids=["key", "same"])
def test_the_tiles_of_the_table(dtype: torch.dtype, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for d in (40, 300):
        assert_within_bounds(Field(5, m=70, t=90, d=d, bank=None, same=same, dtype=dtype))


@pytest.mark.parametrize("same", [False, True], ids=["key", "same"])
def test_a_temperature_on_the_device_is_read_there(same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "on_device", lambda temperature: True)
    field = Field(6, same=same)
    move = Tensor.requires_grad_
    monkeypatch.setattr(Tensor, "requires_grad_", lambda x: move(x.to(DEVICE)) if x.dim() == 0 else move(x))
    assert_within_bounds(field)


def test_tf32_products_keep_their_own_bound() -> None:
    assert_within_bounds(Field(7), product=2.0**-10, precision="tf32")


@pytest.mark.parametrize("which", ["query", "key", "bank", "temperature"])
def test_a_single_gradient_is_the_one_of_all(which: str) -> None:
    field = Field(8)
    expected = field.values()[which]
    inputs = {"query": field.query, "key": field.key, "bank": field.bank, "temperature": torch.tensor(0.1)}
    inputs[which] = inputs[which].clone().requires_grad_()
    (got,) = torch.autograd.grad((field.loss(**inputs) * field.upstream()).sum(), [inputs[which]])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@examples(6)
@given(
    seed=seeds, negatives=st.sampled_from(NEGATIVES), normalize=st.booleans(), same=st.booleans(),
    tile=st.sampled_from([WHOLE, COPIED, HELD]),
)  # fmt: skip
def test_contents_of_absent_vectors_affect_nothing(
    seed: int, negatives: str, normalize: bool, same: bool, tile: kernels.TileShape
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, tile)
        check_contents_of_absent_vectors(seed, negatives, normalize, same)


def check_contents_of_absent_vectors(seed: int, negatives: str, normalize: bool, same: bool) -> None:
    field = Field(seed, same=same)
    chosen = {"negatives": negatives, "normalize": normalize}
    expected = field.values(**chosen)
    for junk in (torch.nan, torch.inf):
        field.query = torch.where(field.query_ids.part[:, None] < 0, junk, field.query)
        field.key = field.query if same else torch.where(field.key_ids.part[:, None] < 0, junk, field.key)
        got = field.values(**chosen)
        assert all(torch.equal(got[name], expected[name]) for name in expected)
        assert not got["query"][field.query_ids.part < 0].any()


@pytest.mark.parametrize("junk", [torch.nan, torch.inf])
@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["bounded", "online"])
@pytest.mark.parametrize("tile", [WHOLE, COPIED, HELD], ids=["masked", "copied", "held"])
def test_nan_and_infinity_in_present_vectors_give_nan(
    junk: float, temperature: float, tile: kernels.TileShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, tile)
    field = Field(9, absent=False, bank=None, images=1)
    field.key[7, 3] = junk
    loss = field.loss(temperature=temperature, weight=None)
    expected = field.loss(temperature=temperature, weight=None, backend="reference")
    assert expected.isnan().any()
    assert torch.equal(loss.isnan(), expected.isnan())


def test_only_excluded_vectors_give_zero() -> None:
    field = Field(10)
    nothing = Ids(field.query_ids.image, torch.full_like(field.query_ids.part, -1), field.query_ids.view)
    unmatched = Ids(*(i * 0 + 50 for i in field.key_ids))
    for ids in ({"query_ids": nothing}, {"key_ids": unmatched}, {"key_ids": Ids(*(i * 0 - 1 for i in field.key_ids))}):
        assert not any(v.any() for v in field.values(**ids).values())


@pytest.mark.parametrize(("m", "t"), [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("bank", [None, 0, 3])
def test_empty_inputs_give_zero(m: int, t: int, bank: int | None) -> None:
    values = Field(0, m=m, t=t, bank=bank).values()
    assert not any(v.any() for v in values.values())


def test_strides_and_integer_types_do_not_matter() -> None:
    field = Field(11)
    expected = field.values()
    wide = torch.full((45, 21, 3), torch.nan, device=DEVICE)
    wide[..., 1] = field.key
    field.key, field.query = wide[..., 1], field.query.T.contiguous().T
    field.bank = torch.cat([field.bank, field.bank])[::1][: len(field.bank)]
    pairs = [torch.stack([i, i - 7], 1) for i in field.key_ids]
    field.key_ids = Ids(pairs[0][:, 0], pairs[1][:, 0].to(torch.int32), pairs[2][:, 0].to(torch.int16))
    field.query_ids = Ids(
        field.query_ids.image.to(torch.int32), field.query_ids.part.to(torch.int8), field.query_ids[2]
    )
    got = field.values()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7)


def test_ids_use_all_64_bits() -> None:
    field = Field(12)
    names = torch.tensor([10**12, -4, 10**12 + 2**32, 2**63 - 1, -(2**63)], device=DEVICE)
    renamed = {
        side: Ids(names[ids.image], ids.part, 9 - ids.view)
        for side, ids in (("query_ids", field.query_ids), ("key_ids", field.key_ids))
    }
    for negatives in NEGATIVES:
        torch.testing.assert_close(field.loss(negatives=negatives, **renamed), field.loss(negatives=negatives))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device with 5 GB")
@pytest.mark.parametrize("side", ["rows", "channels"])
def test_offsets_beyond_32_bits(side: str) -> None:
    shape, far = ((2, 16), (FAR, 1)) if side == "rows" else ((16, 2), (1, FAR))
    query = torch.empty(FAR + 16, dtype=torch.float16, device=DEVICE).as_strided(shape, far)
    query.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    ids = Ids(*(torch.arange(len(query), device=DEVICE) * i for i in (0, 0, 1)))
    losses = []
    for x in (query, query.contiguous()):
        x = x.detach().requires_grad_()
        loss = contrastive_loss(x, x, query_ids=ids, key_ids=ids, backend="triton")
        losses.append(torch.cat([loss.detach().view(1), torch.autograd.grad(loss, x)[0].flatten()]))
    assert torch.equal(*losses)


def test_many_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, kernels.TileShape(16, 16, 16, 64 if DEVICE == "cuda" else 2048, False, 4, 2))
    assert_within_bounds(Field(13, m=5, t=9, d=8192, bank=3, absent=False, images=1))


@pytest.mark.parametrize("tiles", [0, 100], ids=["triangular", "full"])
def test_two_runs_are_equal_bit_for_bit(tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TRIANGULAR_TILES", tiles)
    field = Field(14, same=True)
    first, second = field.values(), field.values()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("same", [False, True], ids=["key", "same"])
def test_opcheck(same: bool) -> None:
    field = Field(1, m=10, t=12, same=same)
    query = field.query.requires_grad_()
    key = (None, None, None, None) if same else (field.key.requires_grad_(), *field.key_ids)
    temperature = torch.tensor(0.2, requires_grad=True)
    args = (query, *field.query_ids, *key, field.bank, temperature, 1.0, "all", True, "ieee", "triton")
    torch.library.opcheck(torch.ops.fgfast.contrast, args)
    grads = [torch.randn(10, device=DEVICE), *(x.detach() for x in torch.ops.fgfast.contrast(*args)[1:])]
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    for needs in ([True, not same, True, True], [False, not same, True, False], [False, False, False, True]):
        torch.library.opcheck(torch.ops.fgfast.contrast_backward, (*grads, needs, *detached))


def test_compiled_fullgraph_gives_the_same_numbers() -> None:
    field = Field(2)
    compiled = torch.compile(lambda query: field.loss(query=query), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(field.query), field.loss())


def test_bad_input_is_one_clear_error() -> None:
    field = Field(0, m=3, t=3, bank=None)
    wide = torch.zeros(3, 8193, device=DEVICE)
    with pytest.raises(ValueError, match=r"query has 8193 channels and the Triton kernels take 8192"):
        field.loss(query=wide, key=wide)
    with pytest.raises(ValueError, match=r"key has 2147483648 rows and the Triton kernels take \d+"):
        kernels.check_sizes(query=wide[:, :4], key=torch.zeros(1, 4).expand(2**31, 4))
    with pytest.raises(TypeError, match=r"query has dtype torch\.float64"):
        field.loss(query=field.query.double(), key=field.key.double())
