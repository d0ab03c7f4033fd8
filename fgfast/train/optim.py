"""The optimiser, its schedule, and the guard that skips a step whose loss is not finite without a device sync."""

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgfast.config import TrainConfig
from fgfast.errors import UserError

LAG = 4  # steps until a verdict is read
MOST_IN_A_ROW = 10


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Fused AdamW or SGD (momentum 0.9) over the trainable parameters; vectors and scalars get no weight decay."""
    params = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of a step, counted from 0."""
    return config.learning_rate(step, total)


@dataclass
class _Verdict:
    step: int
    flags: Tensor  # bool [2]: the step was finite; no rank was asked to stop
    index: Tensor
    ready: torch.cuda.Event | None  # when the copy of ``flags`` to the host is complete


class FiniteGuard:
    """Skips the update of a step whose loss or gradient is not finite, and tells of it a few steps late.

    The verdict stays on the device: the fused optimiser reads it there (``found_inf``), buffers that the forward
    pass moved (BatchNorm's statistics, DINO's centre) are put back by a select, and the host reads it :data:`LAG`
    steps later.

    Args:
        module: what is trained.
        optimizer: a fused optimiser of it.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.buffers = [b for b in module.buffers() if b.is_floating_point()]
        self.before: list[Tensor] = [b.clone() for b in self.buffers]
        self.pending: deque[_Verdict] = deque()
        self.in_a_row = 0
        self.skipped = 0
        self.stop = False  # a rank was asked to stop, and every rank reads so at the same step

    @torch.no_grad()
    def step(self, loss: Tensor, grad_norm: Tensor, index: Tensor, step: int, *, stop: bool = False) -> None:
        """One optimiser step where ``loss`` and ``grad_norm`` are finite, none elsewhere; ``stop`` tells all ranks."""
        finite = torch.isfinite(loss.detach()) & torch.isfinite(grad_norm.detach())
        flags = torch.stack([finite, torch.full_like(finite, not stop)])
        if dist.is_initialized() and dist.get_world_size() > 1:  # one rank's bad loss skips the step on all
            joined = flags.float()
            dist.all_reduce(joined, dist.ReduceOp.MIN)
            flags = joined > 0
            finite = flags[0]
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.grad_scale = torch.ones_like(self.optimizer.found_inf)  # type: ignore[attr-defined]
        self.optimizer.step()
        for now, before in zip(self.buffers, self.before, strict=True):
            torch.where(finite, now, before, out=before)
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.before)
        verdict, ready = flags.to("cpu", non_blocking=True), None
        if finite.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self.pending.append(_Verdict(step, verdict, index, ready))

    def verdicts(self, *, all_of_them: bool = False) -> list[tuple[int, list[int]]]:
        """The skipped steps whose verdicts have come in, each with the numbers of its images.

        Raises:
            UserError: ten steps in a row were skipped.
        """
        found = []
        while self.pending and (all_of_them or len(self.pending) > LAG):
            verdict = self.pending.popleft()
            if verdict.ready is not None:
                verdict.ready.synchronize()  # of a step long past: no wait in practice
            finite, no_stop = verdict.flags.tolist()
            self.stop |= not no_stop
            if finite:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            self.skipped += 1
            found.append((verdict.step, verdict.index.tolist()))
            if self.in_a_row >= MOST_IN_A_ROW:
                raise UserError(
                    f"The loss was not finite in {MOST_IN_A_ROW} steps in a row, the last one step {verdict.step}: "
                    "lower --lr, or check the weights given by --init."
                )
        return found
