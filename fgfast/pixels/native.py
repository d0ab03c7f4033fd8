"""Feature pyramids as a pixel source on the CPU whose scores are resized, compared and summed by compiled code (csrc/).

Scores of the cells are products in PyTorch, as in :mod:`fgfast.pixels.pyramid`. Compiled code mixes them for a row of
pixels at a time and keeps the least: no map of K scores per pixel is written. The sums are those of the last labels,
plus the pixels whose label is new and minus the same in their old cluster, where few are new. Such sums hold the
rounding errors of all pixels that were ever added or taken away. Where these are more than four times those of a
cluster now, by number and by |y|, the sums are made anew: updated sums round as sums of four times as many pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast.pixels.pyramid import Pyramid
from fgfast.pixels.source import one_hot

LANES = 16  # clusters are padded to a multiple of it, kBlock in csrc/pyramid_cpu.cpp
MIXED = 8  # clusters whose product takes as long as to mix the cells of a pixel


class NativePyramid(Pyramid):
    """`Pyramid` of float32 on the CPU."""

    labels: Tensor | None  # to which the sums belong
    sums: Tensor
    carried: Tensor

    def move(self, shift: Tensor | None, factor: Tensor | None) -> None:
        """Use y = factor (x - shift) from now on."""
        super().move(shift, factor)
        self.compiled = tuple(
            (
                f.padded.data_ptr(), f.padded.shape[1], f.channels,
                *((n, low.data_ptr(), high.data_ptr()) for n, (low, high) in ((f.height, f.down), (f.width, f.across))),
            )
            for f in self.levels
        )  # fmt: skip
        self.labels = None
        self.norms: Tensor | None = None

    def _shape(self, n_clusters: int) -> tuple[int, ...]:
        return self.batch, *self.size, n_clusters, n_clusters + -n_clusters % LANES

    def assign(self, m: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One read of the levels, and one of the cells around the pixels whose label is new."""
        import fgfast._native as native

        shape = self._shape(m.shape[1])
        columns = F.pad(m.mT, (0, shape[4] - shape[3])).contiguous().split(self.split, 1)
        scores = [torch.bmm(level.f, part) for level, part in zip(self.levels, columns, strict=True)]
        bias = bias.contiguous()
        labels = torch.empty(self.batch, self.pixels, dtype=torch.int64)
        best = torch.empty(self.batch, self.pixels)
        native.label_pyramid(
            self.compiled, shape, tuple(s.data_ptr() for s in scores), bias.data_ptr(), labels.data_ptr(),
            best.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return labels, best, *self.label_sums(labels, scale, shape[3])

    def label_sums(self, labels: Tensor, scale: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
        """Sums [B, K, D] of scale_n y_n and [B, K] of scale_n over the pixels of each label."""
        import fgfast._native as native

        counts, mass = torch.empty(2, self.batch, n_clusters)
        if self.norms is None:
            self.norms = self.squared_norms.sqrt()
        if self.labels is not None and self.sums.shape[1] == n_clusters:
            sums, before = self.sums.clone(), self.labels.data_ptr()
        else:  # neither is read
            sums, before, self.carried = counts, 0, mass
        work = n_clusters * sum(level.f[0].numel() for level in self.levels)
        scale = scale.contiguous()
        updated = native.update_sums(
            self.compiled, self._shape(n_clusters), labels.data_ptr(), before, scale.data_ptr(), self.norms.data_ptr(),
            work // ((n_clusters + MIXED) * self.channels), counts.data_ptr(), mass.data_ptr(), self.carried.data_ptr(),
            sums.data_ptr(),
        )  # fmt: skip
        if not updated:
            sums, self.carried = self._weighted_sums(one_hot(labels, scale, n_clusters)), mass
        self.labels, self.sums = labels, sums
        return sums, counts
