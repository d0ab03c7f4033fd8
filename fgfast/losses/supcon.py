"""Supervised contrast."""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fgfast.ids import Ids
from fgfast.losses.common import arange_like, check_group, check_temperature, check_vectors, ids_over_ranks
from fgfast.losses.over_ranks import mean_valid
from fgfast.losses.pairs import pairs_of_indices, pairs_of_labels
from fgfast.ops.contrast import contrastive_loss
from fgfast.ops.contrast.checks import check_alike
from fgfast.reference.contrast import row_losses
from fgfast.tensors import FLOATS, INTEGERS, accumulation, check_tensor, exact, shape_error, unit_vectors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NO_LOSS = {"losses": 0, "indices": None, "reduction_type": "already_reduced"}


class SupConLoss(nn.Module):
    r"""Supervised contrast: vectors of one class attract; signature and values of pytorch-metric-learning's.

    .. math:: \ell_i = \log \sum_{k \ne i} e^{s_{ik}} - \frac{1}{|P_i|} \sum_{j \in P_i} s_{ij}, \quad s = \cos / T,

    averaged over the rows whose loss is above 0; 0 where there is no positive or no negative pair at all.

    For cosines and dot products of all pairs the similarities never exist in memory. Pairs of a miner, and every other
    distance, need several matrices of B x R numbers.

    What differs from pytorch-metric-learning 2.9:

    | given | there | here |
    |---|---|---|
    | float16 or bfloat16 | computed and returned in that dtype | computed and returned in float32 |
    | NaN or infinity in a vector | its row is left out | the loss is NaN |
    | a temperature of 0 or less | accepted | ValueError |
    | ref_labels without ref_emb | ref_labels are ignored | ValueError |
    | ref_emb of another length, without ref_labels | the first vectors count, or an IndexError | ValueError |
    | no distance, no reducer | `loss.distance` and `loss.reducer` are the objects that act by default | they are None |
    | your own subclass | is a BaseMetricLossFunction | is not one: derive it from ``fgfast.losses.pml.SupConLoss`` |
    | a row whose loss is 0 but for rounding | counted if rounded up | counted if rounded up, not always the same rows |

    Args:
        temperature: at least 1e-8.
        distance: similarity of vectors: None is the cosine; otherwise one of pytorch-metric-learning's distances, or
            any callable of [B, D] and [R, D] that returns [B, R] and has an attribute ``is_inverted`` (whether larger
            means more similar).
        reducer: None, or one of pytorch-metric-learning's reducers, or a callable like theirs: it takes
            {"loss": {"losses": [B], "indices": [B], "reduction_type": "element"}}, embeddings and labels, and its
            result is returned.
        embedding_regularizer: callable of the embeddings whose result is added, or None.
        embedding_reg_weight: factor of that result.
        collect_stats: accepted for compatibility; this loss has no statistics.
        group: process group with the vectors of whose ranks those of each rank are compared, any numbers of them;
            labels mean the same on every rank and have one dtype. Each rank returns world size x local sum / rows of
            all ranks whose loss is above 0, so the averaging of DistributedDataParallel gives exactly the gradient of
            one process on the joined batch. For cosines and dot products of all pairs, without a reducer; a regularizer
            sees the embeddings of its rank. It takes the place of pytorch-metric-learning's DistributedLossWrapper.

    Raises:
        TypeError: what should be a tensor, a callable or a process group is none, or labels of another dtype.
        ValueError: shapes do not fit, the temperature is too small, labels are missing, what a group does not
            support, or a group whose backend cannot send from the device of the vectors.

    Example:
        >>> import torch
        >>> from fgfast.losses import SupConLoss
        >>> x = torch.eye(2).repeat(2, 1)
        >>> round(SupConLoss(temperature=1.0)(x, torch.tensor([0, 1, 0, 1])).item(), 4)  # log(e + 2) - 1
        0.5514

    Source:
        arXiv 2004.11362; values as in pytorch-metric-learning 2.9.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An instance of the class in ``fgfast.losses.pml`` where pytorch-metric-learning has been imported."""
        if cls is SupConLoss and "pytorch_metric_learning.losses" in sys.modules:
            cls = class_for_pml()
        return super().__new__(cls)

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        distance: Callable[..., Tensor] | None = None,
        reducer: Callable[..., Any] | None = None,
        embedding_regularizer: Callable[[Tensor], Tensor] | None = None,
        embedding_reg_weight: float = 1,
        collect_stats: bool | None = None,
        group: "ProcessGroup | None" = None,
    ):
        super().__init__()
        self._modules.clear()  # defaults of pytorch-metric-learning's base class: modules that no function may replace
        check_temperature(temperature)
        check_group(group)
        for name, given in (("reducer", reducer), ("embedding_regularizer", embedding_regularizer)):
            if given is not None and not callable(given):
                raise TypeError(f"{name} is {given!r}: give a callable like pytorch-metric-learning's, or None.")
        if distance is not None and not (callable(distance) and hasattr(distance, "is_inverted")):
            raise TypeError(
                f"distance is {distance!r}: give None for the cosine, one of pytorch-metric-learning's distances, or a "
                "callable that has is_inverted."
            )
        self.temperature, self.distance, self.reducer = temperature, distance, reducer
        self.embedding_regularizer, self.embedding_reg_weight = embedding_regularizer, embedding_reg_weight
        self.collect_stats, self.group = bool(collect_stats), group

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """Loss of embeddings [B, D] with labels [B] among themselves, or against ref_emb [R, D] and ref_labels [R].

        Where labels and ref_labels are one tensor (also where ref_labels is left out) row i is not paired with row i of
        ref_emb; equal labels in two tensors pair them. ``indices_tuple`` holds the pairs of a miner, three or four
        tensors of indices, and replaces those of the labels. Labels are integers, floats or booleans.

        Returns:
            A scalar, float32 (float64 for float64 embeddings), or what ``reducer`` returns.
        """
        check_vectors(embeddings=embeddings)
        self._check_support(indices_tuple)
        if ref_emb is None and ref_labels is not None:
            raise ValueError("ref_labels is given without ref_emb: give both.")
        if ref_emb is not None:
            check_vectors(ref_emb=ref_emb)
            check_alike(embeddings=embeddings, ref_emb=ref_emb)
            if ref_emb.shape[1] != embeddings.shape[1]:
                raise ValueError(
                    f"ref_emb has {ref_emb.shape[1]} channels and embeddings has {embeddings.shape[1]}: use one."
                )
        reference = embeddings if ref_emb is None else ref_emb
        if labels is not None:
            labels = _check_labels("labels", labels, embeddings)
            ref_labels = labels if ref_labels is None else _check_labels("ref_labels", ref_labels, reference)
            if indices_tuple is None and len(ref_labels) != len(reference):
                raise ValueError(
                    f"ref_emb has {len(reference)} vectors and embeddings has {len(embeddings)}: give ref_labels."
                )
        elif indices_tuple is None:
            raise ValueError("labels is None: give labels, or the pairs of a miner as indices_tuple.")

        if indices_tuple is None and _is_product(self.distance):
            assert labels is not None
            assert ref_labels is not None
            loss, found = self._without_matrix(embeddings, reference, labels, ref_labels)
        else:
            loss, found = self._with_matrix(embeddings, reference, labels, ref_labels, indices_tuple)
        return self._reduce(loss, found, embeddings, labels)

    def _without_matrix(
        self, embeddings: Tensor, reference: Tensor, labels: Tensor, ref_labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The losses [B], and whether there are positive and negative pairs, by ``contrastive_loss``.

        Vectors are sorted by label, which puts each class into few tiles.
        """
        dtype = torch.promote_types(labels.dtype, ref_labels.dtype)
        row = _number(labels, self.group)
        order, query_ids = _sort_by_label(labels, row, dtype)
        query = embeddings[order]
        key, key_ids, column = query, query_ids, row
        if ref_labels is not labels:
            column = _number(ref_labels, self.group)
            ref_order, key_ids = _sort_by_label(ref_labels, -1 - column, dtype)  # no row has a negative number
            key = reference[ref_order]
        elif reference is not embeddings:
            key = reference[order]
        loss = contrastive_loss(
            query, key, query_ids=query_ids, key_ids=key_ids, temperature=self.temperature, reduction="none",
            normalize=getattr(self.distance, "normalize_embeddings", True), group=self.group,
        )  # fmt: skip
        classes = torch.cat([query_ids.image, key_ids.image])
        last_row, last_column, highest, lowest = _maxima(row, column, classes, ~classes, group=self.group)
        # One positive and one negative pair do not count in the other library.
        found = (highest != ~lowest) & ((last_row + 1) * (last_column + 1) > 2)
        return torch.empty_like(loss).index_copy(0, order, loss), found

    def _check_support(self, indices_tuple: Sequence[Tensor] | None) -> None:
        """Raise on what needs the similarities of all pairs, or another mean, if there is a group."""
        if self.group is None:
            return
        for name, given, supported in (
            ("indices_tuple", indices_tuple, indices_tuple is None),
            ("distance", self.distance, _is_product(self.distance)),
            ("reducer", self.reducer, self.reducer is None),
        ):
            if not supported:
                kind = type(given).__name__
                raise ValueError(f"{name} is a {kind}, which SupConLoss does not support over a group: leave one out.")

    def _with_matrix(
        self, embeddings: Tensor, reference: Tensor, labels: Tensor | None, ref_labels: Tensor | None,
        indices_tuple: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The same from the similarities of all pairs [B, R]."""
        if indices_tuple is not None:
            positive, negative = pairs_of_indices(indices_tuple, len(embeddings), len(reference), embeddings.device)
            enough = any(len(indices) > 1 for indices in indices_tuple)
        else:
            assert labels is not None
            assert ref_labels is not None
            positive, negative = pairs_of_labels(labels, ref_labels)
            enough = positive.numel() > 2
        dtype = accumulation(embeddings.dtype)
        with exact(embeddings.device):
            if self.distance is None:
                similarity = unit_vectors(embeddings, dtype) @ unit_vectors(reference, dtype).T
            else:
                similarity = self.distance(embeddings.to(dtype), reference.to(dtype))
                if not self.distance.is_inverted:
                    similarity = -similarity
            loss, _ = row_losses(similarity / self.temperature, positive, positive | negative)
        return loss, positive.any() & negative.any() & enough

    def _reduce(self, loss: Tensor, found: Tensor, embeddings: Tensor, labels: Tensor | None) -> Any:
        """The mean over the losses above 0, or what the reducer makes of the losses [B], plus the regularizer."""
        extra = None
        if self.embedding_regularizer is not None:
            extra = self.embedding_regularizer(embeddings) * self.embedding_reg_weight
        if self.reducer is None:
            loss = torch.where(found, loss, 0)
            loss = mean_valid(loss, ~(loss <= 0), self.group)  # NaN is a loss
            return loss if extra is None else loss + extra
        losses = {"losses": loss, "indices": arange_like(len(loss), loss), "reduction_type": "element"}
        named = {"loss": losses if found else NO_LOSS}
        if extra is None:
            return self.reducer(named, embeddings, labels)
        if type(self.reducer).__name__ in ("DoNothingReducer", "MultipleReducers"):
            return self.reducer({**named, "embedding_reg_loss": {**NO_LOSS, "losses": extra}}, embeddings, labels)
        return self.reducer(named, embeddings, labels) + extra


def _is_product(distance: Any) -> bool:
    """Whether similarities are cosines or dot products, of pytorch-metric-learning or by default."""
    if distance is None:
        return True
    kind = type(distance)
    return (
        kind.__module__.startswith("pytorch_metric_learning.distances.")
        and kind.__name__ in ("CosineSimilarity", "DotProductSimilarity")
        and (distance.p, distance.power, distance.collect_stats) == (2, 1, False)
    )


def _check_labels(name: str, labels: Tensor, vectors: Tensor) -> Tensor:
    """The labels on the device of their vectors; raise unless they are one number a vector."""
    check_tensor(name, labels)
    if labels.dtype not in (*INTEGERS, *FLOATS, torch.bool):
        raise TypeError(f"{name} has dtype {labels.dtype}: give integers, floats or booleans.")
    if labels.shape != vectors.shape[:1]:
        raise shape_error(name, str(list(vectors.shape[:1])), labels)
    return labels.to(vectors.device)


def _number(labels: Tensor, group: "ProcessGroup | None") -> Tensor:
    """0, 1, ... for every label [B], going on from rank to rank."""
    row = arange_like(len(labels), labels)
    return ids_over_ranks(Ids(row, row, row), group).image


def _sort_by_label(labels: Tensor, number: Tensor, dtype: torch.dtype) -> tuple[Tensor, Ids]:
    """The order of the labels [B], and the ids in it: an image per label, a view per number."""
    classes = _as_integers(labels.to(dtype), number)
    order = classes.argsort()
    return order, Ids(classes[order], torch.zeros_like(number), number[order])


def _as_integers(labels: Tensor, number: Tensor) -> Tensor:
    """The labels as int64 that are equal where the labels are; a label of NaN is a class of its own number."""
    if not labels.is_floating_point():
        return labels.to(torch.int64)
    wide = torch.where(labels == 0, 0, labels).to(accumulation(labels.dtype))  # without -0.0
    bits = wide.view(torch.int64 if wide.dtype == torch.float64 else torch.int32)
    return torch.where(labels.isnan(), (0x7FF8 << 48) + number, bits)  # the bits of a NaN of float64


def _maxima(*numbers: Tensor, group: "ProcessGroup | None") -> tuple[Tensor, ...]:
    """The largest of each tensor of integers over all ranks, or -2^63 where it is empty on all."""
    lowest = torch.iinfo(torch.int64).min
    largest = torch.stack([torch.cat([x, x.new_full((1,), lowest)]).amax() for x in numbers])
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest.unbind()


@cache
def class_for_pml() -> type[Any]:
    """SupConLoss with pytorch-metric-learning's base class, whose constructor runs before ours sets the same names."""
    from pytorch_metric_learning.losses import BaseMetricLossFunction

    names = {"__module__": "fgfast.losses.pml", "__qualname__": "SupConLoss", "__doc__": SupConLoss.__doc__}
    return type("SupConLoss", (SupConLoss, BaseMetricLossFunction), names)
