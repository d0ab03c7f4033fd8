"""Part pooling in plain PyTorch: the definition that every backend is tested against."""

import torch
from torch import Tensor


def part_pool(
    features: Tensor, labels: Tensor, n_parts: int, weight: Tensor | None = None, reduce: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Weighted sum or mean of the features [B, N, D] of each part; labels and weight are [B, N].

    Example:
        >>> part_pool(torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[0, 0, -1]]), 2)[0].tolist()
        [[[2.0], [0.0]]]
    """
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    kept_weight = torch.ones(labels.shape, device=features.device) if weight is None else weight.detach()
    kept_weight = kept_weight.to(wide)
    sums, areas = [], []
    for part in range(n_parts):
        kept = (labels == part) & (kept_weight > 0)  # [B, N]
        chosen = torch.where(kept[..., None], features.to(wide), 0)  # selected first: 0 x NaN is NaN
        w = torch.where(kept, kept_weight, 0)
        sums.append((chosen * w[..., None]).sum(1))
        areas.append(w.sum(1))
    batch, channels = features.shape[0], features.shape[2]
    pooled = torch.stack(sums, 1) if sums else features.new_zeros(batch, 0, channels, dtype=wide)  # [B, K, D]
    area = torch.stack(areas, 1) if areas else features.new_zeros(batch, 0, dtype=wide)  # [B, K]
    if reduce == "mean":
        pooled = torch.where(area[..., None] > 0, pooled / torch.where(area > 0, area, 1)[..., None], 0)
    return pooled.to(features.dtype), area.float()


def labels_to_grid(labels: Tensor, size: tuple[int, int], n_parts: int) -> Tensor:
    """Majority id of each adaptive-pooling cell of an id map [B, H, W]: ties to the lowest, no votes gives -1.

    Example:
        >>> labels_to_grid(torch.tensor([[[1, 1, 0, -1], [2, 1, 0, -1]]]), (1, 2), 3).tolist()
        [[[1, 0]]]
    """
    batch, height, width = labels.shape
    rows, columns = size
    grid = torch.full((batch, rows, columns), -1, dtype=torch.int64, device=labels.device)
    for i in range(rows):
        for j in range(columns):
            cell = labels[
                :,
                i * height // rows : -(-(i + 1) * height // rows),
                j * width // columns : -(-(j + 1) * width // columns),
            ]
            most = torch.zeros(batch, dtype=torch.int64, device=labels.device)
            for part in range(n_parts):
                votes = (cell == part).sum((1, 2))
                grid[:, i, j] = torch.where(votes > most, part, grid[:, i, j])
                most = torch.maximum(most, votes)
    return grid
