"""The gradient by chunks of dL/ds, for vectors of more channels than a tile holds, interpreted without a GPU."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgfast.ids import Ids
from fgfast.kernels import configs
from fgfast.kernels.common import interpreted
from fgfast.kernels.contrast import blocks, launch, wide, wide_cases
from fgfast.kernels.contrast import problem as kernels
from fgfast.kernels.sanitizer import checked
from tests.examples import examples
from tests.kernels.contrast_fields import (
    CHANNELS,
    DEVICE,
    NEGATIVES,
    Field,
    assert_within_bounds,
    count_launches,
    cut,
    fields,
    seeds,
)
from tests.memory import Memory

pytestmark = pytest.mark.slow

ROW = configs.contrast_row("half", 8192, 16, 32, 16, 16, 4, 2, 0)


@contextmanager
def chunks(bytes_of_weights: int = 1 << 12, longest: int = 32) -> Iterator[None]:
    """Small tiles, and chunks so small that a field of 50 vectors has several."""
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, CHANNELS)
        patch.setitem(configs._forced, "contrast weights", ROW)
        patch.setattr(wide, "FEWEST_LOGITS", 0)
        patch.setattr(wide, "WEIGHTS_BYTES", bytes_of_weights)
        patch.setattr(wide, "LONGEST_SIDE", longest)
        yield


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with chunks():
        yield


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches of ``gradient``, chunks of 32 x 32 weights and products of the library."""
    counter: Counter[str] = Counter()

    def count(where: Any, name: str) -> None:
        function = getattr(where, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            counter[name] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(where, name, counted)

    count(wide._Weigher, "weigh")
    count(wide, "_multiply_add")

    count_launches(monkeypatch, counter, launch, only=("forward", "gradient"))
    monkeypatch.setattr(wide, "chunk_sizes", lambda *unused: (32, 32))
    return counter


@pytest.mark.quick
@examples(12)
@given(
    fields, st.sampled_from(NEGATIVES), st.booleans(), st.sampled_from([1.0, 0.1, 0.01]),
    st.sampled_from([1 << 10, 1 << 20]),
)  # fmt: skip
def test_values_and_every_gradient_are_those_of_the_definition(
    field: Field, negatives: str, normalize: bool, temperature: float, size: int
) -> None:
    with chunks(size):
        assert_within_bounds(field, negatives=negatives, normalize=normalize, temperature=temperature)


@pytest.mark.parametrize(("d", "dtype"), [(257, torch.float16), (300, torch.bfloat16), (1024, torch.float32)])
@pytest.mark.parametrize("same", [False, True], ids=["key", "same"])
def test_the_tiles_of_the_table(d: int, dtype: torch.dtype, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, kernels.TileShape(64, 64, 16, 256, False, 4, 2))
    monkeypatch.delitem(configs._forced, "contrast weights")
    monkeypatch.setattr(wide, "WEIGHTS_BYTES", 1 << 16)
    monkeypatch.setattr(wide, "LONGEST_SIDE", 128)
    assert_within_bounds(Field(5, m=70, t=140, d=d, bank=None, same=same, dtype=dtype))


@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["bounded", "online"])
def test_query_and_key_share_the_weights(temperature: float, work: Counter[str]) -> None:
    """3 products for each pair: the logits, and one for each gradient."""
    Field(1, m=64, t=96, bank=None).values(temperature=temperature)
    assert work == {"forward": 1, "weigh": 6, "_multiply_add": 12}


@pytest.mark.parametrize(("temperature", "pairs"), [(0.1, 10), (0.01, 16)], ids=["bounded", "online"])
def test_one_triangle_of_symmetric_weights_is_computed(temperature: float, pairs: int, work: Counter[str]) -> None:
    Field(1, m=128, bank=None, same=True).values(temperature=temperature)
    assert work == {"forward": 1, "weigh": pairs, "_multiply_add": 16 if temperature == 0.1 else 32}


def test_only_weights_of_the_gradients_asked_for_are_multiplied(work: Counter[str]) -> None:
    field = Field(1, m=32, t=32, bank=None)
    for inputs, products in ((("query",), 1), (("key",), 1), (("query", "key"), 2), (("temperature",), 1)):
        work.clear()
        given = {"query": field.query, "key": field.key, "temperature": torch.tensor(0.1)}
        given |= {name: given[name].clone().requires_grad_() for name in inputs}
        torch.autograd.grad(field.loss(**given).sum(), [given[name] for name in inputs])
        assert work == {"weigh": 1, "_multiply_add": products, "forward": 1}


def test_blocks_without_a_common_image_are_left_to_the_kernel_that_skips_them(work: Counter[str]) -> None:
    """Keys of "same_image" go to ``gradient``, the bank, whose vectors are negatives of every row, into chunks."""
    field = Field(1, m=32, t=32, bank=32)
    assert_within_bounds(field, negatives="same_image")
    assert (work["gradient"], work["weigh"], work["_multiply_add"]) == (2, 1, 2)


def test_few_logits_are_left_to_gradient(work: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "FEWEST_LOGITS", 32 * 32)
    Field(1, m=32, t=31, bank=32).values()
    assert (work["gradient"], work["weigh"]) == (2, 1)


@pytest.mark.parametrize("which", ["query", "key", "bank", "temperature"])
def test_a_single_gradient_is_the_one_of_all(which: str) -> None:
    field = Field(8)
    expected = field.values()[which]
    inputs = {"query": field.query, "key": field.key, "bank": field.bank, "temperature": torch.tensor(0.1)}
    inputs[which] = inputs[which].clone().requires_grad_()
    (got,) = torch.autograd.grad((field.loss(**inputs) * field.upstream()).sum(), [inputs[which]])
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@examples(4)
@given(seeds, st.sampled_from(NEGATIVES), st.booleans(), st.booleans(), st.sampled_from(["float32", "float16"]))
def test_contents_of_absent_vectors_affect_nothing(
    seed: int, negatives: str, normalize: bool, same: bool, dtype: str
) -> None:
    field = Field(seed, same=same, dtype=getattr(torch, dtype))
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
def test_present_nan_and_infinity_spread_as_in_the_kernel_without_chunks(
    junk: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    field = Field(9, images=1)
    field.key[7, 3], field.key_ids.part[7] = junk, 1
    got = field.values(temperature=temperature)
    monkeypatch.setattr(wide, "FEWEST_LOGITS", 1 << 40)
    expected = field.values(temperature=temperature)
    assert expected["query"].isnan().any()
    for name, value in expected.items():
        assert torch.equal(got[name].isnan(), value.isnan()), name


@pytest.mark.parametrize("same", [False, True], ids=["key", "same"])
def test_a_temperature_on_the_device_is_read_there(same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "on_device", lambda temperature: True)
    move = Tensor.requires_grad_
    monkeypatch.setattr(Tensor, "requires_grad_", lambda x: move(x.to(DEVICE)) if x.dim() == 0 else move(x))
    assert_within_bounds(Field(6, same=same))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms_far_from_one_lose_nothing(dtype: torch.dtype) -> None:
    """A weight divided by a norm of 1e4 or 1e-4 and rounded to bfloat16 keeps its relative error."""
    field = Field(6, dtype=dtype, absent=False, images=2)
    field.query *= 10.0 ** torch.linspace(-3, 3, len(field.query), device=DEVICE)[:, None].to(dtype)
    field.key *= 10.0 ** torch.linspace(3, -3, len(field.key), device=DEVICE)[:, None].to(dtype)
    assert_within_bounds(field)


def test_strides_do_not_matter() -> None:
    field = Field(11)
    expected = field.values()
    spread = torch.full((45, 21, 3), torch.nan, device=DEVICE)
    spread[..., 1] = field.key
    field.key, field.query = spread[..., 1], field.query.T.contiguous().T
    field.key_ids = Ids(*(torch.stack([i, i - 7], 1)[:, 0] for i in field.key_ids))
    got = field.values()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("same", [False, True], ids=["key", "same"])
def test_accesses_are_in_bounds_and_two_runs_are_equal(same: bool) -> None:
    field = Field(14, same=same)
    runs = []
    for _ in range(2):
        with checked() if interpreted() else nullcontext():
            runs.append(field.values())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_products_of_float32_have_the_precision_asked_for(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    exact = wide.exact

    def record(device: torch.device, precision: str) -> Any:
        seen.append(precision)
        return exact(device, precision)

    monkeypatch.setattr(wide, "exact", record)
    Field(7, bank=None).values(precision=precision)
    assert seen == [precision]


def test_blocks_of_other_ranks_give_the_gradients_of_all_columns() -> None:
    field = Field(15, bank=None)
    expected = field.values()
    options = (None, 0.1, "all", True, "ieee")
    upstream = field.upstream() * field.weight
    _, lse, count = launch.forward(field.query, field.query_ids, field.key, field.key_ids, None, *options)
    sums = blocks.Gradients(
        (upstream, lse, count), True, False, 30, field.query, field.query_ids, field.key, field.key_ids, None, *options
    )
    d_key = []
    for part in (slice(0, 30), slice(30, None)):
        x, ids = field.key[part], Ids(*(i[part] for i in field.key_ids))
        total = sums.add(x, ids, True)
        assert total is not None
        d_key.append(sums.finish_columns(x, ids, total))
    d_query, _ = sums.finish()
    torch.testing.assert_close(d_query, expected["query"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat(d_key), expected["key"], rtol=1e-5, atol=1e-6)


@given(
    st.integers(1, 1 << 20), st.integers(1, 1 << 20), st.booleans(), st.sampled_from([257, 512, 1024, 8192]),
    st.sampled_from([(1, 2), (2, 2), (1, 4), (2, 4)]), st.sampled_from([(128, 256), (128, 128), (64, 64)]),
)  # fmt: skip
def test_chunks_cover_the_logits_in_bounded_memory(
    rows: int, columns: int, same: bool, d: int, stored: tuple[int, int], sides: tuple[int, int]
) -> None:
    """Twice the inputs and 64 MiB beside inputs and returned gradients, of which cuBLAS may take 32 MiB."""
    outputs, size = stored
    columns = rows if same else columns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wide, "WEIGHTS_BYTES", 32 << 20)
        patch.setattr(wide, "LONGEST_SIDE", 4096)
        tile = kernels.TileShape(*sides, 32, 64, False, 8, 3)
        high, wide_ = wide.chunk_sizes(rows, columns, same, d * size, outputs * size, tile)
    assert high % tile.x == 0 < high < rows + max(sides)
    assert wide_ % tile.y == 0 < wide_ < columns + max(sides)
    assert not same or high == wide_
    mib, vector = 1 << 20, d * size
    inputs = (rows + (0 if same else columns)) * vector
    copies = min(high, rows) * vector + (0 if same and high >= rows else min(wide_, columns) * vector)
    of_sums = 2 * inputs if size == 2 else inputs  # float32; those of float32 vectors are the returned gradients
    padding = (tile.x + max(sides)) * vector
    assert of_sums + copies + high * wide_ * outputs * size - inputs <= 2 * inputs + 32 * mib + padding


def test_memory_is_that_of_the_sums_a_chunk_and_its_copies() -> None:
    """Counted for float32, where the sums become the returned gradients."""
    m, d = 128, 256
    field = Field(16, m=m, t=m, d=d, bank=None)
    grad, lse, count = (torch.ones(m, device=DEVICE) for _ in range(3))
    with Memory() as memory:
        launch.backward(
            grad, lse, count, [True, True, False, False], field.query, field.query_ids, field.key, field.key_ids, None,
            None, 0.1, "all", True, "ieee",
        )  # fmt: skip
    weights, copies, per_vector = 4096, 2 * 32 * 4 * d, 64 * m
    assert memory.peak <= 2 * 4 * m * d + weights + copies + 2 * per_vector, memory.peak


@pytest.mark.parametrize("same", [False, True], ids=["key", "same"])
def test_opcheck(same: bool) -> None:
    field = Field(1, m=10, t=12, same=same)
    key = (None, None, None, None) if same else (field.key.requires_grad_(), *field.key_ids)
    temperature = torch.tensor(0.2, requires_grad=True)
    args = (field.query, *field.query_ids, *key, field.bank, temperature, 1.0, "all", True, "ieee", "triton")
    grads = [torch.randn(10, device=DEVICE), *(x.detach() for x in torch.ops.fgfast.contrast(*args)[1:])]
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    for needs in ([True, not same, True, True], [False, not same, False, False]):
        torch.library.opcheck(torch.ops.fgfast.contrast_backward, (*grads, needs, *detached))


def test_the_cases_for_compilation_name_every_argument() -> None:
    for case in wide_cases.aot_cases():
        names = list(case.signature)
        assert names == list(case.kernel.arg_names), case.name
        assert {n for n in names if case.signature[n] == "constexpr"} == set(case.constexprs), case.name
