"""The three integers that identify each vector of a contrast."""

from typing import NamedTuple

from torch import Tensor


class Ids(NamedTuple):
    """Which image, part and view a vector comes from.

    Two vectors are a positive pair when image and part agree and view differs; they are the same vector, or copies of
    it, when all three agree. Part -1 means absent: the vector is masked out and affects neither loss nor gradients.

    Args:
        image: integer [N], any values; unique over all ranks when a process group is used.
        part: integer [N], 0 and up, or -1 for absent.
        view: integer [N], any values.

    Example:
        >>> import torch
        >>> from fgfast import Ids
        >>> ids = Ids(image=torch.tensor([0, 1]), part=torch.tensor([0, 0]), view=torch.tensor([0, 0]))
        >>> ids.image.shape
        torch.Size([2])
    """

    image: Tensor
    part: Tensor
    view: Tensor
