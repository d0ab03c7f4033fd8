"""The running variance equals its definition, the queue is first in first out, frozen norms keep their statistics."""

from collections import deque

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fgfast.models.statistics import KeyQueue, RunningVariance, freeze_bn_stats
from fgfast.reference.perturb import running_variance
from tests.examples import examples


@examples(30)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.sampled_from([0.0, 0.5, 0.99]))
def test_variance_is_that_of_the_weighted_batches(seed: int, sizes: list[int], decay: float) -> None:
    """Over all batches, with ``decay`` times the weight of the next one; invalid rows are left out."""
    g = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, 5, generator=g) for n in sizes]
    running = RunningVariance(5, decay)
    for x in batches:
        padded = torch.cat([x, torch.full((1, 5), torch.nan)])
        running.update(padded, torch.arange(len(padded)) < len(x))
        running.update(padded, torch.zeros(len(padded), dtype=torch.bool))  # no valid row: no change
    torch.testing.assert_close(running.variance, running_variance(batches, decay).float(), rtol=1e-5, atol=1e-9)


def test_the_variance_of_no_batch_is_zero() -> None:
    """There is no division by zero."""
    assert RunningVariance(3).variance.tolist() == [0, 0, 0]


@examples(30)
@given(st.integers(0, 10**6), st.integers(1, 7), st.lists(st.integers(1, 5), max_size=4))
def test_queue_holds_the_last_valid_keys(seed: int, size: int, sizes: list[int]) -> None:
    """The newest batch is in front, in its order; invalid keys are left out."""
    g = torch.Generator().manual_seed(seed)
    queue = KeyQueue(size, 2)
    expected = deque(queue.keys.clone())
    for n in sizes:
        keys, valid = torch.randn(n, 2, generator=g), torch.rand(n, generator=g) < 0.6
        queue.push(keys, valid)
        expected.extendleft(reversed(keys[valid]))
    assert torch.equal(queue.keys, torch.stack(list(expected)[:size]))


def test_frozen_norms_keep_their_statistics() -> None:
    """Batches are normalised by their own statistics; running statistics and counts change only outside."""
    net, x = nn.Sequential(nn.BatchNorm1d(3), nn.Identity()), torch.randn(8, 3) + 5
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with freeze_bn_stats(net):
        inside = net(x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    torch.testing.assert_close(net(x), inside)
    assert net[0].num_batches_tracked == 1
    net.eval()
    with freeze_bn_stats(net):
        torch.testing.assert_close(net(x), net(x))
        assert not torch.allclose(net(x), inside)  # evaluation uses the running statistics
