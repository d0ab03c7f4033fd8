"""Supervised contrast."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fgfast.ids import Ids
from fgfast.losses.common import arange_like, check_temperature, check_vectors
from fgfast.ops.contrast import contrastive_loss
from fgfast.tensors import check_integers, shape_error

if TYPE_CHECKING:
    pass


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
        check_temperature(temperature)
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
        check_vectors(embeddings=embeddings)
        check_integers("labels", labels)
        query, query_ids = _by_label(embeddings, labels, 0)
        key, key_ids = query, query_ids
        if ref_emb is not None and ref_labels is not None:
            check_vectors(ref_emb=ref_emb)
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
    """Vectors sorted by label, which puts each class into few tiles; each vector is its own view."""
    if labels.shape != x.shape[:1]:
        raise shape_error(name, str(list(x.shape[:1])), labels)
    order = labels.argsort()
    image = labels[order]
    return x[order], Ids(image, torch.zeros_like(image), first + arange_like(len(labels), labels))
