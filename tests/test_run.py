"""Files of a run: complete or absent, and of the right method."""

import contextlib
import errno
import itertools
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.models.backbone import Backbone
from fgfast.run import (
    has_checkpoint,
    load_checkpoint,
    load_newest,
    read_options,
    save_checkpoint,
    save_encoder,
    save_newest,
)  # fmt: skip
from tests.conftest import TINY


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """A disk that fills up during a write changes nothing and leaves no partial file."""
    file = tmp_path / "last.pt"
    save_checkpoint(file, {"name": "simclr", "step": 1})
    before = file.read_bytes()

    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(OSError, match="No space"):
        write_atomic(file, full)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_checkpoint_of_another_method_is_refused(tmp_path: Path) -> None:
    """The message names both methods."""
    save_checkpoint(tmp_path / "last.pt", {"name": "simclr"})
    with pytest.raises(UserError, match=r"'simclr', not 'particle'"):
        load_checkpoint(tmp_path / "last.pt", "particle")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A file for checkpoints, and the content of a whole one."""
    file = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    save_checkpoint(file, {"name": "simclr", "step": 3, "method": {"weight": torch.arange(200.0)}})
    return file, file.read_bytes()


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path / "none.pt", "simclr")


def test_a_checkpoint_cut_at_any_length_is_refused(saved: tuple[Path, bytes]) -> None:
    file, whole = saved
    file.write_bytes(whole)
    for length in reversed(range(len(whole))):
        os.truncate(file, length)
        with pytest.raises(UserError, match=r"last\.pt is cut or damaged \(.*\): restore it from a copy"):
            load_checkpoint(file, "simclr")


def test_a_checkpoint_with_any_other_bit_is_refused(saved: tuple[Path, bytes]) -> None:
    file, whole = saved
    file.write_bytes(whole)
    with file.open("rb+", buffering=0) as stored:
        for place, bit in itertools.product(range(len(whole)), range(8)):
            os.pwrite(stored.fileno(), bytes([whole[place] ^ 1 << bit]), place)
            with pytest.raises(UserError, match=r"last\.pt is cut or damaged \(.*\): restore it from a copy"):
                load_checkpoint(file, "simclr")
            os.pwrite(stored.fileno(), whole[place : place + 1], place)
    assert load_checkpoint(file, "simclr")["step"] == 3


@pytest.mark.parametrize("more", [b"", b"PK", b"x" * 78])
def test_a_checkpoint_with_more_at_its_end_is_refused(saved: tuple[Path, bytes], more: bytes) -> None:
    file, whole = saved
    file.write_bytes(whole + more)
    with pytest.raises(UserError, match="cut or damaged") if more else contextlib.nullcontext():
        load_checkpoint(file, "simclr")


def test_a_checkpoint_of_an_earlier_version_loads_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"name": "simclr", "step": 3}, tmp_path / "last.pt")
    assert load_checkpoint(tmp_path / "last.pt", "simclr")["step"] == 3
    assert [r.getMessage() for r in caplog.records] == [
        f"{tmp_path / 'last.pt'} has no checksum, as earlier versions wrote none: not all damage to it would be found"
    ]


def test_another_weight_in_a_checkpoint_of_an_earlier_version_is_found(tmp_path: Path) -> None:
    file = tmp_path / "last.pt"
    torch.save({"name": "simclr", "weight": torch.arange(200.0)}, file)
    whole = file.read_bytes()
    place = whole.index(torch.arange(200.0).numpy().tobytes()) + 402
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError, match=r"last\.pt is cut or damaged \(last/data/0\): restore it from a copy"):
        load_checkpoint(file, "simclr")


def test_other_programs_read_a_checkpoint(saved: tuple[Path, bytes]) -> None:
    file, whole = saved
    file.write_bytes(whole)
    assert torch.load(file, weights_only=True)["step"] == 3
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None


def save_step(run: Path, step: int, confirm: Callable[[], object] = lambda: None) -> None:
    save_newest(run, {"name": "simclr", "step": step}, nn.Linear(1, 1), TINY, confirm)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    assert not has_checkpoint(tmp_path)
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    assert [load_checkpoint(tmp_path / name, "simclr")["step"] for name in ("previous.pt", "last.pt")] == [2, 3]
    assert sorted(contents(tmp_path)) == ["encoder.safetensors", "last.pt", "previous.pt"]
    assert load_newest(tmp_path, "simclr")[1] == []


def test_a_whole_last_checkpoint_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 1)
    seen = []

    def observed(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            value = change(*args)
            seen.append(load_checkpoint(tmp_path / "last.pt", "simclr")["step"])
            return value

        return call

    monkeypatch.setattr(os, "link", observed(os.link))
    monkeypatch.setattr(Path, "replace", observed(Path.replace))
    save_step(tmp_path, 2)
    assert seen == [1, 1, 1, 2]  # after the encoder, the link, previous.pt and last.pt


def test_a_process_killed_between_its_two_renames_does_no_harm(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    os.link(tmp_path / "last.pt", tmp_path / "previous.pt")
    save_step(tmp_path, 2)
    assert [load_checkpoint(tmp_path / name, "simclr")["step"] for name in ("previous.pt", "last.pt")] == [1, 2]
    assert len(contents(tmp_path)) == 3


def test_two_checkpoints_are_kept_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(errno.EPERM, "Operation not permitted")))
    for step in (1, 2):
        save_step(tmp_path, step)
    assert [load_checkpoint(tmp_path / name, "simclr")["step"] for name in ("previous.pt", "last.pt")] == [1, 2]
    assert len(contents(tmp_path)) == 3


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200] + bytes(200))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "what"), [(damage, "cut or damaged"), (cut, "cut or damaged"), (Path.unlink, "missing")]
)
def test_the_previous_checkpoint_stands_in_with_a_sentence(
    tmp_path: Path, spoil: Callable[[Path], object], what: str
) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    spoil(tmp_path / "last.pt")
    assert has_checkpoint(tmp_path)
    state, notes = load_newest(tmp_path, "simclr")
    assert state["step"] == 1
    assert notes == [f"{tmp_path / 'last.pt'} is {what}: {tmp_path / 'previous.pt'} of step 1 is used."]


def test_two_damaged_checkpoints_are_both_named(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    damage(tmp_path / "last.pt")
    damage(tmp_path / "previous.pt")
    with pytest.raises(UserError, match=r"last\.pt is cut or damaged and .*previous\.pt is cut or damaged: rest"):
        load_newest(tmp_path, "simclr")


def test_a_damaged_checkpoint_never_replaces_the_whole_one_before_it(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    damage(tmp_path / "last.pt")
    save_step(tmp_path, 3)
    assert [load_checkpoint(tmp_path / name, "simclr")["step"] for name in ("previous.pt", "last.pt")] == [1, 3]


def test_a_claim_that_is_lost_leaves_all_files(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="lost"):
        save_step(tmp_path, 2, Mock(side_effect=UserError("lost")))
    assert contents(tmp_path) == before


def test_timm_loads_the_encoder_file(tmp_path: Path) -> None:
    """The file encoder.safetensors is one that timm loads directly, with the same features."""
    import timm

    encoder = Backbone(TINY, size=32).eval()
    save_encoder(tmp_path / "encoder.safetensors", encoder.net, TINY)
    loaded = timm.create_model(TINY, num_classes=0, checkpoint_path=str(tmp_path / "encoder.safetensors")).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), encoder(x))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_full_disk_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch reports a full disk as a RuntimeError; here it is an OSError that names the file."""
    real = Path.open
    full = lambda p, mode="r", **more: real(Path("/dev/full") if mode == "wb" else p, mode, **more)  # noqa: E731
    monkeypatch.setattr(Path, "open", full)
    encoder = Backbone(TINY, size=32)
    for save in (
        lambda p: save_checkpoint(p, {"name": "simclr", "x": torch.zeros(100_000)}),
        lambda p: save_encoder(p, encoder.net, TINY),
    ):
        with pytest.raises(OSError, match="No space left") as error:
            save(tmp_path / "out")
        assert error.value.errno == errno.ENOSPC
        assert error.value.filename == str(tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["last.pt", "previous.pt"])
def test_a_checkpoint_without_its_configuration_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"holds {name} without its config.toml"):
        read_options(tmp_path)
