"""How the contrastive kernels are launched: one triangle of the logits, splits, skipped blocks, and addresses."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fgfast.ids import Ids
from fgfast.kernels.common import interpreted
from fgfast.kernels.contrast import cases
from fgfast.kernels.contrast import problem as kernels
from fgfast.kernels.contrast import vectors as per_vector
from fgfast.kernels.contrast.forward import forward
from fgfast.kernels.contrast.gradient import gradient
from fgfast.kernels.sanitizer import checked
from fgfast.ops.contrast import contrastive_loss
from tests.examples import examples
from tests.kernels.contrast_fields import FAR, NEGATIVES, WHOLE, Field, assert_within_bounds, cut, fields

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, WHOLE)


@pytest.mark.skipif(not interpreted(), reason="records addresses in the interpreter")
@pytest.mark.parametrize(("stride_n", "stride_d"), [(FAR, 1), (1, FAR)], ids=["rows", "channels"])
def test_addresses_beyond_32_bits(stride_n: int, stride_d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All addresses of a tile are right for strides too large to allocate; nothing is read there."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    seen = []
    load = InterpreterBuilder.create_masked_load

    def record(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        if pointers.data.ndim == 2 and mask.data.any():
            seen.append(set(pointers.data[mask.data].tolist()))
            mask = TensorHandle(np.zeros_like(mask.data), mask.dtype)
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", record)
    x, n, d = torch.zeros(1), 5, 3
    values, ids = torch.ones(n), torch.zeros(n, dtype=torch.int64)
    of_x = (x, stride_n, stride_d, values, ids, ids, ids, 1, 1, 1)
    low, high = ids[:1], ids[:1]
    tile = kernels.TileShape(16, 16, 16, 16, True, 4, 2)
    options = tile.options | {
        "NEGATIVES": "all", "BOUNDED": True, "SPLITS": 1, "CHUNK": 16, "PRECISION": "ieee", "UPCAST": True
    }  # fmt: skip
    partial = torch.zeros(2, 3, n)
    per_vector.prepare[(1,)](
        x, stride_n, stride_d, ids, ids, 1, 1, values, low, high, None, None, None, n, *kernels.NOT_PREPARED, None, 0,
        *[None] * 5, d, NORMALIZE=True, BOUNDED=True, CHANNELS=0, BLOCK=16, BLOCK_D=16, UPCAST=True,
    )  # fmt: skip
    values.fill_(1)
    for triangular in (False, True):
        forward[(1, 1)](
            *of_x, *of_x, None, None, None, low, high, None, 1.0, *torch.empty(3, n), partial, 1, None, n, n, d,
            CHANNELS=0, **options, **tile.of_forward(triangular),
        )  # fmt: skip
    raw = torch.zeros(n, 1, d)
    gradient[(1, 1)](
        *of_x, *of_x, None, None, None, values, values, None, low, high, None, 1.0, raw, None, n, n, d,
        X_ROWS=True, Y_ROWS=True, ADD=False, CHANNELS=0, **options,
    )  # fmt: skip
    expected = {x.data_ptr() + 4 * (i * stride_n + c * stride_d) for i in range(n) for c in range(d)}
    assert len(seen) == 7
    assert all(addresses == expected for addresses in seen)


def count_products(monkeypatch: pytest.MonkeyPatch, run: Any) -> int:
    """How many tiles run() multiplies in the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    calls = []
    dot = InterpreterBuilder.create_dot
    with monkeypatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", lambda *args: (calls.append(1), dot(*args))[1])
        run()
    return len(calls)


@pytest.mark.skipif(not interpreted(), reason="counts products in the interpreter")
@pytest.mark.parametrize("views", [1, 2])
def test_same_image_multiplies_only_blocks_with_common_images(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
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


CUTS = {  # tile, programs, and the expected groups of rows and splits of columns for 150 rows of 84 bytes
    "one program": (WHOLE, 1, (1, 1)),
    "groups": (kernels.TileShape(16, 16, 16, 64, True, 4, 2), 3, (3, 1)),
    "copied": (kernels.TileShape(16, 16, 16, 64, True, 4, 2, copied=True, ahead=True), 3, (3, 1)),
    "flipped": (kernels.TileShape(16, 16, 16, 64, True, 4, 2, copied=True, flipped=True), 3, (3, 1)),
    "held": (kernels.TileShape(16, 16, 16, 64, True, 4, 2, copied=True, held=64), 3, (3, 1)),
    "splits": (kernels.TileShape(32, 16, 16, 16, False, 4, 2), 15, (3, 5)),
}


def use_triangle(patch: pytest.MonkeyPatch, tile: kernels.TileShape, programs: int) -> None:
    """Let forward compute one triangle, with chunks small enough for a split to have several."""
    cut(patch, tile, programs)
    patch.setattr(kernels, "TRIANGULAR_TILES", 0)
    patch.setattr(kernels, "CHUNK", 2)


@pytest.mark.parametrize("name", CUTS)
def test_one_triangle_gives_the_losses_of_all_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tile, programs, expected = CUTS[name]
    use_triangle(monkeypatch, tile, programs)
    assert kernels.groups_and_splits(150, 84, tile, programs) == expected
    for sort, bank, negatives in ((True, None, "all"), (False, 19, "other_images")):
        field = Field(20, m=150, same=True, bank=bank, sort=sort, images=9)
        absent = field.query_ids.part < 0
        field.query = field.key = torch.where(absent[:, None], torch.nan, field.query)
        with checked() if interpreted() else nullcontext():
            triangular = field.loss(weight=None, negatives=negatives)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "TRIANGULAR_TILES", 1 << 30)
            full = field.loss(weight=None, negatives=negatives)
        torch.testing.assert_close(triangular, full, rtol=1e-5, atol=1e-5)
        assert not triangular[absent].any()


@examples(6)
@given(fields, st.sampled_from(NEGATIVES), st.sampled_from(sorted(CUTS)), st.booleans())
def test_one_triangle_gives_the_definition(field: Field, negatives: str, name: str, normalize: bool) -> None:
    field.same, field.key, field.key_ids = True, field.query, field.query_ids
    with pytest.MonkeyPatch.context() as patch:
        use_triangle(patch, *CUTS[name][:2])
        assert_within_bounds(field, negatives=negatives, normalize=normalize)


@pytest.mark.skipif(not interpreted(), reason="counts products in the interpreter")
@pytest.mark.parametrize("views", [1, 2])
def test_one_triangle_is_half_the_products(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tiles X x Y: all pairs of a row and a column past its block, and the blocks on the diagonal."""
    tile = kernels.TileShape(32, 16, 16, 64, True, 4, 2)
    use_triangle(monkeypatch, tile, 6)
    image = torch.arange(12 // views).repeat_interleave(16).repeat(views)
    ids = Ids(image, torch.arange(192) % 8, torch.arange(192) % 2)
    x = torch.randn(192, 8)
    given = {"query_ids": ids, "key_ids": ids, "backend": "triton"}
    rows, columns = 192 // tile.x, 192 // tile.y
    ratio = tile.x // tile.y
    triangle = sum(columns - ratio * row for row in range(rows))
    assert count_products(monkeypatch, lambda: contrastive_loss(x, x, **given)) == triangle == 42
    monkeypatch.setattr(kernels, "TRIANGULAR_TILES", 100)
    assert count_products(monkeypatch, lambda: contrastive_loss(x, x, **given)) == rows * columns == 72


@pytest.mark.skipif(not interpreted(), reason="counts products in the interpreter")
def test_a_block_of_rows_compares_ids_only_with_blocks_of_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views one after the other: blocks between the two blocks of an image compare no ids."""
    use_triangle(monkeypatch, kernels.TileShape(16, 16, 8, 64, True, 4, 2), 1)
    monkeypatch.setattr(kernels, "CHUNK", 256)
    images = 4
    ids = Ids(torch.arange(images).repeat_interleave(16).repeat(2), *torch.zeros(2, 128, dtype=torch.int64))
    x = torch.randn(128, 8)
    products = count_products(monkeypatch, lambda: contrastive_loss(x, x, query_ids=ids, key_ids=ids, backend="triton"))
    compared, clean = 3 * images, 2 * images * (2 * images - 1) // 2 - images  # compared 8 of 16 vectors at a time
    assert products == 2 * compared + clean


@given(st.integers(1, 10**6), st.sampled_from([32, 512, 2048]), st.sampled_from([1, 8, 264, 608]))
def test_groups_and_splits_occupy_the_device_in_bounded_memory(rows: int, row_bytes: int, programs: int) -> None:
    tile = kernels.TileShape(128, 128, 32, 256, True, 8, 2)
    blocks = -(-rows // 128)
    found = kernels.groups_and_splits(rows, row_bytes, tile, programs)
    slots = ((32 << 20) + rows * row_bytes) / (12 * rows)
    if found is None:
        assert blocks**2 < 8 * programs or slots < 2 * programs**0.5 + 2, "enough slots for g + p / g"
        return
    groups, splits = found
    assert groups + splits <= slots
    assert 7 / 8 * programs <= groups * splits <= programs
    tiles = [0] * groups  # past the diagonal, in the order in which the kernel deals blocks
    for block in range(blocks):
        turn, group = divmod(block, groups)
        tiles[group if turn % 2 == 0 else groups - 1 - group] += blocks - block
    assert max(tiles) <= 1.1 * sum(tiles) / groups + 1, "one group has far more tiles than another"


@pytest.mark.skipif(not interpreted(), reason="counts products in the interpreter")
@pytest.mark.parametrize("change", ["none", "key", "same_image", "unbounded", "few", "tile"])
def test_all_logits_are_computed_where_one_triangle_is_not_faster(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, WHOLE._replace(triangle=change != "tile"), programs=2)
    field = Field(0, m=16 if change == "few" else 37, same=change != "key", bank=None)
    options = {
        "negatives": "same_image" if change == "same_image" else "all",
        "temperature": 0.01 if change == "unbounded" else 0.1,
    }
    products = []
    for tiles in (3, 1 << 30):
        monkeypatch.setattr(kernels, "TRIANGULAR_TILES", tiles)
        products.append(count_products(monkeypatch, lambda: field.loss(**options)))
    assert (products[0] < products[1]) == (change == "none")


def test_the_cases_for_compilation_name_every_argument() -> None:
    listed = list(cases.aot_cases())
    assert len({case.name for case in listed}) == len(listed)
    for case in listed:
        names = list(case.signature)
        assert names == list(case.kernel.arg_names), case.name
        assert {n for n in names if case.signature[n] == "constexpr"} == set(case.constexprs), case.name


@pytest.mark.parametrize(
    ("channels", "same", "temperature", "held"),
    [
        (128, False, 0.1, False),  # all channels fit into shared memory
        (129, False, 0.1, True),
        (512, False, 0.1, True),
        (256, True, 0.1, True),
        (257, True, 0.1, False),  # no room for the sums of one triangle
        (256, False, 0.01, False),  # unbounded logits: infinities count
    ],
)
def test_rows_stay_in_registers_where_logits_are_bounded(
    channels: int, same: bool, temperature: float, held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    tile = kernels.TileShape(16, 16, 16, 64, True, 4, 2, copied=True)
    monkeypatch.setattr(kernels, "tile", lambda *given: (asked.append(given[-1]), tile)[1])
    x, ids = torch.ones(4, channels), Ids(*torch.zeros(3, 4, dtype=torch.int64))
    key = (None, None) if same else (x, ids)
    kernels.Problem("forward", x, ids, None, temperature, "all", True, "ieee", None, *key, True, (same, True))
    assert asked == [held]
