"""Stages of an encoder: which of them learn, and which are held."""

import re
from typing import Any

from torch import nn

from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.models.frozen import hold


def stages_of(net: Any) -> list[list[str]]:
    """Names of the parameters of the stem and of each stage after it, as timm groups them.

    A stage is, for example, layer1, stages.0 or one block of a ViT; a final norm belongs to the last stage.

    Raises:
        UserError: timm defines no stages for this network.
    """
    from timm.models import group_parameters

    if not hasattr(net, "group_matcher"):
        raise UserError(f"timm defines no stages for {type(net).__name__}: give --stages all.")
    matcher = net.group_matcher(coarse=True)
    groups = list(group_parameters(net, matcher).values())
    patterns = [
        p for spec in matcher.values() for p in ([spec] if isinstance(spec, str) else [s[0] for s in spec or ()])
    ]
    if len(groups) > 1 and not any(re.match(pattern, groups[-1][0]) for pattern in patterns):
        groups[-2:] = [groups[-2] + groups[-1]]  # timm groups the parameters that no pattern matches last
    return groups


def last_stages(encoder: Backbone, stages: str) -> set[str]:
    """Names of the parameters of the last stages.

    Raises:
        UserError: ``stages`` is neither "all" nor a number of stages that the network has.
    """
    if stages == "all":
        return {name for name, _ in encoder.net.named_parameters()}
    groups = stages_of(encoder.net)
    if not stages.isdecimal() or int(stages) >= len(groups):
        raise UserError(
            f"--stages is {stages}: {encoder.name} has {len(groups) - 1} stages, give at most that many, or all."
        )
    return {name for group in groups[len(groups) - int(stages) :] for name in group}


def unfreeze(encoder: Backbone, stages: str) -> list[nn.Parameter]:
    """Make the last stages trainable and freeze everything before them, including BatchNorm statistics.

    Returns:
        The trainable parameters.

    Raises:
        UserError: ``stages`` is neither "all" nor a number of stages that the network has.
    """
    net: nn.Module = encoder.net
    names = _let_learn(encoder, stages)
    encoder.eval()
    trained: dict[str, bool] = {}
    for name, module in net.named_modules():  # a module comes before its submodules
        inside = _parameters(name, module)
        trained[name] = names.issuperset(inside) if inside else trained[name.rpartition(".")[0]]
        module.training = trained[name]
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def hold_stages(encoder: Backbone, stages: str) -> None:
    """Let the last stages alone learn; those before them stay as they are, in evaluation mode, in training too.

    Raises:
        UserError: ``stages`` is neither "all" nor a number of stages that the network has.
    """
    net: nn.Module = encoder.net
    names = _let_learn(encoder, stages)
    for name, module in net.named_modules():
        inside = _parameters(name, module)
        if inside and names.isdisjoint(inside):
            hold(module)


def _let_learn(encoder: Backbone, stages: str) -> set[str]:
    """Let the parameters of the last stages alone have gradients, and return their names."""
    names = last_stages(encoder, stages)
    for name, parameter in encoder.net.named_parameters():
        parameter.requires_grad_(name in names)
    return names


def _parameters(name: str, module: nn.Module) -> list[str]:
    """Names of the parameters of a module in the network that has it by ``name``."""
    return [f"{name}.{inner}" if name else inner for inner, _ in module.named_parameters()]
