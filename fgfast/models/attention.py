"""The self-attention of timm's transformers, as their own blocks compute it, and runs over a part of the patches.

Keys and queries are taken where a block hands them to ``scaled_dot_product_attention``: after norms and rotary
embeddings, with the bias of relative positions, whatever the code of the block looks like.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fgfast.models.probe import FeatureLayout, evaluating, probe_image, run_features


class _Record(TorchFunctionMode):
    """Collects the keys of the last self-attention and the attention of the first token in all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: Tensor | None = None  # [B, heads, T, d]
        self.attention: list[Tensor] = []  # [B, heads, T] each, of a softmax over all T tokens

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self._record(*args, **kwargs)
        return func(*args, **kwargs)

    def _record(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> None:  # fmt: skip
        if query.dim() != 4 or query.shape != key.shape or is_causal:
            return  # attention of other queries than the tokens: not that of a plain transformer
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = torch.einsum("bhd,bthd->bht", query[:, :, 0].float() * scale, key.transpose(1, 2).float())
        if attn_mask is not None:
            row = attn_mask[..., 0, :]
            scores = scores.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else scores + row.float()
        self.keys = key
        self.attention.append(scores.softmax(-1))


@contextmanager
def recording(net: Any) -> Iterator[_Record]:
    """Record the self-attention of what runs inside; all blocks take their fused path, where it can be seen."""
    unfused = [module for module in net.modules() if getattr(module, "fused_attn", True) is False]
    for module in unfused:
        module.fused_attn = True
    try:
        with _Record() as record:
            yield record
    finally:
        for module in unfused:
            module.fused_attn = False


def missing_attention(net: Any, layout: FeatureLayout, size: int) -> str:
    """Why a network gives no attention of CLS over the patches in every block; "" if it does.

    Args:
        net: the network.
        layout: its layout.
        size: side of images that it takes.
    """
    if layout.kind != "tokens":
        return "its features are not tokens"
    if getattr(net, "cls_token", None) is None or layout.prefix < 1:
        return "it has no CLS token"
    if not hasattr(net, "blocks"):
        return "it has no blocks of one kind"
    with evaluating(net), recording(net) as record:
        features = run_features(net, probe_image(net, size))
    if [a.shape[-1] for a in record.attention] != [features.shape[1]] * len(net.blocks):
        return "its blocks do not compute plain attention over all tokens"
    return ""


@contextmanager
def keeping(net: Any, prefix: int, index: Tensor) -> Iterator[None]:
    """The blocks of a network process the prefix tokens and the patches ``index`` [B, k], with their positions.

    timm's networks leave out random patches in training, through ``patch_drop``; here it leaves out all others.
    """

    def keep(tokens: Tensor) -> Tensor:
        first, patches = tokens[:, :prefix], tokens[:, prefix:]
        return torch.cat([first, patches.gather(1, index[..., None].expand(-1, -1, patches.shape[2]))], 1)

    drop = net.patch_drop
    if drop is None:  # of a transformer with rotary embeddings, which are selected by the indices
        net.patch_drop = lambda tokens: (keep(tokens), index)
        try:
            yield
        finally:
            net.patch_drop = None
        return
    hook = drop.register_forward_hook(
        lambda _module, inputs, out: (keep(inputs[0]), index) if isinstance(out, tuple) else keep(inputs[0])
    )
    try:
        yield
    finally:
        hook.remove()


def missing_dropping(net: Any, layout: FeatureLayout, size: int) -> str:
    """Why a network cannot process a part of its patches; "" if it can.

    All patches, in another order, must give the features of the full image.
    """
    if layout.kind != "tokens":
        return "it has no tokens to drop"
    if not hasattr(net, "patch_drop"):
        return "its blocks take all patches"
    x = probe_image(net, size)
    with evaluating(net), torch.autocast(x.device.type, enabled=False):  # rounded less than the tolerance below
        full = run_features(net, x)
        order = torch.arange(full.shape[1] - layout.prefix, device=x.device).flip(0)
        with keeping(net, layout.prefix, order[None]):
            found = run_features(net, x)
        expected = torch.cat([full[:, : layout.prefix], full[:, layout.prefix :].flip(1)], 1)
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        return "its blocks take all patches"
    return ""
