"""The definition of the pairwise sigmoid loss: the full logit matrix, for tests to compare with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast.tensors import accumulation, without_autocast


def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    r"""The loss of ``fgfast.losses.SigLIPLoss`` for one process, without checks and with every logit in memory.

    .. math:: L = -\frac{1}{N} \sum_{i,j} \log \sigma(z_{ij} (t \langle x_i, y_j \rangle + b)), \quad
              z_{ij} = 1 \text{ if } i = j \text{ else } -1

    float64 is accumulated in float64, everything else in float32; N = 0 gives 0.

    Example:
        >>> x = torch.eye(2)
        >>> loss = sigmoid_loss(x, x, torch.tensor(1.0), torch.tensor(0.0))
        >>> round(loss.item(), 4)  # log(1 + 1 / e) + log(2)
        1.0064
    """
    with without_autocast(image.device):
        dtype = accumulation(image.dtype)
        logits = scale.to(dtype) * (image.to(dtype) @ text.to(dtype).T) + bias.to(dtype)
        is_pair = torch.eye(len(image), dtype=torch.bool, device=image.device)
        return -F.logsigmoid(torch.where(is_pair, logits, -logits)).sum() / max(len(image), 1)
