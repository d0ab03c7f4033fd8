"""Weights from checkpoints of every supported format."""

import argparse
import hashlib
import itertools
import json
import os
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.models.checkpoints import inspect_checkpoint, read_checkpoint
from fgfast.models.matching import flatten
from fgfast.models.weights import load_encoder, load_tensors, weights_file
from fgfast.run import save_checkpoint, save_encoder
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


def test_another_network_is_described_by_what_the_file_has_and_lacks() -> None:
    """The error counts the tensors and names those that are missing, left over and of another shape."""
    net = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 3)})
    tensors = {"a.weight": torch.zeros(3, 5), "a.bias": torch.zeros(3), "a.extra": torch.zeros(1)}
    with pytest.raises(UserError) as caught:
        load_tensors(net, tensors, "The weights FILE")
    assert str(caught.value) == (
        "The weights FILE are of another network (the file has 3 tensors, 2 of the 4 of ModuleDict: 'b.weight', "
        "'b.bias' missing; 'a.extra' left over; 1 of another shape, such as 'a.weight' [3, 5] instead of [3, 2]): give "
        "its --model and --model-args."
    )


NARROW = {"channels": (8, 8, 8, 8)}
NO_CLASS_POSITION = {"no_embed_class": True}


@pytest.mark.parametrize(
    ("source", "target", "args", "more"),
    [
        ("resnet34", "resnet18", NARROW, {}),
        ("resnet101", "resnet50", NARROW, {}),
        ("test_vit", "test_vit", {"depth": 2}, {"depth": 4}),
        ("test_vit", "test_vit", NO_CLASS_POSITION, {"reg_tokens": 1}),
    ],
    ids=["more blocks in a stage", "more bottlenecks", "deeper", "more tokens"],
)
def test_a_larger_network_is_not_loaded_in_part(
    source: str, target: str, args: dict[str, object], more: dict[str, object]
) -> None:
    net = Backbone(target, args=args).net
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError, match="left over"):
        load_tensors(net, Backbone(source, args=args | more).net.state_dict(), "The weights")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def pair() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 3)})


@pytest.mark.parametrize(
    "name", ["decoder_pos_embed", "mask_token", "masked_embed", "logit_scale", "total_ops", "b.total_params", "queue"]
)
def test_a_tensor_beside_the_network_that_no_token_needs_is_ignored(name: str) -> None:
    net, source = pair(), pair()
    load_tensors(net, source.state_dict() | {name: torch.zeros(1)}, "The weights")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize(
    "name",
    [
        "cls_token", "dist_token", "reg_token", "register_tokens", "storage_tokens", "class_embedding", "pos_embed",
        "pos_embed_win", "absolute_pos_embed", "positional_embedding", "b.gamma",
    ],
)  # fmt: skip
def test_a_tensor_that_changes_the_tokens_or_a_module_is_not_left_out(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' left over"):
        load_tensors(pair(), pair().state_dict() | {name: torch.zeros(1)}, "The weights")


def test_weights_of_eight_bits_load_with_their_values() -> None:
    net, source = pair(), pair()
    state = {k: v.to(torch.float8_e4m3fn) for k, v in source.state_dict().items()}
    load_tensors(net, state, "The weights")
    assert all(torch.equal(v, state[k].float()) for k, v in net.state_dict().items())


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda v: v.to("meta")], ids=["sparse", "meta"])
def test_tensors_that_cannot_be_copied_are_named(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    state = pair().state_dict()
    with pytest.raises(UserError, match=r"without values in 'b\.weight': give them as dense tensors"):
        load_tensors(pair(), state | {"b.weight": change(state["b.weight"])}, "The weights")


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_vit", "test_byobnet"])
def test_the_classifier_of_a_timm_network_is_ignored(name: str) -> None:
    import timm

    target = Backbone(name, size=160)
    load_tensors(target.net, timm.create_model(name, num_classes=7).state_dict(), "The weights")


def test_a_missing_count_of_batches_is_no_error_as_in_torch() -> None:
    source, target = Backbone(TINY).net, Backbone(TINY).net
    state = {k: v for k, v in source.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(state) < len(source.state_dict())
    load_tensors(target, state, "The weights")
    assert all(torch.equal(target.state_dict()[k], v) for k, v in state.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float) -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    state = net.state_dict() | {"0.bias": torch.tensor([0.0, value])}
    with pytest.raises(UserError, match=r"not finite in '0\.bias'"):
        load_tensors(net, state, "The weights")


def test_weights_of_another_image_size_name_that_size() -> None:
    state = Backbone("test_vit", size=160).net.state_dict()
    with pytest.raises(UserError, match=r"'pos_embed' \[1, 101, 64\] instead of \[1, 17, 64\]\): give --size 160"):
        load_tensors(Backbone("test_vit", size=64).net, state, "The weights")


@pytest.mark.parametrize("scalar", [np.float64(0.5), np.float32(0.5), np.int64(3), np.bool_(True), np.str_("x")])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_numpy_scalar_beside_the_weights_does_no_harm(tmp_path: Path, scalar: np.generic, zipped: bool) -> None:
    file = tmp_path / "w.pth"
    content = {"state_dict": {"a": torch.ones(2)}, "best": scalar}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(file)["state_dict"]["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "hold a list of 1 tensor: give a state dict"),
        ((1, 2), "hold a tuple of 2 values"),
        (torch.zeros(2, 3), r"hold a tensor of shape \[2, 3\]"),
        (3, "hold one value of type int"),
        ({}, "hold no named tensors, but an empty dictionary: give a state dict"),
        ({"epoch": 3, "lr": 0.1}, "a dictionary of 'epoch', 'lr'"),
        ({0: torch.zeros(2)}, "a dictionary of 0"),
        ({"state_dict": OrderedDict(), "epoch": 1}, "a dictionary of 'state_dict', 'epoch'"),
        (nn.Linear(2, 2), r"reading torch\.nn\.modules\.linear\.Linear could run code: give a state dict"),
        ({"best": np.zeros(2)}, r"reading numpy\._core\.multiarray\._reconstruct could run code"),
    ],
)
def test_a_file_of_something_else_is_said_to_be_that(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        load_encoder(nn.Linear(2, 2), tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_was_cut_is_said_to_be_incomplete(tmp_path: Path, name: str, kept: float) -> None:
    file, state = tmp_path / name, {"a": torch.randn(500)}
    save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(UserError, match="cut or damaged" if kept else "are an empty file"):
        read_checkpoint(file)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An encoder.safetensors of one small layer."""
    file = tmp_path / "encoder.safetensors"
    save_encoder(file, nn.Linear(2, 3), "resnet18")
    return file


def test_an_encoder_with_any_other_bit_is_refused(exported: Path) -> None:
    whole = exported.read_bytes()
    with exported.open("rb+", buffering=0) as stored:
        for place, bit in itertools.product(range(len(whole)), range(8)):
            os.pwrite(stored.fileno(), bytes([whole[place] ^ 1 << bit]), place)
            with pytest.raises(UserError, match="cut or damaged"):
                read_checkpoint(exported)
            os.pwrite(stored.fileno(), whole[place : place + 1], place)
    assert read_checkpoint(exported).keys() == {"weight", "bias"}


def test_an_encoder_cut_at_any_length_is_refused(exported: Path) -> None:
    for length in reversed(range(exported.stat().st_size)):
        os.truncate(exported, length)
        with pytest.raises(UserError, match=r"cut or damaged|are an empty file"):
            read_checkpoint(exported)


def test_a_checkpoint_given_as_weights_is_compared_with_its_checksum(tmp_path: Path) -> None:
    file = tmp_path / "last.pt"
    save_checkpoint(file, {"name": "simclr", "method": {"weight": torch.arange(200.0)}})
    content = bytearray(file.read_bytes())
    content[content.index(torch.arange(200.0).numpy().tobytes()) + 402] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"cut or damaged \(its content differs from its checksum\)"):
        read_checkpoint(file)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_a_checksum_is_that_of_the_whole_file_with_zeros_for_itself(
    exported: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = exported.read_bytes()
    start = content.index(b"fgfast sha256 ") + len(b"fgfast sha256 ")
    digest = hashlib.sha256(content[:start] + b"0" * 64 + content[start + 64 :]).hexdigest()
    assert content[start : start + 64].decode() == digest
    monkeypatch.setattr("fgfast.checksum._CHUNK", chunk)
    assert read_checkpoint(exported).keys() == {"weight", "bias"}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("own", [True, False])
def test_weights_without_a_checksum_load_and_those_of_fgfast_with_a_word(
    tmp_path: Path, name: str, own: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {"a": torch.ones(2)}
    if name.endswith("safetensors"):
        save_file(tensors, tmp_path / name, {"format": "pt"} | ({"timm_model": "resnet18"} if own else {}))
    else:
        torch.save({"name": "simclr", "method": tensors} if own else tensors, tmp_path / name)
    assert next(iter(flatten(read_checkpoint(tmp_path / name)).values())).tolist() == [1, 1]
    assert [r.getMessage().partition(", ")[0] for r in caplog.records] == (
        [f"{tmp_path / name} has no checksum"] if own else []
    )


@pytest.mark.parametrize("comment", [b"", b"made by another program", b"sha256 " + b"0" * 63])
def test_an_archive_of_another_program_loads_whatever_its_comment(tmp_path: Path, comment: bytes) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt", "a") as archive:
        archive.comment = comment
    assert read_checkpoint(tmp_path / "w.pt")["a"].tolist() == [1, 1]


def in_several_files(folder: Path) -> Path:
    """The index of a checkpoint in two files of torch.save, as early versions of transformers wrote it."""
    shards = {"pytorch_model-00001-of-00002.bin": "a", "pytorch_model-00002-of-00002.bin": "b"}
    for shard, name in shards.items():
        torch.save({name: torch.full((2,), float(ord(name)))}, folder / shard)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {name: shard for shard, name in shards.items()}}))
    return index


def test_a_checkpoint_in_several_files_is_read_as_one(tmp_path: Path) -> None:
    read = read_checkpoint(in_several_files(tmp_path))
    assert {name: value.tolist() for name, value in read.items()} == {"a": [97, 97], "b": [98, 98]}
    assert weights_file(tmp_path) == tmp_path / "pytorch_model.bin.index.json"
    assert inspect_checkpoint(weights_file(tmp_path))[0].keys() == {"a", "b"}


def test_a_missing_or_damaged_one_of_several_files_is_named(tmp_path: Path) -> None:
    index = in_several_files(tmp_path)
    second = tmp_path / "pytorch_model-00002-of-00002.bin"
    second.write_bytes(second.read_bytes()[:100])
    with pytest.raises(UserError, match=r"00002-of-00002\.bin are cut or damaged"):
        read_checkpoint(index)
    second.unlink()
    with pytest.raises(UserError, match=r"in 2 files, and 'pytorch_model-00002-of-00002\.bin' are not there: copy"):
        read_checkpoint(index)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": []}}',
     '{"weight_map": {"a": "../w.bin"}}', '{"weight_map": {"a": "/w.bin"}}', '{"weight_map": {"a": ""}}'],
)  # fmt: skip
def test_an_index_that_names_no_files_beside_it_is_refused(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(UserError, match=r"index\.json .*: copy or download it again\."):
        read_checkpoint(index)


def test_a_page_saved_as_weights_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("<!DOCTYPE html>")
    with pytest.raises(UserError, match="would not begin with b'<!DOCTYPE html>'"):
        read_checkpoint(tmp_path / "w.pth")


def test_code_in_a_file_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickle that would execute code is refused."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("ran",))

    torch.save({"teacher": Evil()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="reading print could run code"):
        load_encoder(Backbone(TINY).net, tmp_path / "w.pth")
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match="do not exist"):
        load_encoder(Backbone(TINY).net, tmp_path / "missing.pth")
