"""``contrastive_loss``: one contrast for the whole field; checks, choice of backend, registration."""

import math
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fgfast.backend import check_triton, preference, resolve
from fgfast.ids import Ids
from fgfast.ops.contrast import tiled
from fgfast.ops.contrast.autograd import register_autograd, returned
from fgfast.ops.contrast.ring import ring_contrast
from fgfast.reference import contrast as reference
from fgfast.tensors import accumulation, check_integers, check_tensor, exact, values_checked

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NEGATIVES = ("all", "other_images", "same_image")
REDUCTIONS = ("mean", "mean_valid", "sum", "none")
PRECISIONS = ("ieee", "tf32")
BREAK_EVEN = 2**16  # logits up to which "auto" takes the definition: measured on a CPU core, D = 128


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
    r"""Contrast every query with its positives, against the other keys, without the logit matrix in memory.

    .. math:: \ell_i = \log \sum_{j \in P_i \cup N_i \cup \text{bank}} e^{s_{ij}} - \frac{1}{|P_i|} \sum_{j \in P_i}
              s_{ij}, \qquad s_{ij} = \langle q_i, k_j \rangle / T

    Key j is a positive of query i when image and part agree and view differs; it is left out when all three agree;
    every other key is a negative, restricted by ``negatives``. Part -1 is absent: the query counts nothing, the key is
    never counted, and what stands in them (NaN included) reaches nothing. A query without a positive gives 0.

    The "torch" backend works by tiles of the logit matrix: beside inputs and returned gradients it holds at most twice
    the inputs and 64 MiB. Passing one tensor and one ``Ids`` as query and as key halves its work. Its loss agrees with
    float64 arithmetic to 1e-6 (1 + 1/T) and its gradients to 1e-5 relative to their largest entry, for inputs as they
    are stored (float16 and bfloat16 are read exactly and rounded once, in the gradients returned). The "triton" backend
    keeps the loss within the same bound; with float16 and bfloat16 it rounds dL/ds to bfloat16, so that the gradient
    of a query is within 2^-7 / (T norm) of its upstream gradient, and that of the temperature within 2^-7 / T^2 of
    their sum (for unit vectors). It takes D up to 8,192.

    Args:
        query: [M, D] float32, float16, bfloat16 or float64, any strides. float64 is accumulated in float64, the others
            in float32.
        key: [T, D], the same dtype (under autocast dtypes may differ).
        query_ids: image, part and view of each query, integers [M].
        key_ids: image, part and view of each key, integers [T].
        temperature: T > 0, a number or a 0-d tensor, which then receives a gradient.
        negatives: "all", "other_images" (positives and keys of other images) or "same_image" (keys of the same image).
        weight: [M], finite and not negative, multiplies the losses of queries; it gets no gradient.
        normalize: divide every vector by max(norm, 1e-12) first.
        bank: [Q, D] more negatives of every query, whatever ``negatives`` says.
        reduction: "mean" divides by M, "mean_valid" by the number of queries with a positive and weight > 0, "sum",
            "none" returns the losses [M]. M = 0 gives 0.
        precision: "ieee" or "tf32", how float32 products are made on a GPU.
        deterministic: False permits float atomics; no backend needs them.
        group: keys of all ranks of this process group take part, passed round a ring. The result is world size x local
            sum / global divisor, so that the averaging of DistributedDataParallel gives exactly the gradient of one
            process on the joined batch. Image ids must differ between ranks: see ``fgfast.global_ids``. The number of
            queries and keys may differ between ranks; the bank is replicated and counts once.
        backend: "triton", "torch", "reference" or "auto"; strict. "auto" takes the kernels on a GPU; elsewhere the
            definition up to 65,536 logits, where starting the tiles costs more than they save, and tiles above.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or [M] for "none".

    Raises:
        TypeError: a dtype that is not of the kind asked for.
        ValueError: shapes or devices that do not fit, an unknown option, a temperature that is not positive; on the
            CPU, or with FGFAST_CHECKS=1 in the environment, a part under -1 or a negative or non-finite weight.

    Example:
        >>> import torch
        >>> from fgfast import Ids, contrastive_loss
        >>> image, part = torch.arange(4), torch.zeros(4, dtype=torch.int64)
        >>> first, second = torch.eye(4), torch.eye(4)
        >>> loss = contrastive_loss(first, second, query_ids=Ids(image, part, part), key_ids=Ids(image, part, part + 1))
        >>> bool(loss < 0.001)
        True

    Source:
        SimCLR (arXiv 2002.05709) and DetCon (arXiv 2103.10957), joined; the tiles as in Inf-CL (arXiv 2410.17243).
    """
    query_ids, key_ids = _three("query_ids", query_ids), _three("key_ids", key_ids)
    _check(query, key, query_ids, key_ids, temperature, negatives, weight, bank, reduction, precision)
    weight = None if weight is None else weight.detach()
    if group is not None and torch.distributed.get_world_size(group) > 1:
        resolve("contrastive_loss over a group", backend, ("torch",))
        return ring_contrast(
            query, key, query_ids, key_ids, temperature, negatives, weight, normalize, bank, reduction, precision, group
        )
    small = len(query) * (len(key) + (0 if bank is None else len(bank))) <= BREAK_EVEN
    plain = ("reference", "torch") if small else ("torch", "reference")
    name = resolve("contrastive_loss", backend, preference("contrast", query, plain))
    if name == "triton":
        check_triton("query", query)
    if name == "reference":
        return reference.contrastive_loss(
            query, key, query_ids=query_ids, key_ids=key_ids, temperature=temperature, negatives=negatives,
            weight=weight, normalize=normalize, bank=bank, reduction=reduction,
        )  # fmt: skip
    same = key is query and all(a is b for a, b in zip(query_ids, key_ids, strict=True))
    of_key = (None, None, None, None) if same else (key, *key_ids)
    number, tensor = (1.0, temperature) if isinstance(temperature, Tensor) else (float(temperature), None)
    loss, _, count = torch.ops.fgfast.contrast(
        query, *query_ids, *of_key, bank, tensor, number, negatives, normalize, precision, deterministic, name
    )
    return reference.reduce(loss, count > 0, weight, reduction)


def _three(name: str, ids: Ids) -> Ids:
    if not isinstance(ids, tuple | list) or len(ids) != 3:
        raise TypeError(f"{name} is not (image, part, view): give an fgfast.Ids of three integer tensors.")
    return Ids(*ids)


def _check(
    query: Tensor, key: Tensor, query_ids: Ids, key_ids: Ids, temperature: float | Tensor, negatives: str,
    weight: Tensor | None, bank: Tensor | None, reduction: str, precision: str,
) -> None:  # fmt: skip
    """Shapes, dtypes, devices and options always; values where looking at them costs no device sync."""
    for name, option, known in (
        ("negatives", negatives, NEGATIVES),
        ("reduction", reduction, REDUCTIONS),
        ("precision", precision, PRECISIONS),
    ):
        if option not in known:
            raise ValueError(f"{name} is {option!r}: choose one of {', '.join(known)}.")
    vectors = {"query": query, "key": key} | ({} if bank is None else {"bank": bank})
    for name, x in vectors.items():
        check_tensor(name, x)
        if x.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: give one row a vector, [N, D].")
        if not x.is_floating_point() or x.element_size() < 2:
            raise TypeError(f"{name} has dtype {x.dtype}: give float32, float16, bfloat16 or float64.")
        if x.shape[1] != query.shape[1]:
            raise ValueError(f"{name} has {x.shape[1]} channels and query has {query.shape[1]}: they must agree.")
        if x.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(f"{name} has dtype {x.dtype} and query has {query.dtype}: convert one of them.")
    each: dict[str, tuple[Tensor, int]] = {name: (x, len(x)) for name, x in vectors.items()}
    for side, ids, n in (("query", query_ids, len(query)), ("key", key_ids, len(key))):
        for field, x in zip(Ids._fields, ids, strict=True):
            check_integers(f"{side}_ids.{field}", x)
            each[f"{side}_ids.{field}"] = (x, n)
    if weight is not None:
        each["weight"] = (weight, len(query))
    for name, (x, n) in each.items():
        if name not in vectors and x.shape != (n,):
            raise ValueError(f"{name} has shape {tuple(x.shape)}: give one value a row, ({n},).")
        if x.device != query.device:
            raise ValueError(f"{name} is on {x.device} and query on {query.device}: move it there.")
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or not temperature.is_floating_point():
            shape = tuple(temperature.shape)
            raise ValueError(f"temperature is a {temperature.dtype} of shape {shape}: give a number or a 0-d float.")
        if temperature.device not in (query.device, torch.device("cpu")):
            raise ValueError(f"temperature is on {temperature.device} and query on {query.device}: move it there.")
    elif not isinstance(temperature, Real) or not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature!r}: give a finite number above 0.")
    if torch.compiler.is_compiling():
        return
    if values_checked(query):
        _check_values(query_ids, key_ids, temperature, weight)


def _check_values(query_ids: Ids, key_ids: Ids, temperature: float | Tensor, weight: Tensor | None) -> None:
    if isinstance(temperature, Tensor) and not (temperature > 0 and temperature.isfinite()):
        raise ValueError(f"temperature is {temperature.item()}: give a finite number above 0.")
    for name, part in (("query_ids.part", query_ids.part), ("key_ids.part", key_ids.part)):
        if len(part) and int(part.min()) < -1:
            raise ValueError(f"{name} holds {int(part.min())}: parts are 0 and up, or -1 for absent.")
    if weight is not None and not ((weight >= 0) & weight.isfinite()).all():
        raise ValueError("weight holds a negative or non-finite value: weights are finite and 0 or more.")


def _optional_ids(image: Tensor | None, part: Tensor | None, view: Tensor | None) -> Ids | None:
    return None if image is None or part is None or view is None else Ids(image, part, view)


class _Sides:
    """The sides of one call, made anew in forward and in backward."""

    def __init__(
        self, query: Tensor, query_ids: Ids, key: Tensor | None, key_ids: Ids | None,
        bank: Tensor | None, tensor: Tensor | None, number: float, negatives: str, normalize: bool,
    ):  # fmt: skip
        dtype = accumulation(query.dtype)
        self.scale = tiled.logit_scale(tensor, number, dtype)
        self.bounded = tiled.bounded(self.scale, normalize)
        self.symmetric = key is None and self.bounded
        readable = query.device.type == "cpu" and negatives == "all"
        self.pairs = tiled.find_pairs(query_ids, key_ids, tiled.tile_size(query)) if readable else None
        ranged = self.pairs is None
        self.rows = tiled.make_side(query, query_ids, normalize, dtype, negatives, ranged)
        self.keys = self.rows if key is None else tiled.make_side(key, key_ids, normalize, dtype, negatives, ranged)
        self.bank = None if bank is None else tiled.make_side(bank, None, normalize, dtype)
        self.negatives = negatives

    def products(self, columns: tiled.Side, symmetric: bool = False) -> tiled.Products:
        pairs = None if columns.ids is None else self.pairs
        return tiled.Products(self.rows, columns, self.scale, self.negatives, symmetric, pairs)


@torch.library.custom_op("fgfast::contrast", mutates_args=())
def _contrast(
    query: Tensor, query_image: Tensor, query_part: Tensor, query_view: Tensor,
    key: Tensor | None, key_image: Tensor | None, key_part: Tensor | None, key_view: Tensor | None,
    bank: Tensor | None, temperature_tensor: Tensor | None, temperature: float,
    negatives: str, normalize: bool, precision: str, deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, log2-sum-exp2 and number of positives of each query [M]; key None means the query itself."""
    if backend == "triton":
        from fgfast.kernels.contrast import launch as kernels

        return kernels.forward(
            query, Ids(query_image, query_part, query_view), key, _optional_ids(key_image, key_part, key_view),
            bank, temperature_tensor, temperature, negatives, normalize, precision,
        )  # fmt: skip
    with exact(query.device, precision):
        problem = _Sides(
            query, Ids(query_image, query_part, query_view), key, _optional_ids(key_image, key_part, key_view),
            bank, temperature_tensor, temperature, negatives, normalize,
        )  # fmt: skip
        stats = tiled.Stats.zeros(problem.rows, problem.bounded)
        tiled.forward_tiles(problem.products(problem.keys, problem.symmetric), stats)
        if problem.bank is not None:
            tiled.forward_tiles(problem.products(problem.bank), stats)
        return stats.finish()


@torch.library.custom_op("fgfast::contrast_backward", mutates_args=())
def _contrast_backward(
    grad: Tensor, lse: Tensor, count: Tensor, needs: list[bool],
    query: Tensor, query_image: Tensor, query_part: Tensor, query_view: Tensor,
    key: Tensor | None, key_image: Tensor | None, key_part: Tensor | None, key_view: Tensor | None,
    bank: Tensor | None, temperature_tensor: Tensor | None, temperature: float,
    negatives: str, normalize: bool, precision: str, deterministic: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, bank and temperature, empty where ``needs`` says no."""
    if backend == "triton":
        from fgfast.kernels.contrast import launch as kernels

        grads = kernels.backward(
            grad, lse, count, needs, query, Ids(query_image, query_part, query_view), key,
            _optional_ids(key_image, key_part, key_view), bank, temperature_tensor, temperature, negatives, normalize,
            precision,
        )  # fmt: skip
        return returned(grads, query, key, bank, temperature_tensor)
    need_query, need_key, need_bank, need_temperature = needs
    with exact(query.device, precision):
        problem = _Sides(
            query, Ids(query_image, query_part, query_view), key, _optional_ids(key_image, key_part, key_view),
            bank, temperature_tensor, temperature, negatives, normalize,
        )  # fmt: skip
        k = tiled.Coefficients.make(grad, lse, count)
        dtype = lse.dtype
        same = key is None
        need_rows = need_query or need_temperature
        d_query = query.new_zeros(query.shape, dtype=dtype) if need_rows else None
        d_key = key.new_zeros(key.shape, dtype=dtype) if key is not None and need_key else None
        d_bank = bank.new_zeros(bank.shape, dtype=dtype) if bank is not None and need_bank else None
        if problem.symmetric and d_query is not None:
            tiled.backward_symmetric(problem.products(problem.keys, True), k, d_query)
        elif d_query is not None or d_key is not None:
            tiled.backward_tiles(problem.products(problem.keys), k, d_query, d_query if same else d_key)
        own = None  # where query is key, d_query has every product of the field twice: once too often for temperature
        if same and need_temperature and d_query is not None:
            own = tiled.inner(problem.rows, d_query)
        if problem.bank is not None and (d_query is not None or d_bank is not None):
            tiled.backward_tiles(problem.products(problem.bank), k, d_query, d_bank)
        d_temperature = None
        if need_temperature and d_query is not None and temperature_tensor is not None:
            inner = tiled.inner(problem.rows, d_query) - (0 if own is None else own / 2)
            d_temperature = tiled.temperature_gradient(inner, problem.scale, temperature_tensor)
        if d_query is not None and need_query:
            tiled.finish_gradient(problem.rows, d_query, problem.scale)
        if d_key is not None:
            tiled.finish_gradient(problem.keys, d_key, problem.scale)
        if problem.bank is not None and d_bank is not None:
            tiled.finish_gradient(problem.bank, d_bank, problem.scale)
        grads = [d_query if need_query else None, d_key, d_bank, d_temperature]
        return returned(grads, query, key, bank, temperature_tensor)


register_autograd(_contrast, _contrast_backward)
