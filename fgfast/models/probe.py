"""A timm network for images of a size, and what it gives: found by building it and running it once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fgfast.errors import UserError


class SizeError(UserError):
    """A network does not take images of a size; ``reason`` is what it raised."""

    def __init__(self, name: str, size: tuple[int, int], error: Exception, remedy: str) -> None:
        self.reason = _reason(error)
        super().__init__(f"{name} does not take images of {size[0]} x {size[1]} pixels ({self.reason}): {remedy}.")


class FeatureLayout(NamedTuple):
    """The features of a network, as one forward pass showed them."""

    kind: Literal["map", "channels_last", "tokens", "none"]  # none: there is no single map
    dim: int  # width of the pooled features
    map_dim: int  # channels of the map; 0 if there is none
    prefix: int  # tokens before those of the patches, such as CLS and registers
    reduction: float  # side of an image, in sides of the map
    why: str = ""  # why there is no map


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def run_features(net: Any, x: Tensor) -> Any:
    """``net.forward_features(x)``, never the compiled one that a training loop may have put in its place."""
    return type(net).forward_features(net, x)


def build_network(name: str, size: int, args: dict[str, Any], pretrained: bool) -> tuple[Any, FeatureLayout]:
    """A timm network that takes images of ``size``, and its layout.

    Networks differ in how they learn the size: some take any, some are built for one, some are built for one and take
    others. The first way that builds a network which runs is taken, and ``created_with`` of the network holds its
    arguments for timm. The random state is that of a single construction.

    Raises:
        UserError: there is no such network, it refuses the arguments or the size, or its weights cannot be fetched.
    """
    import timm

    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
        hint = f"did you mean one of {close}?" if close else "timm.list_models() lists its models."
        raise UserError(f"timm has no model {name!r}: {hint}")
    declared = timm.get_pretrained_cfg(name, allow_unregistered=True)
    ways: list[dict[str, Any]] = [{"img_size": size}, {}]
    if not getattr(declared, "fixed_input_size", False):
        ways.reverse()
    start = torch.get_rng_state()
    refused: list[tuple[Exception, dict[str, Any]]] = []
    for way in [{"img_size": size, "dynamic_img_size": True}, *ways]:
        options = {"num_classes": 0, "pretrained": pretrained, **way, **args}
        torch.set_rng_state(start)
        net: Any = None
        try:
            net = timm.create_model(name, **options)
            check_multiple(name, net, size)
            net.created_with = {key: value for key, value in options.items() if key != "pretrained"}
            return net, read_layout(net, size)
        except (MemoryError, UserError):
            raise
        except Exception as error:  # of various types, as the arguments reach any code of timm
            if net is not None:
                refused.append((error, options))
            elif not refused and not _is_unknown(error, way.keys() - args.keys()):
                raise _refuse(name, options, error, args, pretrained) from error
    reason, options = refused[0]  # one: the way without arguments of ours was built, or raised
    if args:
        raise _refuse(name, options, reason, args, False) from reason
    made_for = (getattr(declared, "input_size", None) or (0,))[-1]
    such = f", such as {made_for}," if made_for not in (0, size) else ""
    raise SizeError(name, (size, size), reason, f"choose another --size{such} or another --model") from reason


def _is_unknown(error: Exception, names: set[str]) -> bool:
    """Whether a constructor does not know one of the arguments ``names``."""
    return isinstance(error, TypeError) and "unexpected keyword" in str(error) and any(n in str(error) for n in names)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).rstrip(".")


def _refuse(
    name: str, options: dict[str, Any], error: Exception, args: dict[str, Any], pretrained: bool
) -> UserError:  # fmt: skip
    if pretrained:
        also = " and --model-args" if args else ""
        return UserError(
            f"timm could not load weights of {name!r} ({_reason(error)}): check the network{also}, or give --init a "
            "file."
        )
    remedy = "correct --model-args, or choose another --size" if args else "choose another --model or --size"
    return UserError(f"timm could not build {name!r} with {options} ({_reason(error)}): {remedy}.")


def check_multiple(name: str, net: Any, size: int) -> None:
    """Raise a UserError for images whose side the patches of a network do not divide."""
    patch, embedding = patch_side(net), getattr(net, "patch_embed", None)
    if patch and size % patch and not getattr(embedding, "dynamic_img_pad", False):
        raise UserError(f"--size is {size}: {name} takes multiples of its patches of {patch} pixels.")


def patch_side(net: Any) -> int:
    """Side in pixels of the patches that become tokens, 0 for a network without a patch embedding of timm."""
    embedding: Any = getattr(net, "patch_embed", None)
    return int(embedding.feat_ratio()) if hasattr(embedding, "feat_ratio") else 0


def probe_image(net: Any, side: int) -> Tensor:
    """An image [1, 3, side, side] without two equal pixels, made without random numbers."""
    device = next(net.parameters()).device
    return torch.linspace(-1, 1, 3 * side * side, device=device).view(1, 3, side, side)


def read_layout(net: Any, size: int) -> FeatureLayout:
    """The layout of the features of a network, from one forward pass in evaluation mode.

    The image has the side ``size``, or of two patches for a transformer that takes any multiple of them.

    Raises:
        ValueError: the pooled features are no vector.
        Exception: whatever the network raises for an image that it does not take.
    """
    tokens_of_any_size = getattr(net, "dynamic_img_size", False) and hasattr(net, "num_prefix_tokens")
    side = 2 * patch_side(net) if tokens_of_any_size and patch_side(net) else size
    with evaluating(net):
        x = probe_image(net, side)
        features = run_features(net, x)
        pooled = net.forward_head(features, pre_logits=True)
        if pooled.dim() != 2:
            raise ValueError(f"it gives features of shape {list(pooled.shape)} instead of [1, {net.num_features}]")
        dim = pooled.shape[1]
        if not isinstance(features, Tensor):
            return FeatureLayout("none", dim, 0, 0, 1, "it gives several maps")
        if features.dim() == 4:
            last = _is_channels_last(net, features)
            width, reached = (features.shape[-1], features.shape[2]) if last else features.shape[1::2]
            return FeatureLayout("channels_last" if last else "map", dim, width, 0, side / reached)
        if features.dim() == 3:
            return _read_tokens(net, x, features, dim)
    return FeatureLayout("none", dim, 0, 0, 1, f"its features have the shape {list(features.shape)}")


def _is_channels_last(net: Any, features: Tensor) -> bool:
    stated = getattr(net, "output_fmt", None)
    if stated is not None:
        return str(stated) == "NHWC"
    return features.shape[1] != net.num_features and features.shape[-1] == net.num_features


def _read_tokens(net: Any, x: Tensor, features: Tensor, dim: int) -> FeatureLayout:
    """The layout of tokens [1, T, D]: those after the prefix must be the cells of the final feature map, row by row."""
    none = FeatureLayout("none", dim, 0, 0, 1)
    if not hasattr(net, "forward_intermediates"):
        return none._replace(why="timm does not give its maps")
    last = net.forward_intermediates(x, indices=1, intermediates_only=True)[-1]
    height, width = last.shape[-2:]
    prefix = features.shape[1] - height * width
    if prefix < 0 or prefix != getattr(net, "num_prefix_tokens", prefix) or last.shape[1] != features.shape[2]:
        return none._replace(why=f"its tokens {list(features.shape)} are not a map of {height} x {width} cells")
    cells = last.flatten(2).transpose(1, 2)
    norm = getattr(net, "norm", None)
    candidates = [cells] if norm is None else [cells, norm(cells)]
    if not features.is_meta and not any(
        torch.allclose(features[:, prefix:], found, rtol=1e-3, atol=1e-4) for found in candidates
    ):
        return none._replace(why="its tokens are not in the order of its map")
    return FeatureLayout("tokens", dim, features.shape[2], prefix, x.shape[-1] / width)
