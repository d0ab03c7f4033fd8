"""Weights from checkpoints of every supported format."""

import argparse
from pathlib import Path

import pytest
import torch

from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.models.weights import load_encoder
from tests.conftest import TINY

LAYOUTS = {
    "bare state dict": lambda s: s,
    "MoCo v2": lambda s: {
        "state_dict": {f"module.encoder_q.{k}": v for k, v in s.items()} | {"module.queue": torch.zeros(2)}
    },
    "MoCo v3": lambda s: {"state_dict": {f"module.base_encoder.{k}": v for k, v in s.items()}, "epoch": 3},
    "DINO, full": lambda s: {
        "teacher": {f"backbone.{k}": v for k, v in s.items()} | {"head.mlp.0.weight": torch.zeros(2)},
        "student": {f"module.backbone.{k}": v + 1 for k, v in s.items()},
        "args": argparse.Namespace(arch="vit"),
    },
    "DetCon, PyTorch port": lambda s: {f"online_network.encoder.{k}": v for k, v in s.items()},
    "a run of fgfast": lambda s: {
        "name": "particle",
        "method": {f"encoder.net.{k}": v for k, v in s.items()} | {f"target.net.{k}": v + 1 for k, v in s.items()},
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(tmp_path: Path, layout: str) -> None:
    """The encoder's tensors are found under all prefixes; heads and other networks are ignored."""
    source = Backbone(TINY).net.state_dict()
    torch.save(LAYOUTS[layout](source), tmp_path / "w.pth")
    net = Backbone(TINY).net
    load_encoder(net, tmp_path / "w.pth")
    assert all(torch.equal(v, source[k]) for k, v in net.state_dict().items())


def test_other_network_is_named(tmp_path: Path) -> None:
    """The error names the tensor that does not match."""
    torch.save(Backbone("test_resnet").net.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="another network"):
        load_encoder(Backbone("resnet18", args={"channels": (8, 8, 8, 8)}).net, tmp_path / "w.pth")


def test_code_in_a_file_is_not_executed(tmp_path: Path) -> None:
    """A pickle that would execute code is refused."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("ran",))

    torch.save({"teacher": Evil()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="could not be read"):
        load_encoder(Backbone(TINY).net, tmp_path / "w.pth")
    with pytest.raises(UserError, match="do not exist"):
        load_encoder(Backbone(TINY).net, tmp_path / "missing.pth")
