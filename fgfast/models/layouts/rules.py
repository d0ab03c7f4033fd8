"""What a table of names is made of."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Join = Callable[[list[Tensor], Tensor], Tensor]
"""Makes a tensor of the network from those in the file; the second argument is the network's own, for its shape."""


def single(tensors: list[Tensor], own: Tensor) -> Tensor:
    """The only tensor, as it is."""
    return tensors[0]


def reshaped(tensors: list[Tensor], own: Tensor) -> Tensor:
    """The only tensor, such as the weight of a linear layer for a 1 x 1 convolution, in the shape of the network's."""
    return tensors[0].reshape(own.shape) if tensors[0].numel() == own.numel() else tensors[0]


def concatenated(tensors: list[Tensor], own: Tensor) -> Tensor:
    """The rows of all, such as those for queries, keys and values."""
    return torch.cat(tensors)


def first_third(tensors: list[Tensor], own: Tensor) -> Tensor:
    """The rows for queries of queries, keys and values."""
    return tensors[0].chunk(3)[0]


def last_third(tensors: list[Tensor], own: Tensor) -> Tensor:
    """The rows for values of queries, keys and values."""
    return tensors[0].chunk(3)[-1]


def with_position(tensors: list[Tensor], own: Tensor) -> Tensor:
    """A class token plus its position embedding, the first of all."""
    return tensors[0] + tensors[1][:, :1]


def without_class(tensors: list[Tensor], own: Tensor) -> Tensor:
    """Position embeddings without that of the class token, the first of all."""
    return tensors[0][:, 1:]


class Rule(NamedTuple):
    """The names in a file from which a tensor of the network is made.

    Args:
        own: name in the network, as :func:`describe_names` writes it; "#" stands for a number and "*" for any text.
        file: names in the file; <1> is what the first "#" or "*" stands for, <1-1> and <1*2+1> are numbers computed
            from it.
        join: how the network's tensor is made from those in the file.

    Example:
        >>> Rule("layer#.#.conv#.weight", ("stages.<1-1>.<2>.<3*2>.weight",)).sources("layer2.0.conv3.weight")
        ('stages.1.0.6.weight',)
    """

    own: str
    file: tuple[str, ...]
    join: Join = single

    def sources(self, name: str) -> tuple[str, ...]:
        """The names in the file for a tensor of the network; none if the rule is not about it."""
        match = _pattern(self.own).fullmatch(name)
        return tuple(_GROUP.sub(lambda group: _fill(group, match), text) for text in self.file) if match else ()


class Way(NamedTuple):
    """Names in a file, and how a tensor of the network is made from theirs."""

    names: tuple[str, ...]
    join: Join


_GROUP = re.compile(r"<(\d)(?:\*(\d))?([+-]\d+)?>")


@cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\#", r"(\d+)").replace(r"\*", r"(.+)"))


def _fill(group: re.Match[str], match: re.Match[str]) -> str:
    value, times, plus = match[int(group[1])], group[2], group[3]
    return str(int(value) * int(times or 1) + int(plus or 0)) if times or plus else value


def rules(table: Mapping[str, str | tuple[str, ...]], join: Join = single) -> tuple[Rule, ...]:
    """Rules that share a join, from a dictionary of names in the network and in the file."""
    return tuple(Rule(own, (file,) if isinstance(file, str) else file, join) for own, file in table.items())


@dataclass(frozen=True)
class Layout:
    """Where a library keeps the tensors of a network.

    Args:
        name: for messages.
        networks: names of the timm networks with the same computation.
        rules: where each tensor is; if several are about one, the first whose names are in the file is taken.
        ignored: pattern of names in the file on which no feature depends.
        if_zero: pattern of names that may be left out if all of their values are 0.
        same_padding: whether convolutions pad as in TensorFlow; None if all networks with these tensors do the same.
        eps: epsilon of BatchNorm, from the number of blocks; None as above.
    """

    name: str
    networks: str
    rules: tuple[Rule, ...]
    ignored: str = ""
    if_zero: str = ""
    same_padding: bool | None = None
    eps: Callable[[int], float] | None = None

    def ways(self, described: Mapping[str, str]) -> dict[str, list[Way]] | None:
        """How each tensor of a network can be made; None if the layout is of other networks.

        Args:
            described: what :func:`describe_names` gives for the network.
        """
        found: dict[str, list[Way]] = {}
        for name, text in described.items():
            known_as = name if self is TIMM else text
            found[name] = [Way(names, rule.join) for rule in self.rules if (names := rule.sources(known_as))]
            if not found[name]:
                return None
        return found


TIMM = Layout("timm", "all", rules({"*": "<1>"}))
"""timm's own names. Those of ResNet, ResNeXt, Wide ResNet and DenseNet in torchvision and of the networks of MoCo,
DINO, MAE, DetCon's port, solo-learn, VISSL and lightly are the same, under some prefix."""


def describe_names(net: nn.Module) -> dict[str, str]:
    """The names by which rules know the tensors of a network.

    They are the network's own, but for two kinds of network: stages of blocks in "blocks" are named
    blocks/STAGE/BLOCK/BLOCK COUNTED OVER ALL STAGES/TYPE/ and the layers after them NAME/STAGES/BLOCKS/, as libraries
    count and name them in other ways; and a ViT that adds no position to its class token has "cls_token/positioned" and
    "pos_embed/patches".

    Example:
        >>> import timm
        >>> describe_names(timm.create_model("test_efficientnet"))["blocks.1.0.conv_exp.weight"]
        'blocks/1/0/1/EdgeResidual/conv_exp.weight'
    """
    stages: Any = getattr(net, "blocks", None)
    places: dict[str, str] = {}
    if isinstance(stages, nn.Sequential) and all(isinstance(stage, nn.Sequential) for stage in stages):
        blocks = [(s, b, block) for s, stage in enumerate(stages) for b, block in enumerate(stage.children())]
        for count, (s, b, block) in enumerate(blocks):
            squeeze = "" if isinstance(getattr(block, "se", nn.Identity()), nn.Identity) else "+se"
            places[f"blocks.{s}.{b}."] = f"blocks/{s}/{b}/{count}/{type(block).__name__}{squeeze}/"
        places |= {f"{name}.": f"{name}/{len(stages)}/{len(blocks)}/" for name in ("conv_head", "bn2")}
    if getattr(net, "no_embed_class", False):
        places |= {"cls_token": "cls_token/positioned", "pos_embed": "pos_embed/patches"}
    start = re.compile(f"^(?:{'|'.join(map(re.escape, places)) or '(?!)'})")
    return {name: start.sub(lambda match: places[match[0]], name) for name in net.state_dict()}


def count_blocks(net: nn.Module) -> int:
    """The number of blocks of a network with stages of blocks."""
    return sum(len(stage) for stage in getattr(net, "blocks", ()))
