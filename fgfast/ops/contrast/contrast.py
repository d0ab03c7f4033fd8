"""``contrastive_loss``: choice of the backend and registration with torch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fgfast.backend import check_triton, preference, resolve
from fgfast.ids import Ids
from fgfast.ops.contrast import positives, sides, tiled
from fgfast.ops.contrast.autograd import cast_gradients, forget_zero_vectors, register_autograd
from fgfast.ops.contrast.checks import as_ids, check_operands, check_options
from fgfast.ops.contrast.dense import DenseContrast, fits
from fgfast.ops.contrast.operands import Operands, define_losses
from fgfast.ops.contrast.ring import ring_contrast
from fgfast.ops.contrast.statistics import RowStatistics
from fgfast.ops.derivatives import needs_definition
from fgfast.ops.registration import operation
from fgfast.reference import contrast as reference
from fgfast.tensors import accumulation, exact, readable

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BREAK_EVEN = 2**16  # logits up to which "auto" lets torch.compile trace the reference: measured on a CPU core, D = 128


def contrastive_loss(
    query: Tensor,
    key: Tensor,
    *,
    query_ids: Ids,
    key_ids: Ids,
    temperature: float | Tensor = 0.1,
    negatives: str = "all",
    weight: Tensor | None = None,
    normalize: bool = True,
    bank: Tensor | None = None,
    reduction: str = "mean",
    precision: str = "ieee",
    deterministic: bool = True,
    group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    r"""Contrast every query with its positives against the other keys, without the logit matrix in memory.

    .. math:: \ell_i = \log \sum_{j \in P_i \cup N_i \cup \text{bank}} e^{s_{ij}} - \frac{1}{|P_i|} \sum_{j \in P_i}
              s_{ij}, \qquad s_{ij} = \langle q_i, k_j \rangle / T

    Key j is a positive of query i when image and part agree and view differs; it is masked out when all three agree;
    every other key is a negative, restricted by ``negatives``. Part -1 means absent: such queries and keys are masked
    out, and their contents (NaN included) affect neither loss nor gradients. A query without a positive has loss 0.

    The "torch" backend works by tiles of the logit matrix, or on the CPU with the whole of it where that takes up to
    8 MiB: besides inputs and returned gradients it needs at most twice the memory of the inputs and 64 MiB. If query
    and key are the same tensor with the same ``Ids``, half the products of the symmetric logits are saved. The loss
    agrees with float64 arithmetic to 1e-6 (1 + 1/T) and the gradients to 1e-5 relative to their largest entry, for
    inputs as stored (float16 and bfloat16 inputs are upcast exactly; only the returned gradients are rounded). The
    "triton" backend keeps the loss within the same bound; with float16 and bfloat16 it rounds dL/ds to bfloat16, so the
    error of the gradient of a query is at most 2^-7 / (T norm) times its upstream gradient, and that of the temperature
    2^-7 / T^2 times their sum (for unit vectors). It supports D up to 8,192.

    Forward mode, the transforms of torch.func (grad, vmap, jvp, ...) and second derivatives take the definition in
    plain PyTorch, at every size alike and with the memory of a few matrices of M x (T + Q) logits.

    Args:
        query: [M, D] float32, float16, bfloat16 or float64, any strides. float64 is accumulated in float64, the others
            in float32.
        key: [T, D], the same dtype (under autocast dtypes may differ).
        query_ids: image, part and view of each query, integers [M].
        key_ids: image, part and view of each key, integers [T].
        temperature: T > 0, a number or a 0-d tensor; a tensor receives a gradient.
        negatives: "all", "other_images" (positives and keys of other images) or "same_image" (keys of the same image).
        weight: [M], finite and not negative, multiplies the losses of the queries; it gets no gradient.
        normalize: divide every vector by max(norm, 1e-12) first, in float32 or float64 and right for every finite
            vector; the "triton" backend takes vectors of a norm over 1.8e19 for zeros. The gradient of a vector of
            zeros is 1e12 times that of its unit vector; in float16, which cannot hold it, it is 0.
        bank: [Q, D] additional negatives of every query, independent of ``negatives``.
        reduction: "mean" divides by M, "mean_valid" by the number of queries with a positive and weight > 0; "sum";
            "none" returns the losses [M]. M = 0 gives 0.
        precision: "ieee" or "tf32": arithmetic of float32 products on a GPU.
        deterministic: has no effect, as every backend is deterministic; False would permit float atomics.
        group: contrast with the keys of all ranks of this process group, passed around a ring. The result is
            world size x local sum / global divisor, so the averaging of DistributedDataParallel gives exactly the
            gradient of one process on the concatenated batch. Image ids must differ between ranks: see
            ``fgfast.global_ids``. The number of queries and keys may differ between ranks, the options, a learnable
            temperature and the need of a gradient of the keys may not; the bank is replicated and counts once. It has
            the backends "triton" and "torch".
        backend: "triton", "torch", "reference" or "auto"; strict. "auto" chooses the kernels on a GPU; elsewhere
            "torch", except under torch.compile up to 65,536 logits, where it lets the reference be fused.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or [M] for "none".

    Raises:
        TypeError: an unsupported dtype or type.
        ValueError: shapes or devices that do not fit, an unknown option, a temperature that is not positive; over a
            group, on every rank, D, a dtype, an option or the temperature that differs between ranks; on the
            CPU, or with FGFAST_CHECKS=1 in the environment, a part below -1 or a negative or non-finite weight.
        RuntimeError: forward mode or torch.func with backend "triton" or over a group, or a second derivative over one.

    Example:
        >>> import torch
        >>> from fgfast import Ids, contrastive_loss
        >>> image, part = torch.arange(4), torch.zeros(4, dtype=torch.int64)
        >>> first, second = torch.eye(4), torch.eye(4)
        >>> loss = contrastive_loss(first, second, query_ids=Ids(image, part, part), key_ids=Ids(image, part, part + 1))
        >>> bool(loss < 0.001)
        True

    Source:
        SimCLR (arXiv 2002.05709) and DetCon (arXiv 2103.10957) combined; the tiles as in Inf-CL (arXiv 2410.17243).
    """
    query_ids, key_ids = as_ids("query_ids", query_ids), as_ids("key_ids", key_ids)
    check_options(negatives, reduction, precision, deterministic)
    check_operands(query, key, query_ids, key_ids, temperature, weight, bank)
    weight = None if weight is None else weight.detach()
    number, tensor = (1.0, temperature) if isinstance(temperature, Tensor) else (float(temperature), None)
    operands = Operands(query, query_ids, key, key_ids, bank, tensor, number, negatives, normalize, precision)
    by_definition = needs_definition(
        "contrastive_loss", backend, query, key, bank, tensor, weight, *query_ids, *key_ids
    )
    if group is not None and torch.distributed.get_world_size(group) > 1:
        if by_definition:
            raise RuntimeError(
                "contrastive_loss over a group has no forward-mode derivative and does not work inside torch.func: "
                "give no group."
            )
        name = resolve("contrastive_loss over a group", backend, preference("contrast", query, ("torch",)))
        return ring_contrast(operands, weight, reduction, group, name)
    columns = key.shape[0] + (0 if bank is None else bank.shape[0])
    small = query.shape[0] * columns <= BREAK_EVEN
    on_cpu = ("reference", "torch") if small and not readable(query) else ("torch", "reference")
    name = resolve("contrastive_loss", backend, preference("contrast", query, on_cpu))
    if by_definition or name == "reference":
        return reference.contrastive_loss(
            query, key, query_ids=query_ids, key_ids=key_ids, temperature=temperature, negatives=negatives,
            weight=weight, normalize=normalize, bank=bank, reduction=reduction,
        )  # fmt: skip
    if name == "triton":
        check_triton("query", query)
    if key is query and all(a is b for a, b in zip(query_ids, key_ids, strict=True)):
        operands = operands._replace(key=None, key_ids=None)
    if name == "torch" and fits(operands):
        loss, count = DenseContrast.apply(*operands.flat())
    else:  # reaches kernels.contrast.launch.forward (triton) or tiled.forward_tiles (torch), by _contrast below
        loss, _, count = _contrast(*operands.flat(), name)
    return reference.reduce(loss, count, weight, reduction)


class _Problem:
    """The sides of the logit matrix of one call, recomputed in forward and in backward."""

    def __init__(self, operands: Operands):
        query, negatives, normalize = operands.query, operands.negatives, operands.normalize
        dtype = accumulation(query.dtype)
        self.scale = tiled.logit_scale(operands.temperature_tensor, operands.temperature, dtype)
        self.bounded = tiled.has_bounded_logits(self.scale, normalize)
        self.symmetric = operands.key is None and self.bounded
        ids_are_readable = query.device.type == "cpu" and negatives == "all"
        self.pairs = None
        if ids_are_readable:
            self.pairs = positives.find_pairs(operands.query_ids, operands.key_ids, sides.tile_size(query))
        with_ranges = self.pairs is None
        self.rows = sides.make_side(query, operands.query_ids, normalize, dtype, negatives, with_ranges)
        self.keys = self.rows
        if operands.key is not None:
            self.keys = sides.make_side(operands.key, operands.key_ids, normalize, dtype, negatives, with_ranges)
        self.bank = None if operands.bank is None else sides.make_side(operands.bank, None, normalize, dtype)
        self.negatives = negatives

    def logit_tiles(self, columns: sides.Side, symmetric: bool = False) -> tiled.LogitTiles:
        pairs = None if columns.ids is None else self.pairs
        return tiled.LogitTiles(self.rows, columns, self.scale, self.negatives, symmetric, pairs)


@operation("contrast")
def _contrast(
    query: Tensor, query_image: Tensor, query_part: Tensor, query_view: Tensor,
    key: Tensor | None, key_image: Tensor | None, key_part: Tensor | None, key_view: Tensor | None,
    bank: Tensor | None, temperature_tensor: Tensor | None, temperature: float,
    negatives: str, normalize: bool, precision: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, log2-sum-exp2 and number of positives of each query [M]; key None means the query itself."""
    operands = Operands.from_flat(
        query, query_image, query_part, query_view, key, key_image, key_part, key_view, bank, temperature_tensor,
        temperature, negatives, normalize, precision,
    )  # fmt: skip
    if backend == "triton":
        from fgfast.kernels.contrast import launch as kernels

        return kernels.forward(*operands)
    with exact(query.device, precision):
        problem = _Problem(operands)
        statistics = RowStatistics.zeros(problem.rows, problem.bounded)
        tiled.forward_tiles(problem.logit_tiles(problem.keys, problem.symmetric), statistics)
        if problem.bank is not None:
            tiled.forward_tiles(problem.logit_tiles(problem.bank), statistics)
        return statistics.finish()


@operation("contrast_backward")
def _contrast_backward(
    grad: Tensor, lse: Tensor, count: Tensor, needs: list[bool],
    query: Tensor, query_image: Tensor, query_part: Tensor, query_view: Tensor,
    key: Tensor | None, key_image: Tensor | None, key_part: Tensor | None, key_view: Tensor | None,
    bank: Tensor | None, temperature_tensor: Tensor | None, temperature: float,
    negatives: str, normalize: bool, precision: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, bank and temperature, empty where ``needs`` is False."""
    operands = Operands.from_flat(
        query, query_image, query_part, query_view, key, key_image, key_part, key_view, bank, temperature_tensor,
        temperature, negatives, normalize, precision,
    )  # fmt: skip
    if backend == "triton":
        from fgfast.kernels.contrast import launch as kernels

        grads = kernels.backward(grad, lse, count, needs, *operands)
        if normalize:
            given = (query, key, bank)
            grads[:3] = [forget_zero_vectors(g, x) for g, x in zip(grads[:3], given, strict=True)]
        return cast_gradients(grads, query, key, bank, temperature_tensor)
    need_query, need_key, need_bank, need_temperature = needs
    with exact(query.device, precision):
        problem = _Problem(operands)
        coefficients = tiled.Coefficients.make(grad, lse, count)
        dtype = lse.dtype
        same = key is None
        d_query = query.new_zeros(query.shape, dtype=dtype) if need_query or need_temperature else None
        d_key = key.new_zeros(key.shape, dtype=dtype) if key is not None and need_key else None
        d_bank = bank.new_zeros(bank.shape, dtype=dtype) if bank is not None and need_bank else None
        if problem.symmetric and d_query is not None:
            tiled.backward_symmetric(problem.logit_tiles(problem.keys, True), coefficients, d_query)
        elif d_query is not None or d_key is not None:
            tiled.backward_tiles(problem.logit_tiles(problem.keys), coefficients, d_query, d_query if same else d_key)
        counted_twice = None  # where query is key, d_query holds every product of a pair twice
        if same and need_temperature and d_query is not None:
            counted_twice = tiled.sum_inner_products(problem.rows, d_query)
        if problem.bank is not None and (d_query is not None or d_bank is not None):
            tiled.backward_tiles(problem.logit_tiles(problem.bank), coefficients, d_query, d_bank)
        d_temperature = None
        if need_temperature and d_query is not None and temperature_tensor is not None:
            inner_products = tiled.sum_inner_products(problem.rows, d_query)
            if counted_twice is not None:
                inner_products = inner_products - counted_twice / 2
            d_temperature = tiled.temperature_gradient(inner_products, problem.scale, temperature_tensor)
        if d_query is not None and need_query:
            tiled.finish_gradient(problem.rows, d_query, problem.scale)
        if d_key is not None:
            tiled.finish_gradient(problem.keys, d_key, problem.scale)
        if problem.bank is not None and d_bank is not None:
            tiled.finish_gradient(problem.bank, d_bank, problem.scale)
        grads = [d_query if need_query else None, d_key, d_bank, d_temperature]
        return cast_gradients(grads, query, key, bank, temperature_tensor)


register_autograd(_contrast, _contrast_backward, define_losses)
