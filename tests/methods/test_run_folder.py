"""Reading of run folders whose files were edited, damaged or lost."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fgfast.config import TrainConfig
from fgfast.config_text import to_toml
from fgfast.errors import UserError
from fgfast.methods.base import method_class
from fgfast.methods.jigsaw import Jigsaw, JigsawConfig
from fgfast.methods.run_folder import load_run_encoder, load_run_method, read_run
from fgfast.methods.simclr import SimCLRConfig
from fgfast.methods.srgan import SRGANConfig
from fgfast.report.draw import draw_run
from fgfast.run import save_checkpoint, save_newest
from fgfast.upscale import upscale
from tests.conftest import TINY

CPU = torch.device("cpu")
SIMCLR = SimCLRConfig(model=TINY, size=32, hidden=16, projection=8, device="cpu", threads=1)
JIGSAW = JigsawConfig(model=TINY, size=48, n_permutations=4, device="cpu", threads=1)
SRGAN = SRGANConfig(model="srgan", size=16, width=4, blocks=1, device="cpu", threads=1)


def write_run(run: Path, name: str, config: TrainConfig, written: TrainConfig) -> None:
    """The run folder of ``config`` with the config.toml of ``written``."""
    method = method_class(name)(config)
    save_checkpoint(run / "last.pt", {"name": name, "method": method.state_dict()})
    (run / "config.toml").write_text(to_toml(written, name))


def test_a_run_that_was_moved_is_read_where_it_is(tmp_path: Path) -> None:
    """Scores leave out the images that images.json beside the checkpoint holds out, not those of the first place."""
    write_run(tmp_path, "simclr", SIMCLR, replace(SIMCLR, out="elsewhere"))
    assert load_run_encoder(tmp_path, "last", CPU)[1].out == str(tmp_path)


@pytest.mark.parametrize(
    "edited", [replace(SIMCLR, model="test_convnext"), replace(SIMCLR, projection=16)], ids=["model", "head"]
)
def test_pictures_refuse_a_run_with_other_options_than_its_checkpoint(
    tmp_path: Path, drawn: Path, edited: SimCLRConfig
) -> None:
    write_run(tmp_path, "simclr", SIMCLR, edited)
    with pytest.raises(UserError, match="The weights of the checkpoint are of another network"):
        draw_run(tmp_path, drawn, device=CPU)


def test_srgan_refuses_a_run_with_other_options_than_its_checkpoint(tmp_path: Path) -> None:
    write_run(tmp_path, "srgan", SRGAN, replace(SRGAN, blocks=2))
    with pytest.raises(UserError, match="The weights of the checkpoint are of another network"):
        load_run_encoder(tmp_path, "last", CPU)
    with pytest.raises(UserError, match="The weights of the checkpoint are of another network"):
        upscale(tmp_path, [tmp_path / "a.png"], tmp_path / "out", device=CPU)


def test_the_method_of_a_run_has_the_weights_and_the_state_of_its_checkpoint(tmp_path: Path) -> None:
    method = Jigsaw(JIGSAW)
    method.step = 7
    save_checkpoint(tmp_path / "last.pt", {"name": "jigsaw", "method": method.state_dict()})
    loaded = load_run_method(tmp_path, "last", "jigsaw", JIGSAW)
    assert loaded.get_extra_state() == {"step": 7}
    assert all(torch.equal(value, method.state_dict()[name]) for name, value in loaded.named_parameters())


def test_a_run_whose_last_checkpoint_is_damaged_is_read_with_a_sentence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = Jigsaw(JIGSAW), Jigsaw(JIGSAW)
    (tmp_path / "config.toml").write_text(to_toml(JIGSAW, "jigsaw"))
    for step, method in ((1, before), (2, after)):
        save_newest(tmp_path, {"name": "jigsaw", "step": step, "method": method.state_dict()}, method.encoder.net, TINY)
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-1])
    methods = load_run_method(tmp_path, "last", "jigsaw", JIGSAW), load_run_encoder(tmp_path, "last", CPU)[0]
    for loaded, written in zip(methods, (before, before.encoder), strict=True):
        state = written.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in loaded.named_parameters())
    sentence = f"{tmp_path / 'last.pt'} is cut or damaged: {tmp_path / 'previous.pt'} of step 1 is used."
    assert [record.getMessage() for record in caplog.records] == [sentence] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method = 3", "has method = 3"), ('method = ["a"]', r"has method = \['a'\]"), ("", "names no method"),
        ('method = "simclear"', "has method = 'simclear'"),
    ],
)  # fmt: skip
def test_a_configuration_without_a_method_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(UserError, match=rf"config\.toml {message}: correct it to one of .*color, .*synthpair\."):
        read_run(tmp_path)


def test_a_lost_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds last\.pt without its config\.toml: restore that file"):
        read_run(tmp_path)
