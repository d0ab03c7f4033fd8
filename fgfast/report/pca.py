"""Feature maps as colours: the principal components of the foreground of a set of images."""

import numpy as np
import torch
from torch import Tensor

SHOWN_QUANTILES = (0.01, 0.99)  # of a component over the foreground, which become 0 and 1
LEAST = 4  # cells that three components need


def pca_colours(maps: Tensor) -> Tensor:
    """Colours of the cells of feature maps, by one PCA for all images, so that like features have like colours.

    With x the feature of a cell, m the mean of all cells of all images and u the direction of their largest variance,
    the cell is foreground if <x - m, u> > 0. The sign of u is the one with which cells on the borders of the images
    have the smaller mean: background often lies there, objects rarely. A second PCA over the foreground alone has the
    mean m' and the axes v_1, v_2, v_3, and channel c of a cell of the foreground is

        (<x - m', v_c> - low_c) / (high_c - low_c), clipped to [0, 1],

    where low_c and high_c are the 1% and the 99% quantile of <x - m', v_c> over the foreground. Background is black.

    Args:
        maps: [B, D, h, w] of B images.

    Returns:
        float32 [B, 3, h, w] in [0, 1], on the CPU; a channel without variance is 0. With fewer than four cells of
        foreground all cells are foreground.

    Example:
        >>> maps = torch.zeros(1, 8, 4, 4)
        >>> maps[0, :, 1:3, 1:3] = torch.randn(8, 2, 2, generator=torch.Generator().manual_seed(0)) + 5
        >>> (pca_colours(maps)[0].sum(0) > 0).int().tolist()
        [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]

    Source: the two steps are those of the figures of Oquab et al., "DINOv2: Learning Robust Visual Features without
    Supervision", 2023; the sign by the borders is ours.
    """
    batch, _, height, width = maps.shape
    cells = maps.detach().permute(0, 2, 3, 1).flatten(0, 2).double().cpu()  # [B h w, D]
    border = torch.ones(batch, height, width, dtype=torch.bool)
    border[:, 1:-1, 1:-1] = False
    border = border.flatten()
    score = _components(cells, 1)[:, 0]
    if not border.all() and score[border].mean() > score[~border].mean():
        score = -score
    foreground = score > 0
    if int(foreground.sum()) < LEAST:
        foreground = torch.ones_like(foreground)
    found = _components(cells[foreground], 3)
    low, high = (torch.quantile(found, q, dim=0) for q in SHOWN_QUANTILES)
    spread = high - low
    varies = spread > 1e-9 * cells.abs().max()  # and not by rounding alone
    colours = torch.zeros(len(cells), 3, dtype=torch.float64)
    colours[foreground] = torch.where(varies, (found - low) / torch.where(varies, spread, 1), 0).clamp(0, 1)
    return colours.view(batch, height, width, 3).permute(0, 3, 1, 2).float()


def _components(x: Tensor, n: int) -> Tensor:
    """The first ``n`` principal components of vectors [N, D], float64 [N, n]; zeros for those that there are not."""
    from sklearn.decomposition import PCA

    k = min(n, *x.shape)
    with np.errstate(invalid="ignore"):  # the explained fraction of a variance of zero
        found = torch.from_numpy(PCA(k, random_state=0).fit_transform(x.numpy()))
    return torch.nn.functional.pad(found, (0, n - k))
