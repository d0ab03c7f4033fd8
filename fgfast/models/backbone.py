"""Any timm network as an encoder with access to its feature maps, its pyramid and, for ViTs, keys and attention."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fgfast.data.normalise import IMAGENET, InputStats
from fgfast.errors import UserError
from fgfast.formats import shorten
from fgfast.models.attention import keeping, missing_attention, missing_dropping, recording
from fgfast.models.probe import FeatureLayout, SizeError, build_network, evaluating, probe_image, run_features


class Keys(NamedTuple):
    """Keys of the last attention block and the attention of CLS, both on the patch grid."""

    keys: Tensor  # [B, heads * d, h, w], as they meet the queries: normalised and rotated where the block does so
    attention: Tensor  # [B, heads, h, w], from a softmax over all tokens


LONGEST = 10_000  # characters of --model-args: Python's own parser may crash on longer nested texts


def parse_model_args(text: str) -> dict[str, Any]:
    """Keyword arguments for timm from "name=value,name=value" with Python literals as values.

    Raises:
        UserError: the text does not have this format.

    Example:
        >>> parse_model_args("channels=(16, 32, 64, 128), output_stride=16")
        {'channels': (16, 32, 64, 128), 'output_stride': 16}
    """
    try:
        if len(text) > LONGEST:
            raise ValueError("too long")
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not one list of named values")
        names = [k.arg for k in call.keywords]
        if None in names or len(set(names)) < len(names):
            raise ValueError("a dictionary of values, or a name given twice")
        return {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # the last two from deep nesting
        raise UserError(
            f"--model-args {shorten(repr(text))} is not of the form name=value,name=value: write literals."
        ) from None


def is_vit(name: str) -> bool:
    """Whether a timm network is a ViT (:attr:`Backbone.is_vit`), in most cases found without making its weights.

    Example:
        >>> is_vit("test_vit"), is_vit("test_resnet")
        (True, False)
    """
    import timm

    made_for: Any = timm.get_pretrained_cfg(name, allow_unregistered=True)
    size = made_for.input_size[-1]
    try:
        with torch.device("meta"):
            return Backbone(name, size=size).is_vit
    except UserError:  # a few networks compute with values, which the tensors of this device do not have
        return Backbone(name, size=size).is_vit


class Backbone(nn.Module):
    """A timm network without its classifier.

    What the network gives is found by running it once: the width of its features, whether they are a map or tokens, and
    for which sizes it has to be built. What it cannot give (a map, keys, attention, tokens to leave out) is refused
    when it is asked for.

    Args:
        name: a timm model name, such as "resnet18" or "vit_small_patch16_224".
        size: side of the images in training, in pixels; networks that have to be are built for it.
        args: further arguments of timm.create_model, such as {"output_stride": 16}.
        pretrained: load timm's weights (needs an internet connection).
        grey: convert the input images to their lightness.
        stats: how images are resized and normalised for the network; by default as its pretrained weights were trained,
            or with ImageNet's statistics.

    Attributes:
        stats: these statistics.
        dim: width of the pooled features.
        is_vit: whether the features are the tokens of a transformer with one grid; otherwise they are a map.
        patch: side of the patches of a ViT in pixels, otherwise 1.

    Raises:
        UserError: timm has no such model, refuses the arguments or the size, or cannot fetch the weights.

    Example:
        >>> encoder = Backbone("test_resnet", size=64)
        >>> encoder(torch.zeros(2, 3, 64, 64)).shape == (2, encoder.dim)
        True
    """

    net: Any  # timm's networks share no type
    layout: FeatureLayout

    def __init__(
        self, name: str, *, size: int = 64, args: dict[str, Any] | None = None, pretrained: bool = False,
        grey: bool = False, stats: InputStats | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        from fgfast.models.input_stats import stats_of_timm

        self._adopt(name, *build_network(name, size, args or {}, pretrained), size)
        known = stats_of_timm(name) if pretrained and stats is None else None
        self.grey, self.stats = grey, (stats or (known[0] if known else IMAGENET)).check()

    def _adopt(self, name: str, net: nn.Module, layout: FeatureLayout, size: int) -> None:
        """Take a network with its layout, which is known for images of ``size``."""
        self.name, self.net, self.layout = name, net, layout
        self.dim: int = layout.dim  # of the pooled features: some networks widen them after the map
        embedding = getattr(net, "patch_embed", None)
        one_grid = hasattr(net, "num_prefix_tokens") and hasattr(embedding, "dynamic_feat_size")
        self.is_vit: bool = layout.kind == "tokens" and (layout.prefix > 0 or one_grid)
        self.patch: int = round(layout.reduction) if self.is_vit else 1  # side in pixels
        self._dynamic: bool = self.is_vit and getattr(net, "dynamic_img_size", False)
        self._probe_side = 2 * self.patch if self._dynamic else size
        self._sizes = {(size, size)}  # of images that the network is known to take
        self._missing: dict[str, str] = {}  # why the network has no attention, or cannot drop tokens

    @property
    def map_dim(self) -> int:
        """Channels of the feature map.

        Raises:
            UserError: the network has no single feature map.
        """
        if self.layout.kind == "none":
            raise UserError(f"{self.name} has no feature map ({self.layout.why}): choose another --model.")
        return self.layout.map_dim

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of stages or blocks in memory, and compute the rest again in the backward pass.

        Raises:
            UserError: timm cannot do this for the network.
        """
        try:
            self.net.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as error:
            raise UserError(
                f"timm cannot checkpoint {self.name}: leave out --grad-checkpoint, or choose another --model."
            ) from error

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features [B, D] of images [B, 3, S, S]."""
        return self.pool(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Unpooled features: the final map [B, D, h, w], or the normalised tokens [B, T, D] of a ViT.

        Raises:
            UserError: the network does not take images of this size.
        """
        self._check_size(x)
        features = self.net.forward_features(self._prepare(x))
        if self.layout.kind == "channels_last":
            return features.permute(0, 3, 1, 2)
        if self.layout.kind == "tokens" and not self.is_vit:
            return features.transpose(1, 2).unflatten(2, self._grid(_size_of(x), features.shape[1]))
        return features

    def check_side(self, side: int, option: str) -> None:
        """Raise a UserError that names ``option`` if the network, built for one size, does not take images of ``side``.

        Networks that are not built for a size take any that is not too small.
        """
        if "img_size" not in getattr(self.net, "created_with", {}) or (self._dynamic and side % self.patch == 0):
            return
        try:
            self._check_size(probe_image(self.net, side))
        except SizeError as error:
            raise UserError(
                f"{option} is {side} pixels, which {self.name} does not take ({error.reason}): give it the size of "
                "training, or choose another --model."
            ) from error

    def _check_size(self, x: Tensor) -> None:
        """Try images of a size that the network has not seen: what it raises names neither the size nor a remedy."""
        size = _size_of(x)
        if size in self._sizes:
            return
        try:
            with evaluating(self.net):
                run_features(self.net, x.new_zeros(1, *x.shape[1:]))
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, ValueError, IndexError) as error:
            other = f"give multiples of its patches of {self.patch} pixels" if self._dynamic else "give another size"
            raise SizeError(self.name, size, error, f"{other}, or choose another --model") from error
        self._sizes.add(size)

    def _prepare(self, x: Tensor) -> Tensor:
        """The images as the network takes them."""
        if not self.grey:
            return x
        from fgfast.data.lab import to_grey

        return to_grey(x, self.stats)

    def _grid(self, size: tuple[int, int], cells: int) -> tuple[int, int]:
        """Rows and columns of the map of images of ``size``, which has ``cells`` cells."""
        embedding: Any = self.patch_embedding
        if embedding is not None:
            return embedding.dynamic_feat_size(size)
        height, width = (max(1, round(n / self.layout.reduction)) for n in size)
        if height * width != cells:
            raise UserError(
                f"{self.name} has {cells} cells for images of {size[0]} x {size[1]} pixels, no map of {height} x "
                f"{width}: give square images of the size of training."
            )
        return height, width

    def pool(self, features: Tensor) -> Tensor:
        """Pooled features [B, D] from :meth:`features`: the mean of a map, or CLS of a ViT with a CLS token."""
        if self.layout.kind == "channels_last":
            features = features.permute(0, 2, 3, 1)
        elif self.layout.kind == "tokens" and not self.is_vit:
            features = features.flatten(2).transpose(1, 2)
        return self.net.forward_head(features, pre_logits=True)

    def to_map(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """The map [B, D, h, w] from :meth:`features` of images of ``size``; prefix tokens are dropped.

        Raises:
            UserError: the network has no single feature map.
        """
        if not self.is_vit:
            assert self.map_dim  # raises without a map
            return features
        patches = features[:, self.layout.prefix :]
        return patches.transpose(1, 2).unflatten(2, self._grid(size, patches.shape[1]))

    def map_side(self, side: int) -> int:
        """Side of the feature map of images of ``side`` x ``side`` pixels.

        Raises:
            UserError: the network has no single feature map, or does not take images of this size.
        """
        with evaluating(self):
            return self.to_map(self.features(probe_image(self.net, side)), (side, side)).shape[-1]

    def pyramid(self, x: Tensor, levels: int = 4) -> list[Tensor]:
        """Maps [B, D_l, h_l, w_l] of the last ``levels`` stages (blocks of a ViT), deepest first.

        Raises:
            UserError: timm does not give the maps of this network, or it does not take images of this size.
        """
        if not hasattr(self.net, "forward_intermediates"):
            raise UserError(f"timm does not give the feature maps of {self.name}: choose another --model.")
        self._check_size(x)
        maps = self.net.forward_intermediates(self._prepare(x), intermediates_only=True, norm=self.is_vit)
        return maps[-levels:][::-1]

    def check_attention(self) -> None:
        """Raise a UserError if :meth:`keys` and, for a ViT, :meth:`attend` cannot work: it says what is missing."""
        if "attention" not in self._missing:
            self._missing["attention"] = missing_attention(self.net, self.layout, self._probe_side)
        if reason := self._missing["attention"]:
            raise UserError(
                f"{self.name} has no keys and CLS attention ({reason}): choose a plain ViT such as "
                "vit_small_patch16_224."
            )

    def check_dropping(self) -> None:
        """Raise a UserError if :meth:`kept_features` cannot work: it says why."""
        if "dropping" not in self._missing:
            layout = self.layout if self.is_vit else self.layout._replace(kind="none")
            self._missing["dropping"] = missing_dropping(self.net, layout, self._probe_side)
        if reason := self._missing["dropping"]:
            raise UserError(f"{self.name} cannot leave out patches ({reason}): leave out --drop-tokens.")

    @property
    def patch_embedding(self) -> nn.Module | None:
        """The patch embedding of a ViT, or None: other networks have none, or one that is part of their blocks."""
        embedding: nn.Module | None = getattr(self.net, "patch_embed", None)
        return embedding if self.is_vit and hasattr(embedding, "dynamic_feat_size") else None

    @property
    def key_stride(self) -> int:
        """Stride in pixels of the finest grid of :meth:`keys`: half a patch, or a patch if patches cannot overlap."""
        return max(1, self.patch // 2) if self._overlaps() else self.patch

    def _overlaps(self) -> bool:
        """Whether the patch embedding is a convolution of which the stride may be changed."""
        embedding: Any = self.patch_embedding
        side = getattr(embedding, "patch_size", (0,))[0]  # of a hybrid: in cells of its CNN
        return self._dynamic and hasattr(embedding, "proj") and side == self.patch

    def keys(self, x: Tensor, *, stride: int | None = None) -> Keys:
        """Keys and CLS attention of the last block of a ViT.

        Args:
            x: images [B, 3, H, W].
            stride: stride of the patch embedding in pixels; None keeps the patch size. Half the patch size gives
                overlapping patches and a grid of about twice the side.

        Raises:
            UserError: the network is not a plain ViT with a CLS token, or its patches cannot overlap.
        """
        self.check_attention()
        self._check_size(x)
        if stride is None or stride == self.patch:
            with recording(self.net) as record:
                tokens = run_features(self.net, self._prepare(x)).shape[1]
            grid = self._grid(_size_of(x), tokens - self.layout.prefix)
        elif not self._overlaps():
            raise UserError(f"Patches of {self.name} cannot overlap: give no stride, or choose another --model.")
        else:
            with recording(self.net) as record, _patch_stride(self.net.patch_embed, stride):
                run_features(self.net, self._prepare(x))
            height, width = ((n - self.patch) // stride + 1 for n in x.shape[-2:])
            grid = (height, width)
        assert record.keys is not None  # checked above
        k, attention = record.keys.transpose(1, 2), record.attention[-1]
        skip = self.layout.prefix
        return Keys(
            k[:, skip:].flatten(2).transpose(1, 2).unflatten(2, grid), attention[:, :, skip:].unflatten(2, grid)
        )

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unpooled features and an attention map [L, B, heads, P] over the P patches in row-major order.

        For a ViT it is the attention of CLS in every block: only that row of each T x T matrix is computed, from the
        queries and keys of the forward pass. For a CNN it has one layer and one head: the norm of the final feature
        map, normalised to a sum of 1.

        Raises:
            UserError: the network is a ViT, but not a plain one with a CLS token, or has no feature map.
        """
        if not self.is_vit:
            features = self.features(x)
            norm = self.to_map(features, _size_of(x)).detach().float().norm(dim=1).flatten(1)  # [B, h w]
            return features, (norm / norm.sum(1, keepdim=True).clamp(min=1e-12))[None, :, None]
        self.check_attention()
        self._check_size(x)
        with recording(self.net) as record:
            features = run_features(self.net, self._prepare(x))
        return features, torch.stack(record.attention)[..., self.layout.prefix :]

    def kept_features(self, x: Tensor, index: Tensor) -> Tensor:
        """Normalised tokens [B, prefix + k, D] of a ViT that processes only the patches ``index`` [B, k].

        Raises:
            UserError: the network is not a ViT, or its blocks take all patches.
        """
        self.check_dropping()
        self._check_size(x)
        with keeping(self.net, self.layout.prefix, index):
            return run_features(self.net, self._prepare(x))


def _size_of(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]


@contextmanager
def _patch_stride(patch_embed: Any, stride: int) -> Iterator[None]:
    before = patch_embed.proj.stride
    patch_embed.proj.stride = (stride, stride)
    try:
        yield
    finally:
        patch_embed.proj.stride = before
