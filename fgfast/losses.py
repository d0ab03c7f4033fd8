"""Losses as modules: each a few lines over ``contrastive_loss``, with the names and values that people know."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fgfast.ops._tensors import check_integers, check_tensor
from fgfast.ops.contrast import contrastive_loss
from fgfast.ops.ids import Ids
from fgfast.ops.ring import global_ids

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _check_temperature(temperature: float) -> None:
    if not (temperature >= 1e-8 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}: give a finite number of 1e-8 or more.")


def _check_vectors(**named: Tensor) -> None:
    """Vectors [B, D], all of one shape, under the names that the caller knows."""
    for name, x in named.items():
        check_tensor(name, x)
        if x.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: give one vector a row, [B, D].")
    shapes = {name: tuple(x.shape) for name, x in named.items()}
    if len(set(shapes.values())) > 1:
        found = " and ".join(f"{name} has shape {shape}" for name, shape in shapes.items())
        raise ValueError(f"{found}: give both as [B, D].")


def _world(gather_distributed: bool) -> "ProcessGroup | None":
    """The default group where one is wanted, set up and larger than one process."""
    ready = gather_distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if ready else None


def _everywhere(ids: Ids, group: "ProcessGroup | None") -> Ids:
    return ids if group is None else global_ids(ids, group)


def _pairs(n: int, device: torch.device) -> tuple[Ids, Ids]:
    """Ids of n images with one part, in view 0 and in view 1."""
    image = torch.arange(n, device=device)
    zero = torch.zeros_like(image)
    return Ids(image, zero, zero), Ids(image, zero, zero + 1)


class NTXentLoss(nn.Module):
    r"""Normalised temperature-scaled cross entropy of two views (SimCLR); signature and values of lightly's.

    .. math:: \ell_i = -\log \frac{e^{s_{ij}}}{\sum_{k \ne i} e^{s_{ik}}}, \quad s = \cos / T,

    averaged over the 2 B vectors, j being the other view of i. With a memory bank the negatives are the bank alone, and
    only the first view is a query (MoCo).

    Args:
        temperature: T, at least 1e-8.
        memory_bank_size: 0, or (number of vectors, channels); the bank starts with random directions.
        gather_distributed: contrast with the vectors of all ranks.

    Raises:
        ValueError: the temperature is too small, or the bank's size is not a pair.

    Example:
        >>> import torch
        >>> from fgfast.losses import NTXentLoss
        >>> x = torch.eye(4)
        >>> round(NTXentLoss(temperature=1.0)(x, x).item(), 4)  # log(e + 6) - 1
        1.1654

    Source:
        arXiv 2002.05709; values as in lightly 1.6.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ):
        super().__init__()
        _check_temperature(temperature)
        size = (memory_bank_size,) if isinstance(memory_bank_size, int) else tuple(memory_bank_size)
        if size != (0,) and (len(size) != 2 or min(size) < 0):
            raise ValueError(f"memory_bank_size is {memory_bank_size}: give 0 or (number of vectors, channels).")
        self.temperature, self.gather_distributed = temperature, gather_distributed
        bank = F.normalize(torch.randn(size), dim=-1) if len(size) == 2 else torch.zeros(0)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.int64), persistent=False)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        """Loss of the vectors [B, D] of two views of the same B images."""
        _check_vectors(out0=out0, out1=out1)
        first, second = _pairs(len(out0), out0.device)
        group = _world(self.gather_distributed)
        if len(self.bank):
            bank = self.bank.to(out0.dtype, copy=True)
            if out0.requires_grad:
                self._enqueue(F.normalize(out1.detach(), dim=1))
            return contrastive_loss(
                out0,
                out1,
                query_ids=first,
                key_ids=second,
                temperature=self.temperature,
                negatives="same_image",
                bank=bank,
            )
        both = torch.cat([out0, out1])
        ids = _everywhere(Ids(*(torch.cat(pair) for pair in zip(first, second, strict=True))), group)
        return contrastive_loss(both, both, query_ids=ids, key_ids=ids, temperature=self.temperature, group=group)

    @torch.no_grad()
    def _enqueue(self, batch: Tensor) -> None:
        """Write the batch over the oldest vectors; what does not fit before the end of the bank is dropped."""
        if _world(self.gather_distributed) is not None:
            gathered = [torch.empty_like(batch) for _ in range(dist.get_world_size())]
            dist.all_gather(gathered, batch.contiguous())
            batch = torch.cat(gathered)
        start = int(self.bank_ptr)
        n = min(len(batch), len(self.bank) - start)
        self.bank[start : start + n] = batch[:n].to(self.bank.dtype)
        self.bank_ptr[0] = start + len(batch) if start + len(batch) < len(self.bank) else 0


class DetConBLoss(nn.Module):
    r"""DetCon-B: predictions of regions against target regions of both views; signature and values of lightly's.

    .. math:: L = \sum_{v \in \{0, 1\}} \frac{1}{B M} \sum_{b, m} \frac{\ell_{v b m}}{|\{m' : \text{id}_{m'} =
              \text{id}_m\}|}

    with the loss of a region as in ``contrastive_loss``: positives are the regions of the same id in the other view,
    the region itself in its own view is left out, everything else is a negative.

    Args:
        temperature: at least 1e-8.
        gather_distributed: contrast with the targets of all ranks.

    Raises:
        ValueError: the temperature is too small.

    Example:
        >>> import torch
        >>> from fgfast.losses import DetConBLoss
        >>> x, ids = torch.eye(3)[None], torch.arange(3)[None]  # one image, three regions
        >>> round(DetConBLoss(temperature=1.0)(x, x, x, x, ids, ids).item(), 4)  # 2 (log(e + 4) - 1)
        1.8097

    Source:
        arXiv 2103.10957; values as in lightly 1.6, except that id -1 means an absent region.
    """

    def __init__(self, temperature: float = 0.1, gather_distributed: bool = True):
        super().__init__()
        _check_temperature(temperature)
        self.temperature, self.gather_distributed = temperature, gather_distributed

    def forward(
        self,
        pred_view0: Tensor,
        pred_view1: Tensor,
        target_view0: Tensor,
        target_view1: Tensor,
        mask_view0: Tensor,
        mask_view1: Tensor,
    ) -> Tensor:
        """Loss of predictions and targets [B, M, D] with the ids of their regions [B, M]."""
        check_integers("mask_view0", mask_view0)
        check_integers("mask_view1", mask_view1)
        vectors, maps = (pred_view0, pred_view1, target_view0, target_view1), (mask_view0, mask_view1)
        if any(v.ndim != 3 or v.shape != pred_view0.shape for v in vectors) or any(
            m.shape != pred_view0.shape[:2] for m in maps
        ):
            raise ValueError(
                f"The views are {[tuple(v.shape) for v in vectors]}, the masks {[tuple(m.shape) for m in maps]}: "
                "give vectors [B, M, D] and ids [B, M]."
            )
        masks = torch.stack([mask_view0, mask_view1])  # [2, B, M]
        view, image, _ = (
            i.reshape(-1) for i in torch.meshgrid(*(_arange(n, masks) for n in masks.shape), indexing="ij")
        )
        group = _world(self.gather_distributed)
        ids = _everywhere(Ids(image, masks.reshape(-1), view), group)
        repeats = (masks[..., :, None] == masks[..., None, :]).sum(-1)
        query = torch.cat([pred_view0, pred_view1]).flatten(0, 1)
        shared = pred_view0 is target_view0 and pred_view1 is target_view1
        key = query if shared else torch.cat([target_view0, target_view1]).flatten(0, 1)
        loss = contrastive_loss(
            query,
            key,
            query_ids=ids,
            key_ids=ids,
            temperature=self.temperature,
            weight=1 / repeats.reshape(-1),
            group=group,
        )
        return 2 * loss  # the sum of the means of two views is twice the mean over both


def _arange(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)


class DetConSLoss(nn.Module):
    """DetCon-S: DetCon-B in which the regions are their own targets; signature and values of lightly's.

    Args:
        temperature: at least 1e-8.
        gather_distributed: contrast with the regions of all ranks.

    Example:
        >>> import torch
        >>> from fgfast.losses import DetConSLoss
        >>> x, ids = torch.eye(3)[None], torch.arange(3)[None]
        >>> round(DetConSLoss(temperature=1.0)(x, x, ids, ids).item(), 4)
        1.8097

    Source:
        arXiv 2103.10957.
    """

    def __init__(self, temperature: float = 0.1, gather_distributed: bool = True):
        super().__init__()
        self.detconb = DetConBLoss(temperature, gather_distributed)

    def forward(self, view0: Tensor, view1: Tensor, mask_view0: Tensor, mask_view1: Tensor) -> Tensor:
        """Loss of the regions [B, M, D] of two views with their ids [B, M]."""
        loss: Tensor = self.detconb(view0, view1, view0, view1, mask_view0, mask_view1)
        return loss


class SupConLoss(nn.Module):
    r"""Supervised contrast: vectors of one class attract; signature and values of pytorch-metric-learning's.

    .. math:: \ell_i = \log \sum_{k \ne i} e^{s_{ik}} - \frac{1}{|P_i|} \sum_{j \in P_i} s_{ij}, \quad s = \cos / T,

    averaged over the rows whose loss is above 0; 0 when there is no negative at all.

    Args:
        temperature: at least 1e-8.

    Raises:
        TypeError: labels are no integers, or what should be a tensor is none.
        ValueError: shapes do not fit, the temperature is too small, or a miner's pairs are given.

    Example:
        >>> import torch
        >>> from fgfast.losses import SupConLoss
        >>> x = torch.eye(2).repeat(2, 1)
        >>> round(SupConLoss(temperature=1.0)(x, torch.tensor([0, 1, 0, 1])).item(), 4)  # log(e + 2) - 1
        0.5514

    Source:
        arXiv 2004.11362; values as in pytorch-metric-learning 2.9 (cosine similarity, mean over losses above 0).
    """

    def __init__(self, temperature: float = 0.1):
        super().__init__()
        _check_temperature(temperature)
        self.temperature = temperature

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """Loss of embeddings [B, D] with labels [B] among themselves, or against ref_emb [R, D] and ref_labels [R].

        ``indices_tuple`` keeps the place of a miner's pairs, which are not taken: all pairs count.
        """
        if indices_tuple is not None:
            raise ValueError("indices_tuple is given, and all pairs count here: leave the miner out.")
        if (ref_emb is None) != (ref_labels is None):
            raise ValueError("ref_emb and ref_labels belong together: give both or neither.")
        _check_vectors(embeddings=embeddings)
        check_integers("labels", labels)
        query, query_ids = _by_label(embeddings, labels, 0)
        key, key_ids = query, query_ids
        if ref_emb is not None and ref_labels is not None:
            _check_vectors(ref_emb=ref_emb)
            check_integers("ref_labels", ref_labels)
            if ref_emb.shape[1] != embeddings.shape[1]:
                raise ValueError(
                    f"ref_emb has {ref_emb.shape[1]} channels and embeddings has {embeddings.shape[1]}: use one."
                )
            key, key_ids = _by_label(ref_emb, ref_labels, len(labels), "ref_labels")
        loss = contrastive_loss(
            query, key, query_ids=query_ids, key_ids=key_ids, temperature=self.temperature, reduction="none"
        )
        every = torch.cat([query_ids.image, key_ids.image])
        loss = torch.where((every != every[:1]).any(), loss, 0)
        return loss.sum() / (loss > 0).sum().clamp(min=1)


def _by_label(x: Tensor, labels: Tensor, first: int, name: str = "labels") -> tuple[Tensor, Ids]:
    """Vectors in the order of their labels (so that tiles of one class lie together), each a view of its own."""
    if labels.shape != x.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(labels.shape)}: give one label a row, {tuple(x.shape[:1])}.")
    order = labels.argsort()
    image = labels[order]
    return x[order], Ids(image, torch.zeros_like(image), first + _arange(len(labels), labels))


class InfoNCELoss(nn.Module):
    r"""Cross entropy of a query with its key against other keys: the loss of MoCo.

    .. math:: \ell_i = -\log \frac{e^{s_{ii}}}{e^{s_{ii}} + \sum_n e^{s_{in}}}, \quad s = \cos / T,

    averaged over queries. Negatives are the keys of the other images, or, where a bank is given, the bank alone.

    Args:
        temperature: at least 1e-8.
        scale: multiply the loss by 2 T, as MoCo v3 does.
        group: contrast with the keys of all ranks (without a bank).

    Example:
        >>> import torch
        >>> from fgfast.losses import InfoNCELoss
        >>> x = torch.eye(3)
        >>> round(InfoNCELoss(temperature=1.0)(x, x).item(), 4)  # log(e + 2) - 1
        0.5514

    Source:
        MoCo v2 (arXiv 2003.04297) with a bank, MoCo v3 (arXiv 2104.02057) with ``scale``.
    """

    def __init__(self, temperature: float = 0.1, scale: bool = False, group: "ProcessGroup | None" = None):
        super().__init__()
        _check_temperature(temperature)
        self.temperature, self.scale, self.group = temperature, scale, group

    def forward(self, query: Tensor, key: Tensor, bank: Tensor | None = None) -> Tensor:
        """Loss of queries [B, D] with keys [B, D], and a bank [Q, D] of negatives instead of the other keys."""
        _check_vectors(query=query, key=key)
        query_ids, key_ids = (_everywhere(ids, self.group) for ids in _pairs(len(query), query.device))
        loss = contrastive_loss(
            query, key, query_ids=query_ids, key_ids=key_ids, temperature=self.temperature, bank=bank,
            negatives="all" if bank is None else "same_image", group=self.group,
        )  # fmt: skip
        return loss * (2 * self.temperature) if self.scale else loss


class DINOLoss(nn.Module):
    r"""Cross entropy between teacher and student of different views; signature and values of lightly's.

    .. math:: L = -\frac{1}{n} \sum_{t \ne s} \frac{1}{B} \sum_b \text{softmax}((x_t - c) / T_t) \cdot
              \log \text{softmax}(x_s / T_s)

    with n pairs of different views. Afterwards the centre c moves towards the mean of the teacher (over all ranks).

    Args:
        output_dim: channels K.
        warmup_teacher_temp: T_t in epoch 0.
        teacher_temp: T_t after the warm-up.
        warmup_teacher_temp_epochs: epochs of the linear warm-up.
        student_temp: T_s.
        center_momentum: share of the old centre that is kept.
        center_mode: "mean", the only one.

    Raises:
        ValueError: another mode of the centre, or fewer than two views.

    Example:
        >>> import torch
        >>> from fgfast.losses import DINOLoss
        >>> views = [torch.zeros(2, 4), torch.zeros(2, 4)]
        >>> round(DINOLoss(output_dim=4)(views, views).item(), 4)  # log 4
        1.3863

    Source:
        arXiv 2104.14294; values as in lightly 1.6.
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
    ):
        super().__init__()
        if center_mode != "mean":
            raise ValueError(f"center_mode is {center_mode!r}: 'mean' is the only one.")
        self.warmup_teacher_temp, self.teacher_temp = warmup_teacher_temp, teacher_temp
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, 1, output_dim))

    def temperature_at(self, epoch: float | None) -> float:
        """T_t of an epoch: linear from the first to the last epoch of the warm-up, teacher_temp afterwards."""
        if epoch is None or epoch >= self.warmup_teacher_temp_epochs:
            return self.teacher_temp
        share = epoch / max(self.warmup_teacher_temp_epochs - 1, 1)
        return self.warmup_teacher_temp + min(share, 1) * (self.teacher_temp - self.warmup_teacher_temp)

    def forward(
        self,
        teacher_out: Sequence[Tensor],
        student_out: Sequence[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """Loss of the outputs [B, K] a view; teacher_temp wins over the warm-up of epoch."""
        pairs = len(teacher_out) * len(student_out) - min(len(teacher_out), len(student_out))
        if pairs <= 0:
            raise ValueError("A pair of different views is needed: give outputs of two views or more.")
        temperature = self.temperature_at(epoch) if teacher_temp is None else teacher_temp
        teacher = torch.stack(tuple(teacher_out)).detach()  # [V, B, K]
        target = ((teacher - self.center) / temperature).softmax(-1)
        total = self.center.new_zeros(())
        for s, x in enumerate(student_out):
            log_prob = (x / self.student_temp).log_softmax(-1)
            others = [t for t in range(len(target)) if t != s]
            if others:
                total = total - (target[others].sum(0) * log_prob).sum()
        self.update_center(teacher)
        return total / (pairs * teacher.shape[1])

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        """Move the centre towards the mean over views and batch of the teacher's outputs [V, B, K]."""
        mean = teacher_out.mean((0, 1), keepdim=True).to(self.center.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center.mul_(self.center_momentum).add_(mean, alpha=1 - self.center_momentum)


class PartContrastiveLoss(nn.Module):
    r"""The whole part step for any training loop: maps and id maps in, the contrast of parts out.

    Id maps go to the resolution of the features by majority; features are averaged over each part; a query is
    predictor(projector(part)), a key is target_projector(target part); every part of both views is a query and a key.
    The loss is ``contrastive_loss`` with (image, part id, view), averaged over the queries that have a positive: the
    same part in the other view of its image. Absent parts take part in nothing.

    Args:
        n_parts: K; ids are 0..K-1, anything else is "no part".
        projector: module [N, D] -> [N, E].
        predictor: module [N, E] -> [N, E] of the queries; None for none.
        target_projector: projector of the targets; None takes ``projector``.
        temperature: above 0.
        negatives: "all", "other_images" or "same_image".
        max_parts: sample that many parts an image, without replacement, among those present in either view (the same
            parts for both views); None takes all.
        group: contrast with the parts of all ranks.

    Example:
        >>> import torch
        >>> from fgfast.losses import PartContrastiveLoss
        >>> loss = PartContrastiveLoss(3, projector=torch.nn.Linear(8, 4))
        >>> maps = [torch.randn(2, 8, 7, 7) for _ in range(2)]
        >>> ids = [torch.randint(0, 3, (2, 56, 56)) for _ in range(2)]
        >>> bool(loss(*maps, *ids) > 0)
        True

    Source:
        PARTICLE (ICCVW 2023), DetCon (arXiv 2103.10957); the mean over valid queries instead of all is a choice.
    """

    def __init__(
        self,
        n_parts: int,
        projector: nn.Module,
        predictor: nn.Module | None = None,
        target_projector: nn.Module | None = None,
        temperature: float = 0.1,
        negatives: str = "all",
        max_parts: int | None = None,
        group: "ProcessGroup | None" = None,
    ):
        super().__init__()
        _check_temperature(temperature)
        if n_parts < 1 or (max_parts is not None and max_parts < 1):
            raise ValueError(f"n_parts is {n_parts} and max_parts {max_parts}: both must be 1 or more.")
        self.n_parts, self.max_parts = n_parts, max_parts
        self.projector, self.predictor, self.target_projector = projector, predictor, target_projector
        self.temperature, self.negatives, self.group = temperature, negatives, group

    def forward(
        self,
        features1: Tensor,
        features2: Tensor,
        labels1: Tensor,
        labels2: Tensor,
        target1: Tensor | None = None,
        target2: Tensor | None = None,
    ) -> Tensor:
        """Loss of maps [B, D, h, w] with id maps [B, H, W]; targets are a momentum encoder's maps, or the features."""
        if (target1 is None) != (target2 is None):
            raise ValueError("target1 and target2 belong together: give both or neither.")
        labels = (labels1, labels2)
        if features1.shape[:2] != features2.shape[:2]:
            raise ValueError(
                f"features1 has shape {tuple(features1.shape)} and features2 has shape {tuple(features2.shape)}: "
                "give the same pictures and channels."
            )
        pooled, areas = self._pool((features1, features2), labels)
        chosen, part = self._sample(areas)
        query = self._rows(pooled, chosen, self.projector)
        key = query
        if target1 is not None and target2 is not None:
            with torch.no_grad():
                key = self._rows(
                    self._pool((target1, target2), labels)[0], chosen, self.target_projector or self.projector
                )
        elif self.target_projector is not None:
            key = self._rows(pooled, chosen, self.target_projector)
        if self.predictor is not None:
            query = self.predictor(query)
        view, image, _ = torch.meshgrid(*(_arange(n, part) for n in part.shape), indexing="ij")
        ids = _everywhere(Ids(image.reshape(-1), part.reshape(-1), view.reshape(-1)), self.group)
        return contrastive_loss(
            query, key, query_ids=ids, key_ids=ids, temperature=self.temperature, negatives=self.negatives,
            reduction="mean_valid", group=self.group,
        )  # fmt: skip

    def _pool(self, maps: tuple[Tensor, Tensor], labels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean features [2, B, K, D] and areas [2, B, K] of the parts of both views."""
        from fgfast.ops.part_pool import part_pool

        views = [part_pool(features, ids, self.n_parts) for features, ids in zip(maps, labels, strict=True)]
        return torch.stack([v.pooled for v in views]), torch.stack([v.area for v in views])

    def _sample(self, areas: Tensor) -> tuple[Tensor, Tensor]:
        """Parts taken [B, S] from areas [2, B, K], and their ids [2, B, S], -1 where absent from the view."""
        n = self.n_parts if self.max_parts is None else min(self.max_parts, self.n_parts)
        score = torch.arange(self.n_parts, 0, -1, device=areas.device).expand(areas.shape[1:])
        if n < self.n_parts:
            score = torch.rand(areas.shape[1:], device=areas.device) + (areas > 0).any(0)
        chosen = score.topk(n, dim=1).indices.sort(1).values
        here = areas.gather(2, chosen.expand(2, -1, -1)) > 0
        return chosen, torch.where(here, chosen, -1)

    @staticmethod
    def _rows(pooled: Tensor, chosen: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        """The chosen parts of both views, one a row, through a head: [2 B S, E]."""
        index = chosen[None, :, :, None].expand(2, -1, -1, pooled.shape[-1])
        return head(pooled.gather(2, index).flatten(0, 2))
