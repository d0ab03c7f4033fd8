"""The tensors and options of one contrast, and their flat form in the schemas of the custom ops."""

from typing import Any, NamedTuple

from torch import Tensor

from fgfast.ids import Ids
from fgfast.reference import contrast as reference


class Operands(NamedTuple):
    """What a contrast is computed from; the kernels take these arguments in this order."""

    query: Tensor  # [M, D]
    query_ids: Ids  # [M] each
    key: Tensor | None  # [T, D]; None: the query itself
    key_ids: Ids | None  # [T] each; None: those of the query
    bank: Tensor | None  # [Q, D]
    temperature_tensor: Tensor | None  # 0-d; None: the number below
    temperature: float
    negatives: str
    normalize: bool
    precision: str

    @classmethod
    def from_flat(
        cls, query: Tensor, query_image: Tensor, query_part: Tensor, query_view: Tensor, key: Tensor | None,
        key_image: Tensor | None, key_part: Tensor | None, key_view: Tensor | None, *options: Any,
    ) -> "Operands":  # fmt: skip
        """Group the arguments of a custom op, whose schema takes only tensors and numbers."""
        key_ids = None
        if key_image is not None and key_part is not None and key_view is not None:
            key_ids = Ids(key_image, key_part, key_view)
        return cls(query, Ids(query_image, query_part, query_view), key, key_ids, *options)

    def flat(self) -> tuple[Any, ...]:
        """The arguments of a custom op: query, its 3 ids, key, its 3 ids, bank, temperature tensor, options."""
        key_ids = (None, None, None) if self.key_ids is None else self.key_ids
        return self.query, *self.query_ids, self.key, *key_ids, *self[4:]


def define_losses(operands: Operands) -> Tensor:
    """The losses [M] by the definition."""
    query, query_ids, key, key_ids, bank, tensor, number, negatives, normalize, _ = operands
    return reference.contrastive_loss(
        query, query if key is None else key, query_ids=query_ids, key_ids=query_ids if key_ids is None else key_ids,
        temperature=number if tensor is None else tensor, negatives=negatives, normalize=normalize, bank=bank,
        reduction="none",
    )  # fmt: skip
