"""The optimiser, and a guard that skips steps whose loss is not finite without a device sync."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgfast.config import TrainConfig
from fgfast.errors import UserError
from fgfast.train.groups import parameter_groups
from fgfast.train.lars import LARS

LAG = 4  # steps after which the host reads a verdict
MAX_SKIPPED_IN_A_ROW = 10


def make_optimizer(
    module: nn.Module, config: TrainConfig, local: Callable[[nn.Parameter], nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """AdamW, SGD or LARS (momentum 0.9) over the groups of :func:`parameter_groups`.

    All are fused, as :class:`FiniteGuard` needs it. ``local`` gives what stands for a parameter on this rank.
    """
    groups = parameter_groups(module, config)
    if local is not None:
        groups = [{**group, "params": [local(p) for p in group["params"]]} for group in groups]
    if config.optimizer != "adamw":
        kind = LARS if config.optimizer == "lars" else torch.optim.SGD
        sgd = kind(groups, lr=config.lr, momentum=0.9, fused=True)
        _add_momentum(sgd)
        sgd.register_load_state_dict_post_hook(_add_momentum)
        return sgd
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def _add_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter without a momentum buffer one of zeros, which makes its first step that of PyTorch.

    The fused step takes buffers for all parameters or for none, and a stage of training may bring in new ones; it also
    leaves new buffers without values where it skips a step.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


@dataclass
class _Verdict:
    step: int
    flags: Tensor  # bool [3]: the step was finite; no rank was asked to stop; none asks for a checkpoint
    index: Tensor  # positions of the images of the batch in their set
    ready: torch.cuda.Event | None  # recorded after the copy of ``flags`` to the host


class FiniteGuard:
    """Skips the update of a step whose loss or gradient is not finite, and reports it a few steps later.

    The verdict stays on the device: the fused optimiser reads it there (``found_inf``), buffers that the forward pass
    has changed (BatchNorm's statistics, DINO's centre) are restored by a select, and the host reads it :data:`LAG`
    steps later.

    Args:
        module: the module that is trained.
        optimizer: a fused optimiser of its parameters.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.buffers = [b for b in module.buffers() if b.is_floating_point()]
        self.before: list[Tensor] = [b.clone() for b in self.buffers]
        self.pending: deque[_Verdict] = deque()
        self.skipped_in_a_row = 0
        self.skipped = 0
        self.counters = [b for b in module.buffers() if not b.is_floating_point()]
        self.marked: list[Tensor] = [b.clone() for b in self.counters]
        self.stop = False  # a rank was asked to stop; all ranks learn it at the same step
        self.save = False  # a rank asks for a checkpoint; all learn it at the same step

    @torch.no_grad()
    def step(
        self, loss: Tensor, grad_norm: Tensor, index: Tensor, step: int, *, stop: bool = False, save: bool = False
    ) -> None:
        """Make an optimiser step if ``loss`` and ``grad_norm`` are finite on all ranks.

        ``stop`` asks all ranks to stop, ``save`` to save a checkpoint.
        """
        finite = torch.isfinite(loss.detach()) & torch.isfinite(grad_norm.detach())
        flags = torch.stack([finite, *(torch.full_like(finite, not asked) for asked in (stop, save))])
        if dist.is_initialized() and dist.get_world_size() > 1:  # one rank's bad loss skips the step on all
            of_all_ranks = flags.float()
            dist.all_reduce(of_all_ranks, dist.ReduceOp.MIN)
            flags = of_all_ranks > 0
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

    @torch.no_grad()
    def mark(self) -> None:
        """Remember the counters among the buffers after a complete step; the others are copied by :meth:`step`."""
        if self.counters:
            torch._foreach_copy_(self.marked, self.counters)

    @torch.no_grad()
    def restore(self) -> None:
        """Give all buffers the values that they had after the last complete step."""
        for buffer, before in zip([*self.buffers, *self.counters], [*self.before, *self.marked], strict=True):
            buffer.copy_(before)

    def verdicts(self, *, wait: bool = False) -> list[tuple[int, list[int]]]:
        """Read the verdicts of all but the last :data:`LAG` steps.

        Args:
            wait: read those of the last steps too.

        Returns:
            The steps that were skipped, each with the positions of its images in their set.

        Raises:
            UserError: ten steps in a row were skipped.
        """
        skipped = []
        while self.pending and (wait or len(self.pending) > LAG):
            verdict = self.pending.popleft()
            if verdict.ready is not None:
                verdict.ready.synchronize()  # of a step some time ago: in practice it does not wait
            finite, no_stop, no_save = verdict.flags.tolist()
            self.stop |= not no_stop
            self.save |= not no_save
            if finite:
                self.skipped_in_a_row = 0
                continue
            self.skipped_in_a_row += 1
            self.skipped += 1
            skipped.append((verdict.step, verdict.index.tolist()))
            if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"The loss was not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row, the last of them step "
                    f"{verdict.step}: lower --lr, or check the weights given by --init."
                )
        return skipped
