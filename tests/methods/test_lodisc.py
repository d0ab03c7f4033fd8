"""MoCo v3 and LoDisc on a CNN and a ViT: masks, losses and switches."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fgfast.data.views import Batch
from fgfast.errors import UserError
from fgfast.losses import InfoNCELoss
from fgfast.methods.base import Progress
from fgfast.methods.lodisc import LoDisc, LoDiscConfig
from fgfast.methods.mocov3 import MoCoV3, MoCoV3Config
from fgfast.models.backbone import Backbone
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests.conftest import TINY

NETS = {"cnn": (TINY, "output_stride=8"), "vit": ("test_vit", "")}


def config_for(net: str, **values: object) -> LoDiscConfig:
    model, args = NETS[net]
    return replace(
        LoDiscConfig(
            model=model, model_args=args, size=32, batch_size=6, epochs=1, log_every=1, knn_every=0, hidden=16,
            projection=8, device="cpu", threads=1, amp="off",
        ),
        **values,  # type: ignore[arg-type]
    )  # fmt: skip


def batch_of(n: int = 6, side: int = 32) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(
        views=[torch.randn(n, 3, side, side, generator=g) for _ in range(2)], index=torch.arange(n),
        target=torch.zeros(n, dtype=torch.int64), valid=torch.ones(n, dtype=torch.bool),
    )  # fmt: skip


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("method", ["mocov3", "lodisc"])
def test_trains(drawn: Path, tmp_path: Path, net: str, method: str) -> None:
    """A short run has finite losses; LoDisc logs both of its terms."""
    config = config_for(net, data=str(drawn), out=str(tmp_path / "run"))
    if method == "mocov3":
        known = vars(MoCoV3Config())
        config = MoCoV3Config(**{k: v for k, v in vars(config).items() if k in known})  # type: ignore[assignment]
    rows, _ = read_metrics(pretrain(method, config) / "metrics.jsonl")
    assert len(rows) == 3
    assert all(torch.tensor(r["loss"]).isfinite() for r in rows)
    assert ("local" in rows[0]) == (method == "lodisc")


def test_attention_is_that_of_the_network() -> None:
    """The CLS rows equal those of the full T x T softmax in every block, and the features do not change."""
    torch.manual_seed(0)
    vit, x = Backbone("test_vit", size=32).eval(), torch.randn(2, 3, 32, 32)
    full: list[torch.Tensor] = []

    def record(attn, inputs):  # type: ignore[no-untyped-def]
        qkv = attn.qkv(inputs[0]).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(qkv[0]), attn.k_norm(qkv[1])
        full.append((q * attn.scale @ k.transpose(2, 3)).softmax(-1)[:, :, 0, vit.net.num_prefix_tokens :])

    hooks = [b.attn.register_forward_pre_hook(record) for b in vit.net.blocks]
    with torch.no_grad():
        plain = vit.features(x)
        for h in hooks:
            h.remove()
        features, attention = vit.attend(x)
    torch.testing.assert_close(features, plain)
    torch.testing.assert_close(attention, torch.stack(full))


def test_attention_of_a_cnn_is_the_norm_of_its_map() -> None:
    """It has one layer, one head and sum 1."""
    cnn, x = Backbone(TINY, args={"output_stride": 8}).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features, attention = cnn.attend(x)
    assert attention.shape == (1, 2, 1, 16)
    torch.testing.assert_close(attention.sum(3), torch.ones(1, 2, 1))
    torch.testing.assert_close(attention[0, :, 0], F.normalize(features.flatten(2).norm(dim=1), p=1, dim=1))


@pytest.mark.parametrize("net", NETS)
def test_losses_are_those_of_the_paper(net: str) -> None:
    """It is the sum of four InfoNCE terms times 2 T, with local keys from images that are zero outside the mask."""
    torch.manual_seed(0)
    method, batch = LoDisc(config_for(net)), batch_of()
    method.eval()  # the statistics of BatchNorm must not change between the two computations
    out = method(batch)
    loss = InfoNCELoss(0.2, scale=True)
    queries = [method.predictor(method.projector(method.encoder(v))) for v in batch.views]
    with torch.no_grad():
        keys = [method.target_projector(method.target(v)) for v in batch.views]
        local = []
        for view in batch.views:
            _, pivotal = method.pivots(view)
            assert pivotal.images is not None
            n_patches = pivotal.mask.shape[1]
            assert pivotal.mask.float().mean() == pytest.approx(int(0.3 * n_patches) / n_patches)
            local.append(method.target_projector(method.target(pivotal.images)))
    global_ = loss(queries[0], keys[1]) + loss(queries[1], keys[0])
    part = loss(queries[0], local[1]) + loss(queries[1], local[0])
    torch.testing.assert_close(out["global"], global_, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["local"], part, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out["loss"], global_ + part, rtol=1e-4, atol=1e-5)


def test_keeping_all_patches_gives_the_global_loss() -> None:
    """With keep 1 the local loss equals the global one, with tokens zeroed or dropped."""
    for drop in (False, True):
        torch.manual_seed(0)
        method = LoDisc(config_for("vit", keep=1.0, drop_tokens=drop)).eval()
        out = method(batch_of())
        torch.testing.assert_close(out["local"], out["global"], rtol=1e-4, atol=1e-5)


def test_dropped_tokens_have_no_effect() -> None:
    """The content of a dropped patch, NaN included, does not change the features of the kept ones."""
    torch.manual_seed(0)
    vit, x = Backbone("test_vit", size=32).eval(), torch.randn(1, 3, 32, 32)
    index = torch.tensor([[1]])
    other = x.clone()
    other[:, :, 16:] = torch.nan  # patches 2 and 3 of four
    with torch.no_grad():
        torch.testing.assert_close(vit.kept_features(x, index), vit.kept_features(other, index))


def test_switches() -> None:
    """Number of passes, the frozen patch embedding, momentum updates, and training without a projector."""
    assert LoDisc(config_for("vit", keep=0.25, drop_tokens=True)).passes_per_image == 4.5
    assert LoDisc(config_for("vit")).passes_per_image == 6
    frozen, free = (LoDisc(config_for("vit", freeze_patch_embed=f)).encoder.net.patch_embed for f in (True, False))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in free.parameters())
    ends = []
    for updates in (1, 4):
        torch.manual_seed(0)
        method = LoDisc(config_for("cnn", ema_updates=updates, momentum=0.9))
        before = next(method.target.parameters()).clone()
        with torch.no_grad():
            next(method.encoder.parameters()).add_(1.0)
        method.after_step(Progress(0, 10))
        ends.append((next(method.target.parameters()) - before).mean().item())
    assert ends == pytest.approx([0.1, 1 - 0.9**4], rel=1e-4)
    dim = Backbone(TINY).dim
    assert LoDisc(config_for("cnn", project=False, projection=dim))(batch_of())["loss"].isfinite()
    with pytest.raises(UserError, match=f"--projection {dim}"):
        LoDisc(config_for("cnn", project=False))
    with pytest.raises(UserError, match=r"cannot leave out patches .*: leave out --drop-tokens"):
        LoDisc(config_for("cnn", drop_tokens=True))


def test_padded_images_have_no_effect() -> None:
    """The content of a padded slot does not affect the loss (BatchNorm in evaluation mode)."""
    torch.manual_seed(0)
    method, batch = MoCoV3(config_for("cnn")).eval(), batch_of()
    batch.valid[3] = False
    losses = []
    for fill in (0.0, 50.0):
        for view in batch.views:
            view[3] = fill
        losses.append(method(batch)["loss"])
    torch.testing.assert_close(losses[0], losses[1])


def test_pictures_show_every_strategy() -> None:
    """Each row has an image and what four strategies keep of it."""
    found = LoDisc(config_for("vit")).pictures(batch_of())
    assert [p.caption for p in found["kept"][0]] == ["image", "topk", "sample", "block", "random"]
    assert len(found["kept"]) == 6


def test_paper_preset() -> None:
    """The released settings."""
    config = LoDisc.paper(None)
    assert (config.model, config.size, config.projection, config.weight_decay) == (
        "vit_base_patch16_224",
        224,
        768,
        0.5,
    )


def test_a_fraction_that_keeps_no_patch_is_refused() -> None:
    with pytest.raises(UserError, match=r"0\.2 of 4 patches: give at least 0\.25"):
        LoDisc(config_for("vit", keep=0.2))
