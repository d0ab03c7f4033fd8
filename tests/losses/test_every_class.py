"""What holds for every loss: half precision with a GradScaler, meta tensors, torch.func, dtypes, unchanged buffers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fgfast import losses
from tests.losses.peers import randint, randn

Call = Callable[[nn.Module, Tensor], Tensor]
LABELS, MASKS = randint(0, 5, 400), randint(1, 6, 2, 20, 10)
MAPS = randint(2, 3, 2, 2, 20, 10)


def dino(loss: nn.Module, x: Tensor) -> Tensor:
    return loss([v.detach() for v in x[:200].chunk(2)], x[200:].chunk(2))


def parts(loss: nn.Module, x: Tensor) -> Tensor:
    maps = x.view(2, 2, 10, 10, -1).movedim(-1, 2)
    return loss(*maps, *MAPS.to(x.device))


# A loss, and its value for 400 vectors of 8 channels: more logits than the plain path computes.
CLASSES: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "NTXentLoss": (losses.NTXentLoss, lambda loss, x: loss(x[:200], x[200:])),
    "NTXentLoss with a bank": (
        lambda: losses.NTXentLoss(memory_bank_size=(500, 8)),
        lambda loss, x: loss(x[:200], x[200:]),
    ),
    "InfoNCELoss": (losses.InfoNCELoss, lambda loss, x: loss(x[:200], x[200:])),
    "DetConBLoss": (
        losses.DetConBLoss,
        lambda loss, x: loss(*x.view(2, 20, 10, -1), *x.flip(0).view(2, 20, 10, -1), *MASKS.to(x.device)),
    ),
    "DetConSLoss": (losses.DetConSLoss, lambda loss, x: loss(*x.view(2, 20, 10, -1), *MASKS.to(x.device))),
    "SupConLoss": (losses.SupConLoss, lambda loss, x: loss(x, LABELS)),
    "DINOLoss": (lambda: losses.DINOLoss(8), dino),
    "DINOLoss with Sinkhorn": (lambda: losses.DINOLoss(8, center_mode="sinkhorn"), dino),
    "KoLeoLoss": (losses.KoLeoLoss, lambda loss, x: loss(x)),
    "CLIPLoss": (losses.CLIPLoss, lambda loss, x: loss(x[:200], x[200:], 1.0)),
    "SigLIPLoss": (losses.SigLIPLoss, lambda loss, x: loss(x[:200], x[200:], 1.0, -1.0)),
    "PartContrastiveLoss": (lambda: losses.PartContrastiveLoss(3, nn.Identity()), parts),
}  # fmt: skip
every_class = pytest.mark.parametrize(("make", "call"), CLASSES.values(), ids=CLASSES)


def make_seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def gradient(make: Callable[[], nn.Module], call: Call, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(call(make_seeded(make), x), x)
    return grad


@every_class
@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64,) * 2]
)
def test_the_loss_is_float32_or_the_float64_of_its_vectors(
    make: Callable[[], nn.Module], call: Call, dtype: torch.dtype, expected: torch.dtype
) -> None:
    assert call(make(), randn(0, 400, 8).to(dtype)).dtype == expected


@every_class
def test_a_scaled_loss_of_float16_vectors_trains_and_an_infinity_skips_the_step(
    make: Callable[[], nn.Module], call: Call
) -> None:
    """A GradScaler gets the gradients of float32, or keeps the weights."""
    x = randn(0, 400, 8).float()
    with_infinity = x.index_fill(0, torch.tensor(7), torch.inf)
    model, loss = nn.Linear(8, 8), make_seeded(make)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    (expected,) = torch.autograd.grad(call(make_seeded(make), model(x)), model.weight)
    for infinite in (False, True):
        before = model.weight.detach().clone()
        optimizer.zero_grad()
        scaler.scale(call(loss, model(with_infinity if infinite else x).half())).backward()
        scaler.unscale_(optimizer)
        if not infinite:
            torch.testing.assert_close(model.weight.grad, expected, rtol=0.02, atol=2e-3 * expected.abs().max().item())
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model.weight, before) == infinite


@every_class
def test_meta_tensors_go_through(make: Callable[[], nn.Module], call: Call) -> None:
    x = torch.empty(400, 8, device="meta", requires_grad=True)
    value = call(make().to("meta"), x)
    assert (value.shape, value.device.type) == ((), "meta")
    value.backward()


@every_class
def test_torch_func_grad_gives_the_gradient_of_backward(make: Callable[[], nn.Module], call: Call) -> None:
    """Also where the loss updates a buffer, which is the same afterwards."""
    x = randn(0, 400, 8)
    expected, functional = make_seeded(make).double(), make_seeded(make).double()
    torch.testing.assert_close(torch.func.grad(lambda x: call(functional, x))(x), gradient(lambda: expected, call, x))
    for a, b in zip(functional.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b)
