"""Methods in two parts: encoders that see each image on its own, and a loss that sees the whole batch."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fgfast.methods.base import Method

if TYPE_CHECKING:
    from fgfast.data.views import Batch


class ChunkedMethod(Method, ABC):
    """A method whose encoders can see a batch in chunks (``--micro-batch``), while its heads and loss see all of it.

    A subclass implements :meth:`represent` and :meth:`compare`, and further ones where it needs them. Representations
    are tensors [B, ...] in any structure; row i depends only on image i (and on BatchNorm, if there is any).
    """

    def check_chunks(self) -> None:
        """Raise a UserError if the step cannot be split with the options that are given."""

    def annotate(self, batch: "Batch") -> "Batch":
        """The batch with what is drawn or made for all its images at once, such as id maps; by default as it is."""
        return batch

    @abstractmethod
    def represent(self, batch: "Batch") -> Any:
        """Representations by the online encoder."""

    def represent_targets(self, batch: "Batch") -> Any:
        """Representations by a momentum encoder, without a gradient; by default none."""
        return ()

    @abstractmethod
    def compare(self, online: Any, targets: Any, batch: "Batch") -> dict[str, Tensor]:
        """Heads and losses of the representations of all images: what :meth:`forward` returns."""

    def forward(self, batch: "Batch") -> dict[str, Tensor]:
        """The losses, with all images in one pass."""
        batch = self.annotate(batch)
        online = self.represent(batch)
        with torch.no_grad():
            targets = self.represent_targets(batch)
        return self.compare(online, targets, batch)


def by_image(x: Tensor, n_views: int) -> Tensor:
    """Rows [V B, ...], view by view, as [B, V, ...].

    Example:
        >>> by_image(torch.tensor([1, 2, 10, 20]), 2).tolist()
        [[1, 10], [2, 20]]
    """
    return x.unflatten(0, (n_views, -1)).transpose(0, 1)


def by_view(x: Tensor) -> Tensor:
    """Rows [B, V, ...] as [V B, ...], view by view.

    Example:
        >>> by_view(torch.tensor([[1, 10], [2, 20]])).tolist()
        [1, 2, 10, 20]
    """
    return x.transpose(0, 1).flatten(0, 1)
