"""Groups of parameters with their own learning rates: layers of the encoder, and what stands on it."""

from typing import Any

import torch
from torch import nn

from fgfast.config import TrainConfig
from fgfast.errors import UserError
from fgfast.methods.refining import refinement


def parameter_groups(method: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups of the trainable parameters for an optimiser; vectors and scalars get no weight decay.

    Two groups, as in every checkpoint of earlier versions; with ``encoder_rate``, ``layer_decay`` or ``head_warmup``
    two for each layer of ``method.encoder`` and two for the rest. Beside the entries of an optimiser a group then has
    "matrices" (whether it has weight decay), "encoder" (whether it is of the encoder) and "scale", by which its
    learning rate is multiplied: encoder_rate x layer_decay^(L - l) for layer l of 0, ..., L, and 1 for the rest.

    Raises:
        UserError: the layers of the encoder are not known.
    """
    params, how = [p for p in method.parameters() if p.requires_grad], refinement(config)
    if how.encoder_rate == config.layer_decay == 1 and not how.head_warmup:
        return _by_decay(params, config)
    net = method.get_submodule("encoder.net")
    layers = _layers(net, config) if config.layer_decay < 1 else {}
    of_encoder = {id(p): layers.get(name, 0) for name, p in net.named_parameters()}
    last = max(of_encoder.values())
    groups = []
    for layer in sorted(set(of_encoder.values())):
        own = [p for p in params if of_encoder.get(id(p)) == layer]
        scale = how.encoder_rate * config.layer_decay ** (last - layer)
        groups += [{**group, "scale": scale, "encoder": True} for group in _by_decay(own, config, marked=True)]
    rest = [p for p in params if id(p) not in of_encoder]
    groups += [{**group, "scale": 1.0, "encoder": False} for group in _by_decay(rest, config, marked=True)]
    return [group for group in groups if group["params"]]


def _by_decay(params: list[Any], config: TrainConfig, *, marked: bool = False) -> list[dict[str, Any]]:
    """Matrices, with weight decay, and vectors and scalars, without."""
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [{**group, "matrices": i == 0} for i, group in enumerate(groups)] if marked else groups


def _layers(net: Any, config: TrainConfig) -> dict[str, int]:
    """The layer of each parameter of a timm network by its name, counted from the input."""
    from timm.models import group_parameters

    if not hasattr(net, "group_matcher"):
        raise UserError(f"timm names no layers of {config.model}: leave out --layer-decay, or choose another --model.")
    return dict(group_parameters(net, net.group_matcher(coarse=False), reverse=True))


def set_rates(optimizer: torch.optim.Optimizer, config: TrainConfig, step: int, total: int) -> float:
    """Set the learning rate and the weight decay of every group for a step, counted from 0.

    The encoder is held for ``head_warmup`` of the steps, with a rate of 0; then its schedule begins.

    Returns:
        The learning rate of what stands on the encoder.
    """
    lr, decay = config.learning_rate(step, total), config.weight_decay_at(step, total)
    held = round(refinement(config).head_warmup * total)
    of_encoder = 0.0 if step < held else config.learning_rate(step - held, total - held)
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = (of_encoder if group.get("encoder") else lr) * group.get("scale", 1.0)
        if group.get("matrices", i == 0):
            group["weight_decay"] = decay
    return lr
