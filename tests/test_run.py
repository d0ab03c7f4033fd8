"""Files of a run: complete or absent, and of the right method."""

import errno
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.models.backbone import Backbone
from fgfast.run import load_checkpoint, save_checkpoint, save_encoder
from tests.conftest import TINY
from tests.examples import examples


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


@given(st.floats(0, 1, exclude_max=True))
@example(0.0)
@example(0.05)  # torch raises an OSError
@examples(30)
def test_a_cut_checkpoint_is_refused(saved: tuple[Path, bytes], share: float) -> None:
    file, whole = saved
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"copy or download it again|restore it from a copy"):
        load_checkpoint(file, "simclr")


@given(st.data())
@examples(60)
def test_a_checkpoint_with_another_bit_is_refused_or_the_same(saved: tuple[Path, bytes], data: st.DataObject) -> None:
    """Bits of weights included, which torch.load reads without a word; some bits of the file mean nothing."""
    file, whole = saved
    content = bytearray(whole)
    content[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    try:
        state = load_checkpoint(file, "simclr")
    except UserError:
        return
    assert (state["name"], state["step"]) == ("simclr", 3)
    assert torch.equal(state["method"]["weight"], torch.arange(200.0))


def test_another_weight_in_a_checkpoint_is_found(saved: tuple[Path, bytes]) -> None:
    file, whole = saved
    place = whole.index(torch.arange(200.0).numpy().tobytes()) + 402
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(UserError, match=r"last\.pt is cut or damaged \(.*\): restore it from a copy"):
        load_checkpoint(file, "simclr")


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
