"""The Triton kernels of the contrastive loss against the definition in float64, interpreted without a GPU."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgfast.ids import Ids
from fgfast.kernels.common import interpreted
from fgfast.kernels.contrast import kernels as device_side
from fgfast.kernels.contrast import launch as kernels
from fgfast.kernels.sanitizer import checked
from fgfast.ops.contrast import contrastive_loss
from tests.examples import examples

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEGATIVES = kernels.NEGATIVES
WHOLE = kernels.TileShape(
    16, 32, 16, 64, True, 4, 2
)  # small, so that a field of 50 has shared, skipped and ragged tiles
CHANNELS = kernels.TileShape(16, 32, 16, 16, False, 4, 2)
seeds = st.integers(0, 10_000)


def cut(patch: pytest.MonkeyPatch, tile: kernels.TileShape, programs: int = 1) -> None:
    """Let every kernel work by this tile, and split columns until there are so many programs."""
    patch.setattr(kernels, "tile", lambda *unused: tile)
    patch.setattr(kernels, "programs_wanted", lambda device: programs)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, WHOLE)


class Field:
    """Random vectors and ids: ``values`` gives losses [M] and gradients, ``bounds`` what they may be off by."""

    def __init__(
        self, seed: int = 0, m: int = 37, t: int = 45, d: int = 21, bank: int | None = 19, *, same: bool = False,
        sort: bool = True, absent: bool = True, images: int = 5, dtype: torch.dtype = torch.float32,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)

        def ids(n: int) -> Ids:
            image = torch.randint(0, images, (n,), generator=g)
            part = torch.randint(-1 if absent else 0, 3, (n,), generator=g)
            view = torch.randint(0, 2, (n,), generator=g)
            return Ids(*(i.to(DEVICE) for i in (image.sort().values if sort else image, part, view)))

        def vectors(n: int) -> Tensor:
            return torch.randn(n, d, generator=g).to(DEVICE, dtype)

        self.query, self.query_ids = vectors(m), ids(m)
        self.key, self.key_ids = (self.query, self.query_ids) if same else (vectors(t), ids(t))
        self.bank = None if bank is None else vectors(bank)
        self.weight = (torch.rand(m, generator=g) * (torch.rand(m, generator=g) > 0.3)).to(DEVICE)
        self.same = same

    def loss(self, **options: Any) -> Tensor:
        given = {"query": self.query, "key": self.key, "query_ids": self.query_ids, "key_ids": self.key_ids,
                 "bank": self.bank, "weight": self.weight, "reduction": "none", "backend": "triton"}  # fmt: skip
        merged = given | options
        return contrastive_loss(merged.pop("query"), merged.pop("key"), **merged)

    def upstream(self) -> Tensor:
        """dL/dloss [M]: what ``values`` differentiates by, weights not counted in."""
        return torch.linspace(0.1, 1, len(self.query), device=DEVICE)

    def values(self, exact: bool = False, temperature: float = 0.1, **options: Any) -> dict[str, Tensor]:
        """Losses and gradients; ``exact``: of the definition in float64, for the same numbers."""
        dtype = torch.float64 if exact else self.query.dtype
        query = self.query.detach().to(dtype).requires_grad_()
        key = query if self.same else self.key.detach().to(dtype).requires_grad_()
        bank = None if self.bank is None else self.bank.detach().to(dtype).requires_grad_()
        t = torch.tensor(temperature).to(torch.float64 if exact else torch.float32).requires_grad_()
        given = {"query": query, "key": key, "bank": bank, "temperature": t} | options
        if exact:
            given |= {"backend": "reference", "weight": self.weight.double()}
        loss = self.loss(**given)
        inputs = {"query": query, "temperature": t}
        inputs |= {} if self.same else {"key": key}
        inputs |= {} if bank is None else {"bank": bank}
        grads = torch.autograd.grad((loss * self.upstream()).sum(), list(inputs.values()))
        return {"loss": loss.detach()} | dict(zip(inputs, grads, strict=True))

    def bounds(self, temperature: float, normalize: bool, product: float = 0.0) -> dict[str, Tensor]:
        """Largest errors: of each loss and of the gradient of each vector (its Euclidean norm), and of temperature.

        With eps = 2^-24 and S the largest |q| |k| / T, a logit is off by at most delta = (D + 8) eps S + product S
        (sums of D products, the norms, the scale), where ``product`` is the rounding of the factors of a product; so
        exp(s - lse) is off by a factor 1 + e with e = 2 delta + (columns + 8) eps. A weight dL/ds and, for float16, the
        vector it multiplies are rounded to bfloat16: u = 2^-8. A row has sum_j |dL/ds_ij| <= 2 |g_i|, where g_i is its
        upstream gradient times weight; a column has at most sum_i 2 |g_i|. Both are carried by the longest vector of
        the other side, 1/T, and 1/norm (the projection shortens). The result is rounded once to its dtype. The gradient
        of the temperature is the sum over the rows of <row, its gradient> / T, D + M sums more.
        """
        norms = {
            name: x.double().norm(dim=1)
            for name, x in (("query", self.query), ("key", self.key), ("bank", self.bank))
            if x is not None
        }
        length = {name: torch.ones_like(n) if normalize else n for name, n in norms.items()}
        inverse = {name: 1 / n if normalize else torch.ones_like(n) for name, n in norms.items()}
        longest = {name: float(n.max()) if len(n) else 0.0 for name, n in length.items()}
        columns = max(longest["key"], longest.get("bank", 0.0))
        if self.same:
            columns = max(columns, longest["query"])
        s = longest["query"] * columns / temperature
        eps, n = 2.0**-24, len(self.key) + (0 if self.bank is None else len(self.bank))
        delta = ((self.query.shape[1] + 8) * eps + product) * s
        e = 2 * delta + (n + len(self.query) + 8) * eps
        u = 0.0 if self.query.dtype == torch.float32 else 2.0**-8
        half_ulp = torch.finfo(self.query.dtype).eps / 2
        g = (self.upstream() * self.weight).double()
        of_row = 2 * g * columns * (e + u + product) / temperature * inverse["query"]
        of_column = 2 * g.sum() * longest["query"] * (e + u + product) / temperature
        result = {
            "loss": (2 * delta + (n + 8) * eps * (1 + s)) * self.weight.double() + 1e-7,
            "query": of_row + (of_column * inverse["query"] if self.same else 0),
            "temperature": 2
            * g.sum()
            * s
            * (e + u + product + (self.query.shape[1] + len(self.query)) * eps)
            / temperature,
        }
        result |= {name: of_column * inverse[name] for name in ("key", "bank") if name in inverse}
        self.half_ulp = half_ulp
        return result


def assert_within_bounds(field: Field, temperature: float = 0.1, product: float = 0.0, **options: Any) -> None:
    got = field.values(temperature=temperature, **options)
    expected = field.values(exact=True, temperature=temperature, **options)
    bounds = field.bounds(temperature, options.get("normalize", True), product)
    for name, value in expected.items():
        error = (got[name].double() - value).abs()
        if name in ("query", "key", "bank"):
            assert got[name].dtype == field.query.dtype
            error = (error - field.half_ulp * value.abs()).clamp(min=0).norm(dim=1) / 1.01
            tiny = torch.finfo(field.query.dtype).smallest_normal
            assert (error <= bounds[name] + tiny).all(), (name, float((error / bounds[name]).max()))
        else:
            assert (error <= bounds[name]).all(), (name, float((error / bounds[name]).max()))


fields = st.builds(
    Field,
    seeds,
    st.sampled_from([1, 16, 37]),
    st.sampled_from([1, 32, 45]),
    st.sampled_from([1, 16, 21]),
    st.sampled_from([None, 0, 19]),
    same=st.booleans(),
    sort=st.booleans(),
    absent=st.booleans(),
    images=st.sampled_from([1, 5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
options = st.fixed_dictionaries(
    {
        "negatives": st.sampled_from(NEGATIVES),
        "normalize": st.booleans(),
        "temperature": st.sampled_from([1.0, 0.1, 0.01]),  # 0.01 is beyond the bounded path
    }
)


@pytest.mark.quick
@examples(10)
@given(fields, options, st.sampled_from([WHOLE, CHANNELS]), st.sampled_from([1, 9]))
def test_values_and_every_gradient_are_those_of_the_definition(
    field: Field, options: dict[str, Any], tile: kernels.TileShape, programs: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, tile, programs)
        assert_within_bounds(field, **options)


@pytest.mark.parametrize("negatives", NEGATIVES)
@pytest.mark.parametrize("same", [False, True], ids=["key", "same"])
@pytest.mark.parametrize("normalize", [True, False])
def test_each_path_of_the_kernels(negatives: str, same: bool, normalize: bool) -> None:
    assert_within_bounds(Field(3, same=same), negatives=negatives, normalize=normalize)


@pytest.mark.parametrize("same", [False, True], ids=["key", "same"])
@pytest.mark.parametrize("tile", [WHOLE, CHANNELS], ids=["whole", "channels"])
def test_shares_of_columns_change_nothing(same: bool, tile: kernels.TileShape, monkeypatch: pytest.MonkeyPatch) -> None:
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


@examples(3)
@given(seed=seeds, negatives=st.sampled_from(NEGATIVES), normalize=st.booleans(), same=st.booleans())
def test_contents_of_absent_vectors_reach_nothing(seed: int, negatives: str, normalize: bool, same: bool) -> None:
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
def test_nan_and_infinity_in_present_vectors_give_nan(junk: float, temperature: float) -> None:
    field = Field(9, absent=False, bank=None, images=1)
    field.key[7, 3] = junk
    loss = field.loss(temperature=temperature, weight=None)
    expected = field.loss(temperature=temperature, weight=None, backend="reference")
    assert expected.isnan().any()
    assert torch.equal(loss.isnan(), expected.isnan())


def test_everything_left_out_gives_zero() -> None:
    field = Field(10)
    nothing = Ids(field.query_ids.image, torch.full_like(field.query_ids.part, -1), field.query_ids.view)
    alone = Ids(*(i * 0 + 50 for i in field.key_ids))
    for ids in ({"query_ids": nothing}, {"key_ids": alone}, {"key_ids": Ids(*(i * 0 - 1 for i in field.key_ids))}):
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


FAR = 2**31 + 64


@pytest.mark.skipif(not interpreted(), reason="sees the addresses of the interpreter")
@pytest.mark.parametrize(("stride_n", "stride_d"), [(FAR, 1), (1, FAR)], ids=["rows", "channels"])
def test_addresses_beyond_32_bits(stride_n: int, stride_d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every address of a tile, of vectors so far apart that they could not be allocated; nothing is read there."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    seen = []
    load = InterpreterBuilder.create_masked_load

    def note(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if pointers.data.ndim == 2:
            seen.append(set(pointers.data[mask.data].tolist()))
            mask = TensorHandle(np.zeros_like(mask.data), mask.dtype)
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", note)
    x, n, d = torch.zeros(1), 5, 3
    values, ids = torch.ones(n), torch.zeros(n, dtype=torch.int64)
    of_x = (x, stride_n, stride_d, values, ids, ids, ids, 1, 1, 1)
    low, high = ids[:1], ids[:1]
    options = kernels.TileShape(16, 16, 16, 16, True, 4, 2).options | {
        "NEGATIVES": "all", "BOUNDED": True, "SPLITS": 1, "CHUNK": 16, "PRECISION": "ieee", "UPCAST": True
    }  # fmt: skip
    partial = torch.zeros(2, 3, n)
    device_side.prepare[(1,)](
        x, stride_n, stride_d, ids, ids, 1, 1, values, low, high, None, 0, None, None, None, None, None, n, d,
        NORMALIZE=True, BOUNDED=True, BLOCK=16, BLOCK_D=16, UPCAST=True,
    )  # fmt: skip
    values.fill_(1)
    for half in (False, True):
        device_side.forward[(1, 1)](
            *of_x, *of_x, low, high, None, 1.0, *torch.empty(3, n), partial, 1, n, n, d, TRIANGULAR=half, **options
        )
    raw = torch.zeros(n, 1, d)
    device_side.gradient[(1, 1)](
        *of_x, *of_x, values, values, None, low, high, None, 1.0, raw, n, n, d,
        X_ROWS=True, Y_ROWS=True, ADD=False, **options,
    )  # fmt: skip
    expected = {x.data_ptr() + 4 * (i * stride_n + c * stride_d) for i in range(n) for c in range(d)}
    assert len(seen) == 7
    assert all(addresses == expected for addresses in seen)


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


def count_products(monkeypatch: pytest.MonkeyPatch, run: Any) -> int:
    """How many tiles are multiplied while run() runs, interpreted."""
    from triton.runtime.interpreter import InterpreterBuilder

    calls = []
    dot = InterpreterBuilder.create_dot
    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", lambda *args: (calls.append(1), dot(*args))[1])
        run()
    return len(calls)


@pytest.mark.skipif(not interpreted(), reason="counts what the interpreter does")
@pytest.mark.parametrize("views", [1, 2])
def test_same_image_does_the_work_of_shared_blocks_alone(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, kernels.TileShape(16, 16, 16, 64, True, 4, 2))
    images = 6 // views
    image = torch.arange(images).repeat_interleave(16).repeat(views)  # each image fills a block in each view
    ids = Ids(image, torch.arange(len(image)) % 16 // 2, torch.arange(len(image)) % 2)
    x = torch.randn(len(image), 8, requires_grad=True)

    def work(negatives: str) -> tuple[int, int]:
        losses: list[Tensor] = []
        given = {"query_ids": ids, "key_ids": ids, "negatives": negatives, "backend": "triton"}
        forward = count_products(monkeypatch, lambda: losses.append(contrastive_loss(x, x, **given)))
        return forward, count_products(monkeypatch, lambda: losses[0].backward())

    blocks = images * views
    assert work("all") == (blocks * (blocks + 1) // 2, 2 * blocks**2)
    assert work("same_image") == (blocks * views, 2 * blocks * views)


SQUARES = {  # tile, programs: so many groups of rows and shares of columns
    "one program": (WHOLE, 1, (1, 1)),
    "groups": (kernels.TileShape(16, 16, 16, 64, True, 4, 2), 3, (3, 1)),
    "shares": (kernels.TileShape(32, 16, 16, 16, False, 4, 2), 15, (3, 5)),
}


def halve(patch: pytest.MonkeyPatch, tile: kernels.TileShape, programs: int) -> None:
    """Let forward make half the square, in blocks so few at a time that a share has several chunks of them."""
    cut(patch, tile, programs)
    patch.setattr(kernels, "TRIANGULAR_TILES", 0)
    patch.setattr(kernels, "CHUNK", 2)


def squares(patch: pytest.MonkeyPatch, field: Field, **options: Any) -> tuple[Tensor, Tensor]:
    """Losses from half the square, checked for races and addresses, and from the whole of it."""
    with checked() if interpreted() else nullcontext():
        half = field.loss(weight=None, **options)
    with patch.context() as whole:
        whole.setattr(kernels._Operands, "halves", lambda self: None)
        return half, field.loss(weight=None, **options)


@pytest.mark.parametrize("cut_as", SQUARES)
def test_half_the_square_is_the_whole(cut_as: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tile, programs, expected = SQUARES[cut_as]
    halve(monkeypatch, tile, programs)
    chosen = []
    rule = kernels._Operands.halves
    monkeypatch.setattr(kernels._Operands, "halves", lambda self: chosen.append(rule(self)) or chosen[-1])
    for sort, bank, negatives in ((True, None, "all"), (False, 19, "other_images")):
        field = Field(20, m=150, same=True, bank=bank, sort=sort, images=9)
        absent = field.query_ids.part < 0
        field.query = field.key = torch.where(absent[:, None], torch.nan, field.query)
        half, whole = squares(monkeypatch, field, negatives=negatives)
        torch.testing.assert_close(half, whole, rtol=1e-5, atol=1e-5)
        assert not half[absent].any()
    assert chosen == [expected] * 2


@examples(6)
@given(fields, st.sampled_from(NEGATIVES), st.sampled_from(sorted(SQUARES)), st.booleans())
def test_half_the_square_gives_the_definition(field: Field, negatives: str, cut_as: str, normalize: bool) -> None:
    field.same, field.key, field.key_ids = True, field.query, field.query_ids
    with pytest.MonkeyPatch.context() as patch:
        halve(patch, *SQUARES[cut_as][:2])
        assert_within_bounds(field, negatives=negatives, normalize=normalize)


@pytest.mark.skipif(not interpreted(), reason="counts what the interpreter does")
@pytest.mark.parametrize("views", [1, 2])
def test_half_the_square_is_half_the_products(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tiles X x Y: all pairs of a row and a column behind its block, and the blocks on the diagonal."""
    tile = kernels.TileShape(32, 16, 16, 64, True, 4, 2)
    halve(monkeypatch, tile, 6)
    image = torch.arange(12 // views).repeat_interleave(16).repeat(views)
    ids = Ids(image, torch.arange(192) % 8, torch.arange(192) % 2)
    x = torch.randn(192, 8)
    given = {"query_ids": ids, "key_ids": ids, "backend": "triton"}
    rows, columns = 192 // tile.x, 192 // tile.y
    ratio = tile.x // tile.y
    half = sum(columns - ratio * row for row in range(rows))
    assert count_products(monkeypatch, lambda: contrastive_loss(x, x, **given)) == half == 42
    monkeypatch.setattr(kernels, "TRIANGULAR_TILES", 100)
    assert count_products(monkeypatch, lambda: contrastive_loss(x, x, **given)) == rows * columns == 72


@pytest.mark.skipif(not interpreted(), reason="counts what the interpreter does")
def test_a_block_of_rows_compares_its_own_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two views in a row: between the two blocks of an image there is none that compares ids."""
    halve(monkeypatch, kernels.TileShape(16, 16, 8, 64, True, 4, 2), 1)
    monkeypatch.setattr(kernels, "CHUNK", 256)
    images = 4
    ids = Ids(torch.arange(images).repeat_interleave(16).repeat(2), *torch.zeros(2, 128, dtype=torch.int64))
    x = torch.randn(128, 8)
    products = count_products(monkeypatch, lambda: contrastive_loss(x, x, query_ids=ids, key_ids=ids, backend="triton"))
    compared, clean = 3 * images, 2 * images * (2 * images - 1) // 2 - images  # compared in two halves
    assert products == 2 * compared + clean


@given(st.integers(1, 10**6), st.sampled_from([32, 512, 2048]), st.sampled_from([1, 8, 264, 608]))
def test_groups_and_shares_keep_the_device_busy_in_bounded_memory(rows: int, row_bytes: int, programs: int) -> None:
    tile = kernels.TileShape(128, 128, 32, 256, True, 8, 2)
    blocks = -(-rows // 128)
    found = kernels.groups_and_shares(rows, row_bytes, tile, programs)
    slots = ((32 << 20) + rows * row_bytes) / (12 * rows)
    if found is None:
        assert blocks**2 < 8 * programs or slots < 2 * programs**0.5 + 2, "there would be room: g + p / g slots"
        return
    groups, shares = found
    assert groups + shares <= slots
    assert 7 / 8 * programs <= groups * shares <= programs
    tiles = [0] * groups  # behind the diagonal, as the kernel deals blocks
    for block in range(blocks):
        turn, group = divmod(block, groups)
        tiles[group if turn % 2 == 0 else groups - 1 - group] += blocks - block
    assert max(tiles) <= 1.1 * sum(tiles) / groups + 1, "one group has far more to do than another"


@pytest.mark.parametrize("change", ["key", "same_image", "online", "few"])
def test_the_whole_square_where_half_of_it_does_not_pay(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, WHOLE, programs=2)
    monkeypatch.setattr(kernels, "TRIANGULAR_TILES", 3)
    chosen = []
    rule = kernels._Operands.halves
    monkeypatch.setattr(kernels._Operands, "halves", lambda self: chosen.append(rule(self)) or chosen[-1])
    Field(0, same=True, bank=None).loss()
    Field(0, m=16 if change == "few" else 37, same=change != "key", bank=None).loss(
        negatives="same_image" if change == "same_image" else "all", temperature=0.01 if change == "online" else 0.1
    )
    assert chosen == [(2, 1), None]


@pytest.mark.parametrize("tiles", [0, 100], ids=["half", "whole"])
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
    args = (query, *field.query_ids, *key, field.bank, temperature, 1.0, "all", True, "ieee", True, "triton")
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
        kernels.check_sizes(wide[:, :4], torch.zeros(1, 4).expand(2**31, 4), None)
    with pytest.raises(TypeError, match=r"query has dtype torch\.float64"):
        field.loss(query=field.query.double(), key=field.key.double())


def test_the_cases_for_compilation_name_every_argument() -> None:
    cases = list(kernels.aot_cases())
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        names = list(case.signature)
        assert names == list(case.kernel.arg_names), case.name
        assert {n for n in names if case.signature[n] == "constexpr"} == set(case.constexprs), case.name
    known = ("prepare", "forward", "join", "gradient", "inner", "finish")
    assert {case.kernel for case in cases} == {getattr(device_side, name) for name in known}
