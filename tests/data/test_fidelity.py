"""PSNR and SSIM against scikit-image."""

import numpy as np
import pytest
import torch

from fgfast.data.fidelity import psnr, ssim


@pytest.mark.parametrize("size", [(11, 11), (24, 17), (40, 64)])  # one window; odd; several
def test_equal_to_scikit_image(size: tuple[int, int]) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(3, 3, *size, generator=g)
    noise = torch.randn(3, 3, *size, generator=g) * torch.tensor([0.01, 0.1, 0.5])[:, None, None, None]
    x = (truth + noise).clamp(0, 1)
    for i in range(3):
        a, b = (v[i].permute(1, 2, 0).numpy().astype(np.float64) for v in (x, truth))
        assert psnr(x, truth)[i] == pytest.approx(metrics.peak_signal_noise_ratio(b, a, data_range=1), rel=1e-6)
        expected = metrics.structural_similarity(
            a, b, data_range=1, channel_axis=2, gaussian_weights=True, use_sample_covariance=False
        )
        assert ssim(x, truth)[i] == pytest.approx(expected, rel=1e-5)


def test_identical_and_too_small_images() -> None:
    x = torch.rand(2, 3, 16, 16)
    assert psnr(x, x).tolist() == [float("inf")] * 2
    torch.testing.assert_close(ssim(x, x), torch.ones(2))
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(x[..., :10], x[..., :10])
