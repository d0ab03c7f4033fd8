"""Id maps at feature resolution, by majority: checks, choice of backend, registration."""

import torch
from torch import Tensor

from fgfast.backend import check_triton, preference, resolve
from fgfast.ops.part_pool.tiled import majority_grid
from fgfast.ops.registration import operation
from fgfast.reference import part_pool as reference
from fgfast.tensors import as_size, check_ids, check_integers, check_whole, shape_error, transformed


def check_n_parts(n_parts: int) -> None:
    check_whole("n_parts", n_parts)
    if n_parts < 1:
        raise ValueError(f"n_parts is {n_parts}: give at least 1.")


@operation("labels_to_grid")
def _labels_to_grid(labels: Tensor, height: int, width: int, n_parts: int, backend: str = "torch") -> Tensor:
    if backend == "triton":
        from fgfast.kernels.part_pool import launch as kernels

        return kernels.labels_to_grid(labels, height, width, n_parts)
    return majority_grid(labels, height, width, n_parts, torch.int64)


@_labels_to_grid.register_fake
def _(labels: Tensor, height: int, width: int, n_parts: int, backend: str = "torch") -> Tensor:
    return labels.new_empty(labels.shape[0], height, width, dtype=torch.int64)


_labels_to_grid.loop_in_vmap()


def labels_to_grid(labels: Tensor, size: int | tuple[int, int], n_parts: int, *, backend: str | None = None) -> Tensor:
    r"""Reduce id maps to feature resolution: the majority id of each adaptive-pooling cell.

    .. math:: grid_{ij} = \min \arg\max_k |\{p \in cell_{ij} : labels_p = k\}|

    Cell (i, j) covers rows floor(i H / h) to ceil((i + 1) H / h), and the corresponding columns. Not differentiable.

    Args:
        labels: integer [B, H, W] in 0..n_parts-1, or -1, which does not vote (nor, on a GPU, any other id).
        size: (h, w) of the grid, or one number for a square.
        n_parts: K, at least 1.
        backend: "triton", "torch" or "reference"; strict. None follows `use_backend`.

    Returns:
        int64 [B, h, w]: ties go to the lowest id; -1 where no pixel votes.

    Raises:
        ValueError: labels are not [B, H, W], or size or n_parts below 1.
        TypeError: labels are not integer.

    Example:
        >>> import torch
        >>> from fgfast import labels_to_grid
        >>> labels_to_grid(torch.tensor([[[1, 1, 0, -1], [2, 1, 0, -1]]]), (1, 2), 3).tolist()
        [[[1, 0]]]

    Source: mask pooling of DetCon (Henaff et al., ICCV 2021): one-hot, average pool, argmax.
    """
    check_n_parts(n_parts)
    height, width = as_size(size)
    check_integers("labels", labels)
    if labels.dim() != 3:
        raise shape_error("labels", "[B, H, W]", labels)
    check_ids(labels, n_parts)
    chosen = resolve("labels_to_grid", backend, preference("labels_to_grid", labels))
    if chosen == "reference" and not transformed(labels):  # its loops know no vmap
        return reference.labels_to_grid(labels, (height, width), n_parts)
    if chosen == "triton":
        check_triton(
            "labels", labels.new_empty(0, dtype=torch.float32)
        )  # checks only the device: ids have no float dtype
    return _labels_to_grid(labels, height, width, n_parts, "triton" if chosen == "triton" else "torch")
