"""Cross entropy between teacher and student, whose outputs are centred by a moving mean or by Sinkhorn."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgfast.losses.common import update_buffers
from fgfast.losses.over_ranks import count_valid, join_rows
from fgfast.tensors import accumulation, check_float, check_whole, shape_error

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DINOLoss(nn.Module):
    r"""Cross entropy between teacher and student of different views; signature and values of lightly's.

    .. math:: L = -\frac{1}{n} \sum_{t \ne s} \frac{1}{B} \sum_b \text{softmax}((x_t - c) / T_t) \cdot
              \log \text{softmax}(x_s / T_s)

    with n pairs of different views. After each call the centre c moves towards the teacher's mean over all ranks. The
    teacher gets no gradient, as in the authors' code; lightly's passes one on.

    With ``center_mode="sinkhorn"``, which lightly does not have, the targets are those of :func:`sinkhorn` on the rows
    of all teacher views and ranks instead, and the centre stays as it is.

    Args:
        output_dim: channels K.
        warmup_teacher_temp: T_t in epoch 0.
        teacher_temp: T_t after the warm-up.
        warmup_teacher_temp_epochs: epochs of the linear warm-up.
        student_temp: T_s.
        center_momentum: weight of the old centre in its moving average, 0 to 1.
        center_mode: "mean", or "sinkhorn" as in DINOv2.
        sinkhorn_iterations: of "sinkhorn".

    Returns:
        A scalar; float16 and bfloat16 outputs are computed and returned in float32.

    Raises:
        TypeError: an output is no tensor of floats, or outputs are not in a list.
        ValueError: another mode of the centre, no iteration, fewer than two views, an empty batch, or shapes that do
            not fit.

    Example:
        >>> import torch
        >>> from fgfast.losses import DINOLoss
        >>> views = [torch.zeros(2, 4), torch.zeros(2, 4)]
        >>> round(DINOLoss(output_dim=4)(views, views).item(), 4)  # log 4
        1.3863

    Source:
        arXiv 2104.14294; values as in lightly 1.6. Sinkhorn: arXiv 2304.07193.
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
        *,
        sinkhorn_iterations: int = 3,
    ):
        super().__init__()
        if center_mode not in ("mean", "sinkhorn"):
            raise ValueError(f"center_mode is {center_mode!r}: give 'mean' or 'sinkhorn'.")
        check_whole("sinkhorn_iterations", sinkhorn_iterations)
        if sinkhorn_iterations < 1:
            raise ValueError(f"sinkhorn_iterations is {sinkhorn_iterations}: give at least 1.")
        self.center_mode, self.sinkhorn_iterations = center_mode, sinkhorn_iterations
        self.warmup_teacher_temp, self.teacher_temp = warmup_teacher_temp, teacher_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, 1, output_dim))

    @property
    def teacher_temp_schedule(self) -> Tensor:
        """T_t of each epoch of the warm-up."""
        return torch.linspace(self.warmup_teacher_temp, self.teacher_temp, self.warmup_teacher_temp_epochs)

    def temperature_at(self, epoch: float | None) -> float:
        """T_t of an epoch: linear from the first to the last epoch of the warm-up, teacher_temp afterwards."""
        if epoch is None or epoch >= self.warmup_teacher_temp_epochs:
            return self.teacher_temp
        fraction = min(epoch / max(self.warmup_teacher_temp_epochs - 1, 1), 1)
        return self.warmup_teacher_temp + fraction * (self.teacher_temp - self.warmup_teacher_temp)

    def forward(
        self,
        teacher_out: Sequence[Tensor],
        student_out: Sequence[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
        *,
        valid: Tensor | None = None,
        group: "ProcessGroup | None" = None,
    ) -> Tensor:
        """Loss of the outputs, [B, K] per view; teacher_temp takes precedence over the warm-up of epoch.

        With ``valid``, bool [B], the mean over images and the centre are those of the valid images of all ranks of
        ``group`` (None: of this process), the loss world size x local sum / global count. Without it the loss is that
        of this process and the centre that of the default group. Sinkhorn takes the rows that the centre would.
        """
        self._check_types(teacher_out=teacher_out, student_out=student_out)
        pairs = len(teacher_out) * len(student_out) - min(len(teacher_out), len(student_out))
        if pairs <= 0:
            raise ValueError("Outputs of at least two views are needed, for pairs of different views.")
        self._check_shapes(teacher_out=teacher_out, student_out=student_out)
        temperature = self.temperature_at(epoch) if teacher_temp is None else teacher_temp
        centred = _default_group() if valid is None and group is None else group
        teacher = torch.stack([_select(x.detach(), valid) for x in teacher_out])  # [V, B, K]
        if self.center_mode == "mean":
            target = ((teacher - self.center) / temperature).softmax(-1)
        else:
            rows, kept = (teacher / temperature).flatten(0, 1), None if valid is None else valid.repeat(len(teacher))
            target = sinkhorn(rows, self.sinkhorn_iterations, kept, centred).view_as(teacher)
        target = _select(target, valid)
        total, of_all = target.new_zeros(()), target.sum(0)
        for s, x in enumerate(student_out):
            log_prob = (_select(x, valid) / self.student_temp).log_softmax(-1)
            others = of_all if s >= len(target) else torch.cat([target[:s], target[s + 1 :]]).sum(0)
            total = total - (others * log_prob).sum()
        if self.center_mode == "mean":
            update_buffers(partial(self._update_center, group=centred), teacher, *([] if valid is None else [valid]))
        return total / (pairs * (teacher.shape[1] if valid is None else count_valid(valid, group)))

    @staticmethod
    def _check_types(**outputs: Sequence[Tensor]) -> None:
        """Raise unless both are lists of tensors of floats, or one such tensor whose first dimension is the views."""
        for name, views in outputs.items():
            if not isinstance(views, Sequence) and not (isinstance(views, Tensor) and views.dim()):
                raise TypeError(f"{name} is a {type(views).__name__}: give a list of tensors [B, K], one a view.")
            for i, x in enumerate(views):
                check_float(f"{name}[{i}]", x)

    def _check_shapes(self, **outputs: Sequence[Tensor]) -> None:
        """Raise unless every output of a view is [B, K] with one B of at least 1."""
        first, k = outputs["teacher_out"][0], self.center.shape[-1]
        if not first.dim() or not len(first):
            raise shape_error("teacher_out[0]", f"[B, {k}] with B at least 1", first)
        shape = [len(first), k]
        for name, views in outputs.items():
            for i, x in enumerate(views):
                if list(x.shape) != shape:
                    raise shape_error(f"{name}[{i}]", str(shape), x)

    def update_center(self, teacher_out: Tensor) -> None:
        """Move the centre towards the mean over views and batch of the teacher's outputs [V, B, K] of all ranks."""
        update_buffers(partial(self._update_center, group=_default_group()), teacher_out)

    @torch.no_grad()
    def _update_center(
        self, teacher_out: Tensor, valid: Tensor | None = None, group: "ProcessGroup | None" = None
    ) -> None:
        rows = _select(teacher_out, valid)
        count = rows.new_tensor(rows.shape[1]) if valid is None else valid.sum().to(rows.dtype)
        total, count = rows.sum((0, 1), keepdim=True), len(rows) * count
        if group is not None:
            sums = torch.cat([total.flatten(), count[None]])
            dist.all_reduce(sums, group=group)
            total, count = sums[:-1].view_as(total), sums[-1]
        mean = (total / count.clamp(min=1)).to(self.center.dtype)
        moved = (self.center * self.center_momentum).add_(mean, alpha=1 - self.center_momentum)
        self.center.copy_(torch.where(count > 0, moved, self.center))


def _default_group() -> "ProcessGroup | None":
    """The default group, if there is one."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _select(x: Tensor, valid: Tensor | None) -> Tensor:
    """Rows [..., B, K] in the dtype of sums, with zeros where ``valid`` [B] is False, whatever stood there."""
    x = x.to(accumulation(x.dtype))
    return x if valid is None else torch.where(valid[:, None], x, 0)


@torch.no_grad()
def sinkhorn(
    logits: Tensor, iterations: int = 3, valid: Tensor | None = None, group: "ProcessGroup | None" = None
) -> Tensor:
    r"""Probabilities of the outputs in which every output has about the same total, by Sinkhorn's algorithm.

    From :math:`Q = \exp(x)`, each iteration divides the columns of Q by their sums over the rows of all ranks, then the
    rows by their sums. It is computed in logarithms, so that nothing overflows.

    Args:
        logits: x, float [N, K]: the teacher's outputs divided by its temperature.
        iterations: at least 1.
        valid: bool [N]; the other rows affect no valid one, and what is returned for them means nothing.
        group: the ranks, each with as many rows; None for this process alone.

    Returns:
        [N, K], float32 or float64; every row has the sum 1. There is no gradient.

    Example:
        >>> sinkhorn(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), 50).sum(0).round(decimals=3).tolist()
        [1.0, 1.0]

    Source: Cuturi, "Sinkhorn Distances", 2013; its use for targets: Caron et al., 2020 (arXiv 2006.09882), and DINOv2.
    """
    log_q = logits.to(accumulation(logits.dtype))
    if valid is not None:
        log_q = torch.where(valid[:, None], log_q, -torch.inf)
    for _ in range(iterations):
        column = join_rows(log_q.logsumexp(0, keepdim=True), group).logsumexp(0)
        log_q = log_q - torch.where(column > -torch.inf, column, 0)  # no valid row at all
        row = log_q.logsumexp(1, keepdim=True)
        log_q = log_q - torch.where(row > -torch.inf, row, 0)
    return log_q.exp()
