r"""The pairwise sigmoid loss by tiles of the logit matrix, in one process or with the texts of all ranks.

With :math:`v_{ij} = t \langle x_i, y_j \rangle + b`, its sign changed where i and j are a pair, every entry adds
:math:`\log(1 + e^{v})` to the loss and :math:`\sigma(v)` to the gradients of the logits. A tile is one matrix product
into a buffer that all tiles reuse; backward recomputes the tiles. Over ranks, blocks of texts are passed around a ring,
in backward together with the gradient accumulated so far, as in :mod:`fgfast.ops.contrast.ring`; each block is computed
by the backend that one process would use.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fgfast.backend import BACKENDS, check_triton, preference, resolve
from fgfast.ops.contrast.exchange import Choice, Ring, process_group
from fgfast.ops.contrast.sides import make_side, tile_size, tiles
from fgfast.ops.derivatives import gradients, needs_definition, second_derivatives
from fgfast.ops.registration import operation
from fgfast.reference import sigmoid as reference
from fgfast.tensors import accumulation, exact, transformed

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BREAK_EVEN = 2**16  # logits up to which "auto" chooses the reference


def sigmoid_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The loss of ``fgfast.losses.SigLIPLoss``, whose checks have been made: image and text [N, D], 0-d scale and bias.

    Over a group: world size x local sum / pairs of all ranks. "auto" chooses the kernels on a GPU; elsewhere the
    reference up to 65,536 logits, and the tiles above.

    Raises:
        RuntimeError: forward mode or torch.func with backend "triton" or over a group.
    """
    if image.dtype != text.dtype:  # under autocast
        wider = torch.promote_types(image.dtype, text.dtype)
        image, text = image.to(wider), text.to(wider)
    by_definition = needs_definition("SigLIPLoss", backend, image, text, scale, bias)
    over_ranks = group is not None and dist.get_world_size(group) > 1
    if over_ranks and by_definition:
        _refuse()
    small = len(image) * len(text) <= BREAK_EVEN
    plain = ("torch",) if over_ranks else ("reference", "torch") if small else ("torch", "reference")
    name = resolve("SigLIPLoss", backend, preference("contrast", image, plain))
    if by_definition or name == "reference":
        return reference.sigmoid_loss(image, text, scale, bias)
    # Reaches kernels.contrast.sigmoid (triton) or _Block (torch) below.
    loss: Tensor = _sigmoid_loss(image, text, scale, bias, name, group.group_name if over_ranks and group else "")
    return loss


def _refuse() -> None:
    raise RuntimeError(
        "SigLIPLoss over ranks has no forward-mode derivative, no second derivative and does not work inside "
        "torch.func: give world_size=1."
    )


class _Block:
    """The logits of the images of this rank with one block of texts; text i belongs to image i if ``paired``."""

    def __init__(self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, paired: bool):
        dtype = accumulation(image.dtype)
        self.images, self.texts = (make_side(x, None, False, dtype) for x in (image, text))
        self.scale, self.bias, self.paired = scale.detach().to(dtype), bias.detach().to(dtype), paired
        self.size = tile_size(image)
        self.buffer = image.new_empty(min(len(image), self.size) * min(len(text), self.size), dtype=dtype)

    def compute(self, rows: slice, columns: slice, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tile v [m, n] of loaded images (times scale) and texts, and a view of its entries that are pairs."""
        v = torch.mm(image, text.T, out=self.buffer[: len(image) * len(text)].view(len(image), len(text)))
        v += self.bias
        return v, v.diagonal().neg_() if self.paired and rows.start == columns.start else None

    def losses(self) -> Tensor:
        """The losses of the images [N]."""
        losses = self.images.vectors.new_zeros(len(self.images), dtype=self.images.dtype)
        for rows in tiles(len(self.images), self.size):
            image = self.images.load(rows, self.scale)
            for columns in tiles(len(self.texts), self.size):
                v, _ = self.compute(rows, columns, image, self.texts.load(columns))
                losses[rows] -= F.logsigmoid(v.neg_()).sum(1)
        return losses

    def add_gradients(self, factor: Tensor, d_image: Tensor, d_text: Tensor | None) -> Tensor:
        """Add ``factor`` times the sums of w y to d_image and of w x to d_text, w being the derivative by the logit.

        Returns:
            The sums of w <x, y> and of w over the texts, for every image, [2, N].
        """
        sums = self.images.vectors.new_zeros(2, len(self.images), dtype=self.images.dtype)
        for rows in tiles(len(self.images), self.size):
            image = self.images.load(rows)
            scaled, weighted = image * self.scale, image * factor
            d_rows = torch.zeros_like(image)
            for columns in tiles(len(self.texts), self.size):
                text = self.texts.load(columns)
                v, pairs = self.compute(rows, columns, scaled, text)
                v.sigmoid_()
                if pairs is not None:
                    pairs.neg_()
                sums[1, rows] += v.sum(1)
                d_rows.addmm_(v, text)
                if d_text is not None:
                    d_text[columns].addmm_(v.T, weighted)
            sums[0, rows] = (image * d_rows).sum(1)
            d_image[rows] += d_rows.mul_(factor)
        return sums


class _Blocks:
    """The texts of all ranks of the named group, block by block; "" is this process alone."""

    def __init__(
        self, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, backend: str, group: str,
        need_text: bool = False,
    ):  # fmt: skip
        self.text, self.ring, counts = text, None, [len(text)]
        if group:
            choices: dict[str, Choice] = {
                "backend": (backend, BACKENDS), "text_features.requires_grad": (need_text, (False, True)),
            }  # fmt: skip
            self.ring = Ring(process_group(group), text, choices, {"logit_scale": scale, "logit_bias": bias})
            counts = self.ring.counts
        if backend == "triton":  # not before the exchange, in which the other ranks would wait in vain
            check_triton("image_features", image)
        self.weight = len(counts) / max(sum(counts), 1)  # so that the mean over ranks is the mean over all images

    def each(self, compute: Callable[[Tensor, bool], Tensor | None]) -> Tensor | None:
        """Call compute(texts, whether they are those of this rank); returns the sum of the results for this rank's."""
        if self.ring is None:
            return compute(self.text, True)
        own = self.text.contiguous()
        return self.ring.pass_around([own], lambda block: compute(block[0], block[0] is own))


@operation("sigmoid_loss")
def _sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, backend: str, group: str) -> Tensor:
    """The loss, 0-d."""
    losses = image.new_zeros(len(image), dtype=accumulation(image.dtype))
    blocks = _Blocks(image, text, scale, bias, backend, group)

    def add(texts: Tensor, paired: bool) -> None:
        if backend == "triton":
            from fgfast.kernels.contrast import sigmoid as kernels

            losses.add_(kernels.forward(image, texts, scale, bias, paired))
        else:
            losses.add_(_Block(image, texts, scale, bias, paired).losses())

    with exact(image.device):
        blocks.each(add)
        return losses.sum() * blocks.weight


@operation("sigmoid_loss_backward")
def _sigmoid_loss_backward(
    grad: Tensor, need_text: bool, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, backend: str, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of images, texts, scale and bias; that of the texts is empty unless ``need_text``."""
    dtype = accumulation(image.dtype)
    d_image, sums = image.new_zeros(image.shape, dtype=dtype), image.new_zeros(2, len(image), dtype=dtype)
    blocks = _Blocks(image, text, scale, bias, backend, group, need_text)
    of_loss = grad * blocks.weight
    factor = of_loss * scale.to(dtype)

    def add(texts: Tensor, paired: bool) -> Tensor | None:
        d_text = texts.new_zeros(texts.shape, dtype=dtype) if need_text else None
        if backend == "triton":
            from fgfast.kernels.contrast import sigmoid as kernels

            sums.add_(kernels.add_gradients(image, texts, scale, bias, paired, factor, d_image, d_text))
        else:
            sums.add_(_Block(image, texts, scale, bias, paired).add_gradients(factor, d_image, d_text))
        return d_text

    with exact(image.device):
        d_text = blocks.each(add)
        d_scale, d_bias = sums.sum(1) * of_loss
    return (
        d_image.to(image.dtype),
        text.new_empty(0) if d_text is None else d_text.to(text.dtype),
        d_scale.to(scale.device, scale.dtype, copy=True),
        d_bias.to(bias.device, bias.dtype, copy=True),
    )


@_sigmoid_loss.register_fake
def _(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, backend: str, group: str) -> Tensor:
    return image.new_empty((), dtype=accumulation(image.dtype))


@_sigmoid_loss_backward.register_fake
def _(
    grad: Tensor, need_text: bool, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, backend: str, group: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_text = text.new_empty(text.shape if need_text else (0,))
    return image.new_empty(image.shape), d_text, torch.empty_like(scale), torch.empty_like(bias)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _definition(group: str) -> Any:
    if group:
        _refuse()
    return reference.sigmoid_loss


def _differentiate(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    inputs = ctx.saved_tensors
    if transformed(grad):
        return *gradients(_definition(ctx.options[1]), inputs, grad), None, None
    found = _sigmoid_loss_backward(grad, ctx.needs_input_grad[1], *inputs, *ctx.options)
    needed = (g if need else None for need, g in zip(ctx.needs_input_grad[:4], found, strict=True))
    return *needed, None, None


def _setup_second(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad, ctx.need_text, *arguments = inputs
    ctx.save_for_backward(grad, *arguments[:4])
    ctx.group = arguments[5]


def _differentiate_twice(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    grad, *inputs = ctx.saved_tensors
    wanted = [v if i != 1 or ctx.need_text else None for i, v in enumerate(cotangents)]
    if all(v is None for v in wanted):
        return (None,) * 8
    d_grad, *d_inputs = second_derivatives(_definition(ctx.group), inputs, grad, wanted)
    return d_grad, None, *d_inputs, None, None


_sigmoid_loss.register_autograd(_differentiate, setup_context=_setup)
_sigmoid_loss_backward.register_autograd(_differentiate_twice, setup_context=_setup_second)
