"""A moving average of the encoder's weights, and BatchNorm statistics of clean images: what is evaluated at the end."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fgfast.losses.cached import RunningStatistics
from fgfast.models.frozen import Frozen
from fgfast.models.probe import evaluating
from fgfast.ranks import Ranks, gather, on_all

if TYPE_CHECKING:
    from fgfast.config import TrainConfig
    from fgfast.data.imageset import ImageSet
    from fgfast.models.backbone import Backbone


class WeightAverage:
    r"""The average of a network's weights over its steps, :math:`a \leftarrow \lambda a + (1 - \lambda) w`.

    Running statistics of BatchNorm are averaged too; counters are those of the network.

    Args:
        net: the network.
        decay: lambda, in (0, 1).

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(net.requires_grad_(False), 0.5)
        >>> old = net.weight.clone()
        >>> _ = net.weight.add_(2)
        >>> average.update()
        >>> with average.in_use():
        ...     round((net.weight - old).item(), 4)
        1.0
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net, self.decay = net, decay
        self.values = {name: x.detach().clone() for name, x in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        return {name: x.data for name, x in self.net.state_dict(keep_vars=True).items() if x.is_floating_point()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        torch._foreach_lerp_([*self.values.values()], [*self._tensors().values()], 1 - self.decay)

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Take the values of a checkpoint."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The network has the average inside, and its own weights again afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        own = self._tensors()
        for name, value in self.values.items():
            kept = own[name].clone()
            own[name].copy_(value)
            value.copy_(kept)


@torch.no_grad()
def take_clean_statistics(encoder: "Backbone", images: "ImageSet", config: "TrainConfig", ranks: Ranks) -> int:
    """Compute the BatchNorm statistics of an encoder again, from full images without augmentation.

    Each layer's mean and variance become the averages over the batches, which are those of all other layers in training
    mode. The images are resized as evaluation does it. Batches of fewer than two images are left out. A layer that
    no image goes through keeps its statistics.

    Args:
        encoder: the network; frozen BatchNorms keep their statistics.
        images: at most ``config.clean_stats`` of them are drawn, with a fixed seed.
        config: options of the run.
        ranks: the ranks, each of which takes all images, without those that any of them cannot read.

    Returns:
        Number of layers whose statistics are new.

    Source: Wu and Johnson, "Rethinking Batch in BatchNorm", 2021 (precise statistics).
    """
    from fgfast.data.loader import make_loader
    from fgfast.data.manifest import check_images
    from fgfast.data.views import ViewSpec

    norms = [m for m in encoder.modules() if isinstance(m, _BatchNorm) and not isinstance(m, Frozen)]
    norms = [norm for norm in norms if norm.track_running_stats]
    if not norms:
        return 0
    # Synchronised norms wait for each other: all ranks take the same batches, of images that each of them can read.
    chosen = images.sample(config.clean_stats)
    readable = on_all(ranks, lambda: check_images(chosen, threads=config.threads, lenient=True).index)
    chosen = chosen.subset(reduce(np.intersect1d, gather(ranks, readable)))
    loader = make_loader(
        chosen, ViewSpec(whole=config.size).with_stats(encoder.stats), config.batch_size,
        shuffle=False, device=ranks.device, threads=config.threads, backend=config.loader, lenient=True,
    )  # fmt: skip
    before = [(norm, norm.momentum, RunningStatistics(norm)) for norm in norms]
    try:
        with evaluating(encoder):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.training = True
            for batch in loader:
                assert batch.whole is not None  # the specification asks for it
                valid = batch.valid.to(torch.uint8)
                if ranks.world > 1:  # an image can be lost after the check
                    dist.all_reduce(valid, dist.ReduceOp.MIN)
                if int(valid.sum()) > 1:
                    encoder(batch.whole[valid.bool()])  # with the norms of heads and of attention
    finally:
        loader.close()
        used = [bool(norm.num_batches_tracked) for norm in norms]
        for (norm, momentum, statistics), is_new in zip(before, used, strict=True):
            norm.momentum = momentum
            if not is_new:
                statistics.restore()
    return sum(used)
