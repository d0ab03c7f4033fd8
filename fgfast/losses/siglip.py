"""The pairwise sigmoid loss of SigLIP."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fgfast.losses.common import as_scalar, check_group, check_vectors, group_of_ranks
from fgfast.ops.sigmoid import sigmoid_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

EXCHANGES = ("bidir", "shift", "reduce", "gather")


class SigLIPLoss(nn.Module):
    r"""Pairwise sigmoid loss of images and their texts (SigLIP); signature and values of open_clip's SigLipLoss.

    .. math:: L = -\frac{1}{N} \sum_{i,j} \log \sigma(z_{ij} (t \langle x_i, y_j \rangle + b)), \quad
              z_{ij} = 1 \text{ if } i = j \text{ else } -1

    Images and texts are not normalised here. The matrix of logits never exists: the "torch" backend works by tiles,
    and needs, besides inputs and returned gradients, at most twice the memory of the inputs and 64 MiB. For vectors of
    norm 1 the loss agrees with float64 arithmetic to 1e-6 (L + (1 + |t| + |b|) g), where g is the sum of the magnitudes
    of the derivatives of L by the logits, and gradients to 1e-6 (1 + |t| + |b|) times the sum of the magnitudes that
    they add up; inputs are taken as stored (float16 and bfloat16 are upcast exactly; only the returned gradients are
    rounded). The kernels keep the same bound, but with float16 and bfloat16 they round the derivatives by the logits to
    bfloat16. Forward mode, torch.func and second derivatives take the definition, with the memory of a few N x N
    matrices.

    Over ranks every image is compared with the texts of all ranks, which are passed around a ring: a rank holds two
    blocks of texts. Each rank returns world size x local sum / images of all ranks, so the averaging of
    DistributedDataParallel gives exactly the gradient of one process on the joined batch; with equally many images on
    every rank this is open_clip's value.

    Args:
        cache_labels: has no effect, as no labels are built.
        rank: of this process in the process group.
        world_size: number of ranks; above 1 the default process group takes part.
        dist_impl: "bidir", "shift", "reduce", "gather" or None; has no effect, as texts always travel round the ring.
        group: a process group that takes part instead of the default one; rank and world_size may then be left out.

    Raises:
        ValueError: an unknown ``dist_impl``, or, when it is called, shapes or devices that do not fit, a rank or world
            size that is not that of the process group, or ranks that were called unlike.
        TypeError: an unsupported dtype or type.
        RuntimeError: forward mode, torch.func or a second derivative over ranks.

    Example:
        >>> import torch
        >>> from fgfast.losses import SigLIPLoss
        >>> x = torch.eye(2)
        >>> round(SigLIPLoss()(x, x, torch.tensor(1.0), torch.tensor(0.0)).item(), 4)  # log(1 + 1 / e) + log(2)
        1.0064

    Source:
        arXiv 2303.15343; values as in open_clip 3.3.
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None, *,
        group: "ProcessGroup | None" = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if dist_impl is not None and dist_impl not in EXCHANGES:
            raise ValueError(f"dist_impl is {dist_impl!r}: choose one of {', '.join(EXCHANGES)}.")
        check_group(group)
        self.cache_labels, self.rank, self.world_size, self.group = cache_labels, rank, world_size, group
        self.dist_impl = dist_impl or "bidir"

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None, output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """Loss of images [N, D] and their texts [N, D], of one dtype; float32 (float64 for float64 vectors).

        Args:
            image_features: float32, float16, bfloat16 or float64, any strides.
            text_features: text i belongs to image i.
            logit_scale: t, a number or a tensor of one, which receives a gradient.
            logit_bias: b, likewise; None is 0.
            output_dict: return {"contrastive_loss": loss} instead of the loss.
        """
        check_vectors(image_features=image_features, text_features=text_features)
        scale = as_scalar("logit_scale", logit_scale, image_features)
        bias = as_scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, image_features)
        group = group_of_ranks(self.rank, self.world_size, self.group)
        loss = sigmoid_loss(image_features, text_features, scale, bias, group=group)
        return {"contrastive_loss": loss} if output_dict else loss
