"""The forward and backward passes of a step: of the whole batch at once, with its encoders in chunks, or added up."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgfast.errors import UserError
from fgfast.losses.cached import RunningStatistics, training_batch_norm
from fgfast.methods.base import METHODS, Method, method_class
from fgfast.methods.chunked import ChunkedMethod
from fgfast.models.backbone import Backbone
from fgfast.ranks import Ranks
from fgfast.train.distributed import distribute
from fgfast.train.micro_batch import MicroBatches, can_split, split_batch
from fgfast.train.optim import make_optimizer
from fgfast.train.sharding import Sharded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.distributed.device_mesh import DeviceMesh

    from fgfast.data.views import Batch


class Step:
    """Computes the gradients of a batch, averaged over the ranks.

    Args:
        method: the method, on its device; its options say how the step is divided.
        ranks: the ranks.
        mesh: the ranks as FSDP2 wants them; None makes one.
    """

    def __init__(self, method: Method, ranks: Ranks, mesh: "DeviceMesh | None" = None) -> None:
        self.method, self.ranks, self.config = method, ranks, method.config
        self.sharded = Sharded(method, ranks, mesh) if self.config.shard == "fsdp" else None
        self.whole: Method | MicroBatches = method
        if self.config.micro_batch:
            assert isinstance(method, ChunkedMethod)  # see check_step
            self.whole = MicroBatches(method, self.config.micro_batch)
        self.model: nn.Module = self.whole
        if ranks.world > 1 and self.sharded is None:
            self.model = distribute(self.whole, ranks)

    def __call__(self, batch: "Batch") -> dict[str, Tensor]:
        """Add the gradients of a batch to the parameters; returns the terms of the method."""
        n = self.config.accumulate
        if n == 1:
            return self._add(batch)
        parts = split_batch(batch, -(-len(batch) // n))
        total: dict[str, Tensor] = {}
        for i, (part, weight) in enumerate(zip(parts, self._weights(parts), strict=True)):
            self.method.part = i
            terms = self._add(part, weight, last=i == len(parts) - 1)
            total = {name: total.get(name, 0) + weight * value.detach() for name, value in terms.items()}
        self.method.part = 0
        return total

    def _weights(self, parts: list["Batch"]) -> Tensor:
        """The fractions of the valid images of all ranks that are in each part: every term is a mean over these."""
        counts = torch.stack([part.valid.sum() for part in parts]).float()
        if self.ranks.world > 1:
            dist.all_reduce(counts)
        return counts / counts.sum().clamp(min=1)

    def _add(self, batch: "Batch", weight: Tensor | None = None, *, last: bool = True) -> dict[str, Tensor]:
        with self._synchronising(last=last):
            with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
                terms: dict[str, Tensor] = (
                    self.model(batch) if self.sharded is None else self.sharded(self.model, batch)
                )
            statistics = self._statistics()
            loss = terms["loss"] if weight is None else weight * terms["loss"]
            loss.backward()
        if statistics is not None:
            statistics.restore()
        return terms

    def _synchronising(self, *, last: bool) -> AbstractContextManager[None]:
        """Ranks average gradients in the last backward pass of a step."""
        if self.sharded is not None:
            self.sharded.set_requires_gradient_sync(last)
        if last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def whole_networks(self) -> AbstractContextManager[None]:
        """Networks that this rank can use on its own, for scores and the discovery of parts."""
        return nullcontext() if self.sharded is None else self.sharded.whole()

    def make_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the parameters, or of their shards on this rank."""
        return make_optimizer(self.method, self.config, None if self.sharded is None else self.sharded.local)

    def clip(self) -> Tensor:
        """Clip the gradients, which the optimiser may then read; returns their norm before."""
        params = [p for p in self.method.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(params, self.config.clip or float("inf"), foreach=True)
        return norm if self.sharded is None else self.sharded.hand_over(norm)

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """The states of the method and the optimiser for a checkpoint; all ranks must ask for them together."""
        if self.sharded is None:
            return {"method": self.method.state_dict(), "optimizer": optimizer.state_dict()}
        return self.sharded.state(optimizer)

    def load(self, checkpoint: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Load these states, whichever way they are divided now."""
        if self.sharded is None:
            self.method.load_state_dict(checkpoint["method"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            _lay_out(optimizer)
        else:
            self.sharded.load(checkpoint, optimizer)

    def _statistics(self) -> RunningStatistics | None:
        """Statistics of BatchNorm before passes that repeat earlier ones; None if there are no such passes."""
        if isinstance(self.whole, MicroBatches):
            return self.whole.statistics
        return RunningStatistics(self.method) if self.config.grad_checkpoint else None


def _lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Give states the memory layout of their parameters, as fused steps expect: divided ones have none but rows."""
    for p, values in optimizer.state.items():
        for name, x in values.items():
            if isinstance(x, Tensor) and x.shape == p.shape and x.stride() != p.stride():
                values[name] = torch.empty_like(p, dtype=x.dtype, requires_grad=False).copy_(x)


def check_step(method: Method) -> None:
    """Refuse what a method or its networks cannot do: steps in parts, divided networks, BatchNorm that sees a part.

    Raises:
        UserError: it names the method or the layer.
    """
    config = method.config
    if config.micro_batch:
        if not can_split(type(method)):
            raise UserError(
                f"--micro-batch is given and {method.name} cannot split its step: leave it out, or choose one of "
                f"{_names(can_split)}."
            )
        assert isinstance(method, ChunkedMethod)  # can_split
        method.check_chunks()
        _check_batch_norm(method, "--micro-batch", (n for n, m in method.named_modules() if isinstance(m, Backbone)))
    if config.shard == "fsdp":
        _check_shard(method)
    if config.accumulate > 1:
        if not method.adds_up:
            remedy = f"give --micro-batch {-(-config.batch_size // config.accumulate)} instead"
            if not can_split(type(method)):
                remedy = f"leave it out, or choose one of {_names(lambda kind: kind.adds_up)}"
            raise UserError(
                f"--accumulate is given and the loss of {method.name} is not a mean over images on their own: {remedy}."
            )
        _check_batch_norm(method, "--accumulate", [""])


def _check_shard(method: Method) -> None:
    """Raise a UserError for a method and for options that need whole parameters."""
    config = method.config
    others = {
        f"the method {method.name} with these options": not method.shardable, "--micro-batch": config.micro_batch > 0,
        "--compile": config.compile, "--average": config.average > 0, "--optimizer lars": config.optimizer == "lars",
    }  # fmt: skip
    if any(others.values()):
        name = next(name for name, given in others.items() if given)
        raise UserError(f"--shard fsdp divides the parameters that {name} needs whole: leave one of them out.")


def _names(condition: "Callable[[type[Method]], bool]") -> str:
    return ", ".join(name for name in METHODS if condition(method_class(name)))


def _check_batch_norm(method: Method, option: str, networks: "Iterable[str]") -> None:
    """Raise a UserError if a network has a batch norm that normalises by its batch, unless ``--micro-bn chunk``."""
    for name in networks if method.config.micro_bn == "refuse" else ():
        if (norm := training_batch_norm(method.get_submodule(name))) is not None:
            raise UserError(
                f"{option} would give the BatchNorm {f'{name}.{norm}'.strip('.')} the statistics of a part of the "
                "batch: give --micro-bn chunk to allow it, or networks without BatchNorm."
            )
