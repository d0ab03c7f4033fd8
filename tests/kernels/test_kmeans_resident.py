"""The step whose tiles stay in shared memory, as sm_90 runs it: against the reference, and its traffic."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgfast import kmeans_step

pytest.importorskip("triton")

from fgfast.kernels import configs
from fgfast.kernels.common import interpreted
from fgfast.kernels.kmeans.step import Solver, resident_tile
from fgfast.kernels.sanitizer import checked, fewest
from tests.examples import examples
from tests.kernels.test_kmeans import DEVICE, blobs, check_kmeans, check_step, same, weights

pytestmark = pytest.mark.slow

ROW = configs.ROWS["kmeans_resident", "sm_90"][0]
HALF = [torch.float16, torch.bfloat16]
in_interpreter = pytest.mark.skipif(not interpreted(), reason="counts traffic in the interpreter")


@pytest.fixture(autouse=True)
def resident():
    with configs.force_row("kmeans_resident", ROW):
        yield


def is_resident(x, clusters, weight=None, metric="euclidean"):
    return Solver(x.mT if x.dim() == 3 else x, clusters, weight, metric, "ieee", True).resident


@pytest.mark.quick
@examples(6)
@given(
    seed=st.integers(0, 10**6), batch=st.integers(1, 2), pixels=st.integers(1, 70),
    channels=st.sampled_from([192, 256, 384, 704, 768]), clusters=st.integers(1, 25), dtype=st.sampled_from(HALF),
)  # fmt: skip
def test_step_equals_reference(seed, batch, pixels, channels, clusters, dtype):
    x = blobs(seed, batch, pixels, channels, dtype=dtype)
    assert is_resident(x, clusters)
    check_step(x, blobs(seed + 1, batch, clusters, channels, dtype=dtype))


@pytest.mark.parametrize("clusters", [15, 16, 32, 33, 64])
def test_squares_take_the_last_column_of_scores_only_if_no_centroid_has_it(clusters):
    x, c = blobs(11, 1, 70, 256, dtype=torch.float16), blobs(12, 1, clusters, 256)
    x[0, 40] = c[0, -1]
    step = check_step(x, c)
    assert is_resident(x, clusters)
    assert step.labels[0, 40] == clusters - 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_pixel_affects_only_the_inertia(value):
    x, c = blobs(7, 2, 70, 256, dtype=torch.bfloat16), blobs(8, 2, 5, 256)
    clean = kmeans_step(x, c, backend="triton")
    x[0, 40, 2] = value
    step = check_step(x, c)
    assert step.labels[0, 40] == -1
    assert step.inertia.isnan().tolist() == [True, False]
    assert torch.equal(step.sums[1], clean.sums[1])


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("pixels", "splits"), [(60, 1), (420, 2)])
def test_a_split_problem_and_an_entire_one_equal_the_reference(pixels, splits, deterministic):
    x = blobs(1, 1, pixels, 256, dtype=torch.float16)
    solver = Solver(x.mT, 3, None, "euclidean", "ieee", deterministic)
    assert solver.resident
    assert DEVICE != "cpu" or solver.splits == splits
    check_step(x, x[:, :3], deterministic=deterministic)
    check_kmeans(x, 3, seed=3, n_iter=3, deterministic=deterministic)


def test_empty_clusters_are_repaired_from_the_pixels():
    x = blobs(3, 2, 70, 192, dtype=torch.float16)
    init = x[:, :6].float()
    init[0, [0, 4]] = x[0, :2].float() - 1e3 * torch.eye(192, device=DEVICE)[:2]
    result = check_kmeans(x, 6, init=init, n_iter=2)
    assert (result.counts > 0).all()


def test_channels_last_maps_are_read_as_they_lie():
    x = blobs(5, 2, 5, 7, 256, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert is_resident(x, 3)
    c = blobs(6, 2, 3, 256)
    step = kmeans_step(x, c, backend="triton")
    rows = check_step(x.flatten(2).mT, c)
    assert torch.equal(step.labels.flatten(1), rows.labels)
    assert torch.equal(step.sums, rows.sums)
    padded = blobs(5, 2, 35, 320, dtype=torch.bfloat16)[:, :, :256]  # longer rows
    assert is_resident(padded, 3)
    check_step(padded, c)


def test_ties_go_to_the_lowest_index():
    x = blobs(9, 1, 60, 256, dtype=torch.float16).sign()
    c = torch.cat([x[:, :3], -x[:, :3]], 1)
    step = kmeans_step(x, torch.cat([c, c, c], 1), backend="triton")
    assert (step.labels < 6).all()


def test_other_pixels_take_the_other_kernels():
    x = blobs(0, 2, 32, 256, dtype=torch.bfloat16)
    assert is_resident(x, 5)
    assert not is_resident(x.float(), 5)
    assert not is_resident(x, 5, metric="cosine")
    assert not is_resident(x, 5, weights(0, 2, 32))
    assert not is_resident(x.mT.contiguous().mT, 5)  # rows of pixels
    assert not is_resident(x[:1].expand(2, -1, -1), 5)
    assert not is_resident(x[:, :, 1:225], 5)  # rows at no multiple of 16 bytes
    assert not is_resident(x[:, :, :250], 5)
    assert not is_resident(x[:, :, :160], 5)  # much padding
    assert not is_resident(x, 100)  # too many sums
    assert resident_tile(ROW, 1024, 16) is not None
    assert resident_tile(ROW, 1536, 16) is None  # too much shared memory


@in_interpreter
def test_a_step_exchanges_little_more_than_the_pixels_with_l2():
    """Without any cache: each tile is loaded once, and centroids once per program."""
    x, c = blobs(1, 4, 600, 256, dtype=torch.float16), blobs(2, 4, 5, 256)
    with checked(x, c) as traffic:
        step = kmeans_step(x, c, backend="triton")
    least = fewest(x, c, *step)
    assert traffic.bytes <= 1.1 * least
    assert traffic.requested <= 1.3 * least


def test_iterations_equal_those_of_the_other_kernels(monkeypatch):
    x = blobs(2, 2, 70, 256, dtype=torch.float16)
    result = check_kmeans(x, 4, seed=1, n_iter=4)
    monkeypatch.setitem(configs._forced, "kmeans_resident", ROW._replace(tiles=ROW.tiles | {"HELD": 0}))
    assert not is_resident(x, 4)
    same(result, check_kmeans(x, 4, seed=1, n_iter=4))
