"""Weights, gradients and optimiser states divided among the ranks: ``--shard fsdp``, PyTorch's FSDP2."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fgfast.methods.base import Method
from fgfast.models.backbone import Backbone
from fgfast.ranks import Ranks


class Sharded(nn.Module):
    """A method whose parameters are divided among the ranks; they are whole in what is called through it.

    Blocks of the encoders are gathered one after the other, everything else at once. Names of parameters and buffers of
    the method stay as they are. An optimiser works on the shards themselves, as plain tensors (:meth:`local`).

    Args:
        method: the method, on its device and equal on all ranks.
        ranks: the ranks.
        mesh: the same ranks; None makes one.
    """

    def __init__(self, method: Method, ranks: Ranks, mesh: DeviceMesh | None = None) -> None:
        super().__init__()
        self.method = method
        mesh = mesh or init_device_mesh(ranks.device.type, (ranks.world,))
        for p in method.parameters():
            p.data = p.data.contiguous()  # FSDP2 takes no other layout, such as channels_last
        for backbone in [m for m in method.modules() if isinstance(m, Backbone)]:
            for block in blocks_of(backbone.net):
                fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)
        self.units = [m for m in self.modules() if isinstance(m, FSDPModule)]
        self.shards: dict[nn.Parameter, nn.Parameter] = {}
        self(lambda: None)  # makes this the root, whatever runs first
        self.units[0].reshard()

    def forward(self, call: Callable[..., Any], *given: Any) -> Any:
        """Call a function while this rank has the parameters that it needs."""
        return call(*given)

    def set_requires_gradient_sync(self, last: bool) -> None:
        """Divide gradients among the ranks in the last backward pass of a step; those before are kept whole."""
        self.units[0].set_requires_gradient_sync(last)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every rank has all parameters and needs no other rank to use them, for scores and the discovery of parts."""
        for unit in self.units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in self.units:
                unit.reshard()
                unit.set_reshard_after_forward(unit is not self.units[0], recurse=False)

    def local(self, parameter: nn.Parameter) -> nn.Parameter:
        """The shard of a parameter on this rank, for an optimiser; they share memory."""
        if parameter not in self.shards:
            self.shards[parameter] = nn.Parameter(_local(parameter.detach()))
        return self.shards[parameter]

    def hand_over(self, norm: Tensor) -> Tensor:
        """Give the shards the gradients of their parameters, and return their norm as a plain tensor."""
        for parameter, shard in self.shards.items():
            shard.grad = None if parameter.grad is None else _local(parameter.grad)
            parameter.grad = None
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole states of the method and of an optimiser of its shards; all ranks must ask for them together."""
        method = {
            name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in self.method.state_dict().items()
        }
        state = optimizer.state_dict()
        return {"method": method, "optimizer": state | {"state": self._convert(state["state"], optimizer, _gather)}}

    def load(self, checkpoint: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Load whole states."""
        own, state = self.method.state_dict(), checkpoint["optimizer"]
        self.method.load_state_dict({name: _divide(x, own.get(name)) for name, x in checkpoint["method"].items()})
        optimizer.load_state_dict(
            state | {"state": self._convert(state["state"], optimizer, lambda x, like: _local(_divide(x, like)))}
        )

    def _convert(
        self, state: dict[int, Any], optimizer: torch.optim.Optimizer, convert: Callable[[Any, Tensor], Any]
    ) -> dict[int, Any]:
        """The state of an optimiser by the number of the parameter, converted beside its parameter."""
        of_shard = {id(shard): parameter for parameter, shard in self.shards.items()}
        params = [of_shard[id(p)] for group in optimizer.param_groups for p in group["params"]]
        return {i: {name: convert(x, params[i]) for name, x in values.items()} for i, values in state.items()}


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The blocks of a network: the items of its sequences of modules, such as stages."""
    sequences = (m for m in net.children() if isinstance(m, nn.Sequential | nn.ModuleList))
    return [block for sequence in sequences for block in sequence.children() if any(True for _ in block.parameters())]


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def _gather(x: Any, like: Tensor) -> Any:
    """The whole of a shard that belongs to a parameter; anything else, such as a count of steps, as it is."""
    if not isinstance(x, Tensor) or not isinstance(like, DTensor) or x.dim() == 0:
        return x
    whole = DTensor.from_local(x, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return whole.full_tensor()


def _divide(x: Any, like: Any) -> Any:
    """A whole tensor divided as its counterpart is; anything else as it is."""
    if not isinstance(x, Tensor) or not isinstance(like, DTensor) or x.dim() == 0:
        return x
    return distribute_tensor(x.to(like.device).contiguous(), like.device_mesh, like.placements, src_data_rank=None)
