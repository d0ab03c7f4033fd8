"""The symmetric image-text loss of CLIP."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from fgfast.losses.common import as_scalar, check_group, check_vectors, group_of_ranks, ids_of_two_views
from fgfast.losses.over_ranks import share_mean
from fgfast.ops.contrast import contrastive_loss
from fgfast.tensors import accumulation, untransformed, values_checked

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class CLIPLoss(nn.Module):
    r"""Cross entropy of images with their texts and of texts with their images; signature of open_clip's ClipLoss.

    .. math:: L = -\frac{1}{2 N} \sum_i \left( \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}}
              + \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ji}}} \right), \qquad s_{ij} = t \langle x_i, y_j \rangle

    Images and texts are not normalised here. The matrix of logits never exists, on one rank or several: this is the
    mean of two :func:`fgfast.contrastive_loss`, whose bounds of memory and error it has, with T = 1 / t.

    Over ranks every image is compared with the texts of all ranks and every text with the images of all ranks, which
    are passed around a ring: memory does not grow with the ranks, of which each may have any number of pairs. The
    average over ranks of the gradients, as DistributedDataParallel takes it, is exactly the gradient of one process on
    the joined batch. This is what open_clip gives with ``gather_with_grad``. What differs from open_clip 3.3:

    | given | there | here |
    |---|---|---|
    | gather_with_grad=False, the default | gradients lack a factor or what other ranks contribute | as True |
    | float16 or bfloat16 | computed and returned in that dtype | computed and returned in float32 |
    | a logit_scale of 0 or less | accepted | ValueError, on the CPU or with FGFAST_CHECKS=1 |
    | use_horovod | gathers by Horovod | ValueError |
    | other numbers of pairs on the ranks | an error of the collective, or wrong labels | the mean over all pairs |

    Args:
        local_loss: over ranks, return world size x local sum / pairs of all ranks instead of the loss of all pairs;
            gradients are the same.
        gather_with_grad: has no effect: gradients always reach the features of all ranks.
        cache_labels: has no effect, as no labels are built.
        rank: of this process in the process group.
        world_size: number of ranks; above 1 the default process group takes part.
        use_horovod: only False.
        group: a process group that takes part instead of the default one; rank and world_size may then be left out.

    Raises:
        ValueError: ``use_horovod``, or, when it is called, shapes or devices that do not fit, a logit_scale that is not
            positive, or a rank or world size that is not that of the process group.
        TypeError: an unsupported dtype or type.
        RuntimeError: forward mode, torch.func or a second derivative over ranks.

    Example:
        >>> import torch
        >>> from fgfast.losses import CLIPLoss
        >>> x = torch.eye(2)
        >>> round(CLIPLoss()(x, x, torch.tensor(1.0)).item(), 4)  # log(e + 1) - 1
        0.3133

    Source:
        CLIP (arXiv 2103.00020); values as in open_clip 3.3.
    """

    def __init__(
        self, local_loss: bool = False, gather_with_grad: bool = False, cache_labels: bool = False, rank: int = 0,
        world_size: int = 1, use_horovod: bool = False, *, group: "ProcessGroup | None" = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod is True: give False, as ranks exchange features by torch.distributed.")
        check_group(group)
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod, self.group = rank, world_size, use_horovod, group

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None, output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """Loss of images [N, D] and their texts [N, D], of one dtype; float32 (float64 for float64 vectors).

        Args:
            image_features: float32, float16, bfloat16 or float64, any strides.
            text_features: text i belongs to image i.
            logit_scale: t > 0, a number or a tensor of one, which receives a gradient.
            logit_bias: added to every logit, which changes no loss: a tensor receives the gradient 0.
            output_dict: return {"contrastive_loss": loss} instead of the loss.
        """
        check_vectors(image_features=image_features, text_features=text_features)
        scale = as_scalar("logit_scale", logit_scale, image_features)
        value = untransformed(scale).detach()
        if values_checked(value):
            for wrong in value[~((value > 0) & value.isfinite())].tolist():
                raise ValueError(f"logit_scale is {wrong}: give a finite number above 0.")
        temperature = scale.to(accumulation(image_features.dtype)).reciprocal()
        group = group_of_ranks(self.rank, self.world_size, self.group)
        image_ids, text_ids = ids_of_two_views(len(image_features), image_features.device, group)
        of_images = contrastive_loss(
            image_features, text_features, query_ids=image_ids, key_ids=text_ids, temperature=temperature,
            normalize=False, group=group,
        )  # fmt: skip
        of_texts = contrastive_loss(
            text_features, image_features, query_ids=text_ids, key_ids=image_ids, temperature=temperature,
            normalize=False, group=group,
        )  # fmt: skip
        loss = (of_images + of_texts) / 2
        if logit_bias is not None:
            loss = loss + 0 * as_scalar("logit_bias", logit_bias, image_features)
        if group is not None and not self.local_loss:
            loss = share_mean(loss, group)
        return {"contrastive_loss": loss} if output_dict else loss
