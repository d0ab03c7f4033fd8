"""Errors of the loss classes name the arguments of the class."""

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fgfast import losses
from tests.losses.peers import randn


@pytest.mark.parametrize("name", ["NTXentLoss", "DetConBLoss", "DetConSLoss", "SupConLoss", "InfoNCELoss"])
@pytest.mark.parametrize("temperature", [0.0, -0.1, float("inf"), float("nan")])
def test_a_temperature_that_is_not_positive_is_an_error(name: str, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature is"):
        getattr(losses, name)(temperature=temperature)


@pytest.mark.parametrize("temperature", ["a", None, torch.ones(2)])
def test_a_temperature_that_is_no_number_is_an_error(temperature: object) -> None:
    with pytest.raises(TypeError, match=r"temperature is .*: give a number\."):
        losses.NTXentLoss(temperature=temperature)


@pytest.mark.parametrize("size", [(10.5, 8), "ab", None, 2.0, (3, None)])
def test_a_size_of_the_bank_that_is_no_whole_number_is_an_error(size: object) -> None:
    with pytest.raises(TypeError, match=r"memory_bank_size is .*: give a whole number\."):
        losses.NTXentLoss(memory_bank_size=size)


def test_the_size_of_the_bank_may_be_numpy_numbers() -> None:
    assert losses.NTXentLoss(memory_bank_size=np.int64(0)).memory_bank.size == (0,)
    assert losses.NTXentLoss(memory_bank_size=np.array([4, 3])).memory_bank.bank.shape == (4, 3)


def test_an_empty_batch_leaves_the_centre_as_it_is() -> None:
    loss, x = losses.DINOLoss(8), torch.zeros(0, 8)
    with pytest.raises(ValueError, match=r"teacher_out\[0\]: expected shape \[B, 8\] with B at least 1, got \[0, 8\]"):
        loss([x, x], [x, x])
    assert torch.equal(loss.center, torch.zeros(1, 1, 8))


ONE = torch.tensor([0])


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (([0], [1], [2]), TypeError, "indices_tuple[0] is a list"),
        ((ONE, ONE + 1.0, ONE), TypeError, "indices_tuple[1] has dtype torch.float32: give integers."),
        ((ONE, ONE + 1, ONE, ONE + 4), ValueError, "indices_tuple[3] holds an index out of range: give indices from 0"),
        ((ONE, ONE - 1, ONE + 1), ValueError, "indices_tuple[1] holds an index out of range: give indices from 0 to 3"),
        ((ONE.repeat(2), ONE + 1, ONE + 2), ValueError, "indices_tuple[1]: expected shape [2], got [1]"),
        ((ONE[0], ONE[0] + 1, ONE[0] + 2), ValueError, "indices_tuple[0]: expected shape [P], got []"),
    ],
)
def test_pairs_that_do_not_fit_are_named(indices: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        losses.SupConLoss()(randn(0, 4, 8), indices_tuple=indices)


def test_pairs_of_uint8_are_indices() -> None:
    """To torch alone they would be a mask."""
    pairs = tuple(torch.tensor(i) for i in ([0, 1], [1, 0], [2, 3]))
    x, loss = randn(0, 4, 8), losses.SupConLoss()
    assert loss(x, indices_tuple=tuple(i.byte() for i in pairs)) == loss(x, indices_tuple=pairs)


def test_bad_input_is_one_clear_error() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="memory_bank_size is 5"):
        losses.NTXentLoss(memory_bank_size=5)
    with pytest.raises(TypeError, match="reducer is 'mean'"):
        losses.SupConLoss(reducer="mean")
    with pytest.raises(ValueError, match="center_mode is 'median'"):
        losses.DINOLoss(center_mode="median")
    with pytest.raises(ValueError, match="different views"):
        losses.DINOLoss(output_dim=3)([x], [x])
    with pytest.raises(ValueError, match="n_parts is 0"):
        losses.PartContrastiveLoss(0, nn.Identity())
    maps = torch.zeros(1, 3, 2, 2)
    ids = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="target1 and target2"):
        losses.PartContrastiveLoss(2, nn.Identity())(maps, maps, ids, ids, maps)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: losses.NTXentLoss()(x, x[:3]), ValueError, "out0 has shape (4, 8) and out1 has shape (3, 8)"),
        (lambda x: losses.NTXentLoss()(x[0], x[0]), ValueError, "out0: expected shape [B, D], got [8]"),
        (lambda x: losses.NTXentLoss()([1.0], x), TypeError, "out0 is a list"),
        (lambda x: losses.NTXentLoss()(x.long(), x.long()), TypeError, "out0 has dtype torch.int64"),
        (
            lambda x: losses.NTXentLoss()(x, x.float()),
            TypeError,
            "out1 has dtype torch.float32 and out0 has torch.float64: convert one of them.",
        ),
        (lambda x: losses.NTXentLoss()(x, x.to("meta")), ValueError, "out1 is on meta and out0 on cpu"),
        (lambda x: losses.SupConLoss()(x.long(), x[:, 0]), TypeError, "embeddings has dtype torch.int64"),
        (lambda x: losses.SupConLoss()(x.long(), None, (ONE, ONE + 1, ONE + 2)), TypeError, "embeddings has dtype"),
        (
            lambda x: losses.SupConLoss()(x, x[:, 0], ref_emb=x.float()),
            TypeError,
            "ref_emb has dtype torch.float32 and embeddings has torch.float64",
        ),
        (
            lambda x: losses.DetConSLoss()(x[None], x[None].float(), *[torch.zeros(1, 4).long()] * 2),
            TypeError,
            "view1 has dtype torch.float32 and view0 has torch.float64",
        ),
        (
            lambda x: losses.DetConBLoss()(x[None], 3, x[None], x[None], *[torch.zeros(1, 4).long()] * 2),
            TypeError,
            "pred_view1 is a int",
        ),
        (
            lambda x: losses.PartContrastiveLoss(2, nn.Identity())(x.long(), x.long(), x, x),
            TypeError,
            "features1 has dtype torch.int64",
        ),
        (lambda x: losses.DINOLoss(8)([1, 2], [x, x]), TypeError, "teacher_out[0] is a int: give a torch.Tensor."),
        (lambda x: losses.DINOLoss(8)([x, x], 5), TypeError, "student_out is a int: give a list of tensors [B, K]"),
        (lambda x: losses.InfoNCELoss()(x, x[:, :3]), ValueError, "key has shape (4, 3)"),
        (lambda x: losses.SupConLoss()(x, torch.zeros(4).cfloat()), TypeError, "labels has dtype torch.complex64"),
        (lambda x: losses.SupConLoss()(x), ValueError, "labels is None: give labels"),
        (lambda x: losses.SupConLoss()(x, None, (x, x)), ValueError, "indices_tuple: expected 3 or 4 tensors"),
        (
            lambda x: losses.SupConLoss()(x, None, tuple(torch.tensor([[0], [1], [0], [1]]))),
            ValueError,
            "indices_tuple: pair (0, 1) is both positive and negative.",
        ),
        (
            lambda x: losses.SupConLoss()(x, torch.zeros(4), ref_labels=torch.zeros(4)),
            ValueError,
            "ref_labels is given without ref_emb",
        ),
        (
            lambda x: losses.SupConLoss()(x, torch.zeros(4), ref_emb=x[:3]),
            ValueError,
            "ref_emb has 3 vectors and embeddings has 4: give ref_labels.",
        ),
        (
            lambda x: losses.DINOLoss(8)([x, x], [x, x[:3]]),
            ValueError,
            "student_out[1]: expected shape [4, 8], got [3, 8]",
        ),
        (lambda x: losses.DINOLoss(1)([x, x], [x, x]), ValueError, "teacher_out[0]: expected shape [4, 1], got [4, 8]"),
        (
            lambda x: losses.SupConLoss()(x[0], torch.zeros(8).long()),
            ValueError,
            "embeddings: expected shape",
        ),
        (
            lambda x: losses.SupConLoss()(x, torch.zeros(4).long(), None, x, torch.zeros(3).long()),
            ValueError,
            "ref_labels: expected shape",
        ),
        (
            lambda x: losses.SupConLoss()(x, torch.zeros(4).long(), None, x[:, :3], torch.zeros(4).long()),
            ValueError,
            "ref_emb has 3 channels and embeddings has 8",
        ),
        (
            lambda x: losses.DetConSLoss()(x[None], x[None], [0], torch.zeros(1, 4)),
            TypeError,
            "mask_view0 is a list",
        ),
        (
            lambda x: losses.DetConSLoss()(x[None], x[None], torch.zeros(1, 4), torch.zeros(1, 4)),
            TypeError,
            "mask_view0 has dtype torch.float32",
        ),
        (
            lambda x: losses.PartContrastiveLoss(2, nn.Identity())(
                x.view(2, 4, 2, 2), x.view(2, 4, 2, 2)[:1], *[torch.zeros(2, 2, 2).long()] * 2
            ),
            ValueError,
            "features1 has shape (2, 4, 2, 2) and features2 has shape (1, 4, 2, 2)",
        ),
    ],
)
def test_messages_name_the_arguments_of_the_class(
    call: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    """Errors name the arguments of the loss, not those of the operation that it calls."""
    with pytest.raises(error, match=re.escape(message)):
        call(randn(0, 4, 8))


def test_labels_and_ids_that_do_not_fit_are_errors() -> None:
    """Shapes are told before anything is indexed."""
    x = randn(0, 4, 8)
    with pytest.raises(ValueError, match="labels: expected shape"):
        losses.SupConLoss()(x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[B, M, D\]"):
        losses.DetConBLoss()(x, x, x, x, torch.zeros(4).long(), torch.zeros(4).long())
    with pytest.raises(ValueError, match=r"\[B, M, D\]"):
        losses.DetConSLoss()(x[None], x[None], torch.zeros(1, 3).long(), torch.zeros(1, 3).long())
