"""Checks of the arguments of ``contrastive_loss``."""

import math
from numbers import Real

import torch
from torch import Tensor

from fgfast.ids import Ids
from fgfast.tensors import check_integers, check_tensor, shape_error, untransformed, values_checked

NEGATIVES = ("all", "other_images", "same_image")
REDUCTIONS = ("mean", "mean_valid", "sum", "none")
PRECISIONS = ("ieee", "tf32")
ID_NAMES = tuple(f"{side}_ids.{field}" for side in ("query", "key") for field in Ids._fields)


def as_ids(name: str, ids: Ids) -> Ids:
    """``ids``, or any tuple or list (image, part, view), as Ids."""
    if type(ids) is Ids:
        return ids
    if not isinstance(ids, tuple | list) or len(ids) != 3:
        raise TypeError(f"{name} is not (image, part, view): give an fgfast.Ids of three integer tensors.")
    return Ids(*ids)


def check_options(negatives: str, reduction: str, precision: str, deterministic: bool) -> None:
    """Raise on an unknown option."""
    for name, option, known in (
        ("negatives", negatives, NEGATIVES),
        ("reduction", reduction, REDUCTIONS),
        ("precision", precision, PRECISIONS),
    ):
        if option not in known:
            raise ValueError(f"{name} is {option!r}: choose one of {', '.join(known)}.")
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic is {deterministic!r}: give True or False.")


def check_alike(**vectors: Tensor) -> None:
    """Raise unless all are tensors of floats of one dtype, of any under autocast, on one device."""
    for name, x in vectors.items():
        check_tensor(name, x)
    (first, reference), *_ = vectors.items()
    device = reference.device
    for name, x in vectors.items():
        if not x.is_floating_point() or x.element_size() < 2:
            raise TypeError(f"{name} has dtype {x.dtype}: give float32, float16, bfloat16 or float64.")
        mixed = x.dtype != reference.dtype
        if mixed and (device.type == "meta" or not torch.is_autocast_enabled(device.type)):
            raise TypeError(f"{name} has dtype {x.dtype} and {first} has {reference.dtype}: convert one of them.")
        if x.device != device:
            raise ValueError(f"{name} is on {x.device} and {first} on {device}: move it there.")


def check_operands(
    query: Tensor, key: Tensor, query_ids: Ids, key_ids: Ids, temperature: float | Tensor, weight: Tensor | None,
    bank: Tensor | None,
) -> None:  # fmt: skip
    """Check shapes, dtypes and devices always, and values where reading them costs no device sync."""
    vectors = {"query": query, "key": key} | ({} if bank is None else {"bank": bank})
    for name, x in vectors.items():
        check_tensor(name, x)
        if x.dim() != 2:
            raise shape_error(name, "[N, D]", x)
        if x.shape[1] != query.shape[1]:
            raise ValueError(f"{name} has {x.shape[1]} channels and query has {query.shape[1]}: they must agree.")
    check_alike(**vectors)
    m, t, device = query.shape[0], key.shape[0], query.device
    per_row = list(zip(ID_NAMES, (*query_ids, *key_ids), (m, m, m, t, t, t), strict=True))
    for name, x, _ in per_row:
        check_integers(name, x)
    if weight is not None:
        per_row.append(("weight", weight, m))
    for name, x, n in per_row:
        if x.shape != (n,):
            raise shape_error(name, f"[{n}]", x)
        if x.device != device:
            raise ValueError(f"{name} is on {x.device} and query on {device}: move it there.")
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or not temperature.is_floating_point():
            shape = list(temperature.shape)
            raise ValueError(
                f"temperature is a {temperature.dtype} of shape {shape}: give a number or a 0-d float tensor."
            )
        if temperature.device not in (query.device, torch.device("cpu")):
            raise ValueError(f"temperature is on {temperature.device} and query on {query.device}: move it there.")
    elif not isinstance(temperature, float | Real) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature!r}: give a finite number above 0.")
    if values_checked(untransformed(query)):
        _check_values(query_ids, key_ids, temperature, weight)


def _check_values(query_ids: Ids, key_ids: Ids, temperature: float | Tensor, weight: Tensor | None) -> None:
    if isinstance(temperature, Tensor):
        given = untransformed(temperature).detach()
        for value in given[~((given > 0) & given.isfinite())].tolist():
            raise ValueError(f"temperature is {value}: give a finite number above 0.")
    for name, given in (("query_ids.part", query_ids.part), ("key_ids.part", key_ids.part)):
        part = untransformed(given)
        if len(part) and int(part.min()) < -1:
            raise ValueError(f"{name} holds {int(part.min())}: give parts from 0 up, or -1 for absent.")
    weight = None if weight is None else untransformed(weight)
    if weight is not None and not ((weight >= 0) & weight.isfinite()).all():
        raise ValueError("weight holds a negative or non-finite value: give finite weights of 0 or more.")
