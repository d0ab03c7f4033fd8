"""Files of a run: complete or absent, and of the right method."""

import errno
from pathlib import Path

import pytest
import torch

from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.models.backbone import Backbone
from fgfast.run import load_checkpoint, save_checkpoint, save_encoder
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


@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_broken_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    """Empty files, other files and missing files are refused."""
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(UserError, match="could not be read"):
        load_checkpoint(tmp_path / "last.pt", "simclr")
    with pytest.raises(UserError, match="no checkpoint"):
        load_checkpoint(tmp_path / "none.pt", "simclr")


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
