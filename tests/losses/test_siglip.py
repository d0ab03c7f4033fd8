"""SigLIPLoss: open_clip's arguments, the formula, and what it refuses."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast import losses, use_backend
from tests.losses.peers import assert_same, randn

SCALE, BIAS = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-10.0, dtype=torch.float64)


def features(n: int) -> list[Tensor]:
    return [F.normalize(randn(seed, n, 8), dim=1) for seed in (0, 1)]


def plain(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The labels 1 on the diagonal and -1 elsewhere, as open_clip builds them."""
    labels = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(labels * (scale * image @ text.T + bias)).sum() / len(image)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("n", [1, 9, 600])  # one tile, and a part of a second
def test_value_and_every_gradient_are_those_of_the_formula(n: int, backend: str) -> None:
    with use_backend(backend):
        assert_same(losses.SigLIPLoss(), plain, *features(n), SCALE, BIAS)


def test_no_pairs_give_zero_and_gradients_of_zero() -> None:
    inputs = [x.requires_grad_() for x in (*features(0), SCALE.clone(), BIAS.clone())]
    loss = losses.SigLIPLoss()(*inputs)
    assert loss == 0
    assert [g.tolist() for g in torch.autograd.grad(loss, inputs)] == [[], [], 0, 0]


@pytest.mark.parametrize("scale", [10, 10.0, torch.tensor([10.0]), torch.tensor(10.0)])
def test_factors_may_be_numbers_or_tensors_of_one(scale: Tensor | float) -> None:
    x = features(5)
    expected = losses.SigLIPLoss()(*x, SCALE, torch.tensor(0.0))
    torch.testing.assert_close(losses.SigLIPLoss()(*x, scale, None), expected)
    named = losses.SigLIPLoss(cache_labels=True, dist_impl="shift")(*x, scale, 0, output_dict=True)
    torch.testing.assert_close(named, {"contrastive_loss": expected})


def test_parameters_keep_their_shape_and_dtype_beside_half_precision() -> None:
    image, text = (x.bfloat16() for x in features(7))
    scale, bias = torch.tensor([10.0], requires_grad=True), torch.tensor(-10.0, requires_grad=True)
    loss = losses.SigLIPLoss()(image, text, scale, bias)
    loss.backward()
    assert loss.dtype == torch.float32
    assert (scale.grad.shape, bias.grad.shape, scale.grad.dtype) == ((1,), (), torch.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: losses.SigLIPLoss()(x, x[:3], SCALE, BIAS), ValueError,
         "image_features has shape (4, 8) and text_features has shape (3, 8): give all of them the same shape [B, D]."),
        (lambda x: losses.SigLIPLoss()(x, x.float(), SCALE, BIAS), TypeError, "text_features has dtype torch.float32"),
        (lambda x: losses.SigLIPLoss()(x, x, SCALE.expand(2), BIAS), ValueError, "logit_scale: expected shape [] or"),
        (lambda x: losses.SigLIPLoss()(x, x, SCALE, "1"), TypeError, "logit_bias is a str: give a number or a tensor"),
        (lambda x: losses.SigLIPLoss()(x, x, SCALE, BIAS.long()), TypeError, "logit_bias has dtype torch.int64"),
        (lambda x: losses.SigLIPLoss(dist_impl="ring"), ValueError,
         "dist_impl is 'ring': choose one of bidir, shift, reduce, gather."),
        (lambda x: losses.SigLIPLoss(group=[0, 1]), TypeError, "group is [0, 1]: give a torch.distributed process"),
        (lambda x: losses.SigLIPLoss(rank=1, world_size=2)(x, x, SCALE, BIAS), ValueError,
         "rank is 1 of 2 and this process is rank 0 of 1 of the process group: give its rank and world_size."),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(randn(0, 4, 8))
