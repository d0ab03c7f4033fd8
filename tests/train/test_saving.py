"""Checkpoints written beside the training: what is saved, and what is left when that fails."""

import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fgfast.errors import UserError
from fgfast.run import load_newest
from fgfast.train.saving import CheckpointWriter, copy_to_cpu

NAME = "resnet18"


def state_of(net: nn.Module, step: int) -> dict[str, Any]:
    return {"name": "simclr", "step": step, "method": net.state_dict(), "ranks": [{"buffers": {"b": net.weight}}]}


@pytest.fixture
def net() -> nn.Linear:
    return nn.Linear(300, 200)


def saved_step(run: Path) -> int:
    return int(load_newest(run, "simclr")[0]["step"])


def test_training_during_the_write_does_not_change_what_is_saved(tmp_path: Path, net: nn.Linear) -> None:
    before = net.weight.detach().clone()
    changed = threading.Event()
    state = state_of(net, 1)
    writer = CheckpointWriter(tmp_path, lambda: None)
    real = torch.save

    def late(*args: Any) -> None:
        assert changed.wait(10)
        real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", late)
        writer.save(state, net, NAME)
        with torch.no_grad():
            net.weight.zero_()
        state["step"] = 2
        state["ranks"].clear()
        changed.set()
        writer.wait()
    stored, _ = load_newest(tmp_path, "simclr")
    assert stored["step"] == 1
    for weight in (stored["method"]["weight"], stored["ranks"][0]["buffers"]["b"]):
        assert torch.equal(weight, before)
    assert torch.equal(load_file(tmp_path / "encoder.safetensors")["weight"], before)


def test_a_copy_shares_no_memory_and_copies_each_tensor_once(net: nn.Linear) -> None:
    image = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    state = OrderedDict({"a": net.weight, "again": [net.weight.detach(), ({"b": image}, 3, None)]})
    state._metadata = {"version": 2}  # type: ignore[attr-defined]
    copied = copy_to_cpu(state)
    weight, ((inner, *plain),) = copied["again"][0], copied["again"][1:]
    assert type(copied) is OrderedDict
    assert copied._metadata == {"version": 2}  # type: ignore[attr-defined]
    assert copied["a"].data_ptr() == weight.data_ptr() != net.weight.data_ptr()
    assert not copied["a"].requires_grad
    assert torch.equal(weight, net.weight)
    assert plain == [3, None]
    assert torch.equal(inner["b"], image)
    assert inner["b"].stride() == image.stride()
    assert inner["b"].data_ptr() != image.data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(0, 3), torch.ones(3).expand(2, 3), torch.arange(6).view(2, 3).T[1:], torch.tensor(3.0)],
    ids=["empty", "expanded", "part", "scalar"],
)
def test_any_tensor_is_copied_with_its_values(tensor: Tensor) -> None:
    copied = copy_to_cpu({"a": tensor, "b": tensor + 1})
    assert torch.equal(copied["a"], tensor)
    assert torch.equal(copied["b"], tensor + 1)


def test_a_save_waits_for_the_one_before(tmp_path: Path, net: nn.Linear) -> None:
    release, confirmed = threading.Event(), []

    def confirm() -> None:
        assert release.wait(10)
        confirmed.append(threading.current_thread().name)

    writer = CheckpointWriter(tmp_path, confirm)
    writer.save(state_of(net, 1), net, NAME)
    second = threading.Thread(target=writer.save, args=(state_of(net, 2), net, NAME))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    assert writer.thread is not None
    assert not writer.thread.daemon  # the end of the process waits too
    assert not (tmp_path / "last.pt").exists()
    release.set()
    second.join()
    writer.wait()
    assert confirmed == ["checkpoint"] * 2
    assert saved_step(tmp_path) == 2


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A write beyond ``size`` bytes of a file is an OSError, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_at_any_moment_keeps_all_files(tmp_path: Path, net: nn.Linear) -> None:
    """The limits end the write of last.pt in its first record, within the weights, and in its checksum."""
    writer = CheckpointWriter(tmp_path, lambda: None)
    for step in (1, 2):
        writer.save(state_of(net, step), net, NAME)
    writer.wait()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    size = (tmp_path / "last.pt").stat().st_size
    for limit in (0, 100, size // 2, size - 100, size - 40, size - 1):
        with files_of_at_most(limit):
            writer.save(state_of(net, 3), net, NAME)
            with pytest.raises(OSError, match="File too large") as caught:
                writer.wait()
        assert caught.value.filename == str(tmp_path / "last.pt")
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    writer.save(state_of(net, 3), net, NAME)
    writer.wait()
    assert saved_step(tmp_path) == 3


def test_a_disk_that_is_full_after_the_checkpoint_keeps_all_files(tmp_path: Path, net: nn.Linear) -> None:
    """The encoder is larger than the checkpoint here."""
    writer = CheckpointWriter(tmp_path, lambda: None)
    for step in (1, 2):
        writer.save({"name": "simclr", "step": step}, net, NAME)
    writer.wait()
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with files_of_at_most(100_000):
        writer.save({"name": "simclr", "step": 3}, net, NAME)
        with pytest.raises(OSError, match="File too large"):
            writer.wait()
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


CALLS: dict[str, Callable[[CheckpointWriter, nn.Module], None]] = {
    "check": lambda writer, _: writer.check(),
    "wait": lambda writer, _: writer.wait(),
    "save": lambda writer, net: writer.save({"name": "simclr", "step": 2}, net, NAME),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_error_in_the_thread_is_raised_once_by_the_next_call(tmp_path: Path, net: nn.Linear, call: str) -> None:
    writer = CheckpointWriter(tmp_path, Mock(side_effect=UserError("taken over")))
    writer.save({"name": "simclr", "step": 1}, net, NAME)
    assert writer.thread is not None
    writer.thread.join()
    with pytest.raises(UserError, match="taken over"):
        CALLS[call](writer, net)
    writer.wait()
    assert not list(tmp_path.iterdir())
