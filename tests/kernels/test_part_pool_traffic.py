"""Memory traffic, bounds and races of the kernels of part_pool and labels_to_grid, counted in the interpreter."""

import pytest
import torch
from hypothesis import given

pytest.importorskip("triton")

from fgfast import labels_to_grid, part_pool
from tests.examples import examples
from tests.kernels.test_part_pool import interpreted, ordered, problems

pytestmark = pytest.mark.slow


@interpreted
@pytest.mark.parametrize("order", ["rows", "channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "weighted", "launches"),
    [
        ((2, 256, 21, 28), False, 1),
        ((1, 512, 15, 15), True, 1),
        ((4, 520, 7, 7), True, 1),  # read in runs
        ((1, 128, 56, 56), False, 2),  # split
    ],
)
def test_traffic_is_near_the_minimum(shape, weighted, launches, dtype, order):
    """Features in the order they have, labels and weights again for each block of channels, outputs once."""
    from fgfast.kernels.sanitizer import checked, fewest

    x = ordered(torch.randn(shape).to(dtype), order).requires_grad_()
    labels = torch.randint(-1, 8, (shape[0], *shape[2:]))
    weight = torch.rand(labels.shape) if weighted else None
    with checked(x.detach(), labels, *([weight] if weighted else [])) as traffic:
        out = part_pool(x, labels, 8, weight=weight, backend="triton")
    # Under the interpreter bfloat16 results are stored as float32.
    stored = torch.empty(out.pooled.shape)
    assert traffic.launches == launches
    assert traffic.bytes <= 1.10 * fewest(x, labels, weight, stored, out.area)

    g = torch.randn_like(out.pooled)
    with checked() as traffic:
        (grad,) = torch.autograd.grad(out.pooled, x, g)
    assert traffic.launches == 1
    assert traffic.bytes <= 1.10 * fewest(torch.empty(grad.shape), labels, weight, g, out.area)


@interpreted
@pytest.mark.parametrize("order", ["rows", "channels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(56, 56), (50, 45)], ids=str)
def test_a_launch_that_votes_reads_ids_and_features_once(size, dtype, order):
    """One group of channel blocks per image: four processors and eight images."""
    from fgfast.kernels.sanitizer import checked, fewest

    x = ordered(torch.randn(8, 256, 14, 14).to(dtype), order)
    labels = torch.randint(0, 8, (8, *size), dtype=torch.uint8)
    with checked(x, labels) as traffic:
        out = part_pool(x, labels, 8, backend="triton")
    assert (traffic.launches, traffic.programs) == (1, 8)
    grid = torch.empty(8, 14, 14, dtype=torch.int32)
    assert traffic.bytes <= 1.10 * fewest(x, labels, torch.empty(out.pooled.shape), out.area, grid)


@interpreted
@pytest.mark.parametrize(
    ("shape", "size", "n_parts", "launches"),
    [
        ((2, 300, 7, 7), (12, 14), 9, 1),
        ((2, 300, 7, 7), (12, 14), 33, 2),  # many parts
        ((2, 300, 7, 7), (35, 35), 9, 2),  # several groups of channels would read many ids each
        ((8, 33, 14, 14), (140, 140), 9, 2),  # many steps of voting, faster in a separate launch
        ((1, 33, 56, 56), (60, 60), 2, 3),  # pixels are split among programs
    ],
)
def test_few_votes_are_part_of_the_launch_that_pools(shape, size, n_parts, launches):
    from fgfast.kernels.sanitizer import checked

    x, labels = torch.randn(shape), torch.randint(-1, n_parts, (shape[0], *size))
    with checked(x, labels) as traffic:
        out = part_pool(x, labels, n_parts, backend="triton")
    assert traffic.launches == launches
    expected = part_pool(x, labels, n_parts, backend="torch")
    torch.testing.assert_close(out.pooled, expected.pooled)
    assert torch.equal(out.area, expected.area)


@interpreted
def test_grid_reads_the_id_map_once():
    from fgfast.kernels.sanitizer import checked, fewest

    labels = torch.randint(-1, 15, (1, 128, 128))
    with checked(labels) as traffic:
        grid = labels_to_grid(labels, 32, 15, backend="triton")
    assert traffic.launches == 1
    assert traffic.bytes <= 1.10 * fewest(labels, grid)


@interpreted
@examples(30)
@given(problems() | problems(maps=True))
def test_no_access_outside_tensors_and_no_race(problem):
    from fgfast.kernels.sanitizer import checked

    x, labels, weight, n_parts, reduce = problem
    x = x.detach().requires_grad_()
    with checked(x.detach(), labels):
        out = part_pool(x, labels, n_parts, weight=weight, reduce=reduce, backend="triton")
        out.pooled.sum().backward()
        labels_to_grid(labels, (2, 3), n_parts, backend="triton")
