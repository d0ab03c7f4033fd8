"""Any timm network as an encoder with access to its feature maps, its pyramid and, for ViTs, keys and attention."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fgfast.errors import UserError
from fgfast.formats import shorten


class Keys(NamedTuple):
    """Keys of the last attention block and the attention of CLS, both on the patch grid."""

    keys: Tensor  # [B, D, h, w]
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


class Backbone(nn.Module):
    """A timm network without its classifier.

    Args:
        name: a timm model name, such as "resnet18" or "vit_small_patch16_224".
        size: side of the images in training, in pixels; ViTs are built for it and also accept other sizes.
        args: further arguments of timm.create_model, such as {"output_stride": 16}.
        pretrained: load timm's weights (needs an internet connection).
        grey: convert the input images to their lightness.

    Raises:
        UserError: timm has no such model, refuses the arguments, or cannot fetch the weights.

    Example:
        >>> encoder = Backbone("test_resnet", size=64)
        >>> encoder(torch.zeros(2, 3, 64, 64)).shape == (2, encoder.dim)
        True
    """

    net: Any  # timm's networks share no type

    def __init__(
        self, name: str, *, size: int = 64, args: dict[str, Any] | None = None, pretrained: bool = False,
        grey: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        import timm

        if not timm.is_model(name):
            close = ", ".join(timm.list_models(f"*{name[:6]}*")[:5])
            hint = f"did you mean one of {close}?" if close else "timm.list_models() lists its models."
            raise UserError(f"timm has no model {name!r}: {hint}")
        options: dict[str, Any] = {"num_classes": 0, "pretrained": pretrained, **(args or {})}
        if name.startswith(("vit_", "deit", "test_vit")):
            options = {"img_size": size, "dynamic_img_size": True, **options}
        elif getattr(timm.get_pretrained_cfg(name, allow_unregistered=True), "fixed_input_size", False):
            options = {"img_size": size, **options}
        self.name, self.grey = name, grey
        try:
            self.net = timm.create_model(name, **options)
            self.map_dim: int = self.net.num_features
            self.dim: int = self.net.head_hidden_size  # of the pooled features: some networks widen them after the map
            embedding = getattr(self.net, "patch_embed", None)
            self.is_vit = hasattr(self.net, "num_prefix_tokens") and hasattr(embedding, "dynamic_feat_size")
            self.patch = int(self.net.patch_embed.patch_size[0]) if self.is_vit else 1  # side in pixels
            if size % self.patch:
                raise UserError(f"--size is {size}: {name} takes multiples of its patches of {self.patch} pixels.")
            if args:  # such as in_chans, with which a network is built but cannot run here
                self._check_features(size)
        except (MemoryError, UserError):
            raise
        except Exception as error:  # of various types, as the arguments reach any code of timm
            reason = str(error).rstrip(".") or type(error).__name__
            if pretrained and not hasattr(self, "net"):
                also = " and --model-args" if args else ""
                raise UserError(
                    f"timm could not load weights of {name!r} ({reason}): check the network{also}, or give --init a "
                    "file."
                ) from error
            remedy = "correct --model-args" if args else "choose another --model or --size"
            raise UserError(f"timm could not build {name!r} with {options} ({reason}): {remedy}.") from error

    def _check_features(self, size: int) -> None:
        """Raise if the network does not take images of ``size`` or does not give features [B, D]."""
        was_training = self.training
        self.eval()
        with torch.no_grad():
            shape = self(torch.zeros(1, 3, size, size)).shape
        self.train(was_training)
        if shape != (1, self.dim):
            raise ValueError(f"it gives features of shape {list(shape)} instead of [1, {self.dim}]")

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features [B, D] of images [B, 3, S, S]."""
        return self.pool(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """Unpooled features: the final map [B, D, h, w] of a CNN, the normalised tokens [B, T, D] of a ViT."""
        return self.net.forward_features(self._prepare(x))

    def _prepare(self, x: Tensor) -> Tensor:
        """The images as the network takes them."""
        if not self.grey:
            return x
        from fgfast.data.lab import to_grey

        return to_grey(x)

    def pool(self, features: Tensor) -> Tensor:
        """Pooled features [B, D] from :meth:`features`: the mean of a map, or CLS of a ViT with a CLS token."""
        return self.net.forward_head(features, pre_logits=True)

    def to_map(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """The map [B, D, h, w] from :meth:`features` of images of ``size``; prefix tokens are dropped."""
        if not self.is_vit:
            return features
        grid = self.net.patch_embed.dynamic_feat_size(size)
        patches = features[:, self.net.num_prefix_tokens :]
        return patches.transpose(1, 2).unflatten(2, grid)

    def map_side(self, side: int) -> int:
        """Side of the feature map of images of ``side`` x ``side`` pixels.

        Raises:
            UserError: the features are not a map [B, D, h, w].
        """
        was_training = self.training
        self.eval()
        with torch.no_grad():
            x = torch.zeros(1, 3, side, side, device=next(self.parameters()).device)
            features = self.to_map(self.features(x), (side, side))
        self.train(was_training)
        if features.dim() != 4 or features.shape[1] != self.map_dim:
            raise UserError(
                f"{self.name} has features of shape {list(features.shape)} instead of a map [1, {self.map_dim}, h, w]: "
                "choose another --model."
            )
        return features.shape[-1]

    def pyramid(self, x: Tensor, levels: int = 4) -> list[Tensor]:
        """Maps [B, D_l, h_l, w_l] of the last ``levels`` stages (blocks of a ViT), deepest first."""
        maps = self.net.forward_intermediates(self._prepare(x), intermediates_only=True, norm=self.is_vit)
        return maps[-levels:][::-1]

    def keys(self, x: Tensor, *, stride: int | None = None) -> Keys:
        """Keys and CLS attention of the last block of a ViT.

        Args:
            x: images [B, 3, H, W].
            stride: stride of the patch embedding in pixels; None keeps the patch size. Half the patch size gives
                overlapping patches and a grid of about twice the side.

        Raises:
            UserError: the network is not a plain ViT with a CLS token.
        """
        with self._collect_attention(last=1) as collected, _patch_stride(self.net.patch_embed, stride):
            self.net.forward_features(self._prepare(x))
            grid = tuple(
                (n - p) // s + 1
                for n, p, s in zip(
                    x.shape[-2:], self.net.patch_embed.patch_size, self.net.patch_embed.proj.stride, strict=True
                )
            )
        k, attention = collected[0]
        return Keys(k.flatten(2).transpose(1, 2).unflatten(2, grid), attention.unflatten(2, grid))

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
            if features.dim() != 4:
                raise UserError(f"{self.name} has no feature map: choose another --model.")
            norm = features.detach().float().norm(dim=1).flatten(1)  # [B, h w]
            return features, (norm / norm.sum(1, keepdim=True).clamp(min=1e-12))[None, :, None]
        with self._collect_attention() as collected:
            features = self.features(x)
        return features, torch.stack([attention for _, attention in collected])

    def kept_features(self, x: Tensor, index: Tensor) -> Tensor:
        """Normalised tokens [B, prefix + k, D] of a ViT that processes only the patches ``index`` [B, k].

        Raises:
            UserError: the network is not a ViT.
        """
        if not self.is_vit:
            raise UserError(f"{self.name} has no tokens to drop: leave out --drop-tokens.")
        net = self.net
        tokens = net._pos_embed(net.patch_embed(self._prepare(x)))
        prefix, patches = tokens.split([net.num_prefix_tokens, tokens.shape[1] - net.num_prefix_tokens], 1)
        kept = patches.gather(1, index[..., None].expand(-1, -1, patches.shape[2]))
        return net.norm(net.blocks(net.norm_pre(torch.cat([prefix, kept], 1))))

    @contextmanager
    def _collect_attention(self, last: int = 0) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Collect keys [B, P, heads, d] and attention of CLS [B, heads, P] of the last blocks (0: all) as they run."""
        if not self.is_vit or not hasattr(self.net.blocks[-1].attn, "qkv") or self.net.num_prefix_tokens < 1:
            raise UserError(
                f"{self.name} has no keys and CLS attention: choose a plain ViT such as vit_small_patch16_224."
            )
        collected: list[tuple[Tensor, Tensor]] = []
        skip = self.net.num_prefix_tokens

        def collect(attn: Any, out: Tensor) -> None:
            q, k, _ = out.unflatten(-1, (3, attn.num_heads, -1)).unbind(2)  # [B, T, heads, d]
            q, k = attn.q_norm(q[:, :1]), attn.k_norm(k)
            scores = torch.einsum("bhd,bthd->bht", q[:, 0].float() * attn.scale, k.float())
            collected.append((k[:, skip:], scores.softmax(-1)[:, :, skip:]))

        hooks = [
            block.attn.qkv.register_forward_hook(lambda _m, _i, out, attn=block.attn: collect(attn, out))
            for block in self.net.blocks[-last:]
        ]
        try:
            yield collected
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _patch_stride(patch_embed: Any, stride: int | None) -> Iterator[None]:
    before = patch_embed.proj.stride
    if stride is not None:
        patch_embed.proj.stride = (stride, stride)
    try:
        yield
    finally:
        patch_embed.proj.stride = before
