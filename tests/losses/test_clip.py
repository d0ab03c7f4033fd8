"""CLIPLoss: the cross entropy of images with texts and of texts with images, and what it refuses."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast import losses
from tests.losses.peers import assert_same, randn

SCALE = torch.tensor(14.0, dtype=torch.float64)


def plain(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = scale * image @ text.T
    if bias is not None:
        logits = logits + bias
    labels = torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def features(n: int, d: int = 8) -> tuple[Tensor, Tensor]:
    return F.normalize(randn(0, n, d), dim=1), F.normalize(randn(1, n, d), dim=1)


@pytest.mark.parametrize("n", [1, 9, 300])  # no negatives, the plain path, tiles
def test_clip_is_the_mean_of_two_cross_entropies(n: int) -> None:
    assert_same(losses.CLIPLoss(), plain, *features(n), SCALE)


def test_features_are_not_normalised() -> None:
    assert_same(losses.CLIPLoss(), plain, randn(0, 9, 8), randn(1, 9, 8), SCALE / 10)


def test_a_bias_changes_no_loss_and_gets_the_gradient_0() -> None:
    assert_same(losses.CLIPLoss(), plain, *features(9), SCALE, torch.tensor(-3.0).double())
    bias = torch.tensor(-3.0, requires_grad=True)
    losses.CLIPLoss()(*features(9), SCALE, bias).backward()
    assert bias.grad == 0


@pytest.mark.parametrize("scale", [14.0, SCALE[None], SCALE.float()])
def test_a_scale_is_a_number_or_a_tensor_of_one(scale: Tensor | float) -> None:
    expected = plain(*features(9), SCALE)
    torch.testing.assert_close(losses.CLIPLoss()(*features(9), scale), expected, rtol=1e-6, atol=0)
    named = losses.CLIPLoss()(*features(9), scale, output_dict=True)
    torch.testing.assert_close(named["contrastive_loss"], expected, rtol=1e-6, atol=0)


def test_the_gradient_of_a_bfloat16_scale_is_its_own() -> None:
    """1 / 100 in bfloat16 would be off by 0.2 percent."""
    image, text = (x.bfloat16() for x in features(64))
    scale = torch.tensor(100.0, dtype=torch.bfloat16, requires_grad=True)
    loss = losses.CLIPLoss()(image, text, scale)
    loss.backward()
    exact = torch.tensor(100.0, dtype=torch.float64, requires_grad=True)
    expected = plain(image.double(), text.double(), exact)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(scale.grad.double(), exact.grad, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: losses.CLIPLoss()(x, x[:3], SCALE), ValueError,
         "image_features has shape (4, 8) and text_features has shape (3, 8): give all of them the same shape [B, D]."),
        (lambda x: losses.CLIPLoss()(x[0], x[0], SCALE), ValueError, "image_features: expected shape [B, D], got [8]."),
        (lambda x: losses.CLIPLoss()(x, x.float(), SCALE), TypeError, "text_features has dtype torch.float32"),
        (lambda x: losses.CLIPLoss()(x, x, SCALE.expand(2)), ValueError, "logit_scale: expected shape [] or [1]"),
        (lambda x: losses.CLIPLoss()(x, x, "1"), TypeError, "logit_scale is a str: give a number or a tensor of one."),
        (lambda x: losses.CLIPLoss()(x, x, SCALE.long()), TypeError, "logit_scale has dtype torch.int64"),
        (lambda x: losses.CLIPLoss()(x, x, 0 * SCALE), ValueError, "logit_scale is 0.0: give a finite number above 0."),
        (lambda x: losses.CLIPLoss()(x, x, -1), ValueError, "logit_scale is -1.0: give a finite number above 0."),
        (lambda x: losses.CLIPLoss()(x, x, SCALE / 0), ValueError, "logit_scale is inf: give a finite number above 0."),
        (lambda x: losses.CLIPLoss()(x, x, SCALE, SCALE.expand(2)), ValueError, "logit_bias: expected shape [] or [1]"),
        (lambda x: losses.CLIPLoss(use_horovod=True), ValueError, "use_horovod is True: give False"),
        (lambda x: losses.CLIPLoss(rank=1, world_size=2)(x, x, SCALE), ValueError,
         "rank is 1 of 2 and this process is rank 0 of 1 of the process group: give its rank and world_size."),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(randn(0, 4, 8))
