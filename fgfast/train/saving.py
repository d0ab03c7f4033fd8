"""Writing checkpoints beside the training: the step waits for a copy of the state only."""

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from fgfast.data.normalise import IMAGENET, InputStats
from fgfast.run import save_newest
from fgfast.train.heartbeat import holding

log = logging.getLogger("fgfast")


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread.

    An error of a write is raised by the next call of any method; the files of the checkpoint before it stay whole.

    Args:
        run: run folder.
        confirm: called in the thread before the files of a checkpoint replace older ones; they stay if it fails.
    """

    def __init__(self, run: Path, confirm: Callable[[], object]) -> None:
        self.run, self.confirm = run, confirm
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(
        self, state: dict[str, Any], encoder: nn.Module, model: str, stats: InputStats = IMAGENET,
        exported: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Copy a state, and start to write it once the checkpoint before it is written.

        Args:
            state: tensors and plain values, in dictionaries and lists; it may change when this returns.
            encoder: network to export.
            model: timm's name of the network.
            stats: how images are resized and normalised for it.
            exported: tensors to export in place of those of the network, such as their average.
        """
        self.wait()
        copied, weights = copy_to_cpu((state, encoder.state_dict() | (exported or {})))
        how = {"stats": stats, "created_with": getattr(encoder, "created_with", None)}
        # not a daemon: the end of the process waits for it
        self.thread = threading.Thread(target=self._write, args=(copied, weights, model), kwargs=how, name="checkpoint")
        self.thread.start()

    def _write(self, state: dict[str, Any], weights: dict[str, Tensor], model: str, **how: Any) -> None:
        try:
            with holding():
                save_newest(self.run, state, weights, model, self.confirm, **how)
        except BaseException as error:  # raised again by check()
            self.error = error

    def check(self) -> None:
        """Raise the error of a write that has failed since the last call."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait until the checkpoint is written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the last checkpoint; an error of its writing does not hide the one that ends the run."""
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            log.warning("The last checkpoint could not be written: %s", failed)


def copy_to_cpu(state: Any) -> Any:
    """A deep copy of tensors and plain values in dictionaries and lists, with all tensors on the CPU.

    It shares no memory with ``state``. Tensors of the same memory, shape and type are one copy.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}
    memo: dict[int, Any] = {}
    for tensor in _tensors(state):
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in copies:
            copies[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
            copies[key].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        memo[id(tensor)] = copies[key]
    for device in {device for device, *_ in copies if device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return copy.deepcopy(state, memo)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
