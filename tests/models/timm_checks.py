"""What every timm network must do here, and the attention of its blocks computed in full."""

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from fgfast.errors import UserError
from fgfast.models.backbone import Backbone

MOST_WEIGHTS = 100_000_000  # a larger network is built with two blocks


def smallest_model(module: str) -> tuple[str, int]:
    """The registered model of a timm module with the fewest weights, and their number."""
    sizes = []
    for name in timm.list_models(module=module):
        with torch.device("meta"):
            sizes.append((sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters()), name))
    return min(sizes)[::-1]


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returns, or the one sentence of its UserError."""
    try:
        return call()
    except UserError as error:
        sentence = str(error)
    assert re.fullmatch(r"[^\n]+\.", sentence), sentence
    return sentence


def build_smallest(module: str) -> Backbone:
    """The smallest network of a module for images of 64 pixels, or of the size that it was made for."""
    name, weights = smallest_model(module)
    made_for: Any = timm.get_pretrained_cfg(name)
    sizes = (64, made_for.input_size[-1])
    ways: list[dict[str, Any]] = [{"depth": 2}, {}] if weights > MOST_WEIGHTS else [{}]
    refusals = []
    for args, size in itertools.product(ways, sizes):
        built = outcome(lambda args=args, size=size: Backbone(name, size=size, args=args).eval())
        if isinstance(built, Backbone):
            return built
        refusals.append(built)
    raise AssertionError(refusals)


@torch.no_grad()
def check_network(encoder: Backbone) -> dict[str, str]:
    """Forward, map, pyramid, keys, attention and dropping of a network are right, or refused in one sentence.

    Returns:
        "right" or the sentence, by ability.
    """
    (size, _), *_ = encoder._sizes
    x, found = torch.randn(2, 3, size, size), {}
    assert not any(m.num_batches_tracked for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
    features, pooled = encoder.features(x), encoder(x)
    assert pooled.shape == (2, encoder.dim)
    assert pooled.isfinite().all()
    plain = encoder.net.forward_head(encoder.net.forward_features(x), pre_logits=True)
    torch.testing.assert_close(pooled, plain)
    torch.testing.assert_close(encoder.pool(features), plain)

    def check_map() -> str:
        grid = encoder.to_map(features, (size, size))
        side = encoder.map_side(size)
        assert grid.shape == (2, encoder.map_dim, side, side)
        assert grid.isfinite().all()
        deepest = encoder.pyramid(x, 1)[0]
        if encoder.layout.kind != "map":  # timm's own map has the same order, with or without the last norm
            norm = getattr(encoder.net, "norm", nn.Identity())
            normed = norm(deepest.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            assert any(torch.allclose(grid, same, rtol=1e-3, atol=1e-4) for same in (deepest, normed))
        return "right"

    def check_pyramid() -> str:
        maps = encoder.pyramid(x, 3)
        assert 1 <= len(maps) <= 3
        assert all(m.dim() == 4 and len(m) == 2 and m.isfinite().all() for m in maps)
        sides = [m.shape[-1] for m in maps]
        assert sides == sorted(sides)
        return "right"

    def check_keys() -> str:
        keys = encoder.keys(x)
        compare_with_blocks(encoder, x)
        assert keys.attention.shape[2:] == keys.keys.shape[2:] == (encoder.map_side(size),) * 2
        return "right"

    def check_attention() -> str:
        given, attention = encoder.attend(x)
        torch.testing.assert_close(given, features)
        assert attention.shape[-1] == encoder.map_side(size) ** 2
        assert (attention >= 0).all()
        total = attention.sum(-1)
        assert ((total > 0) & (total <= 1 + 1e-5)).all()
        return "right"

    def check_dropping() -> str:
        encoder.check_dropping()
        prefix = encoder.layout.prefix
        patches = torch.arange(features.shape[1] - prefix)
        everything = encoder.kept_features(x, patches.expand(2, -1))
        torch.testing.assert_close(everything, features, rtol=1e-4, atol=1e-5)
        kept = encoder.kept_features(x, patches[::2].expand(2, -1))
        assert kept.shape == (2, prefix + len(patches[::2]), features.shape[2])
        assert kept.isfinite().all()
        return "right"

    for check in (check_map, check_pyramid, check_keys, check_attention, check_dropping):
        found[check.__name__.removeprefix("check_")] = outcome(check)
    return found


@contextmanager
def in_full(net: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect (keys [B, heads, T, d], attention [B, heads, T, T]) of every block, which multiplies them itself.

    The blocks take the path on which they compute softmax(q k') in full.
    """
    keys: list[Tensor] = []
    seen: list[tuple[Tensor, Tensor]] = []
    product, softmax = torch.Tensor.__matmul__, torch.Tensor.softmax

    def matmul(a: Tensor, b: Tensor) -> Tensor:
        if a.shape[-2:] == b.shape[-2:][::-1] and a.shape[-2] != a.shape[-1]:  # q k', not attention v
            keys[:] = [b.transpose(-2, -1)]
        return product(a, b)

    def record(x: Tensor, *args: Any, **options: Any) -> Tensor:
        attention = softmax(x, *args, **options)
        seen.append((keys[0], attention))
        return attention

    with pytest.MonkeyPatch.context() as patch:
        for module in net.modules():
            if hasattr(module, "fused_attn"):
                patch.setattr(module, "fused_attn", False)
        patch.setattr(torch.Tensor, "__matmul__", matmul)
        patch.setattr(torch.Tensor, "softmax", record)
        yield seen


@torch.no_grad()
def compare_with_blocks(encoder: Backbone, x: Tensor) -> None:
    """Keys and attention are those that the blocks compute in full, to 1e-5 in float32."""
    with in_full(encoder.net) as seen:
        encoder.net.forward_features(x)
    skip = encoder.layout.prefix
    expected = torch.stack([attention[:, :, 0, skip:] for _, attention in seen])
    _, attention = encoder.attend(x)
    torch.testing.assert_close(attention, expected, rtol=1e-5, atol=1e-5)
    found = encoder.keys(x)
    torch.testing.assert_close(found.attention.flatten(2), expected[-1], rtol=1e-5, atol=1e-5)
    keys = seen[-1][0][:, :, skip:].transpose(2, 3).flatten(1, 2)  # [B, heads d, P]
    torch.testing.assert_close(found.keys.flatten(2), keys, rtol=1e-5, atol=1e-5)


def sharpen(net: nn.Module) -> None:
    """Random weights with which attention differs between tokens: at the start it is the same for all."""
    for name, parameter in net.named_parameters():
        if re.search(r"[qk]_norm", name):
            nn.init.normal_(parameter, mean=1, std=0.3)
        elif re.search(r"qkv|[qk]_(proj|bias)|pos|token|bias_table", name):
            nn.init.normal_(parameter, std=0.1)
