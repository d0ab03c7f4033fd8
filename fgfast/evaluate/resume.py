"""The state of a training in an evaluation, from which an interrupted call resumes exactly."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fgfast.data.loader import Loader
from fgfast.errors import UserError
from fgfast.run import read_state, save_checkpoint

log = logging.getLogger("fgfast")


class Progress:
    """Saves and loads what a training loop needs to go on: weights, optimizer, position in the data, random numbers.

    Args:
        file: the file; None keeps nothing.
        call: identifies the call; the state of another call is ignored.
        modules: all networks that are trained.
        optimizer: their optimizer.
        loader: the loader of the batches.
    """

    def __init__(
        self, file: Path | None, call: dict[str, Any], modules: nn.Module, optimizer: torch.optim.Optimizer,
        loader: Loader,
    ) -> None:  # fmt: skip
        self.file, self.call = file, call
        self.modules, self.optimizer, self.loader = modules, optimizer, loader
        self.device = next(modules.parameters()).device

    def save(self, epoch: int, **more: Any) -> None:
        """Save the state after ``epoch`` epochs, with further tensors and plain values."""
        if self.file is None:
            return
        state = {
            "modules": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(), "epoch": epoch,
            "what": self.call, "loader": self.loader.state_dict(), "rng": torch.get_rng_state(), **more,
        }  # fmt: skip
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        save_checkpoint(self.file, state)

    def load(self) -> dict[str, Any]:
        """Restore the state of an interrupted call and return it; {"epoch": 0} if there is none.

        A damaged state is left out with a warning.
        """
        none = {"epoch": 0}
        if self.file is None or not self.file.is_file():
            return none
        try:
            state = read_state(self.file)
        except UserError:
            log.warning("%s is cut or damaged: training starts from the beginning.", self.file)
            return none
        if state.get("what") != self.call:
            return none
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.loader.load_state_dict(state["loader"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        return state
