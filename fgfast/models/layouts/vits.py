"""Tables for ViTs. Where a library has stored its networks in two ways, both are in one table."""

from fgfast.models.layouts.rules import (
    Layout,
    Rule,
    concatenated,
    first_third,
    last_third,
    rules,
    with_position,
    without_class,
)

_T = "encoder.layers.encoder_layer_<1>."
_TORCHVISION_VIT = Layout(
    "torchvision's ViT", "vit_*_patch*_224",
    rules({
        "cls_token": "class_token", "pos_embed": "encoder.pos_embedding", "patch_embed.proj.*": "conv_proj.<1>",
        "blocks.#.norm#.*": f"{_T}ln_<2>.<3>", "blocks.#.attn.qkv.*": f"{_T}self_attention.in_proj_<2>",
        "blocks.#.attn.proj.*": f"{_T}self_attention.out_proj.<2>",
        "blocks.#.mlp.fc1.*": f"{_T}mlp.0.<2>", "blocks.#.mlp.fc2.*": f"{_T}mlp.3.<2>",
        "norm.*": "encoder.ln.<1>",
    })
    + rules({"blocks.#.mlp.fc#.*": f"{_T}mlp.linear_<2>.<3>"}),  # in the files that torchvision offers
)  # fmt: skip

# The names of layers in files of transformers (of all versions), and those of its networks from version 5 on
_A = "encoder.layer.<1>."
_STORED_ATTENTION = rules({"blocks.#.attn.proj.*": f"{_A}attention.output.dense.<2>"}) + rules(
    {"blocks.#.attn.qkv.*": tuple(f"{_A}attention.attention.{part}.<2>" for part in ("query", "key", "value"))},
    concatenated,
)


def _attention(layer: str, own: str = "blocks.#.attn.qkv.*", end: str = "<2>") -> tuple[Rule, ...]:
    return rules({"blocks.#.attn.proj.*": f"{layer}attention.o_proj.<2>"}) + rules(
        {own: tuple(f"{layer}attention.{part}_proj.{end}" for part in "qkv")}, concatenated
    )


_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token", "dist_token": "embeddings.distillation_token",
    "reg_token": "embeddings.register_tokens", "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.*": "embeddings.patch_embeddings.projection.<1>", "norm.*": "layernorm.<1>",
}  # fmt: skip
_MASK = r"embeddings\.mask_token"
# Its norms have eps 1e-12 and timm's 1e-6, which no argument sets: normalised tokens differ by the fraction 5e-7 / v
# where the tokens have variance v, that is by less than 1e-5 for v above 0.05
_HUGGING_FACE_VIT = Layout(
    "Hugging Face's ViT", "vit_*_patch*_224, deit*",
    rules({
        **_EMBEDDINGS,
        "blocks.#.norm1.*": f"{_A}layernorm_before.<2>", "blocks.#.norm2.*": f"{_A}layernorm_after.<2>",
        "blocks.#.mlp.fc1.*": f"{_A}intermediate.dense.<2>", "blocks.#.mlp.fc2.*": f"{_A}output.dense.<2>",
    })
    + _STORED_ATTENTION
    + rules({
        "blocks.#.norm1.*": "layers.<1>.layernorm_before.<2>", "blocks.#.norm2.*": "layers.<1>.layernorm_after.<2>",
        "blocks.#.mlp.fc#.*": "layers.<1>.mlp.fc<2>.<3>",
    })
    + _attention("layers.<1>."),
    ignored=_MASK,
)  # fmt: skip

_UNPOSITIONED = rules(
    {"cls_token/positioned": ("embeddings.cls_token", "embeddings.position_embeddings")}, with_position
) + rules({"pos_embed/patches": "embeddings.position_embeddings"}, without_class)
_HUGGING_FACE_DINOV2 = Layout(
    "Hugging Face's DINOv2", "vit_*_patch14_dinov2, vit_*_patch14_reg4_dinov2",
    rules({
        **_EMBEDDINGS,
        "blocks.#.norm#.*": f"{_A}norm<2>.<3>", "blocks.#.ls#.gamma": f"{_A}layer_scale<2>.lambda1",
        "blocks.#.mlp.fc#.*": f"{_A}mlp.fc<2>.<3>",
    })
    + rules({"blocks.#.mlp.fc1.*": f"{_A}mlp.weights_in.<2>", "blocks.#.mlp.fc2.*": f"{_A}mlp.weights_out.<2>"})
    + rules({"blocks.#.mlp.fc1.*": (f"{_A}mlp.gate_proj.<2>", f"{_A}mlp.up_proj.<2>")}, concatenated)
    + rules({"blocks.#.mlp.fc2.*": f"{_A}mlp.down_proj.<2>"})
    + _STORED_ATTENTION + _attention(_A) + _UNPOSITIONED,
    ignored=_MASK,
)  # fmt: skip

_DINOV2 = Layout(
    "Meta's DINOv2", "vit_*_patch14_dinov2, vit_*_patch14_reg4_dinov2",
    rules({"cls_token/positioned": ("cls_token", "pos_embed")}, with_position)
    + rules({"pos_embed/patches": "pos_embed"}, without_class)
    + rules({
        "reg_token": "register_tokens",
        "blocks.#.mlp.fc1.*": "blocks.<1>.mlp.w12.<2>", "blocks.#.mlp.fc2.*": "blocks.<1>.mlp.w3.<2>", "*": "<1>",
    }),
)  # fmt: skip


def _dinov3(layer: str) -> tuple[Rule, ...]:
    """The layers of DINOv3, with a plain or a gated feed-forward network; keys have no bias."""
    return (
        rules({
            "blocks.#.gamma_#": f"{layer}layer_scale<2>.lambda1", "blocks.#.norm#.*": f"{layer}norm<2>.<3>",
            "blocks.#.attn.q_bias": f"{layer}attention.q_proj.bias",
            "blocks.#.attn.v_bias": f"{layer}attention.v_proj.bias",
            "blocks.#.mlp.fc1.*": f"{layer}mlp.up_proj.<2>", "blocks.#.mlp.fc2.*": f"{layer}mlp.down_proj.<2>",
            "blocks.#.mlp.fc1_g.*": f"{layer}mlp.gate_proj.<2>", "blocks.#.mlp.fc1_x.*": f"{layer}mlp.up_proj.<2>",
        })
        + _attention(layer, "blocks.#.attn.qkv.weight", "weight")
    )  # fmt: skip


_HUGGING_FACE_DINOV3 = Layout(
    "Hugging Face's DINOv3 ViT", "vit_*_patch16_dinov3, vit_*_patch16_dinov3_qkvb",
    rules({
        "cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens",
        "patch_embed.proj.*": "embeddings.patch_embeddings.<1>", "norm.*": "norm.<1>",
    })
    + _dinov3("layer.<1>.") + _dinov3("model.layer.<1>."),
    ignored=_MASK, if_zero=r"(model\.)?layer\.\d+\.attention\.[qv]_proj\.bias",
)  # fmt: skip

_DINOV3 = Layout(
    "Meta's DINOv3", "vit_*_patch16_dinov3, vit_*_patch16_dinov3_qkvb",
    rules({
        "reg_token": "storage_tokens", "blocks.#.gamma_#": "blocks.<1>.ls<2>.gamma",
        "blocks.#.mlp.fc1_g.*": "blocks.<1>.mlp.w1.<2>", "blocks.#.mlp.fc1_x.*": "blocks.<1>.mlp.w2.<2>",
        "blocks.#.mlp.fc2.*": "blocks.<1>.mlp.w3.<2>",
    })
    + rules({"blocks.#.attn.q_bias": "blocks.<1>.attn.qkv.bias"}, first_third)
    + rules({"blocks.#.attn.v_bias": "blocks.<1>.attn.qkv.bias"}, last_third)
    + rules({"*": "<1>"}),
    ignored=r"mask_token|rope_embed\.periods|local_cls_norm\..*|blocks\.\d+\.attn\.qkv\.bias_mask",
    if_zero=r"blocks\.\d+\.attn\.qkv\.bias",
)  # fmt: skip

VITS = (_TORCHVISION_VIT, _HUGGING_FACE_VIT, _HUGGING_FACE_DINOV2, _DINOV2, _HUGGING_FACE_DINOV3, _DINOV3)
