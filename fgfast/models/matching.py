"""Finding the tensors of a network in a checkpoint: under which prefix, and in which layout."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fgfast.errors import UserError
from fgfast.models.checkpoints import list_names
from fgfast.models.layouts import LAYOUTS, TIMM, Layout, Way, count_blocks, describe_names

# Words of prefixes: of several networks in a file an averaged one is taken first, and one of the others last
_AVERAGED = {"teacher", "ema"}
_LESS = {"student", "momentum", "target", "key", "k"}
_WRAPPERS = re.compile(r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")  # around a part of a network
# Parameters beside the modules without which the tokens of a network would be others
_TOKENS = re.compile(
    r"(abs(olute)?_)?pos(ition(al)?)?_emb\w*|(cls|class|dist|reg(ister)?|storage|global)_(tokens?|embeddings?)"
)
_RELATIVE = re.compile(r"rel(ative)?_pos")
_CLOSE = 0.25  # fraction of the names from which on an error says how the file differs from a layout
_COUNTS = ("num_batches_tracked", "total_ops", "total_params")  # the last two written by profilers into every module


@dataclass
class Match:
    """What a checkpoint has for a network in one layout, under one prefix.

    Args:
        layout: the layout.
        prefix: what all names in the file begin with.
        total: how many tensors the file has under the prefix.
        wanted: how many the network has.
        found: how many of them are in the file, right or not.
        tensors: those that are right, by the names of the network.
        sources: the names in the file of each tensor of the network, without the prefix.
        missing: names that the file should have.
        left: names of tensors in the file that the network would need, were it the same.
        shapes: by the network's names, the shapes in the file and in the network where they differ; several of the
            file are those that cannot be joined.
        unusable: names of tensors that are sparse, quantised or without values.
        resampled: which position embeddings were resampled, in words.
    """

    layout: Layout
    prefix: str
    total: int
    wanted: int
    found: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, tuple[str, ...]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[list[torch.Size], torch.Size]] = field(default_factory=dict)
    unusable: list[str] = field(default_factory=list)
    resampled: str = ""

    @property
    def fits(self) -> bool:
        """Whether the file has all tensors of the network under the prefix, and none of a larger one."""
        return not (self.missing or self.left or self.shapes or self.unusable)

    @property
    def rank(self) -> int:
        """0 for averaged networks, such as teachers; 2 for momentum copies and students; 1 for others."""
        words = set(re.split(r"[._]", self.prefix))
        return 0 if words & _AVERAGED else 2 if words & _LESS else 1


def flatten(checkpoint: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors in a dictionary of dictionaries, by their names joined with dots.

    Example:
        >>> [*flatten({"state_dict": {"a.weight": torch.zeros(1)}, "epoch": 3, 4: torch.zeros(1)})]
        ['state_dict.a.weight']
    """
    tensors: dict[str, Tensor] = {}
    for name, value in checkpoint.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[prefix + name] = value
        elif isinstance(name, str) and isinstance(value, Mapping):
            tensors |= flatten(value, f"{prefix}{name}.")
    return tensors


def find(net: nn.Module, checkpoint: Mapping[str, Any], source: str) -> Match:
    """The tensors of ``net`` in a checkpoint, in whichever layout and under whichever prefix they are.

    Of several networks in the checkpoint that fit, an averaged one (a teacher) goes before others, and those before
    momentum copies and students.

    Args:
        net: a timm network.
        checkpoint: the content of a file.
        source: the subject of errors, such as "The weights FILE".

    Raises:
        UserError: no layout has the tensors of the network, several have and differ, or they are not finite.
    """
    state = flatten(checkpoint)
    unwrapped = {_WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    state = unwrapped if len(unwrapped) == len(state) else state
    own, described = tensors_of(net), describe_names(net)
    matches = [
        match(net, own, state, layout, ways, prefix, resample=True)
        for layout in LAYOUTS
        if (ways := layout.ways(described)) is not None
        for prefix in _prefixes(ways, state)
    ]
    fitting = sorted((m for m in matches if m.fits), key=lambda m: m.rank)
    close = [m for m in matches if m.found >= _CLOSE * min(m.wanted, len(state))]
    first = fitting[0] if fitting else max(close, key=lambda m: (len(m.tensors), -m.rank), default=None)
    if first is None:
        nearest = max(matches, key=lambda m: m.found, default=None)
        shapes = f"; {_other_shapes(nearest)}" if nearest and nearest.shapes else ""
        raise UserError(
            f"{source} are in no layout that is known for {network_name(net)} (the file has {len(state)} tensors, such "
            f"as {list_names([*state])}{shapes}): give their {_network_options(net)}."
        )
    for other in fitting[1:]:
        if other.rank == first.rank and not _are_equal(first.tensors, other.tensors):
            raise UserError(
                f"{source} hold two networks that fit, {_where(first)} and {_where(other)}: give a file with the one "
                "to load."
            )
    check(net, first, source)
    _check_computation(net, first, source)
    return first


def match(
    net: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], layout: Layout,
    ways: Mapping[str, list[Way]], prefix: str = "", *, resample: bool = False,
) -> Match:  # fmt: skip
    """Compare the tensors of a network with those of a file in one layout, under one prefix.

    Args:
        net: the network.
        own: its tensors by name.
        state: tensors of the file by name.
        layout: the layout.
        ways: its ways to make each tensor of the network, see :meth:`Layout.ways`.
        prefix: the prefix.
        resample: whether position embeddings of another number of patches are resampled.
    """
    below = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    found = Match(layout, prefix, len(below), len(own))
    for name, tensor in own.items():
        way = next((way for way in ways[name] if all(n in below for n in way.names)), ways[name][0])
        found.sources[name] = way.names
        if missing := [n for n in way.names if n not in below]:
            found.missing += [n for n in missing if n not in found.missing and not n.endswith("num_batches_tracked")]
            continue
        found.found += 1
        given = [below[n] for n in way.names]
        if unusable := [n for n, value in zip(way.names, given, strict=True) if _is_unusable(value)]:
            found.unusable += unusable
            continue
        try:
            made = way.join(given, tensor)
        except (RuntimeError, IndexError):  # the shapes do not even go together
            found.shapes[name] = [value.shape for value in given], tensor.shape
            continue
        if resample and name == "pos_embed" and made.shape != tensor.shape:
            made = _resample(net, made, tensor, found)
        if made.shape == tensor.shape:
            found.tensors[name] = made
        else:
            found.shapes[name] = [made.shape], tensor.shape
    found.left = _left_over(net, below, found) if found.found else [*below]
    return found


def _is_unusable(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta


def _resample(net: nn.Module, given: Tensor, own: Tensor, found: Match) -> Tensor:
    """Position embeddings for the patches of a network, from those for another square of patches."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
    if given.ndim != 3 or own.ndim != 3 or given.shape[2] != own.shape[2] or grid is None:
        return given
    prefix = own.shape[1] - grid[0] * grid[1]
    side = math.isqrt(max(0, given.shape[1] - prefix))
    if prefix not in (0, getattr(net, "num_prefix_tokens", 0)) or side == 0 or side * side != given.shape[1] - prefix:
        return given
    found.resampled = f"from {side} x {side} to {grid[0]} x {grid[1]} patches"
    return resample_abs_pos_embed(given, list(grid), [side, side], num_prefix_tokens=prefix)


def _left_over(net: nn.Module, below: Mapping[str, Tensor], found: Match) -> list[str]:
    """Names of tensors that the network would need to be the same: in one of its modules, or for its tokens."""
    layout = found.layout
    config = getattr(net, "pretrained_cfg", {})
    heads = config.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((heads,) if isinstance(heads, str) else heads)) if layout is TIMM else ()
    known = {name for names in found.sources.values() for name in names}
    modules = {name.partition(".")[0] for name in known if "." in name}
    if layout is TIMM:
        known |= {name for name, _ in net.named_buffers()}  # some buffers are made, not loaded
    return [
        name for name, tensor in below.items()
        if name not in known and not name.startswith(heads) and name.rpartition(".")[2] not in _COUNTS
        and (name.partition(".")[0] in modules if "." in name else _TOKENS.fullmatch(name))
        and not (layout.ignored and re.fullmatch(layout.ignored, name)) and tensor.numel()
        and not (layout.if_zero and re.fullmatch(layout.if_zero, name) and not tensor.any())
    ]  # fmt: skip


def _prefixes(ways: Mapping[str, list[Way]], state: Mapping[str, Tensor]) -> list[str]:
    """The prefixes in a file under which most of the names that are looked for are."""
    wanted = {name for several in ways.values() for way in several for name in way.names}
    counts: Counter[str] = Counter()
    for name in state:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        counts.update(name[:start] for start in starts if name[start:] in wanted)
    most = max(counts.values(), default=0)
    return [prefix for prefix, count in counts.items() if count == most]


def _are_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(a is second[name] or torch.equal(a, second[name]) for name, a in first.items())


def _where(found: Match) -> str:
    place = f"the tensors under {found.prefix!r}" if found.prefix else "the tensors without a prefix"
    return place if found.layout is TIMM else f"{place} in the layout of {found.layout.name}"


def check(net: nn.Module, found: Match, source: str) -> None:
    """Raise a UserError, with ``source`` as its subject, if tensors are missing, left over, unusable or not finite."""
    if found.unusable:
        names = list_names(found.unusable)
        raise UserError(f"{source} are sparse, quantised or without values in {names}: give them as dense tensors.")
    if not found.fits:
        parts = [f"{list_names(found.missing)} missing"] if found.missing else []
        parts += [f"{list_names(found.left)} left over"] if found.left else []
        parts += [_other_shapes(found)] if found.shapes else []
        place = f"under {found.prefix!r} the file has" if found.prefix else "the file has"
        layout = "" if found.layout is TIMM else f" in the layout of {found.layout.name}"
        raise UserError(
            f"{source} are of another network ({place} {found.total} tensors{layout}, {found.found} of the "
            f"{found.wanted} of {network_name(net)}: {'; '.join(parts)}): {_remedy(net, found)}."
        )
    wrong = [own for own, tensor in found.tensors.items() if not tensor.float().isfinite().all()]
    infinite = [*dict.fromkeys(name for own in wrong for name in found.sources[own])]
    if infinite:
        raise UserError(
            f"{source} are not finite in {list_names(infinite)}: "
            "the training that wrote them has diverged, give an earlier checkpoint."
        )


def _other_shapes(found: Match) -> str:
    """How many tensors have another shape than those of the network, and the first of them."""
    name, (given, own) = next(iter(found.shapes.items()))
    names, shapes = " + ".join(map(repr, found.sources[name])), " + ".join(str([*shape]) for shape in given)
    return f"{len(found.shapes)} of another shape, such as {names} {shapes} instead of {list(own)}"


def _check_computation(net: nn.Module, found: Match, source: str) -> None:
    """Raise if the network has the tensors of the layout, but computes something else with them."""
    layout, name = found.layout, network_name(net)
    same = any(type(module).__name__ == "Conv2dSame" for module in net.modules())
    if layout.same_padding not in (None, same):
        other = f"tf_{name}" if layout.same_padding else name.removeprefix("tf_")
        how = "as TensorFlow does" if layout.same_padding else "by the same on all sides"
        raise UserError(
            f"{source} are of {layout.name}, whose convolutions pad {how}, which those of {name} do not: give --model "
            f"{other}."
        )
    eps = {module.eps for module in net.modules() if isinstance(module, nn.BatchNorm2d)}
    if layout.eps and eps != {layout.eps(count_blocks(net))}:
        raise UserError(
            f"{source} are of {layout.name}, whose norms have eps {layout.eps(count_blocks(net)):g} where {name} has "
            f"{', '.join(f'{value:g}' for value in sorted(eps))}: add bn_eps={layout.eps(count_blocks(net)):g} to "
            "--model-args."
        )


def network_name(net: nn.Module) -> str:
    """The name of a network in timm, or that of its class."""
    return str(getattr(net, "pretrained_cfg", {}).get("architecture") or type(net).__name__)


def _network_options(net: nn.Module) -> str:
    """The options that choose a network."""
    return getattr(net, "chosen_by", "--model and --model-args")


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network or a method by name, without its extra state."""
    return {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}


def _remedy(net: nn.Module, found: Match) -> str:
    if not found.missing and not found.left:
        patch = getattr(getattr(net, "patch_embed", None), "patch_size", None)
        given = found.shapes["pos_embed"][0][0] if [*found.shapes] == ["pos_embed"] else ()
        if len(given) == 3 and patch is not None:
            patches = given[1] - getattr(net, "num_prefix_tokens", 0) * (not getattr(net, "no_embed_class", False))
            side = math.isqrt(max(0, patches))
            if side * side == patches:
                return f"give --size {side * patch[0]}"
        if all(_RELATIVE.search(name) for name in found.shapes):
            return "give the --size that they were trained at, as tables of relative positions are not resampled"
    layout = found.layout
    of_library = "" if layout is TIMM else f" ({layout.name} is {layout.networks} in timm)"
    return f"give its {_network_options(net)}{of_library}"
